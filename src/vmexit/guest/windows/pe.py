"""A PE32+ image as it lies in memory: headers, exports, the CodeView record, functions (PE Format, Microsoft Learn).

All of it is the guest's and may lie: every count and offset is bounded, and what cannot be read is an UnreadableError or a
PeError, or missing from a list.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmexit.errors import VmexitError
from vmexit.guest.memory import PAGE, UnreadableError, VirtualMemory, printable

_MACHINE_AMD64 = 0x8664
_PE32_PLUS = 0x20B
_MOST_SIZE = 512 << 20
_MOST_SECTIONS = 96
_MOST_EXPORTS = 1 << 16
_MOST_DIRECTORY = 8 << 20
_MOST_DEBUG = 64
_LONGEST_NAME = 4096
_LONGEST_PATH = 260
_EXPORT, _EXCEPTION, _DEBUG = 0, 3, 6
_CODEVIEW = 2
_EXECUTABLE = 1 << 29
FUNCTION = struct.Struct("<III")
"""RUNTIME_FUNCTION: RVAs of a function's begin, end and unwind information."""


class PeError(VmexitError):
    """What is there is no PE32+ image, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section; ``start`` counts from the image's base."""

    name: str
    start: int
    size: int
    is_code: bool


class CodeView(NamedTuple):
    """The RSDS record: which PDB belongs to the image."""

    guid: bytes
    """As it lies in memory, 16 bytes."""
    age: int
    file: str

    @property
    def key(self) -> str:
        """GUID and age as symbol servers write them."""
        return key_of(self.guid, self.age)


def key_of(guid: bytes, age: int) -> str:
    """GUID and age as symbol servers write them: 32 digits and, without a gap, the age."""
    first, second, third = struct.unpack_from("<IHH", guid)
    return f"{first:08X}{second:04X}{third:04X}{guid[8:].hex().upper()}{age:X}"


