"""The kernel's trace buffers as per_cpu/cpuN/trace_pipe_raw gives them: pages of events, laid out as its own files say.

Nothing is taken on trust: a page that makes no sense is read up to the place where it stops making any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.unsignedinteger]

# Documentation/trace/ring-buffer-design.rst and events/header_event: the first 5 bits of an entry say what it is, or how long.
_LONG, _LONGEST, _PADDING, _TIME_EXTEND, _TIME_STAMP = 0, 28, 29, 30, 31
_TYPE_BITS, _DELTA_BITS = 5, 27
_WORD = 4
# In the header's commit beside the length (include/linux/ring_buffer.h): events were lost before this page; how many stands
# behind the data.
_LENGTH = 0xF_FFFF
_MISSED, _MISSED_STORED = 1 << 31, 1 << 30
_ABSOLUTE_BITS = 59
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

_FIELD = re.compile(r"field:([^;]*);\s*offset:(\d+);\s*size:(\d+);")
_ID = re.compile(r"^ID:\s*(\d+)$", re.MULTILINE)


class FormatError(ValueError):
    """A format file that is not what one could read events by."""


@dataclass(frozen=True, slots=True)
class Field:
    """Where a number stands, in bytes."""

    offset: int
    size: int


def _fields(text: str) -> dict[str, Field]:
    found = {}
    for declaration, offset, size in _FIELD.findall(text):
        name = re.sub(r"\[.*\]$", "", declaration).split()[-1] if declaration.split() else ""
        found[name] = Field(int(offset), int(size))
    return found


@dataclass(frozen=True, slots=True)
class EventFormat:
    """Of one tracepoint: events/SYSTEM/NAME/format."""

    number: int
    """What its entries are known by (common_type)."""
    fields: Mapping[str, Field]


def parse_event_format(text: str, *needed: str) -> EventFormat:
    """Raises FormatError where a field is missing that is needed, or is no number of 1, 2, 4 or 8 bytes."""
    number, fields = _ID.search(text), _fields(text)
    for name in ("common_type", "common_pid", *needed):
        if name not in fields or fields[name].size not in (1, 2, 4, 8):
            raise FormatError(f"it has no number '{name}'")
    if number is None:
        raise FormatError("it has no ID")
    return EventFormat(int(number[1]), fields)


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Of all pages: events/header_page."""

    timestamp: Field
    commit: Field
    data: Field

    @property
    def size(self) -> int:
        """Of a page, in bytes."""
        return self.data.offset + self.data.size


def parse_page_format(text: str) -> PageFormat:
    """Raises FormatError for a header that cannot be read by."""
    fields = _fields(text)
    try:
        found = PageFormat(fields["timestamp"], fields["commit"], fields["data"])
    except KeyError as error:
        raise FormatError(f"it has no field {error}") from None
    if found.timestamp.size != 8 or found.commit.size not in (4, 8) or found.data.offset % _WORD:
        raise FormatError("its fields have other sizes than were ever seen")
    return found


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of the same length that follow upon each other."""

    times: npt.NDArray[np.uint64]
    page: bytes
    start: int
    """Of the first one's data in the page."""
    stride: int
    size: int
    """Of each one's data, in bytes."""

    def column(self, field: Field) -> Numbers | None:
        """One field of all of them, as unsigned numbers; None where their data is too short to have it."""
        if field.offset + field.size > self.size:
            return None
        start = self.start + field.offset
        return np.ndarray((len(self.times),), f"<u{field.size}", self.page, start, (self.stride,))


@dataclass(frozen=True, slots=True)
class Page:
    """What a page held."""

    entries: list[Entries]
    lost: int
    """Events that the kernel had no room for before this page, as far as it says; at least 1 where there were any."""
    is_short: bool
    """Half of it is empty: it may be where the kernel is writing."""
    damaged: bool
    """Something did not make sense; what came before it is there."""


def read_page(page: bytes, layout: PageFormat) -> Page:
    """Takes a page apart, whatever it holds."""
    if len(page) < layout.data.offset:
        return Page([], 0, is_short=True, damaged=bool(page))
    commit = int.from_bytes(page[layout.commit.offset : layout.commit.offset + layout.commit.size], "little")
    start, length = layout.data.offset, commit & _LENGTH
    end = min(start + length, len(page))
    lost = 0
    if commit & _MISSED:
        stored = page[end : end + 8] if commit & _MISSED_STORED else b""
        # Damaged, it might be anything; the kernel's own counters are machine words, and nobody loses that much.
        lost = max(1, int.from_bytes(stored, "little") & 0x7FFF_FFFF_FFFF)
    time = int.from_bytes(page[layout.timestamp.offset : layout.timestamp.offset + 8], "little")
    walk = _Walk(page, time, end)
    sound = walk.run(start)
    is_short = length < layout.data.size // 2
    return Page(walk.entries, lost, is_short, damaged=not sound or start + length > len(page))


class _Walk:
    """A walk along a page's entries."""

    def __init__(self, page: bytes, time: int, end: int) -> None:
        self.entries: list[Entries] = []
        self._page = page
        self._time = time
        self._end = end
        self._words = np.frombuffer(page, "<u4", len(page) // _WORD)

    def run(self, at: int) -> bool:
        """From that offset to the end; False: it led nowhere."""
        while at + _WORD <= self._end:
            header = int(self._words[at // _WORD])
            kind, delta = header & ((1 << _TYPE_BITS) - 1), header >> _TYPE_BITS
            if _LONG < kind <= _LONGEST:
                length = self._alike(at, kind)
            elif kind == _PADDING and delta == 0:
                return True  # the rest of the page
            else:
                length = self._other(at, kind, delta)
            if not length:
                return False
            at += length
        return True

    def _alike(self, at: int, kind: int) -> int:
        """This entry and those of the same length behind it; how many bytes they take, 0: it goes beyond the end."""
        stride = _WORD * (kind + 1)
        most = (self._end - at) // stride
        if most == 0:
            return 0
        headers = self._words[at // _WORD : (at + most * stride) // _WORD : kind + 1]
        others = np.flatnonzero((headers & np.uint32((1 << _TYPE_BITS) - 1)) != kind)
        count = int(others[0]) if len(others) else most
        times = np.cumsum(headers[:count] >> np.uint32(_TYPE_BITS), dtype=np.uint64)
        times += np.uint64(self._time)
        self._time = int(times[-1])
        self.entries.append(Entries(times, self._page, at + _WORD, stride, stride - _WORD))
        return count * stride

    def _other(self, at: int, kind: int, delta: int) -> int:
        """An entry with a word behind its header; how many bytes it takes, 0: it goes beyond the end."""
        if at + 2 * _WORD > self._end:
            return 0
        word = int(self._words[at // _WORD + 1])
        if kind == _TIME_EXTEND:
            self._time = (self._time + (word << _DELTA_BITS) + delta) & _MASK64
            return 2 * _WORD
        if kind == _TIME_STAMP:
            self._time = self._time >> _ABSOLUTE_BITS << _ABSOLUTE_BITS | (word << _DELTA_BITS | delta)
            return 2 * _WORD
        # Data too long for the header to say how long, or an event that was taken back (padding): the word counts itself in.
        length = _WORD + (word + _WORD - 1) // _WORD * _WORD
        if word < _WORD or at + length > self._end:
            return 0
        self._time = (self._time + delta) & _MASK64
        if kind == _LONG:
            times = np.array([self._time], np.uint64)
            self.entries.append(Entries(times, self._page, at + 2 * _WORD, length, word - _WORD))
        return length
