"""Measures the user's machine code at traps: `python -m benchmarks.code`.

The loop of WRMSRs without an event, with a lifted condition that is false, with emulated code and with an emulated condition
take turns in every round; the first use of machine code is measured in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT, BenchmarkError, Target
from benchmarks.loop import MSR, Loop
from benchmarks.machine import PlainMachine, stopwatch

if TYPE_CHECKING:
    from vmexit import Debugger, Event

ROUNDS = 5
NATIVE = 5_000_000
ASKED = 40_000
NOPS = b"\x90\x90\x90"
FALSE = "cmp edx, 0x10; sete al; movzx eax, al"
FALSE_BY_STACK = "push rdx; pop rax; sub eax, edx"


def plain() -> float:
    """Seconds of the loop in QEMU as it comes."""
    loop = Loop(NATIVE)
    with PlainMachine(loop.arguments) as machine, stopwatch() as seconds:
        machine.resume()
        status = machine.wait()
    loop.check_end(status, machine.output)
    return seconds[0]


def with_event(count: int, make: Callable[[Debugger], Event]) -> float:
    """Seconds of the loop with an event, whose every trap has to come and no run be ended."""
    import vmexit

    loop = Loop(count)
    printed: list[bytes] = []
    with vmexit.launch(loop.arguments, output=lambda _, data: printed.append(data)) as debugger:
        event = make(debugger)
        with stopwatch() as seconds:
            stop = debugger.run()
        loop.check_seen(debugger.hits(event))
        if event.faults or (event.recording is not None and len(event.recording)):
            raise BenchmarkError(f"{event.faults} runs were ended, or the condition held")
    loop.check_end(stop.exit_status, b"".join(printed).decode(errors="replace"))
    return seconds[0]


CASES: dict[str, tuple[int, Callable[[], float]]] = {
    "QEMU without the agent": (NATIVE, plain),
    "a lifted condition that is false": (
        NATIVE,
        lambda: with_event(NATIVE, lambda debugger: debugger.on_msr_write(MSR, condition=FALSE)),
    ),
    "emulated code { 90 90 90 }": (ASKED, lambda: with_event(ASKED, lambda debugger: debugger.on_msr_write(MSR, code=NOPS))),
    "an emulated condition that is false": (
        ASKED,
        lambda: with_event(ASKED, lambda debugger: debugger.on_msr_write(MSR, condition=FALSE_BY_STACK)),
    ),
}


def first_use() -> float:
    """Milliseconds from code's being given to its first run's end, but for the guest's own way there; in this process, once."""
    import vmexit

    with vmexit.launch(Loop(1).arguments, output=lambda stream, data: None) as debugger:
        start = time.perf_counter()
        event = debugger.on_msr_write(MSR, code=NOPS)
        seconds = time.perf_counter() - start
        answer = event.callback
        assert answer is not None

        def timed(trap: Any) -> None:
            nonlocal seconds
            start = time.perf_counter()
            answer(trap)
            seconds += time.perf_counter() - start

        event.callback = timed
        debugger.run()
        if debugger.hits(event) != 1 or event.faults:
            raise BenchmarkError("the first use went wrong")
    return seconds * 1000


def _first_use_elsewhere() -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.code", "first-use"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"the first use: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout))


def main() -> None:
    """Print the table and what should be reached."""
    if sys.argv[1:] == ["first-use"]:
        print(json.dumps(first_use()))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    firsts = []
    for _ in range(ROUNDS):
        for name, (_count, measure) in CASES.items():
            seconds[name].append(measure())
        firsts.append(_first_use_elsewhere())
    each = {name: [one / CASES[name][0] * 1e9 for one in found] for name, found in seconds.items()}
    print(f"{'case':<40}{'traps':>12}{'ns a trap':>12}{'least-most':>20}{'traps/s':>14}")
    for name, found in each.items():
        middle, spread = statistics.median(found), f"{min(found):,.0f}-{max(found):,.0f}"
        print(f"{name:<40}{CASES[name][0]:>12,}{middle:>12,.0f}{spread:>20}{1e9 / middle:>14,.0f}")
    base, lifted, code, _ = each.values()
    beyond = statistics.median(mine - without for mine, without in zip(lifted, base, strict=True))
    spread = f"{min(firsts):,.0f}-{max(firsts):,.0f}"
    print(f"{'the first use of code, ms':<40}{'':>12}{statistics.median(firsts):>12,.0f}{spread:>20}\n")
    for target in (
        Target("a lifted condition that is false, beyond no event", beyond, 150, at_most=True, unit="ns"),
        Target("emulated code a second", 1e9 / statistics.median(code), 20_000, at_most=False, unit="traps"),
        Target("the first use of code", statistics.median(firsts), 200, at_most=True, unit="ms"),
    ):
        print(target)


if __name__ == "__main__":
    main()
