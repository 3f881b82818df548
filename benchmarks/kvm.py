"""Measures the KVM door beside a bare C loop over the same exits: `python -m benchmarks.kvm`.

The VMM is the small one of the tests, so that nothing but KVM and the agent is measured. All cases take turns in every round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import vmexit
from tests.guests.build import OK_STATUS, build
from tests.vmm import build_vmm, vmm_arguments

ROUNDS = 5
EXITS = 20_000
PLAIN = 100_000
STAR = 0xC000_0081
SCRIPT = "if ($msr == 0xc0000081) { .n = .n + 1; }"


def _bare(count: int, own_msr: int | None, *, carries_out: bool = False) -> float:
    """Seconds of the VMM alone; with an MSR of its own it handles that MSR's exits in C."""
    command = [str(build_vmm()), *vmm_arguments(build("loop", COUNT=count), 1, own_msr, carries_out=carries_out)]
    start = time.monotonic()
    # In a session of its own, as the others are: the host's scheduler shares its time among sessions.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True)
    seconds = time.monotonic() - start
    assert done.returncode == OK_STATUS, done
    return seconds


def _with_agent(count: int, set_up: Callable[[vmexit.Debugger], vmexit.Event | None]) -> float:
    """Seconds from the first instruction to the end, with the agent preloaded."""
    arguments = vmm_arguments(build("loop", COUNT=count), 1)
    with vmexit.launch_vmm(str(build_vmm()), arguments, output=lambda _, data: None) as debugger:
        event = set_up(debugger)
        start = time.monotonic()
        stop = debugger.run()
        seconds = time.monotonic() - start
        assert stop.exit_status == OK_STATUS, stop
        if event is not None and event.script is not None:
            assert int(debugger.evaluate("print(.n);"), 16) == count
    return seconds


def _attach() -> float:
    """Seconds from the wish to attach to a running VMM to the first event that is seen."""
    command = [str(build_vmm()), *vmm_arguments(build("loop", COUNT=4_000_000_000), 1)]
    vmm = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        start = time.monotonic()
        with vmexit.attach(vmm.pid) as debugger:
            event = debugger.on_msr_write(STAR, immediate=True)
            while not debugger.hits(event):
                debugger.pump(0.01)
            return time.monotonic() - start
    finally:
        vmm.kill()
        vmm.wait()


CASES: dict[str, tuple[int, Callable[[], float]]] = {
    "the VMM alone": (PLAIN, lambda: _bare(PLAIN, None)),
    "with the agent, no event": (PLAIN, lambda: _with_agent(PLAIN, lambda _: None)),
    "with the agent, an event on another MSR": (PLAIN, lambda: _with_agent(PLAIN, lambda each: each.on_msr_write(STAR + 1))),
    "exits in C, each write dropped": (EXITS, lambda: _bare(EXITS, STAR)),
    "exits in C, each write carried out": (EXITS, lambda: _bare(EXITS, STAR, carries_out=True)),
    "a script at each": (EXITS, lambda: _with_agent(EXITS, lambda each: each.on_msr_write(STAR, script=SCRIPT))),
    "each recorded": (EXITS, lambda: _with_agent(EXITS, lambda each: each.on_msr_write(STAR))),
}
BASES = {1: 0, 2: 0, 4: 3, 5: 4, 6: 4}
"""Which case each is compared with: a trap with a loop in C that does the same, which is to carry the write out as well."""


def main() -> None:
    """Print the table."""
    if not Path("/dev/kvm").exists():
        sys.exit("bench: no /dev/kvm here")
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    attached = []
    for _ in range(ROUNDS):
        for name, (_, run) in CASES.items():
            seconds[name].append(run())
        attached.append(_attach())
    names = list(CASES)
    print(f"{'':<42}{'us a write':>12}{'ratio':>8}  least-most")
    for number, name in enumerate(names):
        line = f"{name:<42}{statistics.median(seconds[name]) / CASES[name][0] * 1e6:>12.3f}"
        if number in BASES:
            ratios = [mine / base for mine, base in zip(seconds[name], seconds[names[BASES[number]]], strict=True)]
            line += f"{statistics.median(ratios):>8.3f}  {min(ratios):.3f}-{max(ratios):.3f}"
        print(line)
    print(f"attaching to a running VMM, to the first event: {statistics.median(attached):.3f} s")


if __name__ == "__main__":
    main()
