"""The kernel's own description of its types (BTF), as Linux' Documentation/bpf/btf.rst has it.

The data may be damaged or forged: what makes no sense is a BtfError when it is read, and every walk over types is bounded.
"""

from __future__ import annotations

import enum
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vmexit.errors import VmexitError

MAGIC = b"\x9f\xeb\x01\x00"
"""Of version 1, little-endian, without flags."""
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_ENUMERATOR = struct.Struct("<Ii")
_ENUMERATOR64 = struct.Struct("<III")
_ARRAY = struct.Struct("<III")
_DEEPEST = 32
_MOST_NESTED = 200
_MOST_TYPES = 2_000_000


class BtfError(VmexitError):
    """Types that are not there, or cannot be read."""


class Kind(enum.IntEnum):
    """BTF_KIND_... of a type."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Bytes behind a type: so many, and so many for each of vlen.
_BEHIND = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
    Kind.ENUM64: (0, 12),
}
_WORD = 4


def _by_kind(value: Callable[[Kind], int], other: int) -> npt.NDArray[np.uint32]:
    """A value for each kind, and for each number that is none."""
    return np.array([value(Kind(number)) if number <= max(Kind) else other for number in range(32)], np.uint32)


# Of a type, in words.
_FIXED = _by_kind(lambda kind: (_TYPE.size + _BEHIND.get(kind, (0, 0))[0]) // _WORD, _TYPE.size // _WORD)
_EACH = _by_kind(lambda kind: _BEHIND.get(kind, (0, 0))[1] // _WORD, 0)
_NAMED = {Kind.STRUCT: "struct", Kind.UNION: "union", Kind.ENUM: "enum", Kind.ENUM64: "enum"}
_MODIFIERS = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_QUALIFIERS = {Kind.VOLATILE: "volatile ", Kind.CONST: "const ", Kind.RESTRICT: "restrict ", Kind.TYPE_TAG: ""}
_UNFINDABLE = 5
_RANK = {Kind.STRUCT: 0, Kind.UNION: 1, Kind.ENUM: 2, Kind.ENUM64: 2, Kind.TYPEDEF: 3, Kind.INT: 4, Kind.FLOAT: 4}
_RANKS = _by_kind(lambda kind: _RANK.get(kind, _UNFINDABLE), _UNFINDABLE)
"""Of types of one name the one with the lowest is meant."""


@dataclass(frozen=True, slots=True)
class Type:
    """One type. ``size`` is in bytes; ``target``: the type that a pointer, a typedef or a qualifier is about."""

    number: int
    kind: Kind
    name: str
    count: int
    """Of members, enumerators or parameters."""
    flag: bool
    size: int
    target: int
    at: int
    """Where in the types what belongs to it begins."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union. A bit field has ``bits`` bits from bit ``bit`` of its byte on; others have 0."""

    name: str
    offset: int
    """In bytes."""
    type: int
    bit: int = 0
    bits: int = 0


