"""The types of a PDB (stream TPI), turned into BTF, the form that Linux has its types in and that ``dt`` shows.

The records are CodeView's (LLVM's "CodeView Type Records"; Microsoft's cvinfo.h). What is left out: methods, base classes, static
members, and whatever a kernel written in C does not have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from vmexit.errors import VmexitError
from vmexit.guest.linux.btf import Kind

_HEADER = struct.Struct("<IIIII")
_FIRST = 0x1000
_MOST_TYPES = 1 << 20
_MOST_MEMBERS = 0xFFFF
_MOST_CONTINUED = 64
_DEEPEST = 16
_MOST_NESTED = 200
_FORWARD = 0x80
_MODIFIER, _POINTER, _PROCEDURE, _MFUNCTION, _FIELDS, _BITFIELD = 0x1001, 0x1002, 0x1008, 0x1009, 0x1203, 0x1205
_ARRAY, _CLASS, _STRUCTURE, _UNION, _ENUM = 0x1503, 0x1504, 0x1505, 0x1506, 0x1507
_BASE, _MORE, _TABLE, _ENUMERATOR, _MEMBER = 0x1400, 0x1404, 0x1409, 0x1502, 0x150D
_STATIC, _METHODS, _NESTED, _METHOD = 0x150E, 0x150F, 0x1510, 0x1511
_AGGREGATES = frozenset({_CLASS, _STRUCTURE, _UNION, _ENUM})
_NUMBERS = {0x8000: "<b", 0x8001: "<h", 0x8002: "<H", 0x8003: "<i", 0x8004: "<I", 0x8009: "<q", 0x800A: "<Q"}
_INTRODUCES = (4, 6)
_SIGNED, _CHAR, _BOOL = 1, 2, 4
# The lower byte of the number of a basic type: name, bytes, encoding as BTF has it.
_BASIC = {
    0x03: ("void", 0, 0),
    0x08: ("long", 4, _SIGNED),
    0x10: ("char", 1, _SIGNED),
    0x20: ("unsigned char", 1, 0),
    0x68: ("char", 1, _SIGNED),
    0x69: ("unsigned char", 1, 0),
    0x70: ("char", 1, _SIGNED),
    0x71: ("wchar_t", 2, 0),
    0x7A: ("char16_t", 2, 0),
    0x7B: ("char32_t", 4, 0),
    0x11: ("short", 2, _SIGNED),
    0x21: ("unsigned short", 2, 0),
    0x72: ("short", 2, _SIGNED),
    0x73: ("unsigned short", 2, 0),
    0x12: ("long", 4, _SIGNED),
    0x22: ("unsigned long", 4, 0),
    0x74: ("int", 4, _SIGNED),
    0x75: ("unsigned int", 4, 0),
    0x13: ("__int64", 8, _SIGNED),
    0x23: ("unsigned __int64", 8, 0),
    0x76: ("__int64", 8, _SIGNED),
    0x77: ("unsigned __int64", 8, 0),
    0x30: ("bool", 1, _BOOL),
    0x40: ("float", 4, 0),
    0x41: ("double", 8, 0),
}


class TypesError(VmexitError):
    """The records make no sense."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A member, or an enumerator with its value as ``offset``."""

    name: str
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Aggregate:
    """A struct, class, union or enum."""

    leaf: int
    name: str
    fields: int
    size: int
    """In bytes; of an enum the number of the type that it is stored as."""
    is_forward: bool


@dataclass
class _Writer:
    """Types in BTF, in the order in which they are numbered."""

    types: bytearray = field(default_factory=bytearray)
    strings: bytearray = field(default_factory=lambda: bytearray(b"\0"))
    known: dict[str, int] = field(default_factory=lambda: {"": 0})

    def name(self, text: str) -> int:
        """The offset of a text."""
        found = self.known.get(text)
        if found is None:
            found = self.known[text] = len(self.strings)
            self.strings += text.encode("utf-8", "replace") + b"\0"
        return found

    def add(self, kind: Kind, name: str, size: int, count: int = 0, *, flag: bool = False, behind: bytes = b"") -> None:
        self.types += struct.pack("<III", self.name(name), flag << 31 | kind << 24 | count, size & 0xFFFF_FFFF) + behind

    def section(self) -> bytes:
        """All of it."""
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + bytes(self.types) + bytes(self.strings)


