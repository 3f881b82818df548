"""Tests of rdmsr and wrmsr."""

from __future__ import annotations

import pytest

from tests.commands.fakes import FULL_MSR, WRITE_ONLY_MSR, Typist
from vmexit.errors import TargetError, VmexitError
from vmexit.msr_access import MsrError
from vmexit.targets.base import OnlyLooks

LSTAR = 0xC0000082


@pytest.fixture
def loaded(typist: Typist) -> Typist:
    """With some MSRs."""
    typist.link.msrs.update({(core, LSTAR): 0xFFFFF80773553180 + core for core in range(2)})
    typist.link.msrs.update({(0, 0x1234): 5, (1, 0x1234): 5, (0, FULL_MSR): 0, (1, FULL_MSR): 0})
    return typist


def test_read_on_all_cores(loaded: Typist) -> None:
    assert loaded.types("rdmsr c0000082") == (
        "core : 0x0 - msr[c0000082] = fffff80773553180  LSTAR\ncore : 0x1 - msr[c0000082] = fffff80773553181  LSTAR"
    )


@pytest.mark.parametrize("line", ["rdmsr lstar core 1", "RDMSR IA32_LSTAR CORE 0x1", "rdmsr core 0n1 c0000082"])
def test_read_on_one(loaded: Typist, line: str) -> None:
    assert loaded.types(line) == "core : 0x1 - msr[c0000082] = fffff80773553181  LSTAR"


def test_what_a_value_says(loaded: Typist) -> None:
    assert loaded.types("rdmsr efer core 0") == "core : 0x0 - msr[c0000080] = 0000000000000500  EFER LME LMA"
    assert loaded.types("rdmsr 1234 core 0") == "core : 0x0 - msr[1234] = 0000000000000005"


def test_write_on_all_cores(loaded: Typist) -> None:
    assert loaded.types("wrmsr efer d01") == "\n".join(
        f"core : {core:#x} - msr[c0000080] = 0000000000000d01  EFER 0x500 -> 0xd01 +SCE +NXE" for core in range(2)
    )
    assert loaded.link.msrs[0, 0xC0000080] == loaded.link.msrs[1, 0xC0000080] == 0xD01


def test_write_on_one(loaded: Typist) -> None:
    assert loaded.types("wrmsr 1234 fffff807`73553180 core 1") == (
        "core : 0x1 - msr[1234] = fffff80773553180  0x5 -> 0xfffff80773553180"
    )
    assert (loaded.link.msrs[0, 0x1234], loaded.link.msrs[1, 0x1234]) == (5, 0xFFFFF80773553180)


def test_a_value_is_an_expression(loaded: Typist) -> None:
    loaded.put(rsp=0x1000)
    loaded.types("wrmsr 1234 rsp + 10 core 0")
    assert loaded.link.msrs[0, 0x1234] == 0x1010
    loaded.types("wrmsr 1234 @rsp-1001")
    assert loaded.link.msrs[1, 0x1234] == 0xFFFFFFFFFFFFFFFF


def test_an_msr_that_can_only_be_written(loaded: Typist) -> None:
    shown = loaded.types(f"wrmsr {WRITE_ONLY_MSR:x} 1 core 0")
    assert shown == "core : 0x0 - msr[49] = 0000000000000001  (it can only be written)"