class Btf:
    """The types of one kernel."""

    def __init__(self, data: bytes) -> None:
        """``data``: the section .BTF; more may follow it. Raises BtfError."""
        if data[:4] != MAGIC or len(data) < _HEADER.size:
            raise BtfError("this is no BTF of version 1")
        _, _, _, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(data)
        types, strings = header + type_at, header + string_at
        if types + type_size > len(data) or strings + string_size > len(data):
            raise BtfError("the type information is cut off")
        self._types = data[types : types + type_size]
        self._strings = data[strings : strings + string_size]
        self._places = _places(self._types)

    @staticmethod
    def length(head: bytes) -> int:
        """How long the section is that begins so; 0: none does."""
        if head[:4] != MAGIC or len(head) < _HEADER.size:
            return 0
        _, _, _, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(head)
        return int(max(header + type_at + type_size, header + string_at + string_size))

    def __len__(self) -> int:
        """How many types there are, void not counted."""
        return len(self._places)

    def type(self, number: int) -> Type:
        """The type of that number; 0 is void. Raises BtfError."""
        if number == 0:
            return Type(0, Kind.VOID, "void", 0, False, 0, 0, 0)
        if not 0 < number <= len(self._places):
            raise BtfError("the type information is damaged: it names a type that is not there")
        at = self._places[number - 1] * _WORD
        name, info, size = _TYPE.unpack_from(self._types, at)
        # _places has seen that the kind is known.
        kind = Kind(info >> 24 & 0x1F)
        return Type(number, kind, self._string(name), info & 0xFFFF, bool(info >> 31), size, size, at + _TYPE.size)

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if offset >= len(self._strings) or end < 0:
            raise BtfError("the type information is damaged: it names a text that is not there")
        return self._strings[offset:end].decode("utf-8", "replace")

    @cached_property
    def _by_name(self) -> dict[str, int]:
        words = np.frombuffer(self._types, np.uint32)
        places = np.frombuffer(self._places, np.uint32)
        names, ranks = words[places], _RANKS[words[places + np.uint32(1)] >> 24 & 0x1F]
        findable = np.flatnonzero((names != 0) & (ranks < _UNFINDABLE))
        # "struct x" goes before "typedef x": both are often there, and mean the same.
        by_rank = findable[np.argsort(ranks[findable], kind="stable")]
        _, first = np.unique(names[by_rank], return_index=True)
        found = np.sort(by_rank[first])
        numbers: dict[str, int] = {}
        for name, number in zip(names[found].tolist(), found.tolist(), strict=True):
            numbers.setdefault(self._string(name), number + 1)
        return numbers

    @property
    def names(self) -> Sequence[str]:
        """Of all types that ``find`` finds."""
        return list(self._by_name)

    def find(self, name: str) -> Type | None:
        """A struct, union, enum, typedef or basic type; "struct" and its like may stand before the name."""
        word, _, rest = name.partition(" ")
        number = self._by_name.get(rest.strip() if word in _NAMED.values() else name)
        return None if number is None else self.type(number)

    def strip(self, number: int) -> Type:
        """A type without typedefs and qualifiers. Raises BtfError."""
        for _ in range(_DEEPEST):
            found = self.type(number)
            if found.kind not in _MODIFIERS:
                return found
            number = found.target
        raise BtfError("the type information is damaged: a type is made of itself")

    def size(self, number: int) -> int:
        """In bytes; 0 for void and functions. Raises BtfError."""
        count = 1
        for _ in range(_DEEPEST):
            found = self.strip(number)
            if found.kind != Kind.ARRAY:
                return count * (8 if found.kind == Kind.PTR else found.size if found.kind in _SIZED else 0)
            number, _, length = self.array(found)
            count *= length
        raise BtfError("the type information is damaged: a type is made of itself")

    def array(self, found: Type) -> tuple[int, int, int]:
        """Element type, index type and number of elements of an array."""
        element, index, count = _ARRAY.unpack_from(self._types, found.at)
        return element, index, count

    def members(self, found: Type) -> Iterator[Member]:
        """Of a struct or union, as they are written down."""
        for i in range(found.count):
            name, number, offset = _MEMBER.unpack_from(self._types, found.at + i * _MEMBER.size)
            # With the flag set the upper 8 bits are a bit field's width.
            bits, position = (offset >> 24, offset & 0xFF_FFFF) if found.flag else (0, offset)
            yield Member(self._string(name), position // 8, number, position % 8, bits)

    def enumerators(self, found: Type) -> Iterator[tuple[str, int]]:
        """Names and values of an enum."""
        for i in range(found.count):
            if found.kind == Kind.ENUM64:
                name, low, high = _ENUMERATOR64.unpack_from(self._types, found.at + i * _ENUMERATOR64.size)
                value = high << 32 | low
                yield self._string(name), value - (1 << 64 if found.flag and value >> 63 else 0)
            else:
                name, value = _ENUMERATOR.unpack_from(self._types, found.at + i * _ENUMERATOR.size)
                yield self._string(name), value if found.flag else value & 0xFFFF_FFFF

    def int_encoding(self, found: Type) -> tuple[bool, bool, bool]:
        """Whether an INT is signed, a char, a bool."""
        (info,) = struct.unpack_from("<I", self._types, found.at)
        return bool(info >> 24 & 1), bool(info >> 24 & 2), bool(info >> 24 & 4)

    def parameters(self, found: Type) -> Iterator[int]:
        """The types of a function's parameters; 0 at the end stands for "..."."""
        for i in range(found.count):
            yield struct.unpack_from("<I", self._types, found.at + i * 8 + 4)[0]

    def member(self, owner: Type, path: str) -> Member | None:
        """A member by its name, or by names with dots between; those of nameless members are the owner's own. Raises BtfError."""
        offset, number, found = 0, owner.number, None
        for name in path.split("."):
            found = self._direct(self.strip(number), name, set())
            if found is None:
                return None
            offset, number = offset + found.offset, found.type
        return found and Member(path, offset, found.type, found.bit, found.bits)

    def _direct(self, owner: Type, name: str, seen: set[int]) -> Member | None:
        """``seen``: types that need not be searched again; one that holds itself would be for ever."""
        if owner.kind not in (Kind.STRUCT, Kind.UNION) or owner.number in seen or len(seen) > _MOST_NESTED:
            return None
        seen.add(owner.number)
        for member in self.members(owner):
            if member.name == name:
                return member
            if not member.name:
                inner = self._direct(self.strip(member.type), name, seen)
                if inner is not None:
                    return Member(name, member.offset + inner.offset, inner.type, inner.bit, inner.bits)
        return None

    def offset(self, owner: str, path: str) -> int | None:
        """Of a member, in bytes from the owner's begin; None: there is no such type or member. Raises BtfError."""
        found = self.find(owner)
        member = found and self.member(found, path)
        return member.offset if member else None

    def text(self, number: int) -> str:
        """A type as C writes it, arrays and functions somewhat simpler: "char[16]", "struct list_head *", "int (...)"."""
        before, after = "", ""
        for _ in range(_DEEPEST):
            found = self.type(number)
            match found.kind:
                case Kind.PTR:
                    after = f" *{after.removeprefix(' ') if after.startswith(' *') else after}"
                    number = found.target
                case Kind.ARRAY:
                    number, _, count = self.array(found)
                    after = f" ({after.strip()})[{count}]" if after.startswith(" *") else f"{after}[{count}]"
                case kind if kind in _QUALIFIERS:
                    before += _QUALIFIERS[kind]
                    number = found.target
                case Kind.FUNC_PROTO:
                    number = found.target
                    after = f" ({after.strip()})(...)"
                case kind:
                    word = _NAMED.get(kind, "struct" if kind == Kind.FWD else "")
                    return f"{before}{word} {found.name or '{...}'}".strip() + after if word else f"{before}{found.name}{after}"
        raise BtfError("the type information is damaged: a type is made of itself")


_SIZED = frozenset({Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.FLOAT})


def _places(types: bytes) -> array[int]:
    """Where each type begins. Raises BtfError."""
    words = np.frombuffer(types, np.uint32, len(types) // _WORD)
    info = words[1:]
    # How long the type would be that begins at each word; it goes quicker to find that out of all than of those that do begin.
    lengths = _FIXED[info >> 24 & 0x1F] + _EACH[info >> 24 & 0x1F] * (info & 0xFFFF)
    length_at = array("I", lengths.tobytes())
    places = array("I")
    at, end = 0, len(words)
    while at + _TYPE.size // _WORD <= end:
        places.append(at)
        at += length_at[at]
    kinds = words[np.frombuffer(places, np.uint32) + np.uint32(1)] >> 24 & 0x1F
    unknown = kinds[(kinds == Kind.VOID) | (kinds > max(Kind))]
    if len(unknown):
        raise BtfError(f"there is type information of a kind ({unknown[0]}) that is not known here")
    if at != end or len(types) % _WORD or len(places) > _MOST_TYPES:
        raise BtfError("the type information is damaged")
    return places
