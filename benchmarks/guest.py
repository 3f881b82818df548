"""Measures how soon a guest is known, and names in it: `python -m benchmarks.guest`.

A real Linux is booted to its shell and halted; everything is measured on that one stop.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lookups import LOOKUPS, first_time, made_up_windows
from tests.guest.windows.fake_windows import TEXT
from tests.machines import linux
from vmexit.guest.linux.cache import Cache
from vmexit.guest.system import Help
from vmexit.guest_view import GuestView
from vmexit.setup.kernel import find_kernel

ROUNDS = 5
_BEHIND = 0x100_0000
"""Bytes at the end of a kernel's image that hold no code."""


@dataclass(frozen=True)
class Row:
    """What was measured; ``most``: what it may take at most, None where nothing is wanted. All in seconds."""

    name: str
    seconds: float
    most: float | None = None

    def text(self) -> str:
        """As a line of the table."""
        wanted = "" if self.most is None else f"{_time(self.most):>12}  {'met' if self.seconds <= self.most else 'MISSED'}"
        return f"{self.name:<44}{_time(self.seconds):>12}{wanted}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _least(work: Callable[[], object]) -> float:
    """Of so many rounds: what it takes where nobody else wants the processors."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        rounds.append(time.perf_counter() - start)
    return min(rounds)


def measure() -> list[Row]:
    """Boots, and measures it all."""
    image = find_kernel().image
    with tempfile.TemporaryDirectory() as folder, linux("echo ready; sleep 1000") as (debugger, output):
        debugger.run(until=lambda: "ready" in output.text, timeout=120)
        empty, kept = Cache(Path("/dev/null/nowhere")), Cache(Path(folder))
        by_image = Help(image=image)
        rows = [
            Row("by the kernel's image, cold", _least(lambda: GuestView(debugger, given=by_image, cache=empty).recognised), 1),
            Row("by memory alone, cold", _least(lambda: GuestView(debugger, cache=empty).recognised), 1),
        ]
        GuestView(debugger, given=by_image, cache=kept).recognise()
        rows += [
            Row("by the kernel's image, cached", _least(lambda: GuestView(debugger, given=by_image, cache=kept).recognised), 0.1),
            Row("by memory, cached", _least(lambda: GuestView(debugger, cache=kept).recognised), 0.1),
        ]
        view = GuestView(debugger, cache=kept)
        known = view.linux
        start, end = known.extent
        addresses = [random.randrange(start, end - _BEHIND) for _ in range(LOOKUPS)]

        def look_up() -> None:
            for address in addresses:
                known.name_of(address)

        windows = made_up_windows()
        rows += [
            Row("address to name, first time (median)", first_time(known, start, end - _BEHIND), 2e-6),
            Row("the same in a made-up Windows", first_time(windows, windows.extent[0] + TEXT, windows.extent[1]), 2e-6),
            Row("address to name, again", _least(look_up) / LOOKUPS, 2e-6),
        ]

        def anew(work: Callable[[], object]) -> float:
            def forgetting() -> None:
                known.forget()
                work()

            return _least(forgetting)

        registers = debugger.registers(0)
        return [
            *rows,
            Row("the current task, at a new stop", anew(lambda: known.current(0, registers))),
            Row("all processes, at a new stop", anew(known.tasks.processes)),
            Row("a stack, at a new stop", anew(lambda: view.frames(0))),
        ]


def main() -> None:
    """Print the table."""
    print(f"{'least of ' + str(ROUNDS):<44}{'':>12}{'at most':>12}")
    for row in measure():
        print(row.text())


if __name__ == "__main__":
    main()