class Image:
    """The image at one address."""

    def __init__(self, memory: VirtualMemory, base: int) -> None:
        """Reads the headers. Raises UnreadableError, PeError."""
        self._memory = memory
        self.base = base
        head = memory.read(base, PAGE)
        if head[:2] != b"MZ":
            raise PeError(f"no image begins at {base:#x}")
        (start,) = struct.unpack_from("<I", head, 0x3C)
        # The headers of all kernel images lie in their first page.
        if start % 4 or not 0x40 <= start <= PAGE - 0x108 - 0x28 or head[start : start + 4] != b"PE\0\0":
            raise PeError(f"the image at {base:#x} has no PE header")
        machine, sections, self.timestamp, _, _, optional, _ = struct.unpack_from("<HHIIIHH", head, start + 4)
        magic = struct.unpack_from("<H", head, start + 24)[0]
        if machine != _MACHINE_AMD64 or magic != _PE32_PLUS or sections > _MOST_SECTIONS:
            raise PeError(f"the image at {base:#x} is none for x86-64")
        self.size, self._headers_size = struct.unpack_from("<II", head, start + 24 + 56)
        if not PAGE <= self.size <= _MOST_SIZE:
            raise PeError(f"the image at {base:#x} has an impossible size")
        directories = min(struct.unpack_from("<I", head, start + 24 + 108)[0], 16)
        self._directories = [struct.unpack_from("<II", head, start + 24 + 112 + 8 * index) for index in range(directories)]
        self.identity = head[: start + 24 + 60]
        """The first bytes, which differ between images: the time stamp and the size are among them."""
        self.sections = tuple(self._sections(head, start + 24 + optional, sections))
        self._code_edges: list[int] = []
        """Where code begins, ends, begins again and so on."""
        for start, end in sorted((each.start, each.start + each.size) for each in self.sections if each.is_code):
            if self._code_edges and start <= self._code_edges[-1]:
                self._code_edges[-1] = max(self._code_edges[-1], end)
            else:
                self._code_edges += [start, end]

    @staticmethod
    def _sections(head: bytes, at: int, count: int) -> list[Section]:
        sections = []
        for offset in range(at, min(at + 40 * count, PAGE - 39), 40):
            name, size, start = struct.unpack_from("<8sII", head, offset)
            (flags,) = struct.unpack_from("<I", head, offset + 36)
            sections.append(Section(printable(name.rstrip(b"\0")), start, size, bool(flags & _EXECUTABLE)))
        return sections

    def is_code(self, rva: int) -> bool:
        """Whether it lies in a section that can be executed."""
        return bisect_right(self._code_edges, rva) % 2 == 1

    def _directory(self, index: int) -> tuple[int, int]:
        """Where a data directory lies, and its size; 0, 0: there is none, or it is impossible."""
        if index >= len(self._directories):
            return 0, 0
        start, size = self._directories[index]
        if not start or not 0 < size <= _MOST_DIRECTORY or start + size > self.size:
            return 0, 0
        return start, size

    def _read(self, start: int, size: int) -> bytes:
        """So many bytes; zeros for the pages that are not there."""
        data = b""
        while len(data) < size:
            at = self.base + start + len(data)
            length = min(size - len(data), PAGE - at % PAGE)
            try:
                data += self._memory.read(at, length)
            except UnreadableError:
                data += bytes(length)
        return data

    @cached_property
    def _export_data(self) -> tuple[int, bytes]:
        start, size = self._directory(_EXPORT)
        # The names may lie anywhere in the image; linkers put them into the directory.
        return start, self._read(start, size) if size >= 40 else b""

    @property
    def name(self) -> str:
        """What the image calls itself in its export directory ("ntoskrnl.exe"); empty where it has none."""
        start, data = self._export_data
        if not data:
            return ""
        return _text(data, struct.unpack_from("<I", data, 12)[0] - start, _LONGEST_PATH)

    @cached_property
    def exports(self) -> dict[str, int]:
        """Names and RVAs of what the image gives to others; without what it only passes on from another image."""
        start, data = self._export_data
        if not data:
            return {}
        functions, names, table_at, names_at, ordinals_at = struct.unpack_from("<IIIII", data, 20)
        if functions > _MOST_EXPORTS or names > _MOST_EXPORTS:
            return {}
        table = _array(data, table_at - start, functions, np.dtype("<u4"))
        places = _array(data, names_at - start, names, np.dtype("<u4"))
        ordinals = _array(data, ordinals_at - start, names, np.dtype("<u2"))
        found: dict[str, int] = {}
        for place, ordinal in zip(places.tolist(), ordinals.tolist(), strict=False):
            if ordinal >= len(table):
                continue
            rva = int(table[ordinal])
            name = _text(data, place - start, _LONGEST_NAME)
            if name and 0 < rva < self.size and not start <= rva < start + len(data):
                found.setdefault(name, rva)
        return found

    @cached_property
    def codeview(self) -> CodeView | None:
        """The record that names the image's PDB; None where there is none, or it is not in memory."""
        start, size = self._directory(_DEBUG)
        data = self._read(start, min(size, _MOST_DEBUG * 28))
        for offset in range(0, len(data) - 27, 28):
            kind, length, rva = struct.unpack_from("<III", data, offset + 12)
            if kind != _CODEVIEW or not 24 < length <= 24 + _LONGEST_PATH or not 0 < rva <= self.size - length:
                continue
            record = self._read(rva, length)
            if record[:4] == b"RSDS":
                return CodeView(record[4:20], int.from_bytes(record[20:24], "little"), _text(record, 24, _LONGEST_PATH))
        return None

    @cached_property
    def functions(self) -> npt.NDArray[np.uint32]:
        """The rows of the function table (begin, end, unwind information), by their begin; leaf functions are not in it."""
        start, size = self._directory(_EXCEPTION)
        data = self._read(start, size - size % FUNCTION.size)
        rows = np.frombuffer(data, "<u4").reshape(-1, 3)
        rows = rows[(rows[:, 0] < rows[:, 1]) & (rows[:, 1] <= self.size) & (rows[:, 2] < self.size)]
        in_order: npt.NDArray[np.uint32] = rows[np.argsort(rows[:, 0], kind="stable")]
        return in_order

    def function_at(self, rva: int) -> tuple[int, int, int] | None:
        """The row of the function table that an RVA is in."""
        index = bisect_right(self._begins, rva) - 1
        if index < 0:
            return None
        begin, end, unwind = self.functions[index].tolist()
        return (begin, end, unwind) if rva < end else None

    @cached_property
    def _begins(self) -> array[int]:
        # It is searched in a tenth of the time that numpy's takes.
        return array("I", self.functions[:, 0].tobytes())


def _array(data: bytes, offset: int, count: int, kind: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """As many of ``count`` numbers as lie within the data."""
    if not 0 <= offset <= len(data):
        return np.zeros(0, kind)
    return np.frombuffer(data, kind, min(count, (len(data) - offset) // kind.itemsize), offset)


def _text(data: bytes, offset: int, most: int) -> str:
    if not 0 <= offset < len(data):
        return ""
    return printable(data[offset : offset + most].partition(b"\0")[0])
