"""The kernel's own symbol table (kernel/kallsyms.c), found by what it looks like: no symbol leads to it.

scripts/kallsyms.c writes it as six tables. Names are compressed: each is a length and so many bytes, each of which stands for a
token of one or more characters; ``token_table`` holds the 256 tokens, ``token_index`` where each begins, ``markers`` where every
256th name begins. Addresses are 32-bit offsets, in one of three layouts (``_addresses``). All of it may be damaged: whatever
does not fit together is a KallsymsError.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmexit.errors import VmexitError
from vmexit.guest.linux.image import LINKED_AT, Image
from vmexit.guest.nametable import NameTable
from vmexit.guest.symbols import Addresses, Symbols

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_NAME, _NOTHING = _TOKENS, _TOKENS + 1
"""What the bytes of a name's length are read as: the begin of a name, and nothing."""
_NAMES_A_MARKER = 256
_MOST_SYMBOLS = 4_000_000
_MOST_TOKEN = 128
_MOST_NAMES = 16 << 20
"""Bytes that may lie between the first name and the tokens; 4 MB in a kernel of today."""
_USUAL_MARKERS = 1 << 20
"""Bytes; in a kernel of today 1.4 KB of markers, and from Linux 6.2 on half a megabyte behind them that is not needed here."""
_MOST_TEXT = 64 << 20
"""Bytes of all names together; 2 MB in a kernel of today."""
_FEWEST_SYMBOLS = 1000
_MOST_TRIES = 1000
"""Places that look like a table before one gives up; in a real kernel there are two or three."""
_KERNEL_HALF = 0xFFFF_8000_0000_0000


class KallsymsError(VmexitError):
    """There is no symbol table in an image, or none that can be read."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """Offsets into the image's data."""

    count_at: int
    names: int
    count: int
    markers: list[int]
    """Where every 256th name begins, counted from ``names``."""
    end: int
    """Behind token_index."""


def read_symbols(image: Image) -> Symbols:
    """All symbols of a kernel, at the addresses that the image has. Raises KallsymsError."""
    complaint = "there is no symbol table in this kernel (CONFIG_KALLSYMS)"
    for token_table, tokens, end in _token_tables(image.data):
        try:
            tables = _locate(image.data, token_table, end)
            names, kinds = _names(image.data, tables, tokens)
        except KallsymsError as error:
            complaint = str(error)
            continue
        addresses = _addresses(image, tables, names)
        if addresses is not None:
            return Symbols(addresses, NameTable(names), kinds)
        complaint = "the addresses of this kernel's symbols are laid out in a way that is not known here"
    raise KallsymsError(complaint)


