"""The debugger on real machines: what is trapped, in which order and stage, and what it does to the guest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guests import expected
from tests.guests.build import OK_STATUS, symbols
from tests.machines import Output, access_of, guest
from tests.outputs.peers import wait_until
from vmexit import Access, Action, Debugger, Event, LiveTrap, MsrSet, Stage, State, StopReason, Trap, VmexitError
from vmexit.link.client import RequestError
from vmexit.link.wire import RecordFlag

EVERY_MSR = range(1 << 32)
THREADS = ("multi", "single", "kvm")
"""How a guest is run: by TCG in two ways, or by KVM, through the other door."""
DOORS = pytest.mark.parametrize("thread", ["multi", "kvm"])


def finish(debugger: Debugger, status: int = OK_STATUS) -> None:
    """Lets the machine run to its end, which has to be a good one."""
    stop = debugger.run(timeout=60)
    assert (stop.reason, stop.exit_status) == (StopReason.ENDED, status)


def logged(debugger: Debugger, image: Path | None = None, *, stage: Stage, asking: bool = False) -> list[Trap]:
    """Traps every access in these stages, lets the machine run to its end, and gives what came, in order.

    With an image only what came from there: newer firmware accesses MSRs on every machine.
    """
    traps: list[Trap] = []
    if asking:
        debugger.on_msr_write(EVERY_MSR, lambda trap: traps.append(trap.trap), stage=stage)
        debugger.on_msr_read(EVERY_MSR, lambda trap: traps.append(trap.trap), stage=stage)
    else:
        debugger.on_msr_write(EVERY_MSR, stage=stage)
        debugger.on_msr_read(EVERY_MSR, stage=stage)
        debugger.listeners.append(traps.extend)
    finish(debugger)
    assert [trap.sequence for trap in traps] == list(range(len(traps)))
    return traps if image is None else [trap for trap in traps if is_in(image, trap)]


def is_in(image: Path, trap: Trap) -> bool:
    """Whether it came from the guest itself, which also runs at other virtual addresses, whole gigabytes away (alias.S)."""
    at = symbols(image)
    return at["image_start"] <= trap.rip % (1 << 30) < at["image_end"]


def without_read_values(accesses: list[expected.Access]) -> list[expected.Access]:
    """Before an RDMSR its value is not known."""
    return [replace(access, value=0) if access.kind == "rdmsr" else access for access in accesses]


def surely_done(accesses: Iterable[expected.Access], thread: str) -> list[expected.Access]:
    """Without those that a processor may refuse; TCG refuses none of them."""
    refused = {msr for _, msr, _ in expected.SEQUENCE_UNREAD} if thread == "kvm" else set()
    return [access for access in accesses if access.msr not in refused]


def logs_of(name: str, image: Path) -> list[expected.Access]:
    """The right log of one of the guests with one vCPU and no interrupts."""
    log: list[expected.Access] = {
        "sequence": expected.sequence,
        "selfcheck": expected.selfcheck,
        "fault": expected.fault,
        "alias": expected.alias,
    }[name](image)
    return log


class TestLog:
    """Every access is seen once, in order, with the right numbers; the guest notices nothing."""

    @pytest.mark.parametrize("asking", [False, True], ids=["recorded", "asked"])
    @pytest.mark.parametrize("thread", THREADS)
    @pytest.mark.parametrize("name", ["sequence", "selfcheck", "fault", "alias"])
    def test_pre(self, name: str, thread: str, asking: bool) -> None:
        with guest(name, thread=thread) as (debugger, image, output):
            traps = logged(debugger, image, stage=Stage.PRE, asking=asking)
            assert {trap.stage for trap in traps} == {Stage.PRE}
            got = without_read_values([access_of(trap) for trap in traps])
            assert got == without_read_values([replace(access, faults=False) for access in logs_of(name, image)])
            assert "bad " not in output.text

    @pytest.mark.parametrize("asking", [False, True], ids=["recorded", "asked"])
    @pytest.mark.parametrize("thread", THREADS)
    @pytest.mark.parametrize("name", ["sequence", "selfcheck", "fault", "alias"])
    def test_post_has_the_values_read_and_no_faults(self, name: str, thread: str, asking: bool) -> None:
        with guest(name, thread=thread) as (debugger, image, output):
            traps = logged(debugger, image, stage=Stage.POST, asking=asking)
            assert {trap.stage for trap in traps} == {Stage.POST}
            wanted = [access for access in logs_of(name, image) if not access.faults]
            assert surely_done(map(access_of, traps), thread) == surely_done(wanted, thread)
            assert "bad " not in output.text

    @pytest.mark.parametrize("thread", THREADS)
    def test_all_is_pre_then_post_of_each(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, image, _):
            traps = [trap for trap in logged(debugger, image, stage=Stage.ALL) if surely_done([access_of(trap)], thread)]
            stages = [trap.stage for trap in traps]
            assert stages == [Stage.PRE, Stage.POST] * (len(traps) // 2)
            assert [access_of(trap) for trap in traps[1::2]] == surely_done(expected.sequence(image), thread)

    @pytest.mark.parametrize("asking", [False, True], ids=["recorded", "asked"])
    @pytest.mark.parametrize("thread", THREADS)
    def test_two_vcpus(self, thread: str, asking: bool) -> None:
        count = 300 if asking else 3000
        with guest("smp", 2, thread=thread, COUNT=count, PATIENCE=1 << 20) as (debugger, image, output):
            traps = logged(debugger, image, stage=Stage.ALL, asking=asking)
            for core, log in enumerate(expected.smp(image, count)):
                mine = [trap for trap in traps if trap.core == core]
                assert [access_of(trap) for trap in mine if trap.stage == Stage.POST] == log
                before = [access_of(trap) for trap in mine if trap.stage == Stage.PRE]
                assert without_read_values(before) == without_read_values(log)
            assert output.text.count("core=") == 2

    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST, Stage.ALL])
    @pytest.mark.parametrize("thread", THREADS)
    def test_interrupts_between(self, thread: str, stage: Stage) -> None:
        with guest("irq", thread=thread, COUNT=3000) as (debugger, image, output):
            traps = logged(debugger, image, stage=stage)
            counts = dict(part.split("=") for part in output.text.split())
            assert counts["bad"] == "0" * 16
            loop, handler = expected.irq(image, int(counts["writes"], 16), int(counts["irqs"], 16))
            for log, msrs in ((loop, {expected.STAR, expected.EFER}), (handler, {expected.LSTAR})):
                mine = [trap for trap in traps if trap.msr in msrs]
                for each in (Stage.PRE, Stage.POST):
                    if stage & each:
                        got = [access_of(trap) for trap in mine if trap.stage == each]
                        normal = without_read_values if each == Stage.PRE else list[expected.Access]
                        assert normal(got) == normal(log)

    def test_every_asked_trap_with_interrupts(self) -> None:
        with guest("irq", COUNT=500, PERIOD=2_000_000) as (debugger, image, output):
            traps = logged(debugger, image, stage=Stage.ALL, asking=True)
            counts = dict(part.split("=") for part in output.text.split())
            loop, handler = expected.irq(image, int(counts["writes"], 16), int(counts["irqs"], 16))
            assert counts["bad"] == "0" * 16
            assert len(traps) == 2 * (len(loop) + len(handler))

    def test_firmware_is_trapped_too(self) -> None:
        with guest("sequence", machine="pc") as (debugger, image, _):
            traps = logged(debugger, stage=Stage.PRE)
            firmware = [trap for trap in traps if not is_in(image, trap)]
            # SeaBIOS sets the MTRRs (src/fw/mtrr.c).
            assert {0x2FF, 0x200, 0x250, 0x26F} <= {trap.msr for trap in firmware}


class TestSelection:
    """Which traps an event is triggered by."""

    def test_without_an_msr_five_writes_and_three_reads_are_left_out(self) -> None:
        with guest("sequence") as (debugger, image, _):
            writes, reads = debugger.on_msr_write(), debugger.on_msr_read()
            finish(debugger)
            log = expected.sequence(image)
            assert writes.recording is not None and reads.recording is not None
            written = {trap.msr for trap in writes.recording if is_in(image, trap)}
            read = {trap.msr for trap in reads.recording if is_in(image, trap)}
            assert written == {access.msr for access in log if access.kind == "wrmsr"} - expected.LEFT_OUT
            assert read == {access.msr for access in log if access.kind == "rdmsr"} - {0xC0000102}

    @pytest.mark.parametrize("msr", sorted(expected.LEFT_OUT))
    def test_those_left_out_can_be_named(self, msr: int) -> None:
        with guest("sequence") as (debugger, image, _):
            event = debugger.on_msr_write(msr)
            finish(debugger)
            wanted = [a for a in expected.sequence(image) if a.kind == "wrmsr" and a.msr == msr]
            assert event.recording is not None
            assert [access_of(trap) for trap in event.recording] == wanted
            assert debugger.hits(event) == 0 or len(wanted) > 0

    def test_core(self) -> None:
        with guest("smp", 2, COUNT=50) as (debugger, _, _):
            event = debugger.on_msr_write(expected.STAR, core=1)
            finish(debugger)
            assert event.recording is not None
            assert [trap.value >> 32 for trap in event.recording] == [1] * 50
            assert {trap.core for trap in event.recording} == {1}

    def test_disabled_and_cleared_events_do_nothing(self) -> None:
        with guest("sequence") as (debugger, _, _):
            disabled, cleared = debugger.on_msr_write(), debugger.on_msr_write()
            debugger.enable(disabled, False)
            debugger.clear(cleared)
            finish(debugger)
            assert debugger.summary.total == 0
            assert list(debugger.events) == [disabled]

    def test_a_core_that_is_not_there(self) -> None:
        with guest("sequence") as (debugger, _, _), pytest.raises(VmexitError, match="only core 0"):
            debugger.on_msr_write(core=1)

    def test_a_number_is_never_given_twice(self) -> None:
        with guest("sequence") as (debugger, _, _):
            first = debugger.on_msr_write(1)
            debugger.clear(first)
            assert debugger.on_msr_write(1).number == first.number + 1


class TestShortCircuit:
    """Skipped instructions: never executed, no post stage; the last event that acts decides."""

    @DOORS
    def test_a_skipped_write_is_not_written_and_has_no_post_stage(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):
            skipping = debugger.on_msr_write(expected.LSTAR, short_circuit=True)
            after = debugger.on_msr_write(expected.LSTAR, stage=Stage.POST)
            finish(debugger)
            assert "msr=c0000082 value=0000000000000000" in output.text
            assert "msr=c0000083 value=ffffa23344556677" in output.text
            assert (debugger.hits(skipping), debugger.hits(after)) == (1, 0)
            assert skipping.recording is not None
            assert [trap.flags for trap in skipping.recording] == [RecordFlag.SKIPPED]

    @DOORS
    @pytest.mark.parametrize("encoding", ["rex", "ds", "longest", "two_pages"])
    def test_the_guest_goes_on_behind_the_instruction_however_it_is_encoded(self, encoding: str, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, image, output):
            at = symbols(image)

            def skip_this(trap: LiveTrap) -> None:
                if trap.rip == at[encoding]:
                    trap.skip()

            debugger.on_msr_write(expected.STAR, skip_this)
            finish(debugger)
            value = next(value for name, _, value in expected.SEQUENCE if name == encoding)
            assert f"msr=c0000081 value={value:016x}" not in output.text
            assert f"msr=c0000081 value={value - 0x100000001:016x}" in output.text

    @DOORS
    @pytest.mark.parametrize("order", [(True, False), (False, True)])
    def test_the_later_event_decides(self, order: tuple[bool, bool], thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):
            for short_circuit in order:
                debugger.on_msr_write(expected.LSTAR, short_circuit=short_circuit)
            finish(debugger)
            assert ("msr=c0000082 value=0000000000000000" in output.text) == order[-1]

    @DOORS
    def test_a_skipped_read_leaves_the_registers_alone(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):
            debugger.on_msr_read("IA32_LSTAR", short_circuit=True)
            finish(debugger)
            # What the guest prints then is what EDX:EAX held before.
            assert "msr=c0000082 value=ffff923344556677" in output.text or "msr=c0000082" in output.text

    @pytest.mark.parametrize("stage", [Stage.POST, Stage.ALL])
    def test_not_in_the_post_stage(self, stage: Stage) -> None:
        with guest("sequence") as (debugger, _, _), pytest.raises(VmexitError, match="needs 'stage pre'"):
            debugger.on_msr_write(short_circuit=True, stage=stage)

    def test_skipping_in_a_post_callback_is_an_error_and_the_guest_goes_on(self) -> None:
        with guest("sequence") as (debugger, _, _):
            debugger.on_msr_write(expected.LSTAR, lambda trap: trap.skip(), stage=Stage.POST)
            with pytest.raises(VmexitError, match="only stage pre can skip"):
                debugger.run(timeout=60)
            finish(debugger)


class TestModify:
    """Registers that a callback changes are what the guest goes on with."""

    @DOORS
    def test_a_changed_value_is_written(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):

            def change(trap: LiveTrap) -> None:
                trap.value = 0x0000456789ABCDEF

            debugger.on_msr_write(expected.LSTAR, change)
            finish(debugger)
            assert "msr=c0000082 value=0000456789abcdef" in output.text

    @DOORS
    def test_a_changed_msr_is_written_instead(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):

            def redirect(trap: LiveTrap) -> None:
                trap.msr = 0xC0000084

            debugger.on_msr_write(expected.LSTAR, redirect)
            finish(debugger)
            lines = output.text.splitlines()
            # The guest reads the MSR that ECX holds then: the one that was really written.
            assert "msr=c0000082 value=ffff923344556677" in lines or "msr=c0000084 value=ffff923344556677" in lines

    @DOORS
    def test_later_events_see_the_change(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, _):

            def change(trap: LiveTrap) -> None:
                trap.value += 1

            debugger.on_msr_write(expected.LSTAR, change)
            debugger.on_msr_write(expected.LSTAR, change)
            last = debugger.on_msr_write(expected.LSTAR, stage=Stage.ALL)
            finish(debugger)
            assert last.recording is not None
            assert [trap.value for trap in last.recording] == [0xFFFF923344556679] * 2

    @DOORS
    def test_a_read_value_is_changed_in_the_post_stage(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):

            def change(trap: LiveTrap) -> None:
                trap.value = 0xFEDCBA9876543210

            debugger.on_msr_read(expected.LSTAR, change, stage=Stage.POST)
            finish(debugger)
            assert "msr=c0000082 value=fedcba9876543210" in output.text

    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
    @pytest.mark.parametrize("thread", THREADS)
    def test_every_register(self, stage: Stage, thread: str) -> None:
        names = ["rax", "rbx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16))]
        with guest("selfcheck", thread=thread, DUMP=1) as (debugger, image, output):
            found: dict[str, int] = {}

            def change(trap: LiveTrap) -> None:
                if trap.rip != symbols(image)["dump_wrmsr"]:
                    return
                found.update(trap.registers)
                for number, name in enumerate(names, 1):
                    trap.registers[name] = number * 0x0101010101010101
                trap.registers["rflags"] = 0x446  # DF ZF PF
                trap.registers["df"] = 0

            debugger.on_msr_write(expected.STAR, change, stage=stage)
            finish(debugger)
            lines = dict(line.split("=") for line in output.text.splitlines())
            assert [lines[name] for name in names] == [f"{n * 0x0101010101010101:016x}" for n in range(1, len(names) + 1)]
            assert lines["rflags"] == f"{0x46:016x}"
            assert (found["rcx"], found["r15"], found["rsp"]) == (0x33333333C0000081, 0x0123456789ABCDEF, 0x8888888888888888)
            assert found["rflags"] == 0x897
            rip = symbols(image)["dump_wrmsr"]
            assert found["rip"] == (rip if stage == Stage.PRE else rip + 2)

    @DOORS
    def test_a_callback_can_send_the_guest_elsewhere(self, thread: str) -> None:
        with guest("selfcheck", thread=thread, DUMP=1) as (debugger, image, output):
            at = symbols(image)

            def detour(trap: LiveTrap) -> None:
                if trap.rip == at["dump_wrmsr"]:
                    trap.registers["rip"] = at["dump_detour"]

            debugger.on_msr_write(expected.STAR, detour)
            finish(debugger)
            assert "way=1" in output.text

    def test_values_that_do_not_fit(self) -> None:
        with guest("sequence") as (debugger, _, _):

            def too_large(trap: LiveTrap) -> None:
                trap.value = 1 << 64

            debugger.on_msr_write(expected.LSTAR, too_large)
            with pytest.raises(ValueError, match="64 bits"):
                debugger.run(timeout=60)


class TestCallbacks:
    """Python in the path of a trap."""

    @DOORS
    def test_an_exception_reaches_the_caller_and_the_guest_goes_on(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, image, output):

            def fail(trap: LiveTrap) -> None:
                raise LookupError("mine")

            event = debugger.on_msr_write(expected.LSTAR, fail)
            with pytest.raises(LookupError, match="mine"):
                debugger.run(timeout=60)
            assert debugger.registers()["rip"] == symbols(image)["lstar"]
            debugger.clear(event)
            finish(debugger)
            assert "msr=c0000082 value=ffff923344556677" in output.text

    @DOORS
    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
    def test_a_callback_can_halt_the_machine(self, stage: Stage, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, image, output):
            debugger.on_msr_write(expected.LSTAR, lambda trap: trap.halt(), stage=stage)
            stop = debugger.run(timeout=60)
            assert stop.reason == StopReason.BREAK and stop.trap is not None and stop.trap.stage == stage
            assert debugger.registers()["rip"] == symbols(image)["lstar"] + (2 if stage == Stage.POST else 0)
            finish(debugger)
            assert "msr=c0000082 value=ffff923344556677" in output.text

    @DOORS
    def test_memory(self, thread: str) -> None:
        with guest("selfcheck", thread=thread, DUMP=1) as (debugger, image, _):
            seen: list[bytes] = []
            rip = symbols(image)["dump_wrmsr"]

            def look(trap: LiveTrap) -> None:
                if trap.rip == rip:
                    seen.append(trap.read_memory(trap.rip, 2))
                    seen.append(trap.read_memory(trap.rip, 2, physical=True))
                    scratch = symbols(image)["image_end"] + 0x8000
                    trap.write_memory(scratch, b"vmexit" * 2000)
                    seen.append(trap.read_memory(scratch, 12000))
                    with pytest.raises(RequestError, match="not mapped"):
                        trap.read_memory(0x7FFF_FFFF_F000_0000, 1)

            debugger.on_msr_write(expected.STAR, look)
            finish(debugger)
            assert seen == [b"\x0f\x30", b"\x0f\x30", b"vmexit" * 2000]

    def test_traps_as_they_come(self) -> None:
        with guest("sequence") as (debugger, image, _):
            debugger.on_msr_write(EVERY_MSR)
            got = [access_of(trap) for trap in debugger.traps(timeout=60) if is_in(image, trap)]
            assert got == [access for access in expected.sequence(image) if access.kind == "wrmsr"]
            assert debugger.state == State.ENDED

    def test_leaving_the_iteration_halts_the_machine(self) -> None:
        with guest("hang") as (debugger, _, _):
            debugger.on_msr_write(expected.STAR)
            for trap in debugger.traps(timeout=60):
                if trap.value > 100:
                    break
            assert debugger.state == State.HALTED
            assert debugger.registers()["rip"] > 0

    def test_until_and_timeout(self) -> None:
        with guest("hang") as (debugger, _, _):
            event = debugger.on_msr_write(expected.STAR)
            stop = debugger.run(until=lambda: debugger.hits(event) > 1000, timeout=60)
            assert stop.reason == StopReason.CONDITION
            assert debugger.run(timeout=0.2).reason == StopReason.TIMEOUT
            assert debugger.state == State.HALTED


def breaking(msr: int = expected.LSTAR, *, stage: Stage = Stage.PRE, access: Access = Access.WRMSR) -> Event:
    """An event that breaks."""
    return Event(access=access, msrs=MsrSet.of(msr), stage=stage)


class TestBreak:
    """The machine halts precisely there, and goes on as if nothing had been."""

    @pytest.mark.parametrize("thread", THREADS)
    def test_pre_then_post(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, image, output):
            debugger.add(breaking(stage=Stage.ALL))
            rip = symbols(image)["lstar"]
            for stage, at in ((Stage.PRE, rip), (Stage.POST, rip + 2)):
                stop = debugger.run(timeout=60)
                assert stop.reason == StopReason.BREAK and stop.trap is not None
                assert (stop.trap.stage, stop.trap.rip, stop.trap.msr) == (stage, rip, expected.LSTAR)
                assert debugger.registers()["rip"] == at
                assert debugger.target.link.rings.vcpus >= 1
            finish(debugger)
            assert "msr=c0000082 value=ffff923344556677" in output.text

    @pytest.mark.parametrize("thread", THREADS)
    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST, Stage.ALL])
    def test_every_instruction_stopped_and_gone_on_with(self, thread: str, stage: Stage) -> None:
        with guest("selfcheck", thread=thread) as (debugger, image, output):
            debugger.add(breaking(expected.STAR, stage=stage))
            debugger.add(breaking(expected.STAR, stage=stage, access=Access.RDMSR))
            log: list[expected.Access] = []
            while (stop := debugger.run(timeout=60)).reason == StopReason.BREAK:
                assert stop.trap is not None
                log.append(access_of(stop.trap))
            assert stop.exit_status == OK_STATUS
            wanted = [access for access in expected.selfcheck(image) if access.msr == expected.STAR]
            if stage == Stage.ALL:
                wanted = [access for access in wanted for _ in range(2)]
            assert without_read_values(log) == without_read_values(wanted)
            assert "bad " not in output.text

    @DOORS
    def test_registers_changed_at_a_break(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):
            debugger.add(breaking())
            debugger.run(timeout=60)
            registers = debugger.registers()
            registers["edx"], registers["eax"] = 0x00004567, 0x89ABCDEF
            assert debugger.registers()["rdx"] & 0xFFFFFFFF == 0x00004567
            finish(debugger)
            assert "msr=c0000082 value=0000456789abcdef" in output.text

    @DOORS
    @pytest.mark.parametrize("skip", [True, False])
    def test_short_circuit_decided_at_a_break(self, skip: bool, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, output):
            event = breaking()
            event.short_circuit = not skip
            debugger.add(event)
            later = debugger.on_msr_write(expected.LSTAR)  # on its own it would have the write executed
            debugger.run(timeout=60)
            debugger.decide(skip)
            finish(debugger)
            assert ("msr=c0000082 value=0000000000000000" in output.text) == skip
            assert debugger.hits(later) == 1

    @DOORS
    def test_nothing_to_decide_after_the_instruction(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, _):
            debugger.add(breaking(stage=Stage.POST))
            debugger.run(timeout=60)
            with pytest.raises(VmexitError, match="nothing to decide"):
                debugger.decide(True)

    @DOORS
    def test_an_earlier_event_acts_before_and_a_later_one_after_the_break(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _, _):
            before = debugger.on_msr_write(expected.LSTAR)
            debugger.add(breaking())
            after = debugger.on_msr_write(expected.LSTAR)
            debugger.run(timeout=60)
            assert (debugger.hits(before), debugger.hits(after)) == (1, 0)
            debugger.registers()["eax"] = 5
            finish(debugger)
            assert (debugger.hits(before), debugger.hits(after)) == (1, 1)
            assert after.recording is not None
            assert [trap.value & 0xFFFFFFFF for trap in after.recording] == [5]

    @DOORS
    def test_events_changed_while_halted_hold_from_the_next_instruction_on(self, thread: str) -> None:
        with guest("sequence", thread=thread) as (debugger, _image, _):
            first = debugger.add(breaking())
            debugger.run(timeout=60)
            debugger.clear(first)
            late = debugger.on_msr_write(expected.LSTAR)  # made while this very write is pending
            following = debugger.add(breaking(0xC0000083))
            stop = debugger.run(timeout=60)
            assert stop.trap is not None and stop.trap.event == following.number
            assert debugger.hits(late) == 0
            finish(debugger)

    @pytest.mark.parametrize("thread", THREADS)
    def test_two_vcpus_that_break_all_the_time(self, thread: str) -> None:
        count = 40
        with guest("smp", 2, thread=thread, COUNT=count, PATIENCE=1 << 20) as (debugger, _image, _output):
            debugger.add(breaking(expected.STAR))
            log: dict[int, list[int]] = {0: [], 1: []}
            while (stop := debugger.run(timeout=60)).reason == StopReason.BREAK:
                assert stop.trap is not None
                log[stop.trap.core].append(stop.trap.value & 0xFFFFFFFF)
                assert debugger.core == stop.trap.core
            assert stop.exit_status == OK_STATUS
            assert log == {0: list(range(count, 0, -1)), 1: list(range(count, 0, -1))}

    @DOORS
    def test_breaks_between_interrupts(self, thread: str) -> None:
        with guest("irq", thread=thread, COUNT=60, IRQS=5) as (debugger, _image, output):
            debugger.add(breaking(expected.STAR, stage=Stage.ALL))
            pre: list[int] = []
            post: list[int] = []
            while (stop := debugger.run(timeout=60)).reason == StopReason.BREAK:
                assert stop.trap is not None
                (pre if stop.trap.stage == Stage.PRE else post).append(stop.trap.value & 0xFFFFFFFF)
            assert stop.exit_status == OK_STATUS
            counts = dict(part.split("=") for part in output.text.split())
            assert counts["bad"] == "0" * 16
            assert pre == post == list(range(1, int(counts["writes"], 16) + 1))

    @DOORS
    def test_a_running_machine_is_paused_and_gone_on_with(self, thread: str) -> None:
        with guest("hang", thread=thread) as (debugger, _, _output):
            for _ in range(20):
                debugger.go()
                deadline = time.monotonic() + 60
                debugger.pump(0.01)
                debugger.wait_until_halted()
                assert time.monotonic() < deadline
                assert debugger.stop is not None and debugger.stop.reason == StopReason.PAUSED

    @DOORS
    def test_a_running_machine_gives_no_registers(self, thread: str) -> None:
        with guest("hang", thread=thread) as (debugger, _, _):
            debugger.go()
            with pytest.raises(RequestError, match="halt it first"):
                debugger.registers()
            with pytest.raises(RequestError, match="halt it first"):
                debugger.read_memory(0, 0x1000, 1)
            debugger.wait_until_halted()


class TestOverflow:
    """Records that come faster than they are taken."""

    @DOORS
    def test_waiting_loses_nothing(self, thread: str) -> None:
        count = 60_000
        with guest("loop", thread=thread, COUNT=count) as (debugger, _, _):
            event = debugger.on_msr_write(expected.STAR, keep=1000)
            debugger.go()
            time.sleep(0.5)  # nobody takes anything
            finish(debugger)
            assert debugger.waits() >= 0
            assert debugger.summary.total == count
            assert event.recording is not None
            assert event.recording.forgotten + len(event.recording) == count

    @DOORS
    def test_dropping_is_counted(self, thread: str) -> None:
        from vmexit import Overflow

        count = 200_000
        with guest("loop", thread=thread, COUNT=count) as (debugger, _, _):
            debugger.set_overflow(Overflow.DROP)
            debugger.on_msr_write(expected.STAR)
            debugger.go()
            wait_until(lambda: debugger.dropped() > 0, "a full ring")
            finish(debugger)
            assert debugger.summary.total + debugger.dropped() == count


class TestEnd:
    """However it ends, nothing is left behind."""

    def test_closing_ends_qemu(self) -> None:
        with guest("hang") as (debugger, _, _):
            debugger.go()
            pid = debugger.target.pid
            os.kill(pid, 0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    @DOORS
    def test_closing_while_a_vcpu_waits_for_room(self, thread: str) -> None:
        with guest("loop", thread=thread, COUNT=10_000_000) as (debugger, _, _):
            debugger.on_msr_write(expected.STAR)
            debugger.go()
            wait_until(lambda: debugger.target.link.rings.counters()[1] == 1, "the vCPU to wait")
            started = time.monotonic()
        assert time.monotonic() - started < 60

    def test_qemu_killed_from_outside(self) -> None:
        with guest("hang") as (debugger, _, _):
            debugger.on_msr_write(expected.STAR)
            debugger.run(timeout=0.2)
            os.kill(debugger.target.pid, signal.SIGKILL)
            stop = debugger.run(timeout=60)
            assert (stop.reason, stop.exit_status) == (StopReason.ENDED, -signal.SIGKILL)

    @DOORS
    def test_a_halted_machine_killed_from_outside(self, thread: str) -> None:
        with guest("hang", thread=thread) as (debugger, _, _):
            debugger.run(timeout=0.2)
            os.kill(debugger.target.pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while debugger.state != State.ENDED and time.monotonic() < deadline:
                debugger.pump(0.05)
            assert debugger.state == State.ENDED
            with pytest.raises(VmexitError, match="ended"):
                debugger.registers()


def test_action_and_callback_go_together() -> None:
    with pytest.raises(VmexitError, match="go together"):
        Event(access=Access.WRMSR, msrs=MsrSet.of(1), action=Action.ASK).check()


def test_output_is_the_guests(tmp_path: Path) -> None:
    with guest("sequence") as (debugger, _, output):
        finish(debugger)
        assert isinstance(output, Output)
        assert output.text.startswith("msr=c0000081 value=1122334455667788\n")
