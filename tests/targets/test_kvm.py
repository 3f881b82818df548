"""The KVM door: QEMU with KVM, and a VMM that is not QEMU, both started with the agent preloaded."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guests import expected
from tests.guests.build import OK_STATUS, build, qemu_arguments, symbols
from tests.machines import Output, access_of, guest, need_kvm
from tests.vmm import build_vmm, vmm_arguments
from vmexit import Debugger, LiveTrap, Stage, State, StopReason, Trap
from vmexit.errors import TargetError, UsageError, VmexitError
from vmexit.link.client import RequestError
from vmexit.link.wire import Capability
from vmexit.prints import Printed
from vmexit.targets.kvm import Vmm, untrappable_under_kvm
from vmexit.targets.qemu import Qemu

EVERY_MSR = range(1 << 32)
PARAVIRTUAL = 0x12345
"""An MSR that KVM does not know; the VMM keeps it to itself."""


@contextmanager
def vmm(
    name: str, vcpus: int = 1, *, own_msr: int | None = None, late: bool = False, **defines: int | str
) -> Iterator[tuple[Debugger, Path, Output]]:
    """A guest in the VMM that is not QEMU, halted before its first instruction."""
    need_kvm()
    image, output = build(name, **defines), Output()
    with Debugger(Vmm(str(build_vmm()), vmm_arguments(image, vcpus, own_msr, late=late), output=output)) as debugger:
        yield debugger, image, output


def finish(debugger: Debugger) -> None:
    """Lets the machine run to its end, which has to be a good one."""
    stop = debugger.run(timeout=60)
    assert (stop.reason, stop.exit_status) == (StopReason.ENDED, OK_STATUS)


def trapping(debugger: Debugger, stage: Stage = Stage.ALL) -> list[Trap]:
    """Every access from now on."""
    traps: list[Trap] = []
    debugger.on_msr_write(EVERY_MSR, stage=stage)
    debugger.on_msr_read(EVERY_MSR, stage=stage)
    debugger.listeners.append(traps.extend)
    return traps


class TestVmm:
    """A VMM that is not QEMU."""

    @pytest.mark.parametrize("name", ["selfcheck", "fault"])
    def test_every_access_is_seen_once(self, name: str) -> None:
        with vmm(name) as (debugger, image, output):
            traps = trapping(debugger)
            finish(debugger)
            log: list[expected.Access] = {"selfcheck": expected.selfcheck, "fault": expected.fault}[name](image)
            assert [trap.sequence for trap in traps] == list(range(len(traps)))
            after = [access_of(trap) for trap in traps if trap.stage == Stage.POST]
            assert after == [access for access in log if not access.faults]
            assert sum(trap.stage == Stage.PRE for trap in traps) == len(log)
            assert "bad " not in output.text

    def test_two_vcpus(self) -> None:
        with vmm("smp", 2, COUNT=500, PATIENCE=1 << 20) as (debugger, image, output):
            assert debugger.target.vcpus == 2
            traps = trapping(debugger)
            finish(debugger)
            for core, log in enumerate(expected.smp(image, 500)):
                mine = [access_of(trap) for trap in traps if trap.core == core and trap.stage == Stage.POST]
                assert mine == log
            assert output.text.count("core=") == 2

    def test_what_it_can_do(self) -> None:
        with vmm("hang") as (debugger, _, _):
            assert debugger.target.link.door == "kvm"
            assert debugger.target.link.capabilities == Capability((1 << 8) - 1) | Capability.HALT

    def test_halted_before_the_first_instruction(self) -> None:
        with vmm("sequence") as (debugger, image, output):
            assert debugger.registers()["rip"] == symbols(image)["boot"]
            assert output.text == ""
            assert debugger.read_memory(0, symbols(image)["boot"], 1) == b"\xfa"  # cli

    def test_paused_and_gone_on_with(self) -> None:
        with vmm("hang", TICK=1 << 30, SPIN=10) as (debugger, image, _):
            event = debugger.on_msr_write(expected.STAR)
            hits = 0
            for _ in range(10):
                assert debugger.run(until=lambda: debugger.hits(event) > hits, timeout=60).reason == StopReason.CONDITION  # noqa: B023
                assert symbols(image)["main"] <= debugger.registers()["rip"] < symbols(image)["image_end"]
                hits = debugger.hits(event)
                time.sleep(0.01)
                assert debugger.hits(event) == hits
            assert event.recording is not None
            assert [trap.value for trap in event.recording] == list(range(1, hits + 1))

    def test_a_running_machine_gives_no_registers(self) -> None:
        with vmm("hang") as (debugger, _, _):
            debugger.go()
            with pytest.raises(RequestError, match="halt it first"):
                debugger.registers()

    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
    def test_breaks_on_two_vcpus(self, stage: Stage) -> None:
        with vmm("smp", 2, COUNT=20, PATIENCE=1 << 20) as (debugger, image, _):
            seen: list[tuple[int, int]] = []
            debugger.on_msr_write(expected.STAR, lambda trap: trap.halt(), stage=stage)
            while (stop := debugger.run(timeout=60)).reason == StopReason.BREAK:
                assert stop.trap is not None
                seen.append((stop.trap.core, stop.trap.value & 0xFFFF_FFFF))
                rip = symbols(image)["smp_wrmsr"] + (2 if stage == Stage.POST else 0)
                assert debugger.registers()["rip"] == rip
            assert stop.exit_status == OK_STATUS
            for core in range(2):
                assert [value for other, value in seen if other == core] == list(range(20, 0, -1))

    def test_registers_changed_while_halted(self) -> None:
        with vmm("selfcheck", DUMP=1) as (debugger, image, output):
            rip = symbols(image)["dump_wrmsr"]
            debugger.on_msr_write(expected.STAR, lambda trap: trap.halt() if trap.rip == rip else None)
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            registers = debugger.registers()
            registers["rbx"], registers["eax"] = 0x1234, 0x4321
            assert (debugger.registers()["rbx"], debugger.registers()["rax"] & 0xFFFF_FFFF) == (0x1234, 0x4321)
            finish(debugger)
            lines = dict(line.split("=") for line in output.text.splitlines())
            assert (lines["rbx"], lines["msr"]) == (f"{0x1234:016x}", f"{0x4000000400004321:016x}")

    def test_what_a_processor_refuses_is_refused_here(self) -> None:
        with vmm("hang") as (debugger, _, _):
            with pytest.raises(VmexitError):
                debugger.registers()["cr4"] = 1 << 63
            assert debugger.registers()["cr4"] >> 63 == 0

    def test_killed_while_a_vcpu_is_stopped_there(self) -> None:
        with vmm("hang") as (debugger, _, _):
            debugger.on_msr_write(expected.STAR, lambda trap: trap.halt())
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            os.kill(debugger.target.pid, signal.SIGKILL)
            stop = debugger.run(timeout=60)
            assert (stop.reason, stop.exit_status) == (StopReason.ENDED, -signal.SIGKILL)


class TestAsTheGuestsOwn:
    """A write that is trapped and carried out does what it does when nobody looks."""

    @pytest.mark.parametrize("msr", [0x1B, 0x8B, 0xCE, 0x10A, 0x174, 0x277, 0x345, 0x480, 0x6E1, expected.EFER, expected.LSTAR])
    @pytest.mark.parametrize("high", [0, 0x7FFF_1234])
    def test_faults_included(self, msr: int, high: int) -> None:
        need_kvm()
        image = build("loop", COUNT=1, MSR=msr, HIGH=high)
        alone = subprocess.run([build_vmm(), *vmm_arguments(image)], capture_output=True, text=True, timeout=60)
        with vmm("loop", COUNT=1, MSR=msr, HIGH=high) as (debugger, _, output):
            traps = trapping(debugger, Stage.PRE)
            stop = debugger.run(timeout=60)
            assert (stop.exit_status, output.text) == (alone.returncode, alone.stdout)
            assert any(trap.msr == msr and trap.value == high << 32 | 1 for trap in traps)


class TestItsOwnFilter:
    """What a VMM has asked KVM for itself, it gets, and nothing else; events see it as well."""

    def test_its_exits_are_its_own(self) -> None:
        with vmm("loop", own_msr=PARAVIRTUAL, COUNT=100, MSR=PARAVIRTUAL) as (debugger, _, output):
            event = debugger.on_msr_write(expected.STAR)
            finish(debugger)
            assert debugger.hits(event) == 0
            assert f"sum={5050:016x} last=5a5a5a5a00000001\nown 101\n" in output.text

    def test_events_act_before_and_after_it_has_acted(self) -> None:
        with vmm("loop", own_msr=PARAVIRTUAL, COUNT=100, MSR=PARAVIRTUAL) as (debugger, image, output):
            traps = trapping(debugger)
            finish(debugger)
            mine = [trap for trap in traps if trap.msr == PARAVIRTUAL]
            assert [trap.stage for trap in mine] == [Stage.PRE, Stage.POST] * 101
            assert [access_of(trap) for trap in mine[1::2]] == expected.loop(image, 100, PARAVIRTUAL)[2:]
            assert f"sum={5050:016x} last=5a5a5a5a00000001\nown 101\n" in output.text

    def test_one_that_comes_while_events_are_there(self) -> None:
        with vmm("sequence", own_msr=0xC0000083, late=True) as (debugger, image, output):
            traps = trapping(debugger, Stage.POST)
            finish(debugger)
            refused = {msr for _, msr, _ in expected.SEQUENCE_UNREAD}
            wanted = [access for access in expected.sequence(image) if access.msr not in refused]
            assert [access_of(trap) for trap in traps if trap.msr not in refused] == wanted
            assert "own 2\n" in output.text

    def test_what_is_skipped_does_not_reach_it(self) -> None:
        with vmm("loop", own_msr=PARAVIRTUAL, COUNT=100, MSR=PARAVIRTUAL) as (debugger, _, output):

            def skip_even(trap: LiveTrap) -> None:
                if trap.value % 2 == 0:
                    trap.skip()

            debugger.on_msr_write(PARAVIRTUAL, skip_even)
            finish(debugger)
            assert "own 51\n" in output.text

    def test_it_gets_what_a_callback_has_made_of_it(self) -> None:
        with vmm("loop", own_msr=PARAVIRTUAL, COUNT=3, MSR=PARAVIRTUAL) as (debugger, _, output):

            def change(trap: LiveTrap) -> None:
                trap.value = 0x1111_2222_3333_0000

            debugger.on_msr_write(PARAVIRTUAL, change)
            finish(debugger)
            assert f"sum={3 * 0x3333_0000:016x} last=1111222233330000\nown 4\n" in output.text

    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
    def test_breaks_at_it(self, stage: Stage) -> None:
        with vmm("loop", own_msr=PARAVIRTUAL, COUNT=5, MSR=PARAVIRTUAL) as (debugger, image, output):
            debugger.on_msr_write(PARAVIRTUAL, lambda trap: trap.halt(), stage=stage)
            values = []
            while (stop := debugger.run(timeout=60)).reason == StopReason.BREAK:
                assert stop.trap is not None
                values.append(stop.trap.value & 0xFF)
                assert debugger.registers()["rip"] == symbols(image)["loop_wrmsr"] + (2 if stage == Stage.POST else 0)
            assert values == [5, 4, 3, 2, 1]
            assert "own 6\n" in output.text

    def test_nobodys_msr_is_refused_as_ever(self) -> None:
        """With the filter armed for all, an MSR that KVM does not know is #GP, which this guest does not expect."""
        with vmm("loop", COUNT=1, MSR=PARAVIRTUAL) as (debugger, image, output):
            traps = trapping(debugger)
            stop = debugger.run(timeout=60)
            assert stop.exit_status == 37
            assert f"exception=0d error=00000000 rip={symbols(image)['loop_wrmsr']:016x}" in output.text
            assert [trap.stage for trap in traps if trap.msr == PARAVIRTUAL] == [Stage.PRE]


