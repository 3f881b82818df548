"""Which writes changed an MSR, and from what to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vmexit.link.wire import Access, RecordFlag, Stage
from vmexit.report.counting import Codes, Places, grown
from vmexit.report.reader import Chunk

MOST = 20_000
"""Changes that are kept, over all MSRs."""
_MOST_OF_ONE = 2_000
"""Of one MSR: the first half and the last half."""
_LEAST_OF_ONE = 8
_MOST_REGISTERS = 1 << 18
"""MSRs, each core's by itself, whose values are followed."""
_MOST_MSRS = (1 << 16) - 1
_MOST_LISTED = 1 << 12
"""MSRs whose changes are kept; all are counted."""

CHANGE = np.dtype(
    [
        *(("place", "<u8"), ("time_ns", "<u8"), ("old", "<u8"), ("new", "<u8"), ("rip", "<u8")),
        *(("msr", "<u4"), ("pid", "<u4"), ("vcpu", "<u2"), ("known", "?")),
    ]
)
"""``place``: its number among all traps. ``known``: whether the value before it is known; where not, ``old`` is 0."""
ChangeRows = npt.NDArray[np.void]


class Changes:
    """Follows the value of every MSR of every core.

    A write counts that was carried out, as far as is known: in stage pre, nobody knows whether the processor will refuse it. What
    was read tells a value, too.
    """

    def __init__(self) -> None:
        self.total = 0
        """Writes of another value than the one before. The first write of an MSR whose value was not known is none."""
        self.followed_all = True
        """Whether there were no more registers than can be followed."""
        self._registers, self._msrs = Codes(_MOST_REGISTERS), Codes(_MOST_MSRS)
        self._counts: npt.NDArray[Any] = np.zeros(0, np.int64)
        self._values: npt.NDArray[Any] = np.zeros(0, np.uint64)
        self._known: npt.NDArray[Any] = np.zeros(0, bool)
        self._kept: dict[int, _Kept] = {}
        self._most_of_one = _MOST_OF_ONE
        self._traps = 0

    def add(self, chunk: Chunk) -> None:
        """Takes traps in, in their order."""
        first, self._traps = self._traps, self._traps + len(chunk)
        access, stage = chunk["access"], chunk["stage"]
        carried_out = (chunk["flags"] & np.uint8(RecordFlag.SKIPPED | RecordFlag.FAULTED)) == 0
        writes = access == np.uint8(Access.WRMSR)
        tells = carried_out & (writes | (stage == np.uint8(Stage.POST)))
        places = np.flatnonzero(tells)
        registers = self._registers.of(_registers_of(chunk, places))
        if len(followed := np.flatnonzero(registers < _MOST_REGISTERS)) < len(registers):
            self.followed_all = False
            places, registers = places[followed], registers[followed]
        if not len(places):
            return
        self._values = grown(self._values, len(self._registers))
        self._known = grown(self._known, len(self._registers))
        self._add(chunk, first, places, registers, writes)

    def _add(self, chunk: Chunk, first: int, places: Places, registers: Places, writes: npt.NDArray[np.bool_]) -> None:
        # Register by register, each in the order of time; for 16 bits numpy has a quicker way to sort.
        narrow = registers.astype(np.uint16) if len(self._registers) <= 1 << 16 else registers
        order = np.argsort(narrow, kind="stable")
        places, registers = places[order], registers[order]
        values = chunk["value"][places]
        starts = np.flatnonzero(np.concatenate(([True], registers[1:] != registers[:-1])))
        ends = np.concatenate((starts[1:], [len(registers)])) - 1
        old, known = np.empty_like(values), np.ones(len(values), bool)
        old[1:] = values[:-1]
        old[starts], known[starts] = self._values[registers[starts]], self._known[registers[starts]]
        self._values[registers[ends]], self._known[registers[ends]] = values[ends], True
        told = np.flatnonzero(writes[places] & (~known | (old != values)))
        if not len(told):
            return
        told = told[np.argsort(places[told])]
        where, known = places[told], known[told]
        self._keep(chunk, first, _Found(where, np.where(known, old[told], 0), values[told], known))

    def _keep(self, chunk: Chunk, first: int, found: _Found) -> None:
        codes = self._msrs.of(chunk["msr"][found.where])
        counts = np.bincount(codes[found.known], minlength=len(self._msrs) + 1)
        self.total += int(counts.sum())
        self._counts = grown(self._counts, len(counts))
        self._counts[: len(counts)] += counts
        # MSR by MSR, each in the order of time.
        order = np.argsort(codes.astype(np.uint16) if len(self._msrs) < 1 << 16 else codes, kind="stable")
        sizes = np.bincount(codes, minlength=len(self._msrs) + 1)
        ends = np.cumsum(sizes)
        for code in np.flatnonzero(sizes[:_MOST_LISTED]).tolist():
            kept = self._kept.setdefault(code, _Kept())
            mine = order[ends[code] - sizes[code] : ends[code]]
            picked, room = kept.picked(mine, self._most_of_one)
            kept.add(_rows(chunk, first, found, picked), room, len(mine), self._most_of_one)
        while sum(map(len, self._kept.values())) > 2 * MOST and self._most_of_one > _LEAST_OF_ONE:
            self._thin_out()

    def _thin_out(self) -> None:
        self._most_of_one //= 2
        for kept in self._kept.values():
            kept.thin_out(self._most_of_one)

    def rows(self) -> ChangeRows:
        """Those that are kept, in the order of time: all, or of each MSR the first and the last ones."""
        while sum(map(len, self._kept.values())) > MOST and self._most_of_one > _LEAST_OF_ONE:
            self._thin_out()
        parts = [part for kept in self._kept.values() for part in (kept.first, kept.last)]
        rows: ChangeRows = np.concatenate([np.zeros(0, CHANGE), *parts])
        return rows[np.argsort(rows["place"], kind="stable")]

    @property
    def by_msr(self) -> dict[int, int]:
        """How many changes, by the MSR's address."""
        return {msr: int(count) for msr, count in zip(self._msrs.values, self._counts.tolist(), strict=False) if count}

    def left_out(self) -> dict[int, int]:
        """By the MSR's address, how many of its changes (and first writes) are not among the rows."""
        values = self._msrs.values
        return {values[code]: kept.came - len(kept) for code, kept in self._kept.items() if kept.came > len(kept)}


