"""Measures recordings: `python -m benchmarks.record`.

A guest writes one MSR as fast as it can while vmexit records each write; then that recording is reported.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import BenchmarkError
from benchmarks.loop import MSR, Loop
from benchmarks.machine import PlainMachine
from vmexit.report.reader import RecordingFile

COUNT = 10_000_000
_TIME_S = 300


def _run(*arguments: str) -> tuple[float, int, str]:
    """vmexit with these arguments: seconds, the most memory of any child so far in bytes, what it said. Raises BenchmarkError."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vmexit", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIME_S,
        check=False,
    )
    seconds = time.monotonic() - start
    if done.returncode not in (0, 33):
        raise BenchmarkError(f"vmexit {arguments[0]}: {done.stderr.strip()[-200:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, done.stdout


def _plain(loop: Loop) -> float:
    """How long the guest takes by itself."""
    with PlainMachine(loop.arguments) as machine:
        start = time.monotonic()
        machine.resume()
        loop.check_end(machine.wait(), machine.output)
        return time.monotonic() - start


def _recorded(path: Path, count: int) -> float:
    """Seconds from the first to the last write. Raises BenchmarkError where one is missing or out of its order."""
    first, expected = 0, count
    with RecordingFile(path) as file:
        for chunk in file.chunks():
            mine = chunk["msr"] == MSR
            times, values = chunk["time_ns"][mine], chunk["value"][mine] & 0xFFFF_FFFF
            if len(values):
                first = first or int(times[0])
                if int(values[0]) != expected or int(values[-1]) != expected - len(values) + 1:
                    raise BenchmarkError(f"the write of {expected} is missing")
                expected -= len(values)
                last = int(times[-1])
        if expected or not file.is_whole:
            raise BenchmarkError(f"{expected} writes are missing: {file.notes()}")
    return (last - first) / 1e9


def measure(count: int) -> list[tuple[str, str]]:
    """What was measured, and the figures."""
    loop = Loop(count)
    with tempfile.TemporaryDirectory(prefix="vmexit-bench-") as folder:
        path, html = Path(folder, "loop.rec"), Path(folder, "loop.html")
        plain = _plain(loop)
        _run("record", "-o", str(path), "-e", f"!msrwrite {MSR:x}", "--", *loop.arguments)
        seconds, size = _recorded(path, count), path.stat().st_size
        table, _, _ = _run("report", str(path))
        page, memory, _ = _run("report", str(path), "--html", str(html))
        return [
            ("the guest without vmexit", f"{plain:8.2f} s   {count / plain:12,.0f} writes/s"),
            ("recorded into a file", f"{seconds:8.2f} s   {count / seconds:12,.0f} traps/s, none lost"),
            ("the file", f"{size / 1e6:8.1f} MB  {size / count:12.1f} bytes a trap"),
            ("vmexit report", f"{table:8.2f} s"),
            ("vmexit report --html", f"{page:8.2f} s   {html.stat().st_size / 1e6:12.2f} MB"),
            ("the most memory of any of these, QEMU's too", f"{memory / 1e6:8.1f} MB"),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 with one line where something goes wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description="Measures recordings.")
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"how many writes ({COUNT:,})")
    count = parser.parse_args(arguments).count
    try:
        rows = measure(count)
    except (BenchmarkError, subprocess.TimeoutExpired, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"{count:,} writes of one MSR; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    for title, figures in rows:
        print(f"{title:<46}{figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
