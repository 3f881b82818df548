"""Traps as structured outputs tell of them: one row each, with all that came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vmexit.link.rings import Records
from vmexit.link.wire import Action
from vmexit.trap import Trap, traps_of

_HOLD_S = 0.25
"""How long a trap waits for what its script may still print."""
_ENDINGS = Action.ASK | Action.BREAK


@dataclass(frozen=True, slots=True)
class Traps:
    """Records of events, as they came from the agent."""

    records: Records
    waits: bool = False
    """What a script prints, or a break, may follow upon these."""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.records)

    @property
    def size(self) -> int:
        """In bytes, about."""
        return self.records.nbytes


@dataclass(frozen=True, slots=True)
class Prints:
    """What scripts have printed, a record and a text each; or why a run was ended."""

    records: Records
    parts: tuple[bytes, ...]
    fault: str | None = None

    @property
    def count(self) -> int:
        """How many."""
        return len(self.parts)

    @property
    def size(self) -> int:
        """In bytes, about."""
        return self.records.nbytes + sum(map(len, self.parts))


Item = Traps | Prints


@dataclass(slots=True)
class Row:
    """One trap."""

    trap: Trap
    actions: Action
    text: bytes = b""
    """What its script has printed."""
    fault: str | None = None
    """Why its script was ended."""
    since: float = field(default_factory=time.monotonic)

    def takes(self, trap: Trap) -> bool:
        """Whether that record is of the same trap."""
        mine = self.trap
        if trap.event != mine.event or trap.rip != mine.rip or trap.stage != mine.stage:
            return False
        return trap.action != Action.RECORD and not (trap.action & _ENDINGS & self.actions)


class Gatherer:
    """Puts together what the agent tells of one trap in several records: the vCPU's are in order, with others' between them."""

    def __init__(self) -> None:
        self._open: dict[int, Row] = {}

    @property
    def held(self) -> int:
        """Rows that may not be complete yet."""
        return len(self._open)

    def add(self, item: Item) -> Iterator[Row]:
        """Takes in what came; gives the rows that are complete by that."""
        if isinstance(item, Prints):
            parts: Iterable[bytes] = item.parts or [b""]
            for trap, part in zip(traps_of(item.records), parts, strict=True):
                row = self._open.get(trap.core)
                if row is None or not row.takes(trap):
                    if row is not None:
                        yield row
                    row = self._open[trap.core] = Row(trap, Action(0))
                row.actions |= trap.action
                row.text += part
                row.fault = row.fault or item.fault
            return
        for trap in traps_of(item.records):
            row = self._open.get(trap.core)
            if row is not None and row.takes(trap):
                row.actions |= trap.action
                continue
            if row is not None:
                del self._open[trap.core]
                yield row
            row = Row(trap, trap.action)
            if item.waits:
                self._open[trap.core] = row
            else:
                yield row

    def rest(self, *, all_of_them: bool) -> Iterator[Row]:
        """The rows that nothing more is expected of; or all."""
        oldest = time.monotonic() - _HOLD_S
        for core, row in list(self._open.items()):
            if all_of_them or row.since < oldest:
                del self._open[core]
                yield row