@pytest.mark.parametrize(
    ("line", "message", "marked"),
    [
        ("rdmsr", "which MSR? (rdmsr MSR [core CORE])", ""),
        ("rdmsr core 1", "which MSR?", ""),
        ("rdmsr lstarr", "there is no MSR 'lstarr'", "lstarr"),
        ("rdmsr 10 20 30", "behind the MSR stands 'core CORE' or nothing", "20 30"),
        ("rdmsr 10 core", "a value for 'core' is missing (core CORE)", ""),
        ("rdmsr 10 core 2", "there is no core 2 (there are 0 to 1)", "2"),
        ("rdmsr 10 core all", "'all' is no core number", "all"),
        ("rdmsr {10}", "the number or name of an MSR is typed without quotes and braces", "{10}"),
        ("rdmsr 100000000", "100000000 is too big: the biggest MSR number is ffffffff", "100000000"),
        ("wrmsr", "which MSR?", ""),
        ("wrmsr 10", "a value is missing (wrmsr MSR VALUE [core CORE])", ""),
        ("wrmsr 10 core 1", "a value is missing", ""),
        ("wrmsr 1234 5 6", "a + or - is missing before this", "6"),
        ("wrmsr 1234 rsp zz", "a + or - is missing before this", "zz"),
        ("wrmsr 1234 wat", "'wat' is neither a number nor a register", "wat"),
        ("wrmsr 1234 ffffffffffffffff+1", "an MSR holds 64 bits; this value has more", "ffffffffffffffff+1"),
    ],
)
def test_what_is_wrong_is_marked(loaded: Typist, line: str, message: str, marked: str) -> None:
    first, _, mark = loaded.fails(line).split("\n")
    assert first.startswith(message)
    column = line.rindex(marked) if marked else len(line)
    assert mark == " " * column + "^" + "~" * (len(marked) - 1)
    assert loaded.link.msrs[0, 0x1234] == 5


def test_what_the_machine_refuses(loaded: Typist) -> None:
    with pytest.raises(MsrError, match=r"^MSR 10 cannot be read on core 0: QEMU's emulation has none"):
        loaded.types("rdmsr 10")
    with pytest.raises(MsrError, match=r"^MSR 10 cannot be written on core 1: QEMU's emulation has none"):
        loaded.types("wrmsr 10 0 core 1")
    with pytest.raises(MsrError, match=r"^MSR 200 on core 0 does not take 5: a WRMSR of it would be #GP$"):
        loaded.types("wrmsr 200 5")
    loaded.link.door = "kvm"
    with pytest.raises(MsrError, match=r"^core 0 has no MSR 10 that can be read: it would be #GP"):
        loaded.types("rdmsr 10")


def test_a_running_machine(loaded: Typist) -> None:
    loaded.types("g")
    assert loaded.fails("rdmsr 10").startswith("'rdmsr' needs a halted machine ('pause' halts it)")
    assert loaded.fails("wrmsr 10 0").startswith("'wrmsr' needs a halted machine")
    with pytest.raises(VmexitError, match="halt it first"):
        loaded.debugger.read_msr(LSTAR)


def test_from_python(loaded: Typist) -> None:
    debugger = loaded.debugger
    assert debugger.read_msr("LSTAR") == debugger.read_msr(LSTAR, 0) == 0xFFFFF80773553180
    debugger.core = 1
    debugger.write_msr("ia32_lstar", 7)
    assert (debugger.read_msr(LSTAR), debugger.read_msr(LSTAR, 0)) == (7, 0xFFFFF80773553180)
    for wrong in (-1, 1 << 64):
        with pytest.raises(MsrError, match="an MSR holds 64 bits"):
            debugger.write_msr(LSTAR, wrong)
    for wrong in (-1, 1 << 32):
        with pytest.raises(MsrError, match="an MSR is a number from 0 to ffffffffh"):
            debugger.read_msr(wrong)
    with pytest.raises(VmexitError, match="there is no core 2"):
        debugger.read_msr(LSTAR, 2)


def test_a_machine_that_is_only_looked_at_or_has_ended(loaded: Typist) -> None:
    loaded.target.only_looks = OnlyLooks("nobody may touch it", ())
    with pytest.raises(MsrError, match="MSRs cannot be read or written here: nobody may touch it"):
        loaded.debugger.read_msr(LSTAR)
    loaded.target.only_looks = None
    loaded.target.ended(0)
    loaded.debugger.pump()
    with pytest.raises(TargetError, match="the machine has ended"):
        loaded.debugger.write_msr(LSTAR, 1)
