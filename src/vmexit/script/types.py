"""The types of the script language: sizes, conversions, what a name of a type means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Int:
    """An integer type. `rank` orders types of one size as in C: long stands below long long."""

    name: str
    bits: int
    signed: bool
    rank: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Float:
    """float or double."""

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Void:
    """No value."""

    def __str__(self) -> str:
        return "void"


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address of something of type `to`."""

    to: Type

    def __str__(self) -> str:
        return f"{self.to} *"


@dataclass(frozen=True, slots=True)
class Array:
    """`count` values of type `of`, one behind the other."""

    of: Type
    count: int

    def __str__(self) -> str:
        return f"{self.of}[{self.count}]"


@dataclass(frozen=True, slots=True)
class Member:
    """A part of a struct, `offset` bytes from its start."""

    name: str
    type: Type
    offset: int


@dataclass(eq=False, slots=True)
class Struct:
    """A struct with C's layout. Two structs are the same if they are one object."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    size: int = 0
    alignment: int = 1
    complete: bool = False

    def lay_out(self, members: Sequence[tuple[str, Type]]) -> None:
        """Place the members as C does: each at the next multiple of its alignment, the whole rounded up."""
        at = 0
        for name, type_ in members:
            alignment = alignment_of(type_)
            at = (at + alignment - 1) // alignment * alignment
            self.members[name] = Member(name, type_, at)
            at += size_of(type_)
            self.alignment = max(self.alignment, alignment)
        self.size = (at + self.alignment - 1) // self.alignment * self.alignment
        self.complete = True

    def __str__(self) -> str:
        return f"struct {self.name}"


Type = Int | Float | Void | Pointer | Array | Struct

VOID = Void()
BOOL = Int("bool", 8, False, 0)
CHAR = Int("char", 8, True, 1)
UCHAR = Int("unsigned char", 8, False, 1)
SHORT = Int("short", 16, True, 2)
USHORT = Int("unsigned short", 16, False, 2)
INT = Int("int", 32, True, 3)
UINT = Int("unsigned int", 32, False, 3)
LONG = Int("long", 64, True, 4)
ULONG = Int("unsigned long", 64, False, 4)
LLONG = Int("long long", 64, True, 5)
ULLONG = Int("unsigned long long", 64, False, 5)
FLOAT = Float("float", 32)
DOUBLE = Float("double", 64)

IMPLICIT = ULLONG
"""Of a variable that was never declared, and of what built-in functions give."""
LITERAL = LONG
"""Of numbers, registers and pseudo-registers."""

_UNSIGNED = {CHAR: UCHAR, SHORT: USHORT, INT: UINT, LONG: ULONG, LLONG: ULLONG}
_BY_WORDS: dict[tuple[str, ...], Type] = {
    ("void",): VOID,
    ("bool",): BOOL,
    ("char",): CHAR,
    ("short",): SHORT,
    ("int", "short"): SHORT,
    (): INT,
    ("int",): INT,
    ("long",): LONG,
    ("int", "long"): LONG,
    ("long", "long"): LLONG,
    ("int", "long", "long"): LLONG,
    ("float",): FLOAT,
    ("double",): DOUBLE,
}
TYPE_WORDS = frozenset({"void", "bool", "char", "short", "int", "long", "unsigned", "signed", "float", "double"})


def type_of_words(words: Sequence[str]) -> Type | None:
    """The type that the words (in any order) stand for; None where they are no type."""
    signs = [word for word in words if word in ("signed", "unsigned")]
    found = _BY_WORDS.get(tuple(sorted(word for word in words if word not in ("signed", "unsigned"))))
    if not words or len(signs) > 1 or found is None:
        return None
    if not signs:
        return found
    if not isinstance(found, Int) or found == BOOL:
        return None
    return _UNSIGNED[found] if signs == ["unsigned"] else found


def size_of(type_: Type) -> int:
    """In bytes. Raises ValueError for void and for a struct that is only named."""
    match type_:
        case Int() | Float():
            return type_.bits // 8
        case Pointer():
            return 8
        case Array():
            return type_.count * size_of(type_.of)
        case Struct() if type_.complete:
            return type_.size
        case _:
            raise ValueError


def alignment_of(type_: Type) -> int:
    """In bytes."""
    match type_:
        case Array():
            return alignment_of(type_.of)
        case Struct():
            return type_.alignment
        case _:
            return size_of(type_)


def promoted(type_: Int) -> Int:
    """What a narrow integer becomes before it is reckoned with."""
    return INT if type_.rank < INT.rank else type_


def common(left: Int | Float, right: Int | Float) -> Int | Float:
    """The type in which the two are added, compared and so on (C's usual arithmetic conversions)."""
    if isinstance(left, Float) or isinstance(right, Float):
        return DOUBLE if DOUBLE in (left, right) else FLOAT
    left, right = promoted(left), promoted(right)
    if left.signed == right.signed:
        return left if left.rank >= right.rank else right
    signed, unsigned = (left, right) if left.signed else (right, left)
    if unsigned.rank >= signed.rank:
        return unsigned
    return signed if signed.bits > unsigned.bits else _UNSIGNED[signed]