@dataclass(frozen=True, slots=True)
class _Found:
    """Changes in a chunk, in the order of time."""

    where: Places
    """Places in the chunk."""
    old: npt.NDArray[Any]
    new: npt.NDArray[Any]
    known: npt.NDArray[np.bool_]


def _rows(chunk: Chunk, first: int, found: _Found, picked: Places) -> ChangeRows:
    """Some of them as rows. ``first``: the number of the chunk's first trap among all."""
    rows: ChangeRows = np.zeros(len(picked), CHANGE)
    where = found.where[picked]
    rows["place"] = where.astype(np.uint64) + np.uint64(first)
    rows["old"], rows["new"], rows["known"] = found.old[picked], found.new[picked], found.known[picked]
    for name in ("time_ns", "msr", "vcpu", "rip"):
        rows[name] = chunk[name][where]
    rows["pid"] = chunk.pids()[where]
    return rows


class _Kept:
    """The first and the last changes of one MSR."""

    def __init__(self) -> None:
        self.came = 0
        self.first: ChangeRows = np.zeros(0, CHANGE)
        self.last: ChangeRows = np.zeros(0, CHANGE)

    def __len__(self) -> int:
        return len(self.first) + len(self.last)

    def picked(self, found: Places, most: int) -> tuple[Places, int]:
        """Those of further changes that can be of interest, and how many of them are among the first ones."""
        room = min(len(found), max(0, most // 2 - len(self.first)) if not len(self.last) else 0)
        return np.concatenate((found[:room], found[room:][-(most // 2) :])), room

    def add(self, rows: ChangeRows, room: int, count: int, most: int) -> None:
        """``rows`` as picked from ``count``."""
        self.came += count
        if room:
            self.first = np.concatenate((self.first, rows[:room]))
        if len(rows) > room:
            self.last = np.concatenate((self.last, rows[room:]))[-(most // 2) :]

    def thin_out(self, most: int) -> None:
        """Keeps no more than that."""
        if len(self) > most:
            together = np.concatenate((self.first, self.last))
            self.first, self.last = together[: most // 2], together[-(most // 2) :]


def _registers_of(chunk: Chunk, places: Places) -> npt.NDArray[np.uint64]:
    """Core and MSR in one number."""
    cores = chunk["vcpu"][places].astype(np.uint64)
    return (cores << np.uint64(32)) | chunk["msr"][places].astype(np.uint64)
