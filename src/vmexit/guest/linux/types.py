"""Types, and memory by them, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from vmexit.guest.linux.btf import Btf, BtfError, Kind, Member, Type
from vmexit.guest.memory import printable

_MOST_LINES = 4000
_MOST_ELEMENTS = 16
_MOST_ENUMERATORS = 4096
_DEEPEST = 8


def render(btf: Btf, found: Type, member: Member | None = None, data: bytes | None = None) -> Iterator[str]:
    """A type and its members; with ``member`` only that one, whole. ``data``: memory by that type. Raises BtfError."""
    if member is None:
        target = btf.strip(found.number)
        yield f"{btf.text(found.number)}, {btf.size(found.number):#x} bytes"
        yield from _body(btf, target, 0, data)
        return
    yield _line(btf, member, data)
    target = btf.strip(member.type)
    if target.kind in (Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64):
        yield from _body(btf, target, member.offset, data)


def _body(btf: Btf, target: Type, offset: int, data: bytes | None) -> Iterator[str]:
    if target.kind in (Kind.ENUM, Kind.ENUM64):
        for index, (name, value) in enumerate(btf.enumerators(target)):
            if index == _MOST_ENUMERATORS:
                break
            yield f"  {name} = {_hex(value)}"
        if data is not None:
            yield f"  value: {_enum_text(btf, target, _number(data, offset, target.size))}"
    elif target.kind in (Kind.STRUCT, Kind.UNION):
        for index, member in enumerate(_members(btf, target, offset, 0)):
            if index == _MOST_LINES:
                yield "  ..."
                break
            yield _line(btf, member, data)
    elif data is not None:
        yield f"  {_value(btf, Member('', 0, target.number), data)}"


def _members(btf: Btf, target: Type, offset: int, depth: int) -> Iterator[Member]:
    """With those of nameless members in their place."""
    for member in btf.members(target):
        moved = Member(member.name, offset + member.offset, member.type, member.bit, member.bits)
        inner = None if member.name else btf.strip(member.type)
        if inner is not None and inner.kind in (Kind.STRUCT, Kind.UNION) and depth < _DEEPEST:
            yield from _members(btf, inner, moved.offset, depth + 1)
        else:
            yield moved


def _line(btf: Btf, member: Member, data: bytes | None) -> str:
    bits = f":{member.bits}" if member.bits else ""
    value = _value(btf, member, data) if data is not None else ""
    text = f"  +{member.offset:#06x}  {member.name + bits:<28}  {btf.text(member.type)}"
    return f"{text:<72}  = {value}" if value else text


def _value(btf: Btf, member: Member, data: bytes) -> str:
    """What is there; empty where that is more than one value."""
    target = btf.strip(member.type)
    size = btf.size(member.type)
    if member.offset + size > len(data):
        return ""
    if member.bits:
        whole = int.from_bytes(data[member.offset : member.offset + 16], "little")
        return _hex(whole >> member.bit & (1 << member.bits) - 1)
    if target.kind == Kind.ARRAY:
        return _array_text(btf, target, data[member.offset : member.offset + size])
    number = _number(data, member.offset, size)
    match target.kind:
        case Kind.PTR:
            return f"{number:#018x}"
        case Kind.ENUM | Kind.ENUM64:
            return _enum_text(btf, target, number)
        case Kind.INT:
            is_signed, _, _ = btf.int_encoding(target)
            return _hex(number - (1 << 8 * size) if is_signed and number >> 8 * size - 1 else number)
    return ""


def _array_text(btf: Btf, target: Type, data: bytes) -> str:
    element, _, count = btf.array(target)
    kind, size = btf.strip(element), btf.size(element)
    if kind.kind == Kind.INT and size == 1 and kind.name in ("char", "signed char"):
        return f'"{printable(data.partition(bytes(1))[0])}"'
    if kind.kind not in (Kind.INT, Kind.PTR) or not size:
        return ""
    shown = [_hex(_number(data, index * size, size)) for index in range(min(count, _MOST_ELEMENTS, len(data) // size))]
    return " ".join(shown) + (" ..." if count > _MOST_ELEMENTS else "")


def _enum_text(btf: Btf, target: Type, number: int) -> str:
    try:
        bits = 8 * target.size
        names = [name for name, value in btf.enumerators(target) if value & (1 << bits) - 1 == number]
    except BtfError:
        names = []
    return f"{_hex(number)} ({names[0]})" if names else _hex(number)


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _hex(value: int) -> str:
    """In hexadecimal as everywhere, with the decimal behind it where people think of it so."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    return f"{sign}{value:#x}" + (f" (0n{sign}{value})" if 10 <= value < 1 << 31 else "")
