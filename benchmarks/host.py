"""Measures `vmexit host` beside a bare recorder, on this host's own MSR writes: `python -m benchmarks.host`, as root.

The load is a process on each CPU that sets timers as fast as it can, each a write of IA32_TSC_DEADLINE. The bare recorder
does what `trace-cmd record` does and no more: it takes the same pages out of the same buffers and writes them to a file,
unread. trace-cmd itself is the third, where it is installed and runs: it wants the function tracer's files, too, which some
kernels open for nobody. All take turns in every round.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import vmexit
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action
from vmexit.targets.trace_instance import Instance
from vmexit.targets.trace_pages import read_page

ROUNDS = 3
SECONDS = 2.0
BUFFER_KB = 8192
"""For each CPU, as vmexit has it."""
_NAP_S = 0.05
_BUFFER = "vmexit-bench"
_TRACING = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_LOAD = "import os, time; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: time.sleep(1e-6)"
_ALL = MsrSet.of_ranges([(0, 0xFFFF_FFFF)])


@dataclass(frozen=True, slots=True)
class Seen:
    """What one run saw."""

    events: int
    lost: int
    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def _load() -> Iterator[None]:
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", _LOAD.format(cpu=cpu)], stdin=subprocess.DEVNULL)
        for cpu in sorted(os.sched_getaffinity(0))
    ]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _vmexit() -> Seen:
    """Every write becomes a record that is counted and summed up."""
    with vmexit.watch_host() as debugger:
        event = debugger.add(
            vmexit.Event(access=Access.WRMSR, msrs=_ALL, stage=vmexit.Stage.POST, action=Action.RECORD, text="all")
        )
        start, cpu = time.monotonic(), time.process_time()
        debugger.run(timeout=SECONDS)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
        assert sum(row.count for row in debugger.summary.rows()) == debugger.hits(event)
        return Seen(debugger.hits(event), debugger.dropped(), seconds, cpu_seconds)


def _bare() -> Seen:
    """Pages into a file; they are counted when it is over."""
    instance = Instance([("msr", "write_msr")])
    try:
        with tempfile.TemporaryFile() as file:
            start, cpu = time.monotonic(), time.process_time()
            instance.write("events/msr/write_msr/enable", "1")
            while time.monotonic() - start < SECONDS:
                time.sleep(_NAP_S)
                _take(instance, file.fileno())
            instance.write("tracing_on", "0")
            _take(instance, file.fileno())
            seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
            file.seek(0)
            events = lost = 0
            while data := file.read(instance.layout.size):
                page = read_page(data, instance.layout)
                events += sum(len(entries.times) for entries in page.entries)
                lost += page.lost
            return Seen(events, lost, seconds, cpu_seconds)
    finally:
        instance.close()


def _take(instance: Instance, file: int) -> None:
    for cpu in instance.pipes:
        while data := instance.read_page(cpu):
            os.write(file, data)


class _CannotError(Exception):
    """trace-cmd does not run here."""


def _trace_cmd() -> Seen:
    """`trace-cmd record` into a file, with buffers of the same size; its own report of what is in there."""
    tracing = next(folder for folder in _TRACING if (folder / "instances").exists())
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/trace.dat"
        record = ["trace-cmd", "record", "-B", _BUFFER, "-b", str(BUFFER_KB), "-e", "msr:write_msr", "-o", file]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*record, "sleep", str(SECONDS)], capture_output=True, text=True, timeout=60, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        with contextlib.suppress(OSError):
            (tracing / "instances" / _BUFFER).rmdir()
        report = subprocess.run(["trace-cmd", "report", "-i", file], capture_output=True, text=True, check=False).stdout
    times = [float(time) for time in re.findall(r"(\d+\.\d+): write_msr:", report)]
    if len(times) < 2:
        raise _CannotError((done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1].strip())
    lost = sum(map(int, re.findall(r"\[(\d+) EVENTS DROPPED\]", report)))
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seen(len(times), lost, max(times) - min(times), cpu_seconds)


def main() -> None:
    """Print the table."""
    if not Path("/sys/devices/system/clockevents/clockevent0/current_device").exists() or os.geteuid() != 0:
        sys.exit("bench: this needs root on a Linux host")
    cases = {"a bare recorder, into a file": _bare, "vmexit host: every write a record, summed up": _vmexit}
    if shutil.which("trace-cmd") is None:
        print("trace-cmd is not there (apt install trace-cmd)")
    else:
        cases["trace-cmd record, into a file"] = _trace_cmd
    seen: dict[str, list[Seen]] = {name: [] for name in cases}
    with _load():
        for _ in range(ROUNDS):
            for name, run in list(cases.items()):
                try:
                    seen[name].append(run())
                except _CannotError as error:
                    print(f"trace-cmd does not run here: {error}")
                    del cases[name], seen[name]
    print(f"{'':<46}{'events/s':>10}{'lost':>8}{'us of processor an event':>26}")
    for name, runs in seen.items():
        rate = statistics.median(run.events / run.seconds for run in runs)
        cost = statistics.median(run.cpu_seconds / max(1, run.events) * 1e6 for run in runs)
        print(f"{name:<46}{rate:>10,.0f}{sum(run.lost for run in runs):>8,}{cost:>26.3f}")


if __name__ == "__main__":
    main()
