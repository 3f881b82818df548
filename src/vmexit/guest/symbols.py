"""Names of addresses: which symbol an address lies in, where a symbol is, and which symbols match a pattern."""

from __future__ import annotations

import fnmatch
import re
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_STRETCH_BITS = 8
_MOST_BYTES = 128 << 20
_MOST_ALIKE = 64
"""Names that may have one hash; in a table that nobody has made for that purpose hardly ever two."""
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


Numbers = npt.NDArray[np.uint64]
Index = npt.NDArray[np.uint32]


class _Near:
    """Where symbols begin that are near to each other: nearly all of a table, as a search finds them quickest.

    What lies far below the others (per-CPU variables, which begin at 0) is left out, and so is what lies far above. Of symbols
    that share an address only the first is here. For each stretch of so many bytes it is known which symbol is the last to
    begin within it or before.
    """

    def __init__(self, addresses: Numbers) -> None:
        middle = int(addresses[len(addresses) // 2]) if len(addresses) else 0
        low, high = np.uint64(max(middle - _MOST_BYTES, 0)), np.uint64(min(middle + _MOST_BYTES, (1 << 64) - 1))
        first, last = int(np.searchsorted(addresses, low, "left")), int(np.searchsorted(addresses, high, "right"))
        near = addresses[first:last]
        is_new = np.ones(len(near), bool)
        np.not_equal(near[1:], near[:-1], out=is_new[1:])
        self.base = int(near[0]) if len(near) else 0
        starts = (near[is_new] - np.uint64(self.base)).astype(np.uint32)
        stretches = starts >> np.uint32(_STRETCH_BITS)
        # One more than the last that begins in each.
        behind = np.cumsum(np.bincount(stretches)) if len(near) else np.zeros(0)
        self.count = len(behind)
        self.starts = array("I", starts.tobytes())
        self.lasts = array("I", (behind - 1).astype(np.uint32).tobytes())
        self.numbers = array("I", (np.flatnonzero(is_new) + first).astype(np.uint32).tobytes())
        """Which symbol of the table each is."""


class Symbols:
    """A table of symbols, sorted by address. Several may share an address or a name.

    The names are one piece of text, and what is made to search in it is made when it is first needed: most of a kernel's symbols
    nobody ever asks for.
    """

    def __init__(self, addresses: Numbers, text: bytes, kinds: str, index: tuple[Index, Index] | None = None) -> None:
        """``addresses`` rise; ``text``: the names in UTF-8, a zero byte behind each. ``index``: what ``index`` of the same names
        has given. Raises ValueError where there are not as many of each."""
        if not len(addresses) == text.count(b"\0") == len(kinds) or text[-1:] not in (b"", b"\0"):
            raise ValueError("there are not as many names as addresses")
        if index is not None and not (len(index[0]) == len(index[1]) == len(addresses) > index[1].max(initial=0)):
            raise ValueError("the index does not belong to these names")
        self._array = addresses
        self._text = text
        self._kinds = kinds
        if index is not None:
            self.index = index

    @classmethod
    def of(cls, addresses: Numbers, names: Sequence[str], kinds: str) -> Symbols:
        """From symbols in any order."""
        if not np.all(addresses[1:] >= addresses[:-1]):
            order = np.argsort(addresses, kind="stable")
            indices = order.tolist()
            addresses, names, kinds = addresses[order], [names[i] for i in indices], "".join(kinds[i] for i in indices)
        text = "\0".join([*names, ""])
        if text.count("\0") != len(names):
            text = "\0".join([*(name.replace("\0", "\ufffd") for name in names), ""])
        return cls(addresses, text.encode("utf-8", "backslashreplace"), kinds)

    @classmethod
    def none(cls) -> Symbols:
        """No symbols at all."""
        return cls(np.zeros(0, np.uint64), b"", "")

    def moved_to(self, addresses: Numbers) -> Symbols:
        """The same symbols at other addresses, one for each."""
        if not np.all(addresses[1:] >= addresses[:-1]):
            return Symbols.of(addresses, self.names, self._kinds)
        return Symbols(addresses, self._text, self._kinds, self.__dict__.get("index"))

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Symbol]:
        return map(Symbol, self.names, self._array.tolist(), self._kinds)

    @property
    def addresses(self) -> Numbers:
        """Of all symbols, rising."""
        return self._array

    @property
    def text(self) -> bytes:
        """The names of all symbols, by address, in UTF-8, with a zero byte behind each."""
        return self._text

    @property
    def names(self) -> list[str]:
        """Of all symbols, by address."""
        return self._text.decode("utf-8", "replace").split("\0")[:-1]

    @property
    def kinds(self) -> str:
        """One letter a symbol, as nm has them."""
        return self._kinds

    @cached_property
    def _addresses(self) -> array[int]:
        # Such an array answers in a tenth of the time that numpy's takes for one address, and takes a sixth of a list's memory:
        # an address that is new is not in the processor's cache.
        return array("Q", self._array.tobytes())

    @cached_property
    def _ends(self) -> array[int]:
        """Where in the text each name ends; before them one that ends where the first begins."""
        ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == 0)
        return array("q", np.concatenate(([-1], ends)).astype(np.int64).tobytes())

    @cached_property
    def _near(self) -> _Near:
        return _Near(self._array)

    @cached_property
    def index(self) -> tuple[Index, Index]:
        """Rising hashes of the names, and which name has each; it can be kept with the names."""
        hashes = np.fromiter(map(zlib.crc32, self._text.split(b"\0")[:-1]), np.uint32, len(self))
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        return hashes[order], order

    @cached_property
    def _hashes(self) -> array[int]:
        return array("I", self.index[0].tobytes())

    def _name(self, number: int) -> bytes:
        return self._text[self._ends[number] + 1 : self._ends[number + 1]]

    def find(self, name: str) -> int | None:
        """The address of a symbol; of the lowest one where the name is not unique."""
        wanted = name.encode("utf-8", "backslashreplace")
        value = zlib.crc32(wanted)
        hashes, order = self._hashes, self.index[1]
        first = bisect_left(hashes, value)
        for place in range(first, min(first + _MOST_ALIKE, len(hashes))):
            if hashes[place] != value:
                break
            # Of several of one name the first comes first.
            if self._name(number := int(order[place])) == wanted:
                return int(self._array[number])
        return None

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def at(self, address: int) -> tuple[str, int] | None:
        """The last symbol that is not above the address, and the distance to it; the first of those that share an address."""
        near = self._near
        offset = address - near.base
        stretch = offset >> _STRETCH_BITS
        if 0 <= stretch < near.count:
            index, starts = near.lasts[stretch], near.starts
            while (start := starts[index]) > offset:
                index -= 1
            number, distance = near.numbers[index], offset - start
        else:
            number = bisect_right(self._addresses, address) - 1
            if number < 0:
                return None
            found = self._addresses[number]
            number, distance = bisect_left(self._addresses, found, 0, number), address - found
        ends = self._ends
        return self._text[ends[number] + 1 : ends[number + 1]].decode("utf-8", "replace"), distance

    def search(self, pattern: str) -> Iterator[Symbol]:
        """Those whose name matches a pattern with ``*``, ``?`` and ``[...]``, in any letter case, by address."""
        matches = re.compile(fnmatch.translate(pattern), re.IGNORECASE).match
        rows = zip(self.names, self._array.tolist(), self._kinds, strict=True)
        return (Symbol(*row) for row in rows if matches(row[0]))
