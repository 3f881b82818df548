"""Measures what it costs to know where each recorded trap comes from: `python -m benchmarks.names`.

The loop of WRMSRs is recorded, alone and with the name of the place for each record, in turns.
"""

from __future__ import annotations

import statistics

from benchmarks.loop import MSR, Loop
from benchmarks.machine import stopwatch
from tests.guests.build import symbols
from vmexit import Debugger, StopReason
from vmexit.guest.symbols import Place
from vmexit.guest_view import GuestView
from vmexit.link.rings import Records
from vmexit.targets.qemu import Qemu

ROUNDS = 5
COUNT = 4_000_000
LEAST = 0.5
"""Of the rate without names."""


class _Labels(GuestView):
    """A guest whose symbols are the labels of its image, for it has no kernel."""

    def __init__(self, debugger: Debugger, loop: Loop) -> None:
        super().__init__(debugger)
        self._labels = {address: name for name, address in symbols(loop.image).items()}

    @property
    def seen(self) -> object:
        return self

    def known_name(self, address: int) -> Place | None:
        name = self._labels.get(address)
        return Place(name, 0, "guest") if name else None


def rate(loop: Loop, *, named: bool) -> float:
    """Recorded writes a second."""
    seen: dict[str, int] = {}

    with Debugger(Qemu(loop.arguments, output=lambda *_: None)) as debugger:
        debugger.guest = _Labels(debugger, loop)

        def name(records: Records) -> None:
            texts, which = debugger.names.of_all(records["rip"])
            for index, text in enumerate(texts):
                seen[text] = seen.get(text, 0) + int((which == index).sum())

        if named:
            debugger.record_listeners.append(name)
        event = debugger.on_msr_write(MSR)
        with stopwatch() as seconds:
            stop = debugger.run()
        assert stop.reason == StopReason.ENDED
        loop.check_seen(debugger.hits(event))
    if named and seen != {"loop_wrmsr [guest]": loop.count}:
        raise AssertionError(f"these are the names: {seen}")
    return loop.count / seconds[0]


def measure(rounds: int = ROUNDS, count: int = COUNT) -> tuple[float, float]:
    """The rates without and with names; the median of the rounds."""
    loop = Loop(count)
    pairs = [(rate(loop, named=False), rate(loop, named=True)) for _ in range(rounds)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def main() -> None:
    """Print both."""
    plain, named = measure()
    print(f"recorded                        {plain / 1e6:8.2f} million a second")
    print(f"recorded, the place named       {named / 1e6:8.2f} million a second   {named / plain:.2f} of it", end="")
    print(f"  (at least {LEAST})  {'met' if named >= LEAST * plain else 'MISSED'}")


if __name__ == "__main__":
    main()