def _aligned(offset: int, unit: int = 8) -> int:
    return -(-offset // unit) * unit


def _token_tables(data: bytes) -> Iterator[tuple[int, list[bytes], int]]:
    """Where there may be a token_table, its tokens, and the end of the token_index behind it."""
    at = data.find(b"\0" + _DIGITS)
    for _ in range(_MOST_TRIES):
        if at < 0:
            return
        # The digits stand for themselves; the tokens before theirs are those of the characters below "0".
        start = at + 1
        for _ in range(ord("0")):
            start = data.rfind(b"\0", max(0, start - _MOST_TOKEN - 2), start - 1) + 1
            if start <= 0:
                break
        # Zeros before the table are what it is aligned with; the first token is not empty in any kernel built so far.
        found = _tokens(data, start) if start > 0 else None
        if found is not None:
            yield start, *found
        at = data.find(b"\0" + _DIGITS, at + 1)


def _tokens(data: bytes, start: int) -> tuple[list[bytes], int] | None:
    """The tokens that begin there and the end of their index, if there are both and the one confirms the other."""
    pieces = data[start : start + _TOKENS * _MOST_TOKEN].split(b"\0", _TOKENS)
    if len(pieces) <= _TOKENS:
        return None
    pieces = pieces[:_TOKENS]
    offsets = list(itertools.accumulate((len(piece) + 1 for piece in pieces), initial=0))
    index = struct.pack(f"<{_TOKENS}H", *(offset & 0xFFFF for offset in offsets[:-1]))
    for unit in (8, 4):
        at = _aligned(start + offsets[-1], unit)
        if data[at : at + len(index)] == index:
            return pieces, at + len(index)
    return None


def _locate(data: bytes, token_table: int, end: int) -> _Tables:
    """Names and their number: by the markers, which lie between the names and the tokens."""
    # Not far before the tokens in every kernel built so far.
    for most in (_USUAL_MARKERS, _MOST_NAMES):
        found = _locate_after(data, max(0, token_table - most) & ~3, token_table, end)
        if found is not None:
            return found
    raise KallsymsError("the symbol table of this kernel is damaged")


def _locate_after(data: bytes, first: int, token_table: int, end: int) -> _Tables | None:
    """The same, where the markers lie at ``first`` or behind."""
    words = np.frombuffer(data, np.uint32, (token_table - first) // 4, first)
    # A marker counts the bytes of 256 names: a length and one token at least, two bytes of length and 512 tokens at most.
    # What is less wraps around, and is too much.
    is_step = np.diff(words) - np.uint32(2 * _NAMES_A_MARKER) <= np.uint32(512 * _NAMES_A_MARKER)
    ends = np.flatnonzero(~is_step)
    starts = np.flatnonzero((words[:-1] == 0) & is_step)
    for start in starts[: -_MOST_TRIES - 1 : -1].tolist():
        stop = int(ends[np.searchsorted(ends, start)]) if len(ends) and ends[-1] > start else len(is_step)
        markers = words[start : stop + 1].tolist()
        if len(markers) * _NAMES_A_MARKER < _FEWEST_SYMBOLS:
            continue
        # What follows may look like one marker more.
        for most in (len(markers), len(markers) - 1):
            found = _before(data, first + start * 4, markers[:most], end)
            if found is not None:
                return found
    return None


def _before(data: bytes, markers_at: int, markers: list[int], end: int) -> _Tables | None:
    """The number of names and the names, right before their markers."""
    last = markers[-1]
    tries = 0
    for names in range(markers_at - last & ~3, max(4, markers_at - last - 515 * _NAMES_A_MARKER), -4):
        for count_at in (names - 8, names - 4):
            (count,) = struct.unpack_from("<I", data, count_at) if count_at >= 0 else (0,)
            if not (len(markers) - 1) * _NAMES_A_MARKER < count <= min(len(markers) * _NAMES_A_MARKER, _MOST_SYMBOLS):
                continue
            if _confirms(data, names, markers, count, markers_at):
                return _Tables(count_at, names, count, markers, end)
            tries += 1
            if tries == _MOST_TRIES:
                return None
    return None


def _confirms(data: bytes, names: int, markers: list[int], count: int, markers_at: int) -> bool:
    """Whether a walk over the names comes by the first and the last markers and ends before them."""
    at = names
    for marker in markers[1:3]:
        at = _skip(data, at, _NAMES_A_MARKER)
        if at != names + marker:
            return False
    stop = _skip(data, names + markers[-1], count - (len(markers) - 1) * _NAMES_A_MARKER)
    return stop <= markers_at < stop + 8


def _skip(data: bytes, at: int, count: int) -> int:
    """Where the name begins that is so many names behind the one at ``at``; the data's end at most."""
    for _ in range(count):
        if at >= len(data):
            break
        length, at = data[at], at + 1
        # From Linux 6.1 on a length of more than 127 has a second byte.
        if length >= 0x80 and at < len(data):
            length, at = length & 0x7F | data[at] << 7, at + 1
        at += length
    return min(at, len(data))


def _behind(content: npt.NDArray[np.uint8], names: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the names end that begin there; what lies behind the content counts as its last byte."""
    last = len(content) - 1
    length = content[np.minimum(names, last)].astype(np.int64)
    second = content[np.minimum(names + 1, last)].astype(np.int64)
    # As in _skip.
    return names + 1 + np.where(length >= 0x80, (length & 0x7F | second << 7) + 1, length)


def _codes(data: bytes, tables: _Tables) -> npt.NDArray[np.uint16]:
    """All names as one row of tokens, with _NAME before each."""
    content = np.frombuffer(data, np.uint8)
    groups = np.array(tables.markers, np.int64) + tables.names
    # The names of all markers side by side: a step for each of 256, not for each name.
    rows = np.empty((_NAMES_A_MARKER, len(groups)), np.int64)
    at = groups
    for row in rows:
        row[:] = at
        at = _behind(content, at)
    names = rows.T.ravel()[: tables.count]
    end = int(_behind(content, names[-1:])[0])
    if np.any(at[:-1] != groups[1:]) or end > len(data):
        raise KallsymsError("the symbol table of this kernel is damaged: its names are not where it says")
    codes = content[tables.names : end].astype(np.uint16)
    names -= tables.names
    long = names[codes[names] >= 0x80] + 1
    codes[names] = _NAME
    codes[long] = _NOTHING
    return codes


def _names(data: bytes, tables: _Tables, tokens: list[bytes]) -> tuple[bytes, str]:
    """The names, a zero byte behind each, and their types, one letter each."""
    codes = _codes(data, tables)
    letters = np.frombuffer(b"".join([*tokens, b"\0"]), np.uint8)
    # Of _NAME and _NOTHING, too.
    lengths = np.array([*map(len, tokens), 1, 0], np.int32)
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    each = lengths[codes]
    ends = np.cumsum(each, dtype=np.int64)
    if ends[-1] > _MOST_TEXT:
        raise KallsymsError("the symbol table of this kernel is damaged: its names are too long")
    places = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts[codes] - (ends - each).astype(np.int32), each)
    text = letters[places]
    begins = np.flatnonzero(text == 0)
    if np.diff(begins, append=len(text)).min() < 3:
        raise KallsymsError("the symbol table of this kernel is damaged: there is a symbol without a name")
    is_name = np.ones(len(text), bool)
    # The zero byte before a name is the one behind the name before it.
    is_name[0] = False
    is_name[begins + 1] = False
    names = text[is_name].tobytes() + b"\0"
    if not names.isascii():
        names = names.decode("latin-1").encode("utf-8")
    return names, text[begins + 1].tobytes().decode("latin-1")


def _addresses(image: Image, tables: _Tables, names: bytes) -> Addresses | None:
    """The symbols' addresses, in whichever layout gives _text and the banner their due."""
    text, banner = (_number_of(name, names) for name in (b"_text", b"linux_banner"))
    if text is None or banner is None:
        return None
    for at, base_at in _layouts(tables):
        if at < 0 or at + 4 * tables.count > len(image.data):
            continue
        offsets = np.frombuffer(image.data, np.int32, tables.count, at).astype(np.int64)
        if base_at is None:
            start = image.address_of(at)
            if start is None:
                continue
            places = np.arange(tables.count, dtype=np.uint64) * np.uint64(4) + np.uint64(start)
            addresses = places + offsets.astype(np.uint64)
        else:
            if base_at + 8 > len(image.data):
                continue
            (base,) = struct.unpack_from("<Q", image.data, base_at)
            if base < _KERNEL_HALF:
                continue
            # Not negative: the value itself (CONFIG_KALLSYMS_ABSOLUTE_PERCPU); else counted from one below the base.
            relative = np.uint64(base - 1) - offsets.astype(np.uint64)
            addresses = np.where(offsets >= 0, offsets.astype(np.uint64), relative)
        if _is_plausible(image, addresses, text, banner):
            return addresses
    return None


def _layouts(tables: _Tables) -> Iterator[tuple[int, int | None]]:
    """Where the offsets may lie, and the address that they count from; None: each counts from its own place."""
    for unit in (8, 4):
        size = _aligned(4 * tables.count, unit)
        # Up to Linux 6.3: offsets, relative_base, num_syms, names ...; later: ... token_index, offsets, relative_base.
        for base_at in (tables.count_at - 8, tables.count_at - unit - 8 & ~7):
            yield base_at - _aligned(4 * tables.count), base_at
        after = _aligned(tables.end, unit)
        yield after, _aligned(after + size, 8)
    for unit in (8, 4):
        yield _aligned(tables.end, unit), None


def _number_of(name: bytes, names: bytes) -> int | None:
    """Which of the names it is; of several the first."""
    at = (b"\0" + names).find(b"\0" + name + b"\0")
    return None if at < 0 else names.count(b"\0", 0, at)


def _is_plausible(image: Image, addresses: Addresses, text: int, banner: int) -> bool:
    """Whether they rise, _text is where kernels begin, and the banner is what lies at its own address."""
    if np.any(addresses[1:] < addresses[:-1]):
        return False
    start = int(addresses[text])
    if start < LINKED_AT or start % 0x20_0000:
        return False
    return image.read(int(addresses[banner]), 14) == b"Linux version "
