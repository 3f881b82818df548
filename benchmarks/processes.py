"""Measures what it costs to know the process, and the caller, at each trap: `python -m benchmarks.processes`.

The loop of WRMSRs, in a guest that the tests have given a thread; all cases take turns in every round. The machine's processor
time counts, less what the same loop takes without the question.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import vmexit
from benchmarks.loop import MSR, Loop
from tests.bare_task import PID, lay_out, lay_out_caller
from tests.guests.build import OK_STATUS, build
from tests.vmm import build_vmm, vmm_arguments

ROUNDS = 5
WRITES = 2_000_000
EXITS = 20_000
WANTED_NS = 300
SetUp = Callable[[vmexit.Debugger], object]

CASES: dict[str, SetUp] = {
    "recorded": lambda debugger: debugger.on_msr_write(MSR, keep=0),
    "recorded, with its process": lambda debugger: debugger.on_msr_write(MSR, with_process=True, keep=0),
    "recorded, with caller, too": lambda debugger: (
        debugger.set_code(lay_out_caller(debugger)),
        debugger.on_msr_write(MSR, with_process=True, keep=0),
    ),
    "recorded, of that process": lambda debugger: debugger.on_msr_write(MSR, pid=PID, keep=0),
    "a script that counts": lambda debugger: debugger.on_msr_write(MSR, script="if ($msr) { .n = .n + 1; }"),
    "a script that counts $pid": lambda debugger: debugger.on_msr_write(MSR, script="if ($pid) { .n = .n + 1; }"),
}


def _processor_seconds(pid: int) -> float:
    """Of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run(debugger: vmexit.Debugger, count: int, set_up: SetUp) -> float:
    """Nanoseconds of the VMM's processor time for each write."""
    start = debugger.on_msr_write(MSR, lambda trap: trap.halt())
    debugger.run()
    recipe = lay_out(debugger)
    debugger.clear(start)
    debugger.set_recipe(recipe)
    set_up(debugger)
    last = debugger.on_msr_read(MSR, lambda trap: trap.halt())
    before = _processor_seconds(debugger.target.pid)
    debugger.run()
    seconds = _processor_seconds(debugger.target.pid) - before
    debugger.clear(last)
    stop = debugger.run()
    assert stop.exit_status == OK_STATUS, stop
    return seconds / count * 1e9


def _tcg(set_up: SetUp) -> float:
    with vmexit.launch(Loop(WRITES).arguments, output=lambda _, data: None) as debugger:
        return _run(debugger, WRITES, set_up)


def _kvm(set_up: SetUp) -> float:
    arguments = vmm_arguments(build("loop", COUNT=EXITS), 1)
    with vmexit.launch_vmm(str(build_vmm()), arguments, output=lambda _, data: None) as debugger:
        return _run(debugger, EXITS, set_up)


def _table(name: str, run: Callable[[SetUp], float]) -> None:
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(ROUNDS):
        for case, set_up in CASES.items():
            found[case].append(run(set_up))
    names = list(CASES)
    print(f"{name:<32}{'ns a write':>12}{'more':>10}{'ratio':>8}")
    for case in names:
        base = names[0] if case.startswith("recorded") else names[-2]
        middle = statistics.median(found[case])
        more = statistics.median(mine - plain for mine, plain in zip(found[case], found[base], strict=True))
        line = f"{case:<32}{middle:>12.1f}"
        print(line if case == base else f"{line}{more:>10.1f}{middle / statistics.median(found[base]):>8.2f}")
    more = statistics.median(mine - plain for mine, plain in zip(found[names[-1]], found[names[-2]], strict=True))
    print(f"$pid: {more:.0f} ns (at most {WANTED_NS}: {'met' if more <= WANTED_NS else 'MISSED'})\n")


def main() -> None:
    """Print the tables."""
    _table("TCG", _tcg)
    if Path("/dev/kvm").exists():
        _table("KVM", _kvm)
    else:
        print("no /dev/kvm here", file=sys.stderr)


if __name__ == "__main__":
    main()
