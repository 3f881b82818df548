"""Counting and numbering by the ten thousand: what a digest of a recording is made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_MERGED_AT_ONCE = 1 << 20
_CACHE_BITS = 14
_SPREAD = np.uint64(0x9E37_79B9_7F4A_7C15)
"""2^64 divided by the golden ratio: products of near numbers with it lie far apart."""


class Codes:
    """Numbers different values 0, 1, 2 ... in the order in which they come. All that come after ``most`` share one number."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.values: list[int] = []
        """By their numbers; those beyond ``most`` are not kept."""
        self._sorted: Keys = np.empty(0, np.uint64)
        self._codes: Places = np.empty(0, np.int64)
        self._cached_values: Keys = np.zeros(1 << _CACHE_BITS, np.uint64)
        self._cached_codes: Places = np.full(1 << _CACHE_BITS, -1, np.int64)

    def __len__(self) -> int:
        return len(self.values)

    def of(self, column: npt.NDArray[np.unsignedinteger[Any]]) -> Places:
        """The numbers of these values; new ones get theirs."""
        if not len(column):
            return np.empty(0, np.int64)
        if (column == column[0]).all():  # as it often is where traps come fastest
            return np.full(len(column), self._of(column[:1].astype(np.uint64))[0])
        values = column.astype(np.uint64)
        # Most values were met before. Each has one place where it is looked for first, which is much quicker than searching.
        places = ((values * _SPREAD) >> np.uint64(64 - _CACHE_BITS)).astype(np.intp)
        found = self._cached_codes[places]
        unknown = np.flatnonzero((found < 0) | (self._cached_values[places] != values))
        if len(unknown):
            found[unknown] = self._of(values[unknown])
            self._cached_values[places[unknown]], self._cached_codes[places[unknown]] = values[unknown], found[unknown]
        return found

    def _of(self, column: Keys) -> Places:
        found = self._known(column)
        unknown = np.flatnonzero(found < 0)
        if not len(unknown):
            return found
        values, firsts = np.unique(column[unknown], return_index=True)
        fresh = values[np.argsort(firsts)][: self.most - len(self.values)]
        if len(fresh):
            codes = np.arange(len(self.values), len(self.values) + len(fresh), dtype=np.int64)
            self.values += fresh.tolist()
            together, numbers = np.concatenate((self._sorted, fresh)), np.concatenate((self._codes, codes))
            order = np.argsort(together)
            self._sorted, self._codes = together[order], numbers[order]
            found[unknown] = self._known(column[unknown])
        found[found < 0] = self.most
        return found

    def _known(self, column: Keys) -> Places:
        """Their numbers; -1 for those that have none."""
        if not len(self._sorted):
            return np.full(len(column), -1, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, column), len(self._sorted) - 1)
        return np.where(self._sorted[places] == column, self._codes[places], -1)


class Tally:
    """How often each key came."""

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.uint64)
        self._counts: Places = np.empty(0, np.int64)
        self._waiting: list[tuple[Keys, Places]] = []
        self._waiting_count = 0

    def add(self, keys: Keys) -> None:
        """Counts each of these."""
        if not len(keys):
            return
        if (keys == keys[0]).all():
            self._add(keys[:1].copy(), np.array([len(keys)], np.int64))
        else:
            self._add(*np.unique(keys, return_counts=True))

    def _add(self, keys: Keys, counts: Places) -> None:
        self._waiting.append((keys, counts))
        self._waiting_count += len(keys)
        if self._waiting_count >= _MERGED_AT_ONCE or len(self._waiting) >= 64:
            self.merge()

    def merge(self) -> int:
        """Puts together what has come; gives how many different keys there are."""
        if self._waiting:
            keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
            counts = np.concatenate([self._counts, *(counts for _, counts in self._waiting)])
            self._keys, self._counts = _summed(keys, counts)
            self._waiting, self._waiting_count = [], 0
        return len(self._keys)

    def replace_keys(self, keys: Keys) -> None:
        """Puts a key in each one's place (as ``items`` gives them); those that have become the same are put together."""
        self.merge()
        self._keys, self._counts = _summed(keys, self._counts)

    def items(self) -> tuple[Keys, Places]:
        """The keys, rising, and how often each came."""
        self.merge()
        return self._keys, self._counts


def _summed(keys: Keys, counts: Places) -> tuple[Keys, Places]:
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.empty(0, np.intp)
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def grown(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """The array with room for that many, new ones 0; as it is where it has it."""
    if len(values) >= size:
        return values
    larger = np.zeros(max(size, 2 * len(values), 16), values.dtype)
    larger[: len(values)] = values
    return larger


def packed(parts: Sequence[tuple[Places, int]]) -> Keys:
    """One key of several numbers, each with the bits that it takes; the first is the highest."""
    keys: Keys = np.zeros(len(parts[0][0]), np.uint64)
    for numbers, bits in parts:
        keys = (keys << np.uint64(bits)) | numbers.astype(np.uint64)
    return keys
