"""Records kept in memory, and sums over all that ever came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records, are_alike, joined
from vmexit.link.wire import Access, Stage
from vmexit.trap import Trap, traps_of


class Recording:
    """The newest records of one event, up to a number; how many older ones were forgotten is known."""

    def __init__(self, most: int) -> None:
        """``most``: records that are kept, each 64 bytes."""
        self._most = most
        self._chunks: deque[Records] = deque()
        self._kept = 0
        self.forgotten = 0

    def add(self, records: Records) -> None:
        """Takes records in, oldest first."""
        if not len(records):
            return
        self._chunks.append(records)
        self._kept += len(records)
        while self._chunks and self._kept - len(self._chunks[0]) >= self._most:
            oldest = self._chunks.popleft()
            self._kept -= len(oldest)
            self.forgotten += len(oldest)

    def __len__(self) -> int:
        return self._kept

    def __iter__(self) -> Iterator[Trap]:
        for chunk in list(self._chunks):
            yield from traps_of(chunk)


@dataclass(slots=True)
class MsrSummary:
    """What one event saw of one MSR at one stage."""

    event: int
    access: Access
    stage: Stage
    msr: int
    count: int
    cores: set[int] = field(default_factory=set)
    first: int = 0
    last: int = 0
    """First and last value, in the order of all records."""


_ADDED_AT_ONCE = 1024
"""Records that are gathered before they are added up: that costs little more for many than for one."""


class Summary:
    """Sums over all records, by event, stage and MSR. Adding costs some ten nanoseconds a record."""

    def __init__(self) -> None:
        self.total = 0
        self._waiting: list[Records] = []
        self._waiting_count = 0
        self._keys: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._counts: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._firsts: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._lasts: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._first_sequences: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._last_sequences: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    # A key is event << 48 | vcpu << 35 | stage << 34 | access << 32 | msr, each within its width: 16, 13, 1, 2 and 32 bits.

    @staticmethod
    def _keys_of(records: Records) -> npt.NDArray[np.uint64]:
        keys = records["msr"].astype(np.uint64)
        keys |= records["access"].astype(np.uint64) << np.uint64(32)
        keys |= (records["stage"].astype(np.uint64) - np.uint64(1)) << np.uint64(34)
        keys |= records["vcpu"].astype(np.uint64) << np.uint64(35)
        keys |= (records["event"].astype(np.uint64) - np.uint64(1)) << np.uint64(48)
        return keys

    def add(self, records: Records, *, alike: bool = False) -> None:
        """Takes records in, in the global order. ``alike``: they are known to be (link.rings.are_alike)."""
        self.total += len(records)
        if alike and len(records) >= _ADDED_AT_ONCE:
            self._add_waiting()
            self._add_alike(records)
            return
        self._waiting.append(records)
        self._waiting_count += len(records)
        if self._waiting_count >= _ADDED_AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting_count:
            return
        records = joined(self._waiting)
        self._waiting, self._waiting_count = [], 0
        if are_alike(records):
            self._add_alike(records)
            return
        values, sequences = records["value"], records["sequence"]
        places = self._places(self._keys_of(records))
        fresh = np.flatnonzero(self._counts[places] == 0)
        self._counts += np.bincount(places, minlength=len(self._keys))
        # Of equal places the assignment written last stays: the last record forwards, the first one backwards.
        self._lasts[places], self._last_sequences[places] = values, sequences
        backwards = fresh[::-1]
        self._firsts[places[backwards]], self._first_sequences[places[backwards]] = values[backwards], sequences[backwards]

    def _add_alike(self, records: Records) -> None:
        first, last = records[0], records[-1]
        place = int(self._places(self._keys_of(records[:1]))[0])
        if self._counts[place] == 0:
            self._firsts[place], self._first_sequences[place] = first["value"], first["sequence"]
        self._counts[place] += len(records)
        self._lasts[place], self._last_sequences[place] = last["value"], last["sequence"]

    def _places(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Where the sums of these keys are; makes room for those that are new."""
        if len(self._keys):
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            if (self._keys[places] == keys).all():
                return places
        self._make_room(np.unique(keys))
        return np.searchsorted(self._keys, keys)

    def _make_room(self, found: npt.NDArray[np.uint64]) -> None:
        new = np.setdiff1d(found, self._keys, assume_unique=True)
        if not len(new):
            return
        keys = np.concatenate((self._keys, new))
        order = np.argsort(keys)
        self._keys = keys[order]
        for name in ("_counts", "_firsts", "_lasts", "_first_sequences", "_last_sequences"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.zeros(len(new), old.dtype)))[order])

    def rows(self) -> list[MsrSummary]:
        """A row for each event, stage and MSR; the vCPUs are put together. In the order of events and addresses."""
        self._add_waiting()
        rows: dict[tuple[int, int, int, int], tuple[MsrSummary, int, int]] = {}
        columns = (self._keys, self._counts, self._firsts, self._lasts, self._first_sequences, self._last_sequences)
        for key, count, first, last, first_sequence, last_sequence in zip(*(column.tolist() for column in columns), strict=True):
            event, core, stage, access, msr = key >> 48, key >> 35 & 0x1FFF, (key >> 34 & 1) + 1, key >> 32 & 3, key & 0xFFFF_FFFF
            place = (event, msr, access, stage)
            row, earliest, latest = rows.get(place) or (
                MsrSummary(event, Access(access), Stage(stage), msr, 0, first=first, last=last),
                first_sequence,
                last_sequence,
            )
            row.count += count
            row.cores.add(core)
            if first_sequence < earliest:
                row.first, earliest = first, first_sequence
            if last_sequence > latest:
                row.last, latest = last, last_sequence
            rows[place] = (row, earliest, latest)
        return [rows[place][0] for place in sorted(rows)]
