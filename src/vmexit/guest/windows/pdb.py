"""A PDB: the key of the image that it belongs to, its public symbols, and the stream with its types.

The container is MSF 7.00: a file of blocks, in which each stream is a list of blocks (LLVM's "The PDB File Format"). A file may
be damaged or forged: what makes no sense is a PdbError, and nothing is read beyond what there is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmexit.errors import VmexitError
from vmexit.guest.memory import printable
from vmexit.guest.symbols import Symbols
from vmexit.guest.windows import layout
from vmexit.guest.windows.pe import key_of
from vmexit.guest.windows.profile import Profile
from vmexit.guest.windows.tpi import TypesError, read_types

_MAGIC = b"Microsoft C/C++ MSF 7.00\r\n\x1aDS\0\0\0"
_MOST_FILE = 1 << 30
_MOST_STREAMS = 1 << 16
_NO_STREAM = 0xFFFF
_INFO, _TPI, _DBI = 1, 2, 3
_DBI_HEADER = struct.Struct("<iIIHHHHHHiiiiiIiiHHI")
# Which streams the DBI's last part names.
_OMAP_FROM_SOURCE, _SECTIONS, _ORIGINAL_SECTIONS = 4, 5, 10
_SECTION = 40
_S_PUB32 = 0x110E
_PUBLIC = struct.Struct("<IIH")
_CODE_FLAGS = 3
"""CV_PUBSYMFLAGS: code, or a function."""


class PdbError(VmexitError):
    """It is no PDB, or a damaged one."""


class Streams:
    """The streams of an MSF file."""

    def __init__(self, data: bytes) -> None:
        """Raises PdbError."""
        if data[: len(_MAGIC)] != _MAGIC or len(data) < len(_MAGIC) + 24:
            raise PdbError("it is no PDB (MSF 7.00)")
        self._data = data
        self._block, _, _, length, _, at = struct.unpack_from("<IIIIII", data, len(_MAGIC))
        if self._block not in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            raise PdbError("it is damaged: its blocks have an impossible size")
        if length > len(data) or length % 4:
            raise PdbError("it is cut off, or damaged")
        blocks = self._numbers(self._blocks([at], 4 * -(-length // self._block)))
        directory = self._numbers(self._blocks(blocks, length))
        count = directory[0] if directory else 0
        if not 4 <= count <= min(_MOST_STREAMS, len(directory) - 1):
            raise PdbError("it is damaged: its directory makes no sense")
        self._streams: list[tuple[int, list[int]]] = []
        next_block = 1 + count
        for size in directory[1 : 1 + count]:
            size = 0 if size == 0xFFFF_FFFF else size
            if size > len(data):
                raise PdbError("it is damaged: a stream is longer than the file")
            used = -(-size // self._block)
            self._streams.append((size, directory[next_block : next_block + used]))
            next_block += used

    @staticmethod
    def _numbers(data: bytes) -> list[int]:
        numbers: list[int] = np.frombuffer(data[: len(data) & ~3], "<u4").tolist()
        return numbers

    def _blocks(self, numbers: list[int], length: int) -> bytes:
        """The first bytes of these blocks put together."""
        size = self._block
        if len(numbers) * size < length or any((number + 1) * size > len(self._data) + size - 1 for number in numbers):
            raise PdbError("it is cut off, or damaged")
        return b"".join(self._data[number * size : (number + 1) * size] for number in numbers)[:length]

    def read(self, number: int) -> bytes:
        """A stream's content; empty where there is no such stream. Raises PdbError."""
        if number >= len(self._streams):
            return b""
        size, blocks = self._streams[number]
        data = self._blocks(blocks, size)
        if len(data) < size:
            raise PdbError("it is cut off, or damaged")
        return data


def read_pdb(path: Path) -> Profile:
    """What a PDB says. Raises PdbError, also where it cannot be read."""
    try:
        if path.stat().st_size > _MOST_FILE:
            raise PdbError("it is larger than any PDB of a kernel")
        data = path.read_bytes()
    except OSError as error:
        raise PdbError(error.strerror or str(error)) from None
    return parse_pdb(data)


def parse_pdb(data: bytes) -> Profile:
    """The same, of a file's content. Raises PdbError."""
    streams = Streams(data)
    info, dbi = streams.read(_INFO), streams.read(_DBI)
    if len(info) < 28 or len(dbi) < _DBI_HEADER.size:
        raise PdbError("it does not say which image it belongs to")
    header = _DBI_HEADER.unpack_from(dbi)
    # The image's record has the age of the DBI; that in the stream before counts what was done to the PDB since.
    key = key_of(info[12:28], header[2])
    try:
        types, offsets = read_types(streams.read(_TPI), layout.MEMBERS)
    except TypesError as error:
        raise PdbError(f"its types are damaged: {error}") from None
    return Profile(key, offsets, _symbols(streams, dbi, header), types)


def _symbols(streams: Streams, dbi: bytes, header: tuple[int, ...]) -> Symbols:
    """The public symbols, as RVAs."""
    records, parts, last = header[7], (*header[9:14], header[16]), header[15]
    start = _DBI_HEADER.size + sum(max(part, 0) for part in parts)
    named = struct.unpack_from(f"<{max(last, 0) // 2}H", dbi, start) if start + max(last, 0) <= len(dbi) else ()

    def stream(index: int) -> bytes:
        return streams.read(named[index]) if index < len(named) and named[index] != _NO_STREAM else b""

    moved = _pairs(stream(_OMAP_FROM_SOURCE))
    sections = stream(_ORIGINAL_SECTIONS) if len(moved) else b""
    sections = sections or stream(_SECTIONS)
    bases = [struct.unpack_from("<I", sections, at + 12)[0] for at in range(0, len(sections) - _SECTION + 1, _SECTION)]
    rows: list[tuple[int, str, str]] = []
    for segment, offset, kind, name in _publics(streams.read(records) if records != _NO_STREAM else b""):
        if 0 < segment <= len(bases):
            rva = _moved(moved, bases[segment - 1] + offset)
            if 0 < rva < 1 << 32:
                rows.append((rva, name, kind))
    rows.sort()
    rvas = np.array([rva for rva, _, _ in rows], np.uint64)
    return Symbols.of(rvas, [name for _, name, _ in rows], "".join(kind for _, _, kind in rows))


def _publics(data: bytes) -> Iterator[tuple[int, int, str, str]]:
    """Segment, offset, kind and name of each public symbol."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("<HH", data, at)
        end = at + 2 + length
        if length < 2 or end > len(data):
            return
        if kind == _S_PUB32 and at + 4 + _PUBLIC.size < end:
            flags, offset, segment = _PUBLIC.unpack_from(data, at + 4)
            name = printable(data[at + 4 + _PUBLIC.size : end].partition(b"\0")[0])
            if name:
                yield segment, offset, "T" if flags & _CODE_FLAGS else "D", name
        at = end


def _pairs(data: bytes) -> npt.NDArray[np.uint32]:
    """OMAP: from RVAs before the image was rearranged to those after."""
    return np.frombuffer(data[: len(data) & ~7], "<u4").reshape(-1, 2)


def _moved(moved: npt.NDArray[np.uint32], rva: int) -> int:
    """Where an RVA is now; 0: it was left out."""
    if not len(moved):
        return rva
    index = int(np.searchsorted(moved[:, 0], rva, side="right")) - 1
    if index < 0 or not moved[index, 1]:
        return 0
    return int(moved[index, 1]) + rva - int(moved[index, 0])
