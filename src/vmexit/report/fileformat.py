"""A recording as it lies in a file, which describes itself: whoever reads it needs nothing else.

    8 bytes   MAGIC
    4 bytes   VERSION, little-endian as every number in here
    blocks    each a BLOCK header and its payload

A block is whole or it is not: a header and a payload have a checksum each, so that a file that was cut off, is still being
written, or is damaged can be read up to what is whole. Kinds of blocks that a reader does not know are passed over.

INFO and END hold a JSON object: INFO adds to what is known (see ``merge``), END is the last block and says how it ended.

TRAPS holds traps by columns. Its payload: a CHUNK header, then for each column a COLUMN header and its name in ASCII, then the
data of the columns in the same order. A column is an array of unsigned numbers of 1, 2, 4 or 8 bytes; ``Encoding`` tells how
it is stored. The columns are the fields of struct vmexit_record (agent/wire.h), and whatever more a
trap has.
"""

from __future__ import annotations

import enum
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt

from vmexit.errors import VmexitError

MAGIC = b"\x89VMXIT\r\n"
VERSION = 1
START = struct.Struct("<8sI")
BLOCK = struct.Struct("<4s4sIII")
"""MARK, its kind, the payload's length and CRC-32, and the CRC-32 of these four."""
MARK = b"\xf5VXB"
INFO, TRAPS, END = b"INFO", b"TRAP", b"END."
CHUNK = struct.Struct("<IQQQI")
"""Traps, earliest and latest time (CLOCK_MONOTONIC, ns), records lost up to here since the beginning, columns."""
COLUMN = struct.Struct("<BBBxI")
"""Length of its name, bytes of a number, Encoding, bytes of its data."""

CALLER_GUESSED = 32
"""A bit of the column "flags": "called_from", where the trap's function returns to (0: not known), only looks like it."""
PROCESS_KNOWN = 8
"""A bit of the column "flags": the columns "process" and "thread" hold the numbers of what executed the instruction. Where there
are no such columns, or not this bit, nobody knows."""

MOST_TRAPS = 1 << 20
"""Of a block; no writer makes bigger ones, so a block that claims more is damaged."""
MOST_BYTES = 1 << 28
_MOST_COLUMNS = 64
_WIDTHS = (1, 2, 4, 8)

Numbers = npt.NDArray[np.unsignedinteger[Any]]


class RecordingError(VmexitError):
    """A recording that cannot be written, or is none."""


class DamagedError(Exception):
    """A block that is not what a writer has written."""


class Encoding(enum.IntFlag):
    """How a column is stored. The parts can be combined; DIFFERENCES comes first when it is taken apart again."""

    DIFFERENCES = 1
    """The first number as it is, then by how much each differs from the one before it (modulo its width)."""
    CONSTANT = 2
    """All numbers (or differences) are the same: just one is stored. Otherwise all of them are, by planes (the lowest byte of
    all, then the next byte of all ...), compressed (LZ4, block format)."""


_BY_DIFFERENCES = frozenset({"sequence", "time_ns"})


def merge(known: dict[str, Any], news: Mapping[str, Any]) -> None:
    """Adds to what is known of a recording: objects are merged key by key, anything else is replaced."""
    for key, value in news.items():
        old = known.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            merge(old, value)
        else:
            known[key] = dict(value) if isinstance(value, Mapping) else value


# ---- writing ----


def start() -> bytes:
    """What a file begins with."""
    return START.pack(MAGIC, VERSION)


def block(kind: bytes, payload: bytes) -> bytes:
    """A whole block."""
    head = BLOCK.pack(MARK, kind, len(payload), zlib.crc32(payload), 0)
    return head[:-4] + zlib.crc32(head[:-4]).to_bytes(4, "little") + payload


def text_block(kind: bytes, content: Mapping[str, Any]) -> bytes:
    """A block of kind INFO or END."""
    return block(kind, json.dumps(content, separators=(",", ":")).encode())


def traps_block(columns: Mapping[str, Numbers], lost: int) -> bytes:
    """A block of traps, of which there is at least one; ``columns``: by name, all of the same length, among them "time_ns"."""
    times = columns["time_ns"]
    heads, data = [], []
    for name, values in columns.items():
        encoding, stored = _encode(values, name in _BY_DIFFERENCES)
        heads.append(COLUMN.pack(len(name), values.dtype.itemsize, encoding, len(stored)) + name.encode("ascii"))
        data.append(stored)
    chunk = CHUNK.pack(len(times), int(times.min()), int(times.max()), lost, len(columns))
    return block(TRAPS, b"".join((chunk, *heads, *data)))


