"""Measures what a trap costs and prints one table: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import worker
from benchmarks.common import BenchmarkError, Case, Result, Sample, Target, child, interleave, report, results, table
from benchmarks.machine import QEMU
from vmexit import VmexitError
from vmexit.setup.initramfs import PRELUDE, build_initramfs
from vmexit.setup.kernel import find_kernel

CASES = (
    Case("plain", "QEMU without the agent", 20_000_000, base="plain"),
    Case("other", "vmexit: an event on another MSR", 20_000_000, base="plain"),
    Case("recorded", "vmexit: every write recorded and counted", 20_000_000, base="plain"),
    Case("script", "vmexit: a script that counts", 20_000_000, base="plain"),
    Case("printf", "vmexit: a script that prints, into a file", 2_000_000, base="plain"),
    Case("callback", "vmexit: a Python callback each", 100_000, base="plain"),
    Case("gdb", "gdb: a Python breakpoint each", 3_000, base="plain"),
    Case("unicorn", "Unicorn: a Python hook each", 100_000, base="plain"),
    Case("boot-plain", "Linux boot: QEMU without the agent", 1, base="boot-plain", by_event=False),
    Case("boot-idle", "Linux boot: a QEMU plugin that does nothing", 1, base="boot-plain", by_event=False),
    Case("boot-recorded", "Linux boot: every MSR access recorded", 1, base="boot-plain", by_event=False),
)
ROUNDS = 5
QUICK_ROUNDS = 3
_QUICK = 20
_NOTES = """\
A run lasts from the machine's resume until QEMU has ended and every event is counted; nothing is subtracted.
The cases take turns in every round. seconds, events/s: the medians. ratio: the time of an event, as a multiple
of what it is without the agent in the same round, the median; least-most: the range of these ratios."""


def chosen(keys: Sequence[str], quick: bool) -> list[Case]:
    """The cases with these keys (none: all) and those that they are compared with, in the order of the table."""
    wanted = set(keys or (case.key for case in CASES))
    wanted |= {case.base for case in CASES if case.key in wanted and case.base}
    return [replace(case, count=max(1, case.count // _QUICK)) if quick else case for case in CASES if case.key in wanted]


def check_tools(cases: Iterable[Case]) -> None:
    """Raises BenchmarkError, naming all that is missing, unless the cases can be run here."""
    keys = {case.key for case in cases}
    missing = [f"{QEMU} (Debian: apt install qemu-system-x86)"] if keys - {"unicorn"} and not shutil.which(QEMU) else []
    if "gdb" in keys and not shutil.which("gdb"):
        missing.append("gdb (Debian: apt install gdb)")
    if "unicorn" in keys and importlib.util.find_spec("unicorn") is None:
        missing.append("the Python package unicorn (pip install '.[bench]')")
    if missing:
        raise BenchmarkError(f"missing: {', '.join(missing)}; or choose other cases with --only")


def boot_arguments(folder: Path) -> list[str]:
    """QEMU's arguments for Linux with two vCPUs and an init that switches off; its initramfs goes into ``folder``."""
    initramfs = folder / "initramfs"
    initramfs.write_bytes(build_initramfs(PRELUDE + worker.boot_init()))
    return [
        *("-accel", "tcg", "-smp", "2", "-m", "256", "-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(find_kernel().image), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1 tsc=reliable cryptomgr.notests"),
    ]


def measure(case: Case, *, boot: Sequence[str]) -> Sample:
    """Runs the case in a process of its own."""
    qemu = ["--", *boot] if case.key.startswith("boot") else []
    return child("benchmarks.worker", [case.key, str(case.count), *qemu], case.limit_s)


def targets(summed: Sequence[Result]) -> list[Target]:
    """What the project wants to reach, as far as these cases tell."""
    by_key = {result.case.key: result for result in summed}
    reached = []

    def ratio(key: str, title: str, bound: float) -> None:
        if (result := by_key.get(key)) and result.ratio is not None:
            reached.append(Target(title, result.ratio, bound, at_most=True, unit="x plain"))

    def rate(key: str, title: str, bound: float) -> None:
        if key in by_key and "gdb" in by_key:
            reached.append(Target(title, by_key[key].rate / by_key["gdb"].rate, bound, at_most=False, unit="x gdb"))

    ratio("other", "an event on another MSR", 1.05)
    ratio("recorded", "every write recorded", 2.0)
    if (counting := by_key.get("script")) and (plain := by_key.get("plain")):
        nanoseconds = [
            (mine.seconds / mine.events - base.seconds / base.events) * 1e9
            for mine, base in zip(counting.samples, plain.samples, strict=True)
        ]
        reached.append(
            Target("a script that counts, beyond no event", statistics.median(nanoseconds), 120, at_most=True, unit="ns")
        )
    if printing := by_key.get("printf"):
        reached.append(Target("lines printed into a file, a second", printing.rate, 300_000, at_most=False, unit="lines"))
    ratio("boot-recorded", "Linux boot, every MSR access recorded", 1.05)
    rate("recorded", "recorded events a second", 3000)
    rate("callback", "Python callbacks a second", 30)
    if tools := [sample.tool_bytes for result in summed for sample in result.samples if sample.tool_bytes]:
        reached.append(Target("the debugger's memory (the most of all cases)", max(tools) / 1e6, 150, at_most=True, unit="MB"))
    with_agent, without = (
        [sample.vmm_bytes for sample in by_key[key].samples if sample.vmm_bytes] if key in by_key else []
        for key in ("recorded", "plain")
    )
    if with_agent and without:
        share = (statistics.median(with_agent) - statistics.median(without)) / 1e6
        reached.append(Target("the agent's memory (QEMU's with it less QEMU's without)", share, 32, at_most=True, unit="MB"))
    return reached


def surroundings() -> dict[str, str]:
    """What the figures depend on."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    version = (
        subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False).stdout if shutil.which(QEMU) else ""
    )
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} CPUs",
        "system": f"{platform.system()} {platform.release()}",
        "QEMU": (re.findall(r"version (\S+)", version) or ["none"])[0],
        "Python": platform.python_version(),
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _run(given: argparse.Namespace) -> int:
    cases = chosen(given.only, given.quick)
    check_tools(cases)
    around = surroundings()
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="vmexit-bench-") as folder:
        boot = boot_arguments(Path(folder)) if any(case.key.startswith("boot") for case in cases) else []
        samples = interleave(
            cases, rounds, partial(measure, boot=boot), lambda text: print(f"bench: {text}", file=sys.stderr, flush=True)
        )
    around["load after"] = " ".join(f"{load:.2f}" for load in os.getloadavg())
    summed = results(cases, samples)
    reached = targets(summed)
    print("; ".join(f"{name} {value}" for name, value in around.items()) + f"; {rounds} rounds\n")
    print(table(summed))
    print(f"\n{_NOTES}\n")
    for target in reached:
        print(target)
    if given.json:
        given.json.write_text(json.dumps(report(summed, reached, around), indent=1) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when everything was measured (whether or not the targets are met), 1 with one line when something went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures what a trap costs, beside gdb and Unicorn."
    )
    parser.add_argument("--quick", action="store_true", help=f"a {_QUICK}th of the events: to see that it works")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"how often each case is run ({ROUNDS}; with --quick {QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=[case.key for case in CASES], help="this case; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all runs to a file, too")
    given = parser.parse_args(arguments)
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        return _run(given)
    except (BenchmarkError, VmexitError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
