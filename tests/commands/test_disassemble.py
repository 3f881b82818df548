"""Tests of u and its kin."""

from __future__ import annotations

import pytest

from tests.commands.fakes import Typist

BASE = 0xFFFFF8003AD6F000
CODE = bytes.fromhex("0F30 48895C2408 57 488B042520000000 EBFE".replace(" ", ""))
LONG_MODE = {"cr0": 0x80000001, "efer": 0x500}


@pytest.fixture
def coded(typist: Typist) -> Typist:
    """With code at RIP in 64-bit mode."""
    typist.map(BASE, CODE.ljust(0x1000, b"\x90"))
    typist.put(rip=BASE, **LONG_MODE)
    return typist


def test_layout_and_where_it_begins(coded: Typist) -> None:
    assert coded.types("u l 10").split("\n") == [
        "fffff800`3ad6f000 0F 30                               wrmsr",
        "fffff800`3ad6f002 48 89 5C 24 08                      mov qword ptr [rsp + 8], rbx",
        "fffff800`3ad6f007 57                                  push rdi",
        "fffff800`3ad6f008 48 8B 04 25 20 00 00 00             mov rax, qword ptr [0x20]",
    ]


def test_it_goes_on_where_it_was(coded: Typist) -> None:
    coded.types("u l 3")  # an instruction that begins within the length is shown whole
    assert coded.types("u l 1") == "fffff800`3ad6f007 57                                  push rdi"
    coded.types(f"u {BASE + 0x10:x} l 1")
    assert coded.types("u l 1").startswith("fffff800`3ad6f012 ")


def test_a_new_stop_begins_at_rip_anew(coded: Typist) -> None:
    coded.types("u l 2")
    coded.put(rip=BASE + 7)
    assert coded.types("u l 1").endswith("push rdi")
    coded.types("g")
    coded.types("pause")
    assert coded.types("u l 1").endswith("push rdi")
    coded.put(1, rip=BASE + 2, **LONG_MODE)
    coded.types("~ 1")
    assert coded.types("u l 1").startswith("fffff800`3ad6f002 ")


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("u2 rip+2", "48                                  dec eax"),
        ("U32 rip+2", "48                                  dec eax"),
        ("u64 rip+2", "48 89 5C 24 08                      mov qword ptr [rsp + 8], rbx"),
        ("u16 rip+2", "48                                  dec ax"),
        ("u rip+2", "48 89 5C 24 08                      mov qword ptr [rsp + 8], rbx"),
    ],
)
def test_width(coded: Typist, line: str, first: str) -> None:
    assert coded.types(line).split("\n")[0] == f"fffff800`3ad6f002 {first}"


def test_u_goes_by_the_core(coded: Typist) -> None:
    coded.put(cr0=1, efer=0)
    assert coded.types("u rip+2 l 1").endswith("dec eax")
    coded.map(0xFF000, bytes(0xFF0) + b"\x48")
    coded.put(cr0=0, cs=0xF000, rip=0xFFF0)  # as after a reset: the linear address is made of CS and IP
    assert coded.types("u l 1") == "00000000`000ffff0 48                                  dec ax"


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("intel", "mov rax, qword ptr [0x20]"),
        ("att", "movq 0x20, %rax"),
        ("MASM", "mov rax, qword ptr [20h]"),
    ],
)
def test_syntax(coded: Typist, syntax: str, text: str) -> None:
    coded.types(f"settings syntax {syntax}")
    assert coded.types("u rip+8 l 1").endswith(f"             {text}")


def test_how_much_is_shown_unless_said_otherwise(coded: Typist) -> None:
    assert coded.types("u").split("\n")[-1].startswith("fffff800`3ad6f03f ")


def test_physical(coded: Typist) -> None:
    coded.map(0, b"\x90" * 8 + b"\xc3", physical=True)
    assert coded.types("!u 7 l 2").split("\n") == [
        "00000000`00000007 90                                  nop",
        "00000000`00000008 C3                                  ret",
    ]
    assert coded.types("!u l 1").startswith("00000000`00000009 ")
    assert coded.types("u l 1").startswith("fffff800`3ad6f000 ")


def test_what_is_not_mapped(coded: Typist) -> None:
    assert coded.types(f"u {BASE + 0xFFF:x}").split("\n") == [
        "fffff800`3ad6ffff 90                                  nop",
        "nothing is mapped from fffff800`3ad70000 on",
    ]
    assert coded.fails("u 1000") == "nothing is mapped at 00000000`00001000\nu 1000\n  ^~~~"
    coded.put(rip=0x2000)
    assert coded.fails("u") == "nothing is mapped at 00000000`00002000\nu\n^"
    assert coded.fails("!u l 1").startswith("'!u' needs an address")


def test_bytes_that_are_no_instruction(coded: Typist) -> None:
    coded.map(0, b"\x06\x90", physical=True)
    assert coded.types("!u64 0 l 2").split("\n") == [
        "00000000`00000000 06                                  (bad)",
        "00000000`00000001 90                                  nop",
    ]


def test_it_needs_a_halted_machine(coded: Typist) -> None:
    coded.types("g")
    assert coded.fails("u").startswith("'u' needs a halted machine")