class TestRefused:
    """What cannot work is said in one line."""

    def test_a_static_vmm(self) -> None:
        with pytest.raises(TargetError, match=r"linked statically: .*linked dynamically") as error:
            Vmm(str(build_vmm(static=True)), [])
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("program", "arguments", "says"),
        [
            ("/nonexistent/vmm", [], "is not there"),
            ("true", [], "true did not start a virtual machine of KVM's: it ended with status 0"),
            ("sh", ["-c", "echo what a pity >&2; exit 3"], "sh did not start a virtual machine of KVM's: what a pity"),
        ],
    )
    def test_a_program_that_is_no_vmm(self, program: str, arguments: list[str], says: str) -> None:
        with pytest.raises(TargetError, match=says) as error:
            Vmm(program, arguments)
        assert "\n" not in str(error.value)

    def test_a_script_that_starts_one(self, tmp_path: Path) -> None:
        need_kvm()
        image, output = build("sequence"), Output()
        script = tmp_path / "start"
        script.write_text(f'#!/bin/sh\n/bin/true\nexec "{build_vmm()}" "$@"\n')
        script.chmod(0o755)
        with Debugger(Vmm(str(script), vmm_arguments(image), output=output)) as debugger:
            event = debugger.on_msr_write(expected.LSTAR)
            finish(debugger)
            assert debugger.hits(event) == 1

    def test_qemus_arguments_and_the_accelerator(self) -> None:
        with pytest.raises(UsageError, match=r"-accel tcg: this contradicts --accel kvm"):
            Qemu(["-accel", "tcg"], accelerator="kvm")
        with pytest.raises(UsageError, match=r"-machine q35,accel=tcg: this contradicts"):
            Qemu(["-machine", "q35,accel=tcg"], accelerator="kvm")

    def test_x2apic(self) -> None:
        with guest("sequence", thread="kvm") as (debugger, _, _):
            for msrs in (0x830, range(0x7F0, 0x810)):
                with pytest.raises(VmexitError, match=r"MSR 8[03]0 cannot be trapped in QEMU .*: KVM lets no filter apply"):
                    debugger.on_msr_write(msrs)
            debugger.on_msr_write(0x7FF)
            debugger.on_msr_write()  # all: these are left out
            assert len(list(debugger.events)) == 2

    def test_where_the_processor_virtualises_the_deadline_timer_is_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(path: Path) -> str:
            return "processor : 0\nflags\t\t: fpu vmx sse\n"

        monkeypatch.setattr(Path, "read_text", read)
        assert [msrs.first for msrs in untrappable_under_kvm()] == [0x6E0, 0x800]


