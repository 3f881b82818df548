"""Type information, made up and damaged, and how types are shown."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.linux.fake_linux import STRUCTS, BtfWriter, make_btf, member
from vmexit.guest.linux.btf import Btf, BtfError, Kind
from vmexit.guest.linux.types import render


def pack_array(element: int, count: int) -> bytes:
    return struct.pack("<III", element, 1, count)


@pytest.fixture(scope="module")
def made() -> Btf:
    """One type of each kind."""
    writer = BtfWriter()
    u32 = writer.integer("unsigned int", 4)
    s8 = writer.integer("signed char", 1, 1)
    boolean = writer.integer("_Bool", 1, 4)
    pointer = writer.add("", 2, u32)
    constant = writer.add("", 10, u32)
    to_constant = writer.add("", 2, constant)
    matrix = writer.add("", 3, 0, pack_array(writer.add("", 3, 0, pack_array(u32, 3)), 2))
    pointers = writer.add("", 3, 0, pack_array(pointer, 2))
    text = writer.add("", 3, 0, pack_array(s8, 8))
    colour = writer.add("colour", 6, 4, struct.pack("<IiIi", writer.string("RED"), 0, writer.string("BLUE"), 5), 2)
    big = writer.add("big", 19, 8, struct.pack("<III", writer.string("HUGE"), 1, 0x80), 1)
    inner = writer.structure("", 8, [("x", u32, 0), ("y", u32, 4)])
    either = writer.structure("", 8, [("", inner, 0), ("both", u32, 0)], kind=5)
    function = writer.add("", 13, u32, struct.pack("<IIII", 0, u32, 0, pointer), 2)
    callback = writer.add("", 2, function)
    forward = writer.add("later", 7, 0)
    to_forward = writer.add("", 2, forward)
    flags = struct.pack("<III", writer.string("low"), u32, 3 << 24) + struct.pack("<III", writer.string("high"), u32, 5 << 24 | 3)
    bits = writer.add("bits", 4, 4, flags, 2, flag=1)
    thing = writer.structure(
        "thing",
        0x80,
        [
            ("first", u32, 0),
            ("small", s8, 4),
            ("yes", boolean, 5),
            ("", either, 8),
            ("pointer", to_constant, 0x10),
            ("matrix", matrix, 0x18),
            ("pointers", pointers, 0x30),
            ("text", text, 0x40),
            ("colour", colour, 0x48),
            ("big", big, 0x50),
            ("callback", callback, 0x58),
            ("later", to_forward, 0x60),
            ("bits", bits, 0x68),
        ],
    )
    writer.add("thing_t", 8, thing)
    writer.add("thing", 8, thing)
    writer.add("main", 12, function)
    writer.add("jiffies", 14, u32, bytes(4))
    writer.add(".data", 15, 0, bytes(12), 1)
    writer.add("double", 16, 8)
    writer.add("tag", 17, u32, bytes(4))
    writer.add("tag", 18, u32)
    return Btf(writer.section())


def test_members(made: Btf) -> None:
    thing = made.find("struct thing")
    assert thing is not None and thing.kind == Kind.STRUCT and made.size(thing.number) == 0x80
    assert made.offset("thing", "y") == made.offset("thing_t", "y") == 12  # of a nameless struct in a nameless union
    assert made.offset("thing", "both") == 8
    assert made.offset("thing", "nothing") is made.offset("nothing", "x") is made.offset("thing", "first.x") is None
    high = made.member(thing, "bits.high")
    assert high is not None and (high.offset, high.bit, high.bits) == (0x68, 3, 5)


def test_every_struct_of_the_made_up_kernel() -> None:
    btf = Btf(make_btf())
    for name, (size, members) in STRUCTS.items():
        found = btf.find(name)
        assert found is not None and found.size == size
        for each, offset, _ in members:
            assert btf.offset(name, each) == offset
    assert btf.offset("task_struct", "thread.sp") == member("task_struct.thread.sp") == 0x108


def test_how_types_are_shown(made: Btf) -> None:
    thing = made.find("thing")
    assert thing is not None
    assert list(render(made, thing)) == [
        "struct thing, 0x80 bytes",
        "  +0x0000  first                         unsigned int",
        "  +0x0004  small                         signed char",
        "  +0x0005  yes                           _Bool",
        "  +0x0008  x                             unsigned int",
        "  +0x000c  y                             unsigned int",
        "  +0x0008  both                          unsigned int",
        "  +0x0010  pointer                       const unsigned int *",
        "  +0x0018  matrix                        unsigned int[2][3]",
        "  +0x0030  pointers                      unsigned int *[2]",
        "  +0x0040  text                          signed char[8]",
        "  +0x0048  colour                        enum colour",
        "  +0x0050  big                           enum big",
        "  +0x0058  callback                      unsigned int (*)(...)",
        "  +0x0060  later                         struct later *",
        "  +0x0068  bits                          struct bits",
    ]


def test_how_values_are_shown(made: Btf) -> None:
    thing, bits, colour, u32 = (made.find(name) for name in ("thing", "bits", "colour", "unsigned int"))
    assert thing and bits and colour and u32
    data = bytearray(0x80)
    data[0:6] = b"\x10\0\0\0\xfe\x01"
    data[0x10:0x18] = (0xFFFF_8880_0000_1000).to_bytes(8, "little")
    data[0x30:0x31] = b"\x07"
    data[0x40:0x48] = b"a\x1bb\0cccc"
    data[0x48:0x4C] = b"\5\0\0\0"
    data[0x50:0x58] = (0x80 << 32 | 1).to_bytes(8, "little")
    data[0x68] = 0b1010_1011
    lines = [line.split("  = ")[1] if "  = " in line else "" for line in render(made, thing, data=bytes(data))]
    assert lines[1:4] == ["0x10 (0n16)", "-0x2", "0x1"]
    assert lines[7] == "0xffff888000001000"
    assert lines[9:13] == ["0x7 0x0", '"a\\x1bb"', "0x5 (BLUE)", "0x8000000001 (HUGE)"]
    only = made.member(thing, "bits")
    assert [line.split("= ")[-1] for line in render(made, thing, only, bytes(data))][1:] == ["0x3", "0x15 (0n21)"]
    assert list(render(made, colour, data=b"\5\0\0\0"))[-1] == "  value: 0x5 (BLUE)"
    assert list(render(made, u32, data=b"\x2a\0\0\0")) == ["unsigned int, 0x4 bytes", "  0x2a (0n42)"]
    # Too little memory shows no value, and is no error.
    assert all("  = " not in line for line in render(made, thing, data=b""))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no BTF"),
        (b"\x9f\xeb\x02\0" + bytes(20), "no BTF"),
        (make_btf()[:200], "cut off"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 1) + struct.pack("<III", 0, 31 << 24, 0) + b"\0", "not known"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 1) + struct.pack("<III", 0, 4 << 24 | 5, 0) + b"\0", "damaged"),
    ],
)
def test_what_is_no_btf(data: bytes, message: str) -> None:
    with pytest.raises(BtfError, match=message):
        Btf(data)


def test_types_made_of_themselves() -> None:
    writer = BtfWriter()
    writer.add("loop", 8, 1)
    writer.add("", 3, 0, pack_array(2, 2))
    writer.structure("nest", 8, [("", 3, 0), ("", 3, 0), ("", 3, 0)])
    writer.add("lost", 8, 77)
    btf = Btf(writer.section())
    with pytest.raises(BtfError, match="made of itself"):
        btf.size(1)
    with pytest.raises(BtfError, match="made of itself"):
        btf.size(2)
    with pytest.raises(BtfError, match="made of itself"):
        btf.text(2)
    assert btf.offset("nest", "x") is None
    nest, lost = btf.find("nest"), btf.find("lost")
    assert nest is not None and lost is not None
    assert len(list(render(btf, nest))) < 5000
    with pytest.raises(BtfError, match="not there"):
        btf.size(lost.number)


GOOD = make_btf()


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), cut=st.booleans())
def test_damaged_btf_is_refused_or_read(changes: list[tuple[int, int]], cut: bool) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    if cut:
        del data[changes[0][0] :]
    try:
        btf = Btf(bytes(data))
        for name in ("task_struct", "module", "module_state"):
            found = btf.find(name)
            if found is not None:
                assert len(list(render(btf, found, data=bytes(0x400)))) <= 4002
                btf.member(found, "thread.sp")
    except BtfError:
        return
