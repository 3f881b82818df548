"""Many names as one piece of text, and where each of them stands."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint32]

_MOST_ALIKE = 64
"""Names that may have one hash; in a table that nobody has made for that purpose hardly ever two."""


class NameTable:
    """Names by number, and numbers by name. Several names may be the same.

    What is made to search in the text is made when it is first needed: most of a kernel's names nobody ever asks for.
    """

    def __init__(self, text: bytes, index: tuple[Numbers, Numbers] | None = None) -> None:
        """``text``: in UTF-8, a zero byte behind each name. ``index``: what ``index`` of the same text has given.

        Raises ValueError where the text is none, and where the index is of another.
        """
        if not text.isascii():
            text.decode("utf-8")
        self.text = text
        self._count = text.count(b"\0")
        if text and text[-1]:
            raise ValueError("the last name has no end")
        if index is not None:
            hashes, order = index
            if not len(hashes) == len(order) == self._count or order.max(initial=0) > max(self._count - 1, 0):
                raise ValueError("the index does not belong to these names")
            self.index = index

    @classmethod
    def of(cls, names: Sequence[str]) -> NameTable:
        """From names one by one."""
        text = "\0".join([*names, ""])
        if text.count("\0") != len(names):
            text = "\0".join([*(name.replace("\0", "\ufffd") for name in names), ""])
        return cls(text.encode("utf-8", "backslashreplace"))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> str:
        return self.string[int(self.bounds[number]) : int(self.bounds[number + 1]) - 1]

    @cached_property
    def string(self) -> str:
        """The text, decoded."""
        return self.text.decode("utf-8")

    def split(self) -> list[str]:
        """All names."""
        return self.string.split("\0")[:-1]

    @cached_property
    def bounds(self) -> Numbers:
        """Where in the string each name begins, and last the string's end; between two names there is a zero."""
        is_ascii = len(self.string) == len(self.text)
        characters = np.frombuffer(self.text, np.uint8) if is_ascii else np.frombuffer(self.string.encode("utf-32-le"), np.uint32)
        return np.concatenate(([0], np.flatnonzero(characters == 0) + 1)).astype(np.uint32)

    @cached_property
    def index(self) -> tuple[Numbers, Numbers]:
        """Rising hashes of the names, and the number of the name that has each; it can be kept with the text."""
        hashes = np.fromiter(map(zlib.crc32, self.text.split(b"\0")[:-1]), np.uint64, self._count)
        both = np.sort(hashes << np.uint64(32) | np.arange(self._count, dtype=np.uint64))
        return (both >> np.uint64(32)).astype(np.uint32), both.astype(np.uint32)

    @cached_property
    def _hashes(self) -> array[int]:
        # Such an array answers in a tenth of the time that numpy's takes for one number.
        return array("I", self.index[0].tobytes())

    def find(self, name: str) -> int | None:
        """The number of a name; of several that are the same the lowest. None: there is none."""
        value = zlib.crc32(name.encode("utf-8", "backslashreplace"))
        hashes, order = self._hashes, self.index[1]
        first = bisect_left(hashes, value)
        for place in range(first, min(first + _MOST_ALIKE, len(hashes))):
            if hashes[place] != value:
                break
            if self[number := int(order[place])] == name:
                return number
        return None
