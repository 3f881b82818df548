"""A recording, summed up in two passes over its file: what tables and pages are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vmexit.link.wire import Access, RecordFlag, Stage
from vmexit.report.changes import ChangeRows, Changes
from vmexit.report.counting import Codes, Places, Tally, grown, packed
from vmexit.report.reader import NOBODY, Chunk, RecordingFile

_MOST_MSRS, _MOST_PIDS, _MOST_EVENTS, _MOST_CORES = (1 << 16) - 1, (1 << 16) - 1, (1 << 8) - 1, (1 << 12) - 1
_MOST_SERIES = 1 << 17
_SERIES_BITS, _CORE_BITS, _BIN_BITS = 18, 13, 33

OTHERS = -1
"""Stands for an MSR or a process, where there were too many different ones."""


@dataclass(frozen=True, slots=True)
class Series:
    """What traps have in common: of the same MSR, access, stage, event, process, and outcome."""

    msr: int
    """Its address, or OTHERS."""
    access: Access
    stage: Stage
    event: int
    """Its number; OTHERS where there were too many."""
    pid: int | None
    """None where it is not known; OTHERS where there were too many."""
    skipped: bool
    faulted: bool


@dataclass
class Row:
    """Sums over some traps."""

    count: int = 0
    cores: set[int] = field(default_factory=set)
    first: int = 0
    last: int = 0
    """The first and the last value."""
    first_place: int = -1
    last_place: int = -1
    """Where these stand among all traps."""

    def add(self, other: Row) -> None:
        """Puts both together."""
        self.count += other.count
        self.cores |= other.cores
        if self.first_place < 0 or 0 <= other.first_place < self.first_place:
            self.first, self.first_place = other.first, other.first_place
        if other.last_place > self.last_place:
            self.last, self.last_place = other.last, other.last_place


class Digest:
    """Sums over a whole recording."""

    def __init__(self, file: RecordingFile) -> None:
        """Reads all of it. Raises RecordingError where the file cannot be read any more."""
        self.file = file
        self.total = 0
        self.changes = Changes()
        self.has_processes = False
        self.series: list[Series] = []
        self.rows: list[Row] = []
        """Of each series."""
        self.by_core: dict[int, int] = {}
        self.start_ns, self.end_ns = 0, 0
        """When it began (the machine's start, where that is known, else the first trap) and ended, by CLOCK_MONOTONIC."""
        self._msrs, self._pids = Codes(_MOST_MSRS), Codes(_MOST_PIDS)
        self._events, self._cores = Codes(_MOST_EVENTS), Codes(_MOST_CORES)
        self._keys = Codes(_MOST_SERIES)
        self._firsts: npt.NDArray[Any] = np.zeros(0, np.uint64)
        self._lasts: npt.NDArray[Any] = np.zeros(0, np.uint64)
        self._first_places: npt.NDArray[Any] = np.zeros(0, np.int64)
        self._last_places: npt.NDArray[Any] = np.zeros(0, np.int64)
        self._counts = Tally()
        for chunk in file.chunks():
            self._add(chunk)
        self._finish()

    # ---- the first pass ----

    def series_of(self, chunk: Chunk) -> Places:
        """The number of each trap's series (its place in ``series``)."""
        flags = chunk["flags"]
        outcome = (flags & np.uint8(RecordFlag.SKIPPED)) + ((flags & np.uint8(RecordFlag.FAULTED)) >> np.uint8(1))
        return self._keys.of(
            packed(
                [
                    (self._msrs.of(chunk["msr"]), 17),
                    (self._pids.of(chunk.pids()), 17),
                    (self._events.of(chunk["event"]), 9),
                    (chunk["access"].astype(np.int64) & 3, 2),
                    (chunk["stage"].astype(np.int64) & 3, 2),
                    (outcome.astype(np.int64), 2),
                ]
            )
        )

    def _add(self, chunk: Chunk) -> None:
        series, cores = self.series_of(chunk), self._cores.of(chunk["vcpu"])
        self._counts.add(packed([(series, _SERIES_BITS), (cores, _CORE_BITS)]))
        self._note_values(chunk, series)
        self.changes.add(chunk)
        self.total += len(chunk)

    def _note_values(self, chunk: Chunk, series: Places) -> None:
        known, size = len(self._firsts), _MOST_SERIES + 1 if len(self._keys) == _MOST_SERIES else len(self._keys)
        if size > known:
            self._firsts, self._lasts = grown(self._firsts, size), grown(self._lasts, size)
            self._first_places, self._last_places = grown(self._first_places, size), grown(self._last_places, size)
            self._first_places[known:] = self._last_places[known:] = -1
        places, values = np.arange(self.total, self.total + len(chunk)), chunk["value"]
        # Of equal series the assignment written last stays: the last trap forwards, the first one backwards.
        self._lasts[series], self._last_places[series] = values, places
        fresh = np.flatnonzero(self._first_places[series] < 0)[::-1]
        self._firsts[series[fresh]], self._first_places[series[fresh]] = values[fresh], places[fresh]

    def _finish(self) -> None:
        keys, counts = self._counts.items()
        self.has_processes = any(pid != NOBODY for pid in self._pids.values)
        for number in range(len(self._keys) + (self._first_places[len(self._keys) :] >= 0).any()):
            self.series.append(self._series(number))
            firsts = (self._firsts, self._lasts, self._first_places, self._last_places)
            self.rows.append(Row(0, set(), *(int(column[number]) for column in firsts)))
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            number, core = key >> _CORE_BITS, self.core_of(key & (1 << _CORE_BITS) - 1)
            self.rows[min(number, len(self.rows) - 1)].count += count
            self.rows[min(number, len(self.rows) - 1)].cores.add(core)
            self.by_core[core] = self.by_core.get(core, 0) + count
        first, last = self.file.times
        clock = self.file.info.get("clock")
        started = clock.get("started_ns") if isinstance(clock, dict) else None
        self.start_ns = min(first, started) if isinstance(started, int) and self.total and started > 0 else first
        self.end_ns = last

    def core_of(self, code: int) -> int:
        """A vCPU, from the number that cells have for it."""
        return self._cores.values[code] if code < len(self._cores) else OTHERS

    def _series(self, number: int) -> Series:
        if number >= len(self._keys):
            return Series(OTHERS, Access.WRMSR, Stage.PRE, OTHERS, OTHERS, False, False)
        key = self._keys.values[number]
        outcome, stage, access, event = key & 3, key >> 2 & 3, key >> 4 & 3, key >> 6 & 0x1FF
        pid, msr = key >> 15 & 0x1FFFF, key >> 32 & 0x1FFFF
        return Series(
            self._msrs.values[msr] if msr < len(self._msrs) else OTHERS,
            Access.RDMSR if access == Access.RDMSR else Access.WRMSR,
            Stage.POST if stage == Stage.POST else Stage.PRE,
            self._events.values[event] - 1 if event < len(self._events) else OTHERS,
            self._process(pid),
            bool(outcome & 1),
            bool(outcome & 2),
        )

    def _process(self, code: int) -> int | None:
        if code >= len(self._pids):
            return OTHERS
        pid = self._pids.values[code]
        return None if pid == NOBODY else pid

    # ---- the second pass ----

    def groups(self, most: int) -> Groups:
        """The series, put together so that there are no more than about ``most``: the rarest processes first, then rare MSRs."""
        by_process: dict[int | None, list[int]] = {}
        for number, series in enumerate(self.series):
            by_process.setdefault(series.pid, []).append(number)
        busiest = sorted(by_process, key=lambda pid: (-sum(self.rows[number].count for number in by_process[pid]), pid or 0))
        room = most if len(self.series) <= most else most - len({replace(series, pid=None) for series in self.series})
        apart: set[int | None] = set()
        for pid in busiest:
            room -= len(by_process[pid])
            if room < 0:
                break
            apart.add(pid)
        counts: dict[Series, int] = {}
        wanted = []
        for series, row in zip(self.series, self.rows, strict=True):
            group = series if series.pid in apart or series.pid is None else replace(series, pid=OTHERS)
            wanted.append(group)
            counts[group] = counts.get(group, 0) + row.count
        kept = sorted(counts, key=lambda group: -counts[group])[: max(1, most)]
        place_of = {group: place for place, group in enumerate(kept)}
        if len(kept) < len(counts):
            kept.append(Series(OTHERS, Access.WRMSR, Stage.PRE, OTHERS, OTHERS, False, False))
        places = [place_of.get(group, len(kept) - 1) for group in wanted]
        return Groups(
            kept, np.array([*places, *[len(kept) - 1] * (_MOST_SERIES + 1 - len(places))], np.int64), len(apart - {None})
        )

    def cells(self, groups: Sequence[Groups], most: int) -> list[Cells]:
        """For each of these ways to group, how many traps of each group and core there were in each of equal parts of the time.

        There are so few parts that there are no more than ``most`` cells. A length of one way is another's times a power of two.
        """
        span = max(1, self.end_ns - self.start_ns + 1)
        widths, tallies = [max(1, -(-span // _MOST_BINS))] * len(groups), [Tally() for _ in groups]
        for chunk in self.file.chunks():
            times = np.clip(chunk["time_ns"], np.uint64(self.start_ns), np.uint64(self.end_ns)) - np.uint64(self.start_ns)
            series, cores = self.series_of(chunk), self._cores.of(chunk["vcpu"])
            for i, (group, tally) in enumerate(zip(groups, tallies, strict=True)):
                bins = (times // np.uint64(widths[i])).astype(np.int64)
                tally.add(packed([(group.places[series], _SERIES_BITS), (cores, _CORE_BITS), (bins, _BIN_BITS)]))
                while tally.merge() > most and widths[i] < span:
                    keys, _ = tally.items()
                    low = np.uint64((1 << _BIN_BITS) - 1)
                    tally.replace_keys((keys & ~low) | ((keys & low) >> np.uint64(1)))
                    widths[i] *= 2
        return [Cells(width, *tally.items()) for width, tally in zip(widths, tallies, strict=True)]

    def sample(self, most: int) -> Iterator[Chunk]:
        """Every so many-th trap, so that there are no more than ``most``; all of them where there are no more."""
        stride = self.stride(most)
        place = 0
        for chunk in self.file.chunks():
            first = -place % stride
            if first < len(chunk):
                yield Chunk({name: values[first::stride] for name, values in chunk.columns.items()}, chunk.lost)
            place += len(chunk)

    def stride(self, most: int) -> int:
        """Every how many-th trap ``sample`` gives."""
        return max(1, -(-self.total // most))

    def changed(self) -> ChangeRows:
        """The changes that are kept; see Changes.rows."""
        return self.changes.rows()


_MOST_BINS = 1 << 13


@dataclass(frozen=True, slots=True)
class Groups:
    """Series, some of which are put together."""

    kept: list[Series]
    """With OTHERS for what is put together."""
    places: Places
    """Of each series its place in ``kept``."""
    processes: int
    """Those that are told apart."""

    def without_processes(self) -> Groups:
        """The same groups, of which those that differ in the process alone are put together as the first of them."""
        first: dict[Series, int] = {}
        places = [first.setdefault(replace(group, pid=None), place) for place, group in enumerate(self.kept)]
        return Groups(self.kept, np.array(places, np.int64)[self.places], 0)


@dataclass(frozen=True, slots=True)
class Cells:
    """Counts by group, core and part of the time."""

    width_ns: int
    """Of a part."""
    keys: npt.NDArray[np.uint64]
    counts: Places

    def columns(self) -> tuple[Places, Places, Places, Places]:
        """Group (a place in Groups.kept), core (Digest.core_of), part of the time, count; in the order of time."""
        keys = self.keys
        bins = (keys & np.uint64((1 << _BIN_BITS) - 1)).astype(np.int64)
        cores = (keys >> np.uint64(_BIN_BITS) & np.uint64((1 << _CORE_BITS) - 1)).astype(np.int64)
        series = (keys >> np.uint64(_BIN_BITS + _CORE_BITS)).astype(np.int64)
        order = np.argsort(bins, kind="stable")
        return series[order], cores[order], bins[order], self.counts[order]