class TestQemu:
    """What is particular to QEMU with KVM; what it has in common with TCG is in test_debugger."""

    def test_firmware(self) -> None:
        """SeaBIOS sets the MTRRs (src/fw/mtrr.c)."""
        with guest("sequence", thread="kvm", machine="pc") as (debugger, image, _):
            event = debugger.on_msr_write()
            wanted = {0x2FF, 0x200, 0x250, 0x26F}
            assert event.recording is not None
            recording = event.recording
            debugger.run(until=lambda: wanted <= {trap.msr for trap in recording}, timeout=120)
            assert wanted <= {trap.msr for trap in recording}
            assert all(trap.rip < symbols(image)["image_start"] or trap.rip > 0xF_0000 for trap in recording)

    def test_its_own_filter_is_left_alone(self) -> None:
        """QEMU keeps reads of MSR 35h to itself, and would abort at any other exit."""
        with guest("loop", thread="kvm", COUNT=50, MSR=0x35) as (debugger, _, output):
            traps = trapping(debugger)
            stop = debugger.run(timeout=60)
            assert stop.exit_status in (OK_STATUS, 37)  # a processor may refuse the write
            assert any(trap.msr == 0x35 for trap in traps)
            assert "unhandled" not in output.text

    def test_somebody_else_resumes_it(self) -> None:
        need_kvm()
        arguments = ["-cpu", "host", *qemu_arguments(build("hang"), machine="microvm")]
        with Debugger(Qemu(arguments, accelerator="kvm", output=Output())) as debugger:
            debugger.run(timeout=0.2)
            target = debugger.target
            assert isinstance(target, Qemu)
            target.query("cont")
            deadline = time.monotonic() + 60
            while debugger.state != State.RUNNING:
                assert time.monotonic() < deadline
                debugger.pump(0.05)


