"""Traps as structured outputs tell of them: one row each, with all that came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from vmexit.link.rings import Records
from vmexit.link.wire import Action
from vmexit.trap import Trap, traps_of

_HOLD_S = 0.25
"""How long a trap waits for what its script may still print."""
# Operations on plain numbers take a tenth of the time.
_RECORD, _ENDINGS = int(Action.RECORD), int(Action.ASK | Action.BREAK)


@dataclass(frozen=True, slots=True)
class Item:
    """Records of events, as they came from the agent."""

    records: Records
    texts: list[bytes] | None
    """What each of them, if it is one of a print, has printed; None: there is none of these."""
    faults: dict[int, str]
    """By their places: why runs of scripts were ended."""
    count: int
    """How many messages they are."""
    waits: bool
    """Several of them may be of one trap."""

    @property
    def size(self) -> int:
        """In bytes, about."""
        return self.records.nbytes + (sum(map(len, self.texts)) if self.texts else 0)


@dataclass(slots=True)
class Row:
    """One trap."""

    trap: Trap
    actions: int
    """Of its records (Action)."""
    since: float
    """When it came (time.monotonic)."""
    text: bytes = b""
    """What its script has printed."""
    fault: str | None = None
    """Why its script was ended."""

    def takes(self, trap: Trap, action: int) -> bool:
        """Whether that record is of the same trap."""
        if action == _RECORD or action & _ENDINGS & self.actions:
            return False
        mine = self.trap
        return trap.event == mine.event and trap.rip == mine.rip and trap.stage is mine.stage


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
        actions = item.records["action"].tolist()
        now = time.monotonic()
        for place, (trap, action) in enumerate(zip(traps_of(item.records), actions, strict=True)):
            row = self._open.get(trap.core)
            if row is not None and row.takes(trap, action):
                row.actions |= action
            else:
                if row is not None:
                    del self._open[trap.core]
                    yield row
                row = Row(trap, action, now)
                if not item.waits:
                    yield row
                    continue
                self._open[trap.core] = row
            if item.texts:
                row.text += item.texts[place]
                row.fault = row.fault or item.faults.get(place)

    def rest(self, *, all_of_them: bool) -> Iterator[Row]:
        """The rows that nothing more is expected of; or all."""
        oldest = time.monotonic() - _HOLD_S
        for core, row in list(self._open.items()):
            if all_of_them or row.since < oldest:
                del self._open[core]
                yield row
