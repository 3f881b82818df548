"""Records kept in memory, and sums over all that ever came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records
from vmexit.link.wire import Access, Stage
from vmexit.trap import Trap, traps_of


class Recording:
    """The newest records of one event, up to a number; how many older ones were forgotten is known."""

    def __init__(self, most: int) -> None:
        """``most``: records that are kept, each 72 bytes."""
        self._most = most
        self._chunks: deque[Records] = deque()
        self._kept = 0
        self.forgotten = 0

    def add(self, records: Records) -> None:
        """Takes records in, oldest first."""
        self._chunks.append(records)
        self._kept += len(records)
        while self._kept - len(self._chunks[0]) >= self._most:
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


class Summary:
    """Sums over all records, by event, stage and MSR. Adding costs some ten nanoseconds a record."""

    def __init__(self) -> None:
        self.total = 0
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

    def add(self, records: Records) -> None:
        """Takes records in, in the global order."""
        if not len(records):
            return
        self.total += len(records)
        keys = self._keys_of(records)
        is_one = keys[0] == keys[-1] and (keys == keys[0]).all()
        found = keys[:1] if is_one else np.unique(keys)
        self._make_room(found)
        places = np.searchsorted(self._keys, found if len(found) == 1 else keys)
        values, sequences = records["value"], records["sequence"]
        if len(found) == 1:
            place = int(places[0])
            if self._counts[place] == 0:
                self._firsts[place], self._first_sequences[place] = values[0], sequences[0]
            self._counts[place] += len(records)
            self._lasts[place], self._last_sequences[place] = values[-1], sequences[-1]
            return
        backwards = places[::-1]
        fresh = self._counts == 0
        self._counts += np.bincount(places, minlength=len(self._keys))
        # Of equal places the assignment written last stays: the last record forwards, the first one backwards.
        self._lasts[places], self._last_sequences[places] = values, sequences
        firsts, first_sequences = self._firsts.copy(), self._first_sequences.copy()
        firsts[backwards], first_sequences[backwards] = values[::-1], sequences[::-1]
        self._firsts = np.where(fresh, firsts, self._firsts)
        self._first_sequences = np.where(fresh, first_sequences, self._first_sequences)

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
