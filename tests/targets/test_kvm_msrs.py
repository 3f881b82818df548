"""Filters by value, and MSRs that the debugger reads and writes, where KVM runs the guest: in QEMU, and in a VMM that is not."""

from __future__ import annotations

import pytest

from tests.guests import expected
from tests.guests.build import symbols
from tests.machines import guest
from tests.targets.test_kvm import PARAVIRTUAL, finish, vmm
from vmexit import Debugger, Stage, StopReason
from vmexit.link.client import RequestError
from vmexit.msr_access import MsrError

STAR, LSTAR, EFER, PAT, FS_BASE, APIC_BASE, MTRR_CAP = 0xC0000081, 0xC0000082, 0xC0000080, 0x277, 0xC0000100, 0x1B, 0xFE


def values(debugger: Debugger, number: int = 0) -> list[int]:
    """What the records of an event have as values."""
    recording = list(debugger.events)[number].recording
    assert recording is not None
    return [trap.value for trap in recording]


def break_at(debugger: Debugger, rip: int) -> None:
    """Runs until the instruction there is about to execute."""
    event = debugger.on_msr_write(range(1 << 32), lambda trap: trap.halt() if trap.rip == rip else None)
    assert debugger.run(timeout=60).reason == StopReason.BREAK
    debugger.clear(event)


def test_values_in_a_vmm() -> None:
    with vmm("loop", COUNT=20) as (debugger, _, _):
        debugger.on_msr_write(STAR, value=3, mask=7)
        debugger.on_msr_write(STAR, changed=True, mask=0x10)
        finish(debugger)
        assert [value & 7 for value in values(debugger)] == [3, 3, 3]
        assert [value & 0x10 for value in values(debugger, 1)] in ([0x10, 0], [0x10])


@pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST, Stage.ALL])
def test_only_what_changes(stage: Stage) -> None:
    """KVM tells what the MSR holds: the guest's first write of what is there already is none."""
    with vmm("sequence") as (debugger, image, _):
        first = next(access for access in expected.sequence(image) if access.msr == PAT).value
        debugger.write_msr(PAT, first)
        debugger.on_msr_write(PAT, changed=True, stage=stage)
        debugger.on_msr_write(LSTAR, changed=True, stage=stage)
        finish(debugger)
        assert values(debugger) == []
        assert values(debugger, 1) == [0xFFFF923344556677] * (2 if stage == Stage.ALL else 1)


def test_what_was_read() -> None:
    with vmm("sequence") as (debugger, _, _):
        debugger.on_msr_read(stage=Stage.POST, value=0xFFFF << 48, mask=0xFFFF << 48)
        finish(debugger)
        assert len(values(debugger)) > 3
        assert all(value >> 48 == 0xFFFF for value in values(debugger))


@pytest.mark.parametrize("name", ["vmm", "kvm"])
def test_msrs_are_read_and_written(name: str) -> None:
    machine = vmm("sequence") if name == "vmm" else guest("sequence", thread="kvm")
    with machine as (debugger, image, output):
        break_at(debugger, symbols(image)["lstar"])
        assert debugger.read_msr(STAR) == 0x1122334455667788
        assert debugger.read_msr("LSTAR") == 0
        assert debugger.read_msr(EFER) == debugger.registers()["efer"]
        assert debugger.read_msr(APIC_BASE) & ~0xFFF == 0xFEE00000
        debugger.write_msr(FS_BASE, 0x7E00_0000_1000)
        debugger.write_msr(LSTAR, 0x1000)
        assert (debugger.read_msr(FS_BASE), debugger.registers()["fs_base"]) == (0x7E00_0000_1000,) * 2
        assert debugger.read_msr(LSTAR) == 0x1000
        debugger.decide(True)
        # Which an event has to be interested in for to come once more.
        debugger.on_msr_write(LSTAR, value=0)
        finish(debugger)
        assert "msr=c0000082 value=0000000000001000" in output.text


def test_what_the_processor_refuses() -> None:
    with vmm("sequence") as (debugger, image, _):
        break_at(debugger, symbols(image)["lstar"])
        with pytest.raises(MsrError, match="core 0 has no MSR 4711 that can be read"):
            debugger.read_msr(0x4711)
        with pytest.raises(MsrError, match="core 0 has no MSR 4711 that can be written"):
            debugger.write_msr(0x4711, 1)
        efer = debugger.read_msr(EFER)
        for msr, value in ((LSTAR, 1 << 60), (EFER, 1 << 63), (EFER, efer ^ 0x100), (MTRR_CAP, 1)):
            with pytest.raises(MsrError, match="does not take"):
                debugger.write_msr(msr, value)
        assert debugger.read_msr(EFER) == efer
        finish(debugger)


def test_what_a_vmm_keeps_to_itself() -> None:
    with vmm("hang", own_msr=PARAVIRTUAL) as (debugger, _, _):
        for refused in (lambda: debugger.read_msr(PARAVIRTUAL), lambda: debugger.write_msr(PARAVIRTUAL, 1)):
            with pytest.raises(MsrError, match="the VMM keeps it to itself"):
                refused()


def test_only_while_it_stands_still() -> None:
    with vmm("hang") as (debugger, _, _):
        debugger.go()
        for refused in (lambda: debugger.read_msr(STAR), lambda: debugger.write_msr(STAR, 1)):
            with pytest.raises(RequestError, match="halt it first"):
                refused()


def test_each_core_has_its_own() -> None:
    with vmm("smp", 2, COUNT=20, PATIENCE=1 << 20) as (debugger, _, _):
        debugger.on_msr_write(STAR, lambda trap: trap.halt(), core=1)
        assert debugger.run(timeout=60).reason == StopReason.BREAK
        debugger.write_msr(LSTAR, 0x1000, 0)
        debugger.write_msr(LSTAR, 0x2000, 1)
        assert [debugger.read_msr(LSTAR, core) for core in range(2)] == [0x1000, 0x2000]
        for event in debugger.events:
            debugger.clear(event)
        finish(debugger)
