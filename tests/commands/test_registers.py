"""Tests of the command r."""

from __future__ import annotations

import pytest

from tests.commands.fakes import Typist


@pytest.fixture
def loaded(typist: Typist) -> Typist:
    """With the values of HyperDbg's manual, and some more."""
    typist.put(rax=0xFFFF948CC1BA4780, rbx=0xFFFF948CC02F19E0, rcx=0x24, rdi=0xFFFF948CC23403A0)
    typist.put(rip=0xFFFFF80168D91262, rsp=0xFFFF9305483F3698, rbp=2, rflags=0x40246)
    typist.put(cs=0x10, ss=0x18, ds=0x2B, es=0x2B, fs=0x53, gs=0x2B)
    typist.put(cr0=0x80050033, efer=0xD01, gs_base=0xFFFF888007C00000)
    for number, value in {10: 0x48564653, 11: 0x564D43414C4C, 14: 0xFFFF948CC23403A0}.items():
        typist.link.values[0][number] = value
    return typist


def test_all(loaded: Typist) -> None:
    assert (
        loaded.types("r")
        == """\
RAX=ffff948cc1ba4780 RBX=ffff948cc02f19e0 RCX=0000000000000024
RDX=0000000000000000 RSI=0000000000000000 RDI=ffff948cc23403a0
RIP=fffff80168d91262 RSP=ffff9305483f3698 RBP=0000000000000002
R8=0000000000000000  R9=0000000000000000  R10=0000000048564653
R11=0000564d43414c4c R12=0000000000000000 R13=0000000000000000
R14=ffff948cc23403a0 R15=0000000000000000 IOPL=00
OF 0  DF 0  IF 1  SF 0
ZF 1  PF 1  CF 0  AXF 0
CS=0010 SS=0018 DS=002b ES=002b FS=0053 GS=002b
RFLAGS=0000000000040246
CR0=0000000080050033 CR2=0000000000000000 CR3=0000000000000000
CR4=0000000000000000 CR8=0000000000000000 EFER=0000000000000d01
FS_BASE=0000000000000000 GS_BASE=ffff888007c00000 KERNEL_GS_BASE=0000000000000000"""
    )


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("r rax", "rax=ffff948cc1ba4780"),
        ("r RAX", "rax=ffff948cc1ba4780"),
        ("R @Rax", "rax=ffff948cc1ba4780"),
        ("r eax", "eax=c1ba4780"),
        ("r ah", "ah=47"),
        ("r cs", "cs=0010"),
        ("r zf", "zf=1"),
        ("r af", "af=0"),  # a number elsewhere
        ("r gs_base", "gs_base=ffff888007c00000"),
    ],
)
def test_one(loaded: Typist, line: str, shown: str) -> None:
    assert loaded.types(line) == shown


def test_of_the_current_core(loaded: Typist) -> None:
    loaded.put(1, rax=7)
    loaded.types("~ 1")
    assert loaded.types("r rax") == "rax=0000000000000007"
    assert loaded.types("r rax = 8") == "rax=0000000000000008"
    loaded.types("~ 0")
    assert loaded.types("r rax") == "rax=ffff948cc1ba4780"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("r rdx=10", "rdx=0000000000000010"),
        ("r rdx = 10", "rdx=0000000000000010"),
        ("r rdx =0n10", "rdx=000000000000000a"),
        ("r rdx= fffff800`3ad6f010", "rdx=fffff8003ad6f010"),
        ("r rdx = rcx", "rdx=0000000000000024"),
        ("r rdx = @RCX + rbp+10", "rdx=0000000000000036"),
        ("r rdx = rcx-5", "rdx=000000000000001f"),
        ("r rdx = -1", "rdx=ffffffffffffffff"),
        ("r rdx = 5 - - 3 + +1", "rdx=0000000000000009"),
        ("r rdx = af", "rdx=00000000000000af"),
        ("r rdx = @zf", "rdx=0000000000000001"),
        ("r al = al + 1", "al=81"),
        ("r ecx = - 2", "ecx=fffffffe"),
        ("r zf = 0", "zf=0"),
        ("r rip = rip + 2 // skip it", "rip=fffff80168d91264"),
        ("r rdx/* */=/*x*/4/**/", "rdx=0000000000000004"),
    ],
)
def test_assignment(loaded: Typist, line: str, shown: str) -> None:
    assert loaded.types(line) == shown
    name = shown.partition("=")[0]
    assert loaded.types(f"r {name}") == shown


def test_a_part_leaves_the_rest(loaded: Typist) -> None:
    loaded.types("r eax = 1")
    assert loaded.types("r rax") == "rax=ffff948c00000001"


@pytest.mark.parametrize(
    ("line", "message", "column", "width"),
    [
        ("r raxx", "'raxx' is no register: did you mean 'rax'?", 2, 4),
        ("r 5", "'5' is no register", 2, 1),
        ("r = 5", "'=' is no register", 2, 1),
        ("r rax 5", "after a register comes '=' or nothing, not '5'", 6, 1),
        ("r rax +5", "after a register comes '=' or nothing, not '+'", 6, 1),
        ("r rax =", "a number or register is missing", 7, 1),
        ("r rax = 5 +", "a number or register is missing", 11, 1),
        ("r rax = 5 5", "a + or - is missing before this", 10, 1),
        ("r rax = 5 = 5", "there is nothing to assign to here", 10, 1),
        ("r rax = xyz", "'xyz' is neither a number nor a register, nor a symbol that is known", 8, 3),
        ("r rax = @5", "'@5' is no register", 8, 2),
        ("r al = 100", "al holds 8 bits; 0x100 does not fit", 7, 3),
        ("r zf = 1+1", "zf holds 1 bit; 0x2 does not fit", 7, 3),
        ('r rax = "5"', "text in quotes or braces is no number", 8, 3),
        ("r rax = {5}", "text in quotes or braces is no number", 8, 3),
    ],
)
def test_what_is_wrong(loaded: Typist, line: str, message: str, column: int, width: int) -> None:
    first, _, mark = loaded.fails(line).split("\n")
    assert first == message
    assert mark == " " * column + "^" + "~" * (width - 1)
    assert loaded.types("r rax") == "rax=ffff948cc1ba4780"


def test_it_needs_a_halted_machine(typist: Typist) -> None:
    typist.types("g")
    assert typist.fails("r rax") == "'r' needs a halted machine ('pause' halts it)\nr rax\n^"
