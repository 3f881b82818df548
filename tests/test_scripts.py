"""Scripts at real traps: what they reach and change, on several vCPUs at once, and what becomes of what they print."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS, symbols
from tests.machines import guest, linux
from vmexit import Access, Action, Debugger, Event, MsrSet, Stage, State, StopReason, VmexitError
from vmexit.debugger import Overflow
from vmexit.prints import Printed
from vmexit.script.errors import ScriptError, ScriptRunError

EVERY_MSR = range(1 << 32)
THREADS = ("multi", "single")


def prints_of(debugger: Debugger) -> list[Printed]:
    """What scripts print from now on."""
    found: list[Printed] = []
    debugger.print_listeners.append(found.append)
    return found


def text_of(found: list[Printed]) -> str:
    """All of it."""
    return b"".join(each.text for each in found).decode()


def finish(debugger: Debugger, status: int = OK_STATUS) -> None:
    """Lets the machine run to its end, which has to be a good one."""
    stop = debugger.run(timeout=120)
    assert (stop.reason, stop.exit_status) == (StopReason.ENDED, status)


class TestWhatTheyReach:
    """Registers, memory and pseudo-registers of the trapped vCPU."""

    def test_what_a_write_is(self) -> None:
        with guest("sequence") as (debugger, image, _):
            found = prints_of(debugger)
            debugger.on_msr_write(EVERY_MSR, script='printf("%llx %llx %llx\\n", $msr, $value, $rip);')
            event = debugger.on_msr_write(EVERY_MSR)
            finish(debugger)
            assert event.recording is not None
            # The firmware's are in both.
            assert text_of(found) == "".join(f"{trap.msr:x} {trap.value:x} {trap.rip:x}\n" for trap in event.recording)
            assert f"{symbols(image)['two_pages']:x}\n" in text_of(found)

    @pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
    @pytest.mark.parametrize("name", ["rbx", "rbp", "rsi", "rdi", "r8", "r12", "r15", "cr3", "efer", "gs", "cs", "ss"])
    def test_registers_are_those_that_a_callback_sees(self, name: str, stage: Stage) -> None:
        with guest("sequence") as (debugger, _, _):
            found = prints_of(debugger)
            values: list[int] = []
            debugger.on_msr_write(0xC0000082, stage=stage, script=f"print(@{name}); pause();")
            while debugger.run(timeout=60).reason == StopReason.BREAK:
                values.append(debugger.registers()[name])
            assert [int(line, 16) for line in text_of(found).split()] == values and len(values) == 1

    def test_a_changed_register_is_what_the_guest_has(self) -> None:
        with guest("sequence") as (debugger, _, output):
            debugger.on_msr_write(0xC0000082, script="@rcx = 0xc0000083; @rax = 11; @rdx = 22;")
            event = debugger.on_msr_write(0xC0000083, stage=Stage.POST)
            finish(debugger)
            assert event.recording is not None
            assert next(iter(event.recording)).value == 0x22_0000_0011
            assert "msr=c0000083 value=0000002200000011" in output.text

    def test_what_was_read_can_be_changed(self) -> None:
        with guest("sequence") as (debugger, _, output):
            debugger.on_msr_read(0xC0000081, stage=Stage.POST, script="$value = 0x1234;")
            finish(debugger)
            assert output.text.count("msr=c0000081 value=0000000000001234") == 11

    def test_rip_can_be_moved_past_the_instruction(self) -> None:
        with guest("sequence") as (debugger, _, output):
            debugger.on_msr_write(0xC0000082, script="@rip = @rip + 2;")
            finish(debugger)
            assert "msr=c0000082 value=0000000000000000" in output.text

    def test_flags(self) -> None:
        with guest("sequence") as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(0xC0000082, script='@cf = 1; printf("%llx %d\\n", @rflags, @cf); pause();')
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            flags = debugger.registers()["rflags"]
            assert text_of(found) == f"{flags:x} 1\n" and flags & 1

    @pytest.mark.parametrize(
        "name", ["gdtr", "idtr", "ldtr", "tr", "dr0", "dr1", "dr2", "dr3", "dr6", "cr2", "fs_base", "gs_base"]
    )
    def test_system_registers_are_read_and_written(self, name: str) -> None:
        with guest("loop", COUNT=2) as (debugger, _, _):
            found = prints_of(debugger)
            script = f"""
                if (.n == 0) {{ .old = @{name}; @{name} = 0x12345678; }}
                else {{ print(@{name}); @{name} = .old; print(@{name} == .old); }}
                .n = .n + 1;
            """
            debugger.on_msr_write(0xC0000081, script=script)
            finish(debugger)
            assert text_of(found) == "12345678\n1\n" and not any(each.fault for each in found)

    def test_a_breakpoint_that_a_script_sets_is_one(self) -> None:
        with guest("loop", COUNT=2) as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(
                0xC0000081, script='if (.n == 0) { @dr0 = 0x500000; @dr7 = 0x401; } .n = .n + 1; printf("%x ", @dr7);'
            )
            finish(debugger)
            assert text_of(found) == "401 401 "

    def test_memory_is_read_and_written(self) -> None:
        with guest("sequence") as (debugger, image, _):
            found = prints_of(debugger)
            there = symbols(image)["image_start"]
            debugger.on_msr_write(
                0xC0000082,
                script=f"""
                    long bytes[2]; .old = poi({there:#x});
                    printf("%d ", eq({there:#x}, 1122334455667788)); printf("%llx %x ", poi({there:#x}), db({there + 1:#x}));
                    memcpy(&bytes, {there:#x}, 8); printf("%llx ", bytes[0]);
                    printf("%llx ", poi_pa(virtual_to_physical({there:#x}))); eq({there:#x}, .old);
                    printf("%d %d\\n", check_address({there:#x}), check_address(0x800000000000));
                """,
            )
            before = debugger.read_memory(0, there, 8, physical=True)
            finish(debugger)
            assert text_of(found) == "1 1122334455667788 77 1122334455667788 1122334455667788 1 0\n"
            assert len(before) == 8

    def test_physical_addresses_and_back(self) -> None:
        with linux("true") as (debugger, _):
            found = prints_of(debugger)
            script = """
                long physical = virtual_to_physical(@rsp);
                printf("%d %d\\n", poi_pa(physical) == poi(@rsp), poi(physical_to_virtual(physical)) == poi(@rsp));
                printf("%llx %llx\\n", virtual_to_physical(0x7fff00000000), physical_to_virtual(0xfffffffff000));
            """
            debugger.on_msr_write(0xC0000082, core=1, stage=Stage.POST, script=script)
            finish(debugger, 0)
            assert text_of(found) == "1 1\n0 0\n"

    def test_date_and_time(self) -> None:
        with linux("true") as (debugger, _):
            found = prints_of(debugger)
            debugger.on_msr_write(0xC0000082, core=0, stage=Stage.POST, script='printf("%.3s|\\n", $time); print(strlen($date));')
            finish(debugger, 0)
            time_text, length = text_of(found).split()
            assert time_text[2:] == ":|" and length == "a"


class TestOrder:
    """Several events, short-circuiting, events that scripts change."""

    def test_event_sc_decides_like_the_event_itself(self) -> None:
        with guest("sequence") as (debugger, _, output):
            debugger.on_msr_write(0xC0000082, script="event_sc(1);")
            debugger.on_msr_write(0xC0000083, short_circuit=True, script="event_sc(0);")
            finish(debugger)
            assert "msr=c0000082 value=0000000000000000" in output.text
            assert "msr=c0000083 value=ffffa23344556677" in output.text

    def test_a_script_and_a_callback(self) -> None:
        with guest("sequence") as (debugger, _, _):
            seen: list[int] = []
            debugger.on_msr_write(0xC0000082, lambda trap: seen.append(trap.value), script="$value = 5;")
            finish(debugger)
            assert seen == [5]

    def test_events_that_scripts_change(self) -> None:
        with guest("loop", COUNT=100) as (debugger, _, _):
            first = debugger.on_msr_write(0xC0000081, script=".n = .n + 1; if (.n == 0n10) { event_disable(1); event_clear(2); }")
            second = debugger.on_msr_write(0xC0000081)
            third = debugger.on_msr_write(0xC0000081)
            fourth = debugger.on_msr_write(0xC0000081, script="if (.n == 0n20) { event_enable(0x1000001); }")
            finish(debugger)
            assert [debugger.hits(event) for event in (first, second, third, fourth)] == [100, 89, 9, 100]
            assert second.enabled and third.number not in debugger.events

    def test_a_change_is_known_when_the_next_event_is_made(self) -> None:
        with guest("loop", COUNT=100) as (debugger, _, _):
            debugger.on_msr_write(0xC0000081, script=".n = .n + 1; if (.n == 5) { event_disable(1); pause(); }")
            other = debugger.on_msr_write(0xC0000081)
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            debugger.on_msr_write(0x10)
            assert not other.enabled
            finish(debugger)
            assert debugger.hits(other) == 4

    def test_an_event_that_is_not_there(self) -> None:
        with guest("sequence") as (debugger, _, _):
            found = prints_of(debugger)
            event = debugger.on_msr_write(0xC0000082, script="event_disable(7);")
            finish(debugger)
            assert [str(each.fault) for each in found] == ["script:1:1: there is no event 7"] and event.faults == 1


class TestSeveralVcpus:
    """Locals are a run's own, globals are shared, and the atomic functions are."""

    @pytest.mark.parametrize(
        "script",
        [
            "interlocked_increment(&.n);",
            "spinlock_lock(&.lock); .n = .n + 1; spinlock_unlock(&.lock);",
            "interlocked_exchange_add(&.n, 1);",
        ],
        ids=["increment", "lock", "add"],
    )
    def test_counting_together(self, script: str) -> None:
        with guest("smp", 2, COUNT=20_000, PATIENCE=1 << 30) as (debugger, _, _):
            event = debugger.on_msr_write(0xC0000081, script=script)
            finish(debugger)
            assert debugger.hits(event) == 40_000 and event.faults == 0
            assert debugger.evaluate("print(.n);") == b"9c40\n"

    def test_a_million_increments_on_each(self) -> None:
        with guest("smp", 2, COUNT=1, PATIENCE=1 << 30) as (debugger, _, _):
            debugger.set_script_limits(steps=10_000_000)
            event = debugger.on_msr_write(
                0xC0000081, script="for (i = 0; i < 0n1000000; i = i + 1) { interlocked_increment(&.n); }"
            )
            finish(debugger)
            assert debugger.hits(event) == 2 and event.faults == 0
            assert debugger.evaluate('printf("%d", .n);') == b"2000000"

    def test_prints_of_both_are_whole_and_in_order(self) -> None:
        with guest("smp", 2, COUNT=5000, PATIENCE=1 << 30) as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(
                0xC0000081, immediate=False, script='printf("%d %llx %s\\n", $core, $value, "text"); printf("%d end\\n", $core);'
            )
            finish(debugger)
            lines = text_of(found).splitlines()
            assert len(lines) == 20_000
            for core in (0, 1):
                mine = [line for line in lines if line.startswith(f"{core} ")]
                assert [line.split()[1] == "end" for line in mine] == [False, True] * 5000
                counts = [int(line.split()[1], 16) & 0xFFFF_FFFF for line in mine[::2]]
                assert counts == list(range(5000, 0, -1))


class TestFaults:
    """A run that is ended: told with its place; the guest and the event go on."""

    @pytest.mark.parametrize(
        ("script", "message", "column"),
        [
            ("x = 1 / (@rax - @rax);", "division by zero", 7),
            ("print(poi(0x7ffffffff000));", "0x7ffffffff000 cannot be read", 7),
            ("*(long *)0x123456789000 = 1;", "0x123456789000 cannot be written", 1),
            ("while (1) { }", "the script takes too long", 1),
            ("x = 1 << (@rax | 40);", "a shift by", 7),
            ("spinlock_lock(&.l); spinlock_lock(&.l);", "was not to be had", 21),
        ],
    )
    def test_fault(self, script: str, message: str, column: int) -> None:
        with guest("sequence") as (debugger, _, _):
            found = prints_of(debugger)
            event = debugger.on_msr_write(0xC0000082, script=script)
            other = debugger.on_msr_write(0xC0000083, script='printf("on\\n");')
            finish(debugger)
            (fault,) = [each.fault for each in found if each.fault is not None]
            assert message in fault.message and (fault.line, fault.column) == (1, column)
            assert text_of(found) == "on\n" and (event.faults, other.faults) == (1, 0)
            assert event.enabled

    def test_what_was_done_before_it_stays(self) -> None:
        with guest("sequence") as (debugger, _, output):
            found = prints_of(debugger)
            debugger.on_msr_write(
                0xC0000082, script='printf("a"); $value = 7; printf("b"); print(poi(0x7fff00000000)); $value = 8;'
            )
            finish(debugger)
            assert text_of(found) == "ab" and "msr=c0000082 value=0000000000000007" in output.text

    def test_a_lock_that_an_ended_run_held_is_free(self) -> None:
        with guest("loop", COUNT=50) as (debugger, _, _):
            event = debugger.on_msr_write(0xC0000081, script="spinlock_lock(&.l); print(1 / (@rax - @rax));")
            finish(debugger)
            assert event.faults == 50

    def test_what_does_not_compile_makes_no_event(self) -> None:
        with guest("sequence") as (debugger, _, _):
            with pytest.raises(ScriptError, match="script:1:7"):
                debugger.on_msr_write(0x10, script="print(nothing);")
            assert not list(debugger.events)

    def test_an_event_that_names_a_script_must_run_it(self) -> None:
        with guest("sequence") as (debugger, _, _), pytest.raises(VmexitError, match="go together"):
            debugger.add(Event(access=Access.WRMSR, msrs=MsrSet.of(1), action=Action.SCRIPT))


class TestOutput:
    """Nothing is lost silently, whoever is slow or dies."""

    @pytest.mark.parametrize("immediate", [False, True])
    def test_a_flood(self, immediate: bool) -> None:
        with guest("loop", COUNT=100_000) as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(0xC0000081, immediate=immediate, script='printf("%llx\\n", $value & ffffffff);')
            finish(debugger)
            assert [int(line, 16) for line in text_of(found).split()] == list(range(100_000, 0, -1))

    def test_long_texts_fill_the_ring_sooner_than_records_do(self) -> None:
        with guest("loop", COUNT=2000) as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(0xC0000081, immediate=False, script=f'printf("%s\\n", "{"x" * 4000}");')
            finish(debugger)
            assert text_of(found) == f"{'x' * 4000}\n" * 2000
            assert debugger.waits() > 0 or len(found) > 1

    def test_dropped_ones_are_counted(self) -> None:
        with guest("loop", COUNT=200_000) as (debugger, _, _):
            debugger.set_overflow(Overflow.DROP)
            found = prints_of(debugger)
            debugger.print_listeners.append(lambda _: time.sleep(0.002))
            debugger.on_msr_write(0xC0000081, immediate=False, script='printf("%s%llx\\n", "a longer text", $value);')
            finish(debugger)
            assert text_of(found).count("\n") + debugger.dropped() == 200_000 and debugger.dropped() > 0

    def test_the_guest_goes_on_without_the_debugger(self) -> None:
        with guest("loop", COUNT=3_000_000) as (debugger, _, output):
            debugger.on_msr_write(0xC0000081, script='printf("%llx\\n", $value); .n = .n + 1;')
            debugger.go()
            deadline = time.monotonic() + 120
            while debugger.hits(next(iter(debugger.events))) < 1000 and time.monotonic() < deadline:
                debugger.pump(0.01)
            debugger.target.link.close()
            while "sum=" not in output.text and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "last=5a5a5a5a00000001" in output.text

    def test_scripts_that_come_and_go_while_the_machine_runs(self) -> None:
        with guest("loop", COUNT=4_000_000_000) as (debugger, _, _):
            debugger.on_msr_write(0x10)
            debugger.go()
            for number in range(100):
                event = debugger.on_msr_write(0xC0000081, script=f".n = .n + {number:x};")
                debugger.pump(0.001)
                debugger.clear(event)
            maps = Path(f"/proc/{debugger.target.pid}/maps").read_text()
            assert maps.count("vmexit-script") <= 4
            debugger.wait_until_halted()


class TestBesideTheMachine:
    """Debugger.evaluate: the same language, registers and memory of a halted machine, the same variables."""

    @pytest.mark.parametrize("name", ["gdtr", "idtr", "ldtr", "tr", "dr0", "dr3", "dr6", "dr7", "cr2", "kernel_gs_base"])
    def test_system_registers_are_those_of_the_trap(self, name: str) -> None:
        with guest("loop", COUNT=2) as (debugger, _, _):
            found = prints_of(debugger)
            debugger.on_msr_write(0xC0000081, script=f"print(@{name}); pause();")
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            old = debugger.evaluate(f"print(@{name}); .old = @{name};").decode()
            new = "455" if name == "dr7" else "12345678"
            assert debugger.evaluate(f"@{name} = 0x{new}; print(@{name});").decode() == f"{new}\n"
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            assert debugger.evaluate(f"@{name} = .old; print(@{name});").decode() == old
            finish(debugger)
            assert text_of(found) == f"{old}{new}\n" and not any(each.fault for each in found)

    def test_physical_addresses_and_back(self) -> None:
        with linux("true") as (debugger, _):
            debugger.on_msr_write(0xC0000082, core=1, stage=Stage.POST, script="pause();")
            assert debugger.run(timeout=120).reason == StopReason.BREAK
            text = debugger.evaluate("""
                long physical = virtual_to_physical(@rsp);
                printf("%d %d ", poi_pa(physical) == poi(@rsp), poi(physical_to_virtual(physical)) == poi(@rsp));
                printf("%llx %llx", virtual_to_physical(0x7fff00000000), physical_to_virtual(0xfffffffff000));
            """)
            assert text == b"1 1 0 0"

    def test_a_machine_that_runs_has_neither(self) -> None:
        with guest("loop", COUNT=1 << 30) as (debugger, _, _):
            debugger.go()
            with pytest.raises(ScriptRunError):
                debugger.evaluate("print(@gdtr);")
            for function in ("virtual_to_physical", "physical_to_virtual"):
                with pytest.raises(VmexitError, match="halt"):
                    debugger.evaluate(f"print({function}(1000));")

    def test_registers_memory_and_variables(self) -> None:
        with guest("sequence") as (debugger, image, output):
            debugger.on_msr_write(0xC0000082, script=".seen = $value; pause();")
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            assert (
                debugger.evaluate('printf("%llx %llx %llx", .seen, $value, $context);')
                == b"ffff923344556677 ffff923344556677 c0000082"
            )
            assert debugger.evaluate("$value = 9; .seen = 1; print(@rip == $rip);") == b"1\n"
            assert debugger.evaluate(f"print(dw({symbols(image)['lstar']:#x}));") == b"300f\n"
            finish(debugger)
            assert "msr=c0000082 value=0000000000000009" in output.text
            assert debugger.evaluate("print(.seen);") == b"1\n"

    def test_events(self) -> None:
        with guest("sequence") as (debugger, _, _):
            event = debugger.on_msr_write(0x10)
            debugger.evaluate("event_disable(0);")
            assert not event.enabled
            debugger.evaluate("event_enable(0); event_clear(0);")
            assert not list(debugger.events)
            with pytest.raises(ScriptRunError, match="there is no event 0"):
                debugger.evaluate("event_clear(0);")

    def test_while_the_machine_runs(self) -> None:
        with guest("hang") as (debugger, _, _):
            debugger.go()
            with pytest.raises(ScriptRunError, match="halt it first"):
                debugger.evaluate("print(@rax);")
            assert debugger.evaluate("print(1 + 1);") == b"2\n"
            debugger.evaluate("pause();")
            debugger.wait_until_halted()
            assert debugger.state is State.HALTED

    def test_interrupted_by_ctrl_c(self) -> None:
        with guest("sequence") as (debugger, _, _), pytest.raises(KeyboardInterrupt):
            debugger.run_script(
                debugger.compiler.compile("while (1) { print(1); }"), lambda _: os.kill(os.getpid(), signal.SIGINT)
            )