def _encode(values: Numbers, by_differences: bool) -> tuple[Encoding, bytes]:
    encoding, first = Encoding(0), b""
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    if by_differences and len(values) > 1:
        encoding |= Encoding.DIFFERENCES
        first, values = values[:1].tobytes(), np.diff(values)
    if (values == values[0]).all():
        return encoding | Encoding.CONSTANT, first + values[:1].tobytes()
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1).T
    return encoding, first + lz4.block.compress(np.ascontiguousarray(planes), store_size=False)


# ---- reading ----


@dataclass(frozen=True, slots=True)
class Head:
    """Of a block."""

    kind: bytes
    length: int
    checksum: int

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Raises DamagedError."""
        if len(data) < BLOCK.size:
            raise DamagedError("it ends within a block's header")
        mark, kind, length, checksum, own = BLOCK.unpack(data[: BLOCK.size])
        if mark != MARK or own != zlib.crc32(data[: BLOCK.size - 4]) or length > MOST_BYTES:
            raise DamagedError("a block's header is damaged")
        return cls(kind, length, checksum)

    def check(self, payload: bytes) -> None:
        """Raises DamagedError unless this is the block's payload."""
        if len(payload) != self.length or zlib.crc32(payload) != self.checksum:
            raise DamagedError("a block's content is damaged")


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """What a block of traps says of itself."""

    count: int
    first_ns: int
    last_ns: int
    lost: int
    columns: int

    @classmethod
    def unpack(cls, data: bytes) -> ChunkHead:
        """Raises DamagedError."""
        if len(data) < CHUNK.size:
            raise DamagedError("a block of traps is too short")
        head = cls(*CHUNK.unpack(data[: CHUNK.size]))
        if not 0 < head.count <= MOST_TRAPS or head.first_ns > head.last_ns or head.columns > _MOST_COLUMNS:
            raise DamagedError("a block of traps makes no sense")
        return head


def read_text(payload: bytes) -> dict[str, Any]:
    """The object of a block of kind INFO or END. Raises DamagedError."""
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        raise DamagedError("a block that should hold JSON does not") from None
    if not isinstance(content, dict):
        raise DamagedError("a block holds no JSON object")
    return content


def read_traps(payload: bytes) -> dict[str, Numbers]:
    """The columns of a block of traps. Raises DamagedError."""
    head = ChunkHead.unpack(payload)
    place, described = CHUNK.size, []
    for _ in range(head.columns):
        if place + COLUMN.size > len(payload):
            raise DamagedError("a column is cut off")
        name_length, width, encoding, length = COLUMN.unpack_from(payload, place)
        place += COLUMN.size
        name = payload[place : place + name_length].decode("ascii", "replace")
        place += name_length
        if width not in _WIDTHS or encoding & ~(Encoding.DIFFERENCES | Encoding.CONSTANT):
            raise DamagedError(f"the column {name!r} is stored in a way that is not known")
        described.append((name, width, Encoding(encoding), length))
    columns = {}
    for name, width, encoding, length in described:
        columns[name] = _decode(payload[place : place + length], head.count, width, encoding)
        place += length
    if "time_ns" not in columns:
        raise DamagedError("traps without a time")
    return columns


def _decode(stored: bytes, count: int, width: int, encoding: Encoding) -> Numbers:
    dtype = np.dtype(f"<u{width}")
    first = stored[:width]
    if encoding & Encoding.DIFFERENCES:
        stored, count = stored[width:], count - 1
    if encoding & Encoding.CONSTANT:
        if len(stored) != width:
            raise DamagedError("a number is cut off")
        values: Numbers = np.full(count, np.frombuffer(stored, dtype)[0])
    else:
        try:
            planes = lz4.block.decompress(stored, uncompressed_size=count * width)
        except (lz4.block.LZ4BlockError, ValueError):
            raise DamagedError("a column cannot be unpacked") from None
        if len(planes) != count * width:
            raise DamagedError("a column has another length than the others")
        values = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(width, count).T).view(dtype).reshape(count)
    if not encoding & Encoding.DIFFERENCES:
        return values
    if len(first) != width:
        raise DamagedError("a number is cut off")
    return np.cumsum(np.concatenate((np.frombuffer(first, dtype), values)), dtype=dtype)