class TestScripts:
    """Scripts run in the vCPU's thread here too."""

    def test_beside_the_machine_they_reach_the_same(self) -> None:
        with vmm("selfcheck") as (debugger, _, _):
            seen = 'printf("%llx %llx %llx %llx|", @gdtr, @tr, @dr6, virtual_to_physical($rip));'
            printed: list[Printed] = []
            debugger.print_listeners.append(printed.append)
            debugger.on_msr_write(expected.STAR, script=seen + " pause();")
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            there = debugger.evaluate(seen)
            assert b"".join(each.text for each in printed) == there and not there.endswith(b" 0|")
            assert debugger.evaluate('@dr0 = 0x1234; @idtr = 0x5000; printf("%x %x", @dr0, @idtr);') == b"1234 5000"

    @pytest.mark.parametrize("kind", ["qemu", "vmm"])
    def test_registers_and_memory(self, kind: str) -> None:
        with (
            guest("selfcheck", thread="kvm", DUMP=1) if kind == "qemu" else vmm("selfcheck", DUMP=1) as (debugger, image, output)
        ):
            printed: list[Printed] = []
            debugger.print_listeners.append(printed.append)
            script = f"""if ($rip == {symbols(image)["dump_wrmsr"]:x}) {{
                .physical = virtual_to_physical($rip);
                .there = physical_to_virtual(.physical);
                .code = poi($rip) & ffff;
                .cr3 = @cr3;
                @r10 = .code + (.there == $rip) + (.cr3 == {symbols(image)["pml4"]:x});
                @rax = 7;
                printf("%llx", .code);
            }}"""
            debugger.on_msr_write(expected.STAR, script=script)
            finish(debugger)
            assert [(each.text, each.fault) for each in printed] == [(b"300f", None)]
            lines = dict(line.split("=") for line in output.text.splitlines())
            assert lines["r10"] == f"{0x300F + 2:016x}"
            assert lines["msr"] == f"{0x4000000400000007:016x}"

    def test_a_script_enables_an_event_whose_msr_did_not_trap_before(self) -> None:
        with vmm("sequence") as (debugger, _, _):
            second = debugger.on_msr_write(0xC0000083)
            debugger.enable(second, False)
            debugger.on_msr_write(expected.LSTAR, script=f"event_enable({second.number:x});")
            finish(debugger)
            assert debugger.hits(second) == 1

    def test_a_script_skips_and_pauses(self) -> None:
        with vmm("sequence") as (debugger, _, output):
            debugger.on_msr_write(expected.LSTAR, script="event_sc(1);")
            debugger.on_msr_write(0xC0000083, script="pause();")
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            finish(debugger)
            assert "msr=c0000082 value=0000000000000000" in output.text
            assert "msr=c0000083 value=ffffa23344556677" in output.text