def read_types(data: bytes, members: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """The types in BTF, and the offsets of those ``members`` ("_EPROCESS.UniqueProcessId") that there are. Raises TypesError."""
    if not data:
        return b"", {}
    try:
        types = _Types(data)
        offsets = {path: offset for path in members if (offset := types.offset(*path.split(".", 1))) is not None}
        return types.as_btf(), offsets
    except (struct.error, IndexError, ValueError):
        raise TypesError("a record is cut off") from None


class _Types:
    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise TypesError("the stream is cut off")
        _, header, first, last, length = _HEADER.unpack_from(data)
        if first != _FIRST or not _FIRST <= last <= _FIRST + _MOST_TYPES or header + length > len(data):
            raise TypesError("the stream's header makes no sense")
        self._data = data
        self._places = self._find_records(header, header + length, last - first)
        self._defined: dict[str, int] = {}
        forwards: dict[int, str] = {}
        for index, (leaf, at) in enumerate(self._places):
            if leaf in _AGGREGATES:
                found = self._aggregate(leaf, at)
                if found.is_forward:
                    forwards[_FIRST + index] = found.name
                elif found.name:
                    self._defined.setdefault(found.name, _FIRST + index)
        # A type that was only announced, and is said elsewhere in full.
        self._forwards = {number: self._defined[name] for number, name in forwards.items() if name in self._defined}
        self._basics: dict[int, int] = {}
        self._first_record = 0

    def _find_records(self, at: int, end: int, count: int) -> list[tuple[int, int]]:
        """The kind of each record, and where what follows it begins."""
        places: list[tuple[int, int]] = []
        while at + 4 <= end and len(places) < count:
            length, leaf = struct.unpack_from("<HH", self._data, at)
            if length < 2 or at + 2 + length > end:
                raise TypesError("a record is longer than the stream")
            places.append((leaf, at + 4))
            at += 2 + length
        return places

    def _end(self, at: int) -> int:
        """Where the record ends whose content begins there."""
        length: int = struct.unpack_from("<H", self._data, at - 4)[0]
        return at - 2 + length

    def _number(self, at: int) -> tuple[int, int]:
        """A number of a record, and where the next thing begins."""
        (short,) = struct.unpack_from("<H", self._data, at)
        if short < 0x8000:
            return short, at + 2
        form = _NUMBERS.get(short)
        if form is None:
            raise TypesError("a number has an unknown form")
        return struct.unpack_from(form, self._data, at + 2)[0], at + 2 + struct.calcsize(form)

    def _text(self, at: int) -> tuple[str, int]:
        end = self._data.index(b"\0", at) if b"\0" in self._data[at : at + 4096] else len(self._data)
        return self._data[at:end].decode("utf-8", "replace"), end + 1

    def _aggregate(self, leaf: int, at: int) -> _Aggregate:
        _, properties, *_ = struct.unpack_from("<HH", self._data, at)
        if leaf == _ENUM:
            size, fields = struct.unpack_from("<II", self._data, at + 4)
            rest = at + 12
        else:
            (fields,) = struct.unpack_from("<I", self._data, at + 4)
            size, rest = self._number(at + (8 if leaf == _UNION else 16))
        name = self._text(rest)[0]
        return _Aggregate(leaf, "" if name.startswith(("<", "__unnamed")) else name, fields, size, bool(properties & _FORWARD))

    def _record(self, number: int) -> tuple[int, int]:
        """Kind and place of the record of a type; kind 0: there is none."""
        index = number - _FIRST
        return self._places[index] if 0 <= index < len(self._places) else (0, 0)

    def _fields(self, number: int) -> Iterator[_Field]:
        """What a list of fields holds, with the lists that continue it."""
        seen: set[int] = set()
        for _ in range(_MOST_CONTINUED):
            leaf, at = self._record(number)
            if leaf != _FIELDS or number in seen:
                return
            seen.add(number)
            end = self._end(at)
            number = 0
            while at + 4 <= end:
                # Records are aligned to 4 bytes, by bytes that say how many are left out.
                if self._data[at] >= 0xF0:
                    at += max(self._data[at] & 15, 1)
                    continue
                kind, _ = struct.unpack_from("<HH", self._data, at)
                at += 4
                match kind:
                    case 0x150D:  # MEMBER
                        (target,) = struct.unpack_from("<I", self._data, at)
                        offset, at = self._number(at + 4)
                        name, at = self._text(at)
                        yield _Field(name, target, offset)
                    case 0x1502:  # ENUMERATOR
                        value, at = self._number(at)
                        name, at = self._text(at)
                        yield _Field(name, 0, value)
                    case 0x1404:  # MORE
                        (number,) = struct.unpack_from("<I", self._data, at)
                        at += 4
                    case 0x1400:  # BASE
                        at = self._number(at + 4)[1]
                    case 0x1409:  # TABLE
                        at += 4
                    case 0x150E | 0x150F | 0x1510:  # STATIC, METHODS, NESTED
                        at = self._text(at + 4)[1]
                    case 0x1511:  # METHOD
                        introduces = struct.unpack_from("<H", self._data, at - 2)[0] >> 2 & 7 in _INTRODUCES
                        at = self._text(at + (8 if introduces else 4))[1]
                    case _:
                        return

    def offset(self, owner: str, member: str) -> int | None:
        """Of a member, also of a nameless member's."""
        number = self._defined.get(owner)
        return None if number is None else self._offset_in(number, member, set())

    def _offset_in(self, number: int, member: str, seen: set[int]) -> int | None:
        """``seen``: types that need not be searched again; one that holds itself would be for ever."""
        leaf, at = self._record(number)
        if leaf not in (_CLASS, _STRUCTURE, _UNION) or number in seen or len(seen) > _MOST_NESTED:
            return None
        seen.add(number)
        nameless = []
        for each in islice(self._fields(self._aggregate(leaf, at).fields), _MOST_MEMBERS):
            if each.name == member:
                return each.offset
            if not each.name:
                nameless.append(each)
        for each in nameless:
            inner = self._offset_in(each.type, member, seen)
            if inner is not None:
                return each.offset + inner
        return None

    # ---- to BTF ----

    def as_btf(self) -> bytes:
        """All types, in the form that Btf reads."""
        writer = _Writer()
        basics = {kind: number for number, kind in enumerate(_BASIC, 1)}
        # A pointer to each basic type comes behind them, then one BTF type for each record.
        self._basics = basics
        self._first_record = 1 + 2 * len(basics)
        for name, size, encoding in _BASIC.values():
            if size:
                writer.add(Kind.INT, name, size, behind=struct.pack("<I", encoding << 24 | size * 8))
            else:
                writer.add(Kind.TYPEDEF, name, 0)
        for number in basics.values():
            writer.add(Kind.PTR, "", number)
        for leaf, at in self._places:
            self._write(writer, leaf, at)
        return writer.section()

    def _btf(self, number: int) -> int:
        """The number in BTF of a type of the PDB; 0, which is void, where it has none."""
        number = self._forwards.get(number, number)
        if number >= _FIRST:
            return self._first_record + number - _FIRST if number - _FIRST < len(self._places) else 0
        basic = self._basics.get(number & 0xFF)
        if basic is None:
            return 0
        return basic + len(self._basics) if number >> 8 & 15 else basic

    def _write(self, writer: _Writer, leaf: int, at: int) -> None:
        """The BTF type of one record; those that BTF has no use for are nameless typedefs of void."""
        data = self._data
        if leaf in _AGGREGATES:
            self._write_aggregate(writer, self._aggregate(leaf, at))
        elif leaf == _POINTER:
            writer.add(Kind.PTR, "", self._btf(struct.unpack_from("<I", data, at)[0]))
        elif leaf == _MODIFIER:
            target, flags = struct.unpack_from("<IH", data, at)
            writer.add(Kind.CONST if flags & 1 else Kind.VOLATILE, "", self._btf(target))
        elif leaf == _ARRAY:
            element, index = struct.unpack_from("<II", data, at)
            size = self._number(at + 8)[0]
            each = self._size(element, 0)
            count = size // each if each else 0
            writer.add(Kind.ARRAY, "", 0, behind=struct.pack("<III", self._btf(element), self._btf(index), count & 0xFFFF_FFFF))
        elif leaf in (_PROCEDURE, _MFUNCTION):
            writer.add(Kind.FUNC_PROTO, "", self._btf(struct.unpack_from("<I", data, at)[0]))
        else:
            writer.add(Kind.TYPEDEF, "", 0)

    def _write_aggregate(self, writer: _Writer, found: _Aggregate) -> None:
        if found.is_forward:
            writer.add(Kind.FWD, found.name, 0)
        elif found.leaf == _ENUM:
            fields = list(islice(self._fields(found.fields), _MOST_MEMBERS))
            behind = b"".join(struct.pack("<II", writer.name(each.name), each.offset & 0xFFFF_FFFF) for each in fields)
            is_signed = any(each.offset < 0 for each in fields)
            writer.add(Kind.ENUM, found.name, self._size(found.size, 0) or 4, len(fields), flag=is_signed, behind=behind)
        else:
            fields = list(islice(self._fields(found.fields), _MOST_MEMBERS))
            bits = [self._bits(each.type) for each in fields]
            has_bits = any(length for _, _, length in bits)
            rows = []
            for each, (target, position, length) in zip(fields, bits, strict=True):
                place = each.offset * 8 + position
                if has_bits:
                    place = length << 24 | place & 0xFF_FFFF
                rows.append(struct.pack("<III", writer.name(each.name), self._btf(target), place & 0xFFFF_FFFF))
            kind = Kind.UNION if found.leaf == _UNION else Kind.STRUCT
            writer.add(kind, found.name, found.size, len(rows), flag=has_bits, behind=b"".join(rows))

    def _bits(self, number: int) -> tuple[int, int, int]:
        """The type of a member, and if it is a bit field its first bit and its width."""
        leaf, at = self._record(number)
        if leaf != _BITFIELD:
            return number, 0, 0
        target, length, position = struct.unpack_from("<IBB", self._data, at)
        return target, position, length

    def _size(self, number: int, depth: int) -> int:
        """Of a type, in bytes; 0 where it is not known."""
        if number < _FIRST:
            return 8 if number >> 8 & 15 else _BASIC.get(number & 0xFF, ("", 0, 0))[1]
        leaf, at = self._record(number)
        if depth > _DEEPEST:
            return 0
        if leaf == _POINTER:
            return 8
        if leaf == _ARRAY:
            return self._number(at + 8)[0]
        if leaf in (_MODIFIER, _BITFIELD):
            return self._size(struct.unpack_from("<I", self._data, at)[0], depth + 1)
        if leaf in _AGGREGATES:
            if number in self._forwards:
                return self._size(self._forwards[number], depth + 1)
            found = self._aggregate(leaf, at)
            return self._size(found.size, depth + 1) if leaf == _ENUM else found.size
        return 0
