"""Tests of the command msr."""

from __future__ import annotations

import pytest

from tests.commands.fakes import Typist
from vmexit import msr
from vmexit.commands import msr_explain


def test_what_an_msr_is(typist: Typist) -> None:
    lines = typist.types("msr FMASK").splitlines()
    assert lines[0] == "c0000084 FMASK (Intel and AMD): flags that SYSCALL clears"
    assert lines[1] == "also called SFMASK, SF_MASK, SYSCALL_MASK, SYSCALL_FLAG_MASK"
    assert "     13:12  IOPL" in [f"   {line}" for line in lines]
    assert lines[-1].startswith("source: AMD64 Architecture Programmer's Manual")


def test_names_of_values_are_told(typist: Typist) -> None:
    assert "  18:17  MODE     0 oneshot, 1 periodic, 2 deadline" in typist.types("msr x2apic_lvt_timer").splitlines()


@pytest.mark.parametrize(
    "line", ["msr c0000080 d01", "MSR efer d01", "msr IA32_EFER 0xd01", "msr msr_efer 0n3329", "msr 0xc0000080 d`01"]
)
def test_what_a_value_says(typist: Typist, line: str) -> None:
    assert typist.types(line).splitlines() == [
        "EFER = 0xd01 SCE LME LMA NXE",
        "      0  SCE  SYSCALL and SYSRET can be executed",
        "      8  LME  long mode is wanted; it begins with paging",
        "     10  LMA  long mode is active (set by the processor)",
        "     11  NXE  page tables may forbid execution",
    ]


def test_values_of_fields(typist: Typist) -> None:
    assert typist.types("msr star 0023001000000000").splitlines() == [
        "STAR = 0x23001000000000 SYSCALL_CS=0x10 SYSRET_CS=0x23",
        "  47:32  SYSCALL_CS  0x10  CS of the kernel; SS is 8 more",
        "  63:48  SYSRET_CS   0x23  CS of a 32-bit user; SS is 8 more, a 64-bit user's CS 16 more",
    ]
    assert typist.types("msr lstar ffffffff81a00080") == "LSTAR = 0xffffffff81a00080"


def test_what_a_change_means(typist: Typist) -> None:
    assert typist.types("msr efer 500 d01") == "EFER 0x500 -> 0xd01 +SCE +NXE"


def test_an_address_with_two_meanings(typist: Typist) -> None:
    shown = typist.types("msr 8b 1234")
    assert shown.split("\n\n") == [
        "BIOS_SIGN_ID = 0x1234 other=0x1234",
        "PATCH_LEVEL = 0x1234 REVISION=0x1234\n   31:0  REVISION  0x1234",
    ]
    assert typist.types("msr patch_level 1234").splitlines()[0] == "PATCH_LEVEL = 0x1234 REVISION=0x1234"
    assert [line for line in typist.types("msr 309").splitlines() if line.startswith("309")] == [
        "309 FIXED_CTR0 (Intel): counter of one fixed event: instructions, cycles, reference cycles, slots",
        "309 P4_FLAME_PERFCTR1 (Intel p4): performance counter",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("msr", "which MSR? (msr MSR [VALUE])"),
        ("msr zzz", "there is no MSR 'zzz'"),
        ("msr lsttar", "there is no MSR 'lsttar': did you mean LSTAR, STAR, CSTAR?"),
        ("msr gs_bas", "there is no MSR 'gs_bas': did you mean GS_BASE, KERNEL_GS_BASE?"),
        ("msr dead0", "nothing is known of MSR dead0"),
        ("msr 100000000", "100000000 is too big: the biggest MSR number is ffffffff"),
        ("msr efer sce", "'sce' is no value of an MSR (a number is hexadecimal; decimal ones begin with 0n)"),
        ("msr efer 1 2 3", "'msr' takes 3 arguments at most"),
        ("msr efer,star", "there is no MSR 'efer,star'"),
        ('msr "efer"', "the number or name of an MSR is typed without quotes and braces"),
        ("msr {efer}", "the number or name of an MSR is typed without quotes and braces"),
    ],
)
def test_what_is_wrong(typist: Typist, line: str, message: str) -> None:
    assert typist.fails(line).splitlines()[0] == message


def test_everything_in_lines() -> None:
    lines = msr_explain.overview().splitlines()
    assert len(lines) == len(msr.everything())
    assert "c0000082  LSTAR                         both         where SYSCALL enters the kernel from 64-bit code" in lines


def test_everything_can_be_explained(typist: Typist) -> None:
    for one in msr.everything():
        for rest in ("", " 0", " ffffffffffffffff", " 0 ffffffffffffffff"):
            assert typist.types(f"msr {one.name}{rest}").splitlines()[0].isprintable()
