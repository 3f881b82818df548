"""Names of addresses: which symbol an address lies in, where a symbol is, and which symbols match a pattern."""

from __future__ import annotations

import fnmatch
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmexit.guest.nametable import NameTable

_STRETCH_BITS = 8
_MOST_BYTES = 128 << 20
KERNEL = "kernel"
"""What the kernel itself is called where modules have names."""


class Place(NamedTuple):
    """An address as people read it."""

    name: str
    offset: int
    """From the symbol on."""
    module: str

    def __str__(self) -> str:
        offset = f"+{self.offset:#x}" if self.offset else ""
        return f"{self.name}{offset} [{self.module}]"


class Symbol(NamedTuple):
    """A symbol of a table; ``kind`` is nm's letter."""

    name: str
    address: int
    kind: str


Addresses = npt.NDArray[np.uint64]

_make = tuple.__new__
"""Makes a Place in half of the time that Place(...) takes."""


class _Near(NamedTuple):
    """Where symbols begin that are near to each other: nearly all of a table, as a search finds them quickest.

    What lies far below the others (per-CPU variables, which begin at 0) is left out, and so is what lies far above. Of symbols
    that share an address only the first is here. All numbers count from 0 at the first of them.
    """

    base: int
    """The address of the first."""
    stretches: int
    """Pieces of 1 << _STRETCH_BITS bytes that they begin in."""
    lasts: array[int]
    """For each stretch the last symbol that begins within it or before."""
    starts: array[int]
    """Of each symbol, in bytes from the first on."""
    begins: array[int]
    """Where its name begins in the text."""
    ends: array[int]
    """Where its name ends."""

    @classmethod
    def of(cls, addresses: Addresses, bounds: npt.NDArray[np.uint32], nameless: Addresses) -> _Near:
        """From all addresses of a table, where their names begin and the text ends, and addresses that shall have empty names."""
        middle = int(addresses[len(addresses) // 2]) if len(addresses) else 0
        low, high = np.uint64(max(middle - _MOST_BYTES, 0)), np.uint64(min(middle + _MOST_BYTES, (1 << 64) - 1))
        first, last = int(np.searchsorted(addresses, low, "left")), int(np.searchsorted(addresses, high, "right"))
        if first == last:
            return cls(0, 0, *(array("I") for _ in range(4)))
        near, is_new = np.unique(addresses[first:last], return_index=True)
        others = np.setdiff1d(nameless[(nameless > near[0]) & (nameless <= high)], near)
        nothing = np.zeros(len(others), np.uint32)
        starts = (np.concatenate((near, others)) - near[0]).astype(np.uint32)
        begins = np.concatenate((bounds[:-1][first:last][is_new], nothing))
        ends = np.concatenate((bounds[1:][first:last][is_new] - np.uint32(1), nothing))
        order = np.argsort(starts)
        lasts = np.cumsum(np.bincount(starts >> np.uint32(_STRETCH_BITS))) - 1
        columns = (lasts, starts[order], begins[order], ends[order])
        return cls(int(near[0]), len(lasts), *(array("I", column.astype(np.uint32).tobytes()) for column in columns))


class Symbols:
    """A table of symbols, sorted by address. Several may share an address or a name."""

    def __init__(self, addresses: Addresses, names: NameTable, kinds: str) -> None:
        """``addresses`` rise; ``names`` and ``kinds`` belong to them. Raises ValueError where there are not as many of each."""
        if not len(addresses) == len(names) == len(kinds):
            raise ValueError("there are not as many names as addresses")
        self.addresses = addresses
        """Of all symbols, rising."""
        self.names = names
        """Of all symbols, by address."""
        self.kinds = kinds
        """One letter a symbol, as nm has them."""
        self.nameless: Addresses = np.zeros(0, np.uint64)
        """Where something begins that belongs to no symbol before it; to be set before ``place`` is asked."""

    @classmethod
    def of(cls, addresses: Addresses, names: Sequence[str], kinds: str) -> Symbols:
        """From symbols in any order."""
        if not np.all(addresses[1:] >= addresses[:-1]):
            order = np.argsort(addresses, kind="stable")
            indices = order.tolist()
            addresses, names, kinds = addresses[order], [names[i] for i in indices], "".join(kinds[i] for i in indices)
        return cls(addresses, NameTable.of(names), kinds)

    @classmethod
    def none(cls) -> Symbols:
        """No symbols at all."""
        return cls(np.zeros(0, np.uint64), NameTable(b""), "")

    def moved(self, distance: int, least: int = 0) -> Symbols:
        """The same so much further on; those below ``least`` stay where they are."""
        if not distance:
            return self
        by = np.uint64(distance % (1 << 64))
        addresses = np.where(self.addresses >= np.uint64(least), self.addresses + by, self.addresses)
        if np.all(addresses[1:] >= addresses[:-1]):
            return Symbols(addresses, self.names, self.kinds)
        return Symbols.of(addresses, self.names.split(), self.kinds)

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Symbol]:
        return map(Symbol, self.names.split(), self.addresses.tolist(), self.kinds)

    def find(self, name: str) -> int | None:
        """The address of a symbol; of the lowest one where the name is not unique."""
        number = self.names.find(name)
        return None if number is None else int(self.addresses[number])

    def __contains__(self, name: str) -> bool:
        return self.names.find(name) is not None

    @cached_property
    def _near(self) -> _Near:
        return _Near.of(self.addresses, self.names.bounds, self.nameless)

    @cached_property
    def _string(self) -> str:
        return self.names.string

    @cached_property
    def _in_order(self) -> array[int]:
        return array("Q", self.addresses.tobytes())

    def place(self, address: int, module: str) -> Place | None:
        """An address by the last symbol that is not above it; by the first of those that share an address.

        Its name is empty where something else has begun since that symbol, which has no name.
        """
        base, stretches, lasts, starts, begins, ends = self._near
        distance = address - base
        stretch = distance >> _STRETCH_BITS
        if 0 <= stretch < stretches:
            index = lasts[stretch]
            while (start := starts[index]) > distance:
                index -= 1
            return _make(Place, (self._string[begins[index] : ends[index]], distance - start, module))
        number = bisect_right(self._in_order, address) - 1
        if number < 0:
            return None
        start = self._in_order[number]
        return Place(self.names[bisect_left(self._in_order, start, 0, number)], address - start, module)

    def search(self, pattern: str) -> Iterator[Symbol]:
        """Those whose name matches a pattern with ``*``, ``?`` and ``[...]``, in any letter case, by address."""
        matches = re.compile(fnmatch.translate(pattern), re.IGNORECASE).match
        return (symbol for symbol in self if matches(symbol.name))
