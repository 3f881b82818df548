"""Events with machine code, on a real guest: what they do at traps, and what failures do to them."""

import random
import struct

import pytest

from tests.guests.build import OK_STATUS
from tests.machines import guest
from vmexit import Debugger, LiveTrap, StopReason, Trap
from vmexit.coded import Coded, UserCode, attach
from vmexit.events.event import Event
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, RecordFlag, Stage
from vmexit.prints import Printed
from vmexit.script.errors import ScriptRunError
from vmexit.trap import record_of, traps_of

STAR = 0xC0000081
# test byte ptr [rdx], 1; jz +2; ud2
FAILS_AT_ODD = bytes.fromhex("f60201 7402 0f0b")
UD2 = bytes.fromhex("0f0b")


def event() -> Event:
    return Event(access=Access.WRMSR, msrs=MsrSet.of(STAR), action=Action.RECORD)


def test_a_record_made_of_a_trap_is_that_trap() -> None:
    trap = Trap(7, 8, 9, 10, 1 << 63, STAR, 3, 1, Access.WRMSR, Stage.POST, Action.RECORD, RecordFlag(0), 2)
    assert list(traps_of(record_of(trap))) == [trap]


@pytest.mark.parametrize(
    ("code", "failures", "hits", "faults", "enabled"),
    [(FAILS_AT_ODD, 2, 6, 3, True), (UD2, 2, 2, 2, False), (UD2, 0, 6, 6, True)],
)
def test_failures_in_a_row_disable_the_event(code: bytes, failures: int, hits: int, faults: int, enabled: bool) -> None:
    with guest("loop", COUNT=6) as (debugger, _, output):
        told: list[Printed] = []
        debugger.print_listeners.append(told.append)
        made = event()
        Coded(debugger, UserCode(code=code), made, lambda: failures)
        debugger.add(made)
        debugger.run()
        assert (debugger.hits(made), made.faults, made.enabled) == (hits, faults, enabled)
        assert [b"ud2" in printed.text for printed in told] == [True] * faults + [False] * (not enabled)
        assert "last=5a5a5a5a00000001" in output.text


def test_a_run_that_is_ended_changes_no_register() -> None:
    with guest("loop", COUNT=1) as (debugger, _, output):
        made = event()
        Coded(debugger, UserCode(code=bytes.fromhex("c70200000000") + UD2), made, lambda: 0)  # mov dword ptr [rdx], 0
        debugger.add(made)
        debugger.run()
        assert made.faults == 1
        assert "last=5a5a5a5a00000001" in output.text


# mov rax, [rcx]; and eax, 1: lifted. The same by way of the stack is not.
ODD = bytes.fromhex("488b01 83e001")
ODD_EMULATED = bytes.fromhex("ff31 58 83e001")


@pytest.mark.parametrize(("condition", "way", "action"), [(ODD, "lifted", Action.RECORD), (ODD_EMULATED, "emulated", Action.ASK)])
def test_a_condition_guards_the_records(condition: bytes, way: str, action: Action) -> None:
    with guest("loop", COUNT=6) as (debugger, _, _output):
        seen: list[int] = []
        debugger.listeners.append(lambda traps: seen.extend(trap.value & 0xFF for trap in traps))
        made = debugger.on_msr_write(STAR, condition=condition)
        assert (made.way, made.action) == (way, action)
        debugger.run()
        assert seen == [5, 3, 1]
        assert made.recording is not None
        assert [trap.value & 0xFF for trap in made.recording] == [5, 3, 1]
        assert debugger.hits(made) == 6


@pytest.mark.parametrize("condition", [ODD, ODD_EMULATED])
def test_a_condition_guards_break_script_and_callback(condition: bytes) -> None:
    with guest("loop", COUNT=4) as (debugger, _, _output):
        called: list[int] = []
        printed = prints(debugger)
        debugger.on_msr_write(
            STAR, lambda trap: called.append(trap.value & 0xFF), script='printf("%d ", $value & ff);', condition=condition
        )
        broken = event()
        broken.action = Action.BREAK
        attach(debugger, UserCode(condition=condition), broken)
        debugger.add(broken)
        stops = []
        while (stop := debugger.run()).reason == StopReason.BREAK:
            assert stop.trap is not None
            stops.append(stop.trap.value & 0xFF)
        assert stops == called == [3, 1]
        assert "".join(printed) == "3 1 "


def prints(debugger: Debugger) -> list[str]:
    """What scripts print from now on, and what is told of them."""
    told: list[str] = []
    debugger.print_listeners.append(lambda printed: told.append((printed.text or str(printed.fault).encode()).decode()))
    return told


# The script tells EAX before it doubles it; the code adds 0x100 to it.
SCRIPT = 'printf("%llx ", @rax); @rax = @rax * 2;'
CODE = bytes.fromhex("81 02 00010000")  # add dword ptr [rdx], 0x100


@pytest.mark.parametrize("thread", ["multi", "kvm"])
@pytest.mark.parametrize("condition", [None, ODD, ODD_EMULATED])
@pytest.mark.parametrize("is_code_first", [False, True])
def test_code_and_script_run_in_the_order_given(condition: bytes | None, is_code_first: bool, thread: str) -> None:
    with guest("loop", thread=thread, COUNT=3) as (debugger, _, output):
        printed = prints(debugger)
        values: list[int] = []
        debugger.listeners.append(lambda traps: values.extend(trap.value & 0xFFFF for trap in traps))
        made = event()
        made.action = Action.SCRIPT | Action.RECORD
        made.script = debugger.compiler.compile(SCRIPT)
        attach(debugger, UserCode(condition=condition, code=CODE, is_code_first=is_code_first), made)
        debugger.add(made)
        debugger.on_msr_write(STAR, stage=Stage.POST)
        debugger.run()
        acted = (3, 2, 1) if condition is None else (3, 1)
        after = {value: (value + 0x100) * 2 if is_code_first else value * 2 + 0x100 for value in acted}
        assert "".join(printed) == "".join(f"{value + 0x100 * is_code_first:x} " for value in acted)
        # The event's own record, where it acts, is of before; then comes that of what was written.
        wanted = [[value, after[value]] if value in after else [value] for value in (3, 2, 1)]
        assert values == [value for pair in wanted for value in pair]
        assert f"last=5a5a5a5a{after[1]:08x}" in output.text
        assert debugger.hits(made) == 3
        # A trap counts once, however often the event has asked.
        (summary,) = [row for row in debugger.summary.rows() if row.stage == Stage.PRE]
        assert summary.count == 3 if condition is None or condition == ODD_EMULATED else 2


@pytest.mark.parametrize("condition", [ODD, ODD_EMULATED])
def test_a_condition_guards_the_short_circuit_and_leaves_that_of_others_alone(condition: bytes) -> None:
    with guest("loop", COUNT=4) as (debugger, _, _output):
        executed: list[int] = []
        debugger.listeners.append(lambda traps: executed.extend(trap.value & 0xFF for trap in traps if trap.stage == Stage.POST))
        # The first event skips all; the second one, which acts at the odd values, has them executed after all.
        debugger.on_msr_write(STAR, short_circuit=True)
        debugger.on_msr_write(STAR, condition=condition)
        debugger.on_msr_write(STAR, stage=Stage.POST)
        debugger.run()
        assert executed == [3, 1]


@pytest.mark.parametrize("condition", [ODD, ODD_EMULATED])
def test_a_short_circuit_where_the_condition_holds(condition: bytes) -> None:
    with guest("loop", COUNT=4) as (debugger, _, _output):
        executed: list[int] = []
        made = debugger.on_msr_write(STAR, condition=condition, short_circuit=True)
        debugger.on_msr_write(STAR, stage=Stage.POST)
        debugger.listeners.append(lambda traps: executed.extend(trap.value & 0xFF for trap in traps if trap.stage == Stage.POST))
        debugger.run()
        assert executed == [4, 2]
        assert made.recording is not None
        assert [trap.skipped for trap in made.recording] == [True, True]


def test_a_script_behind_a_condition_decides_on_the_short_circuit_after_it() -> None:
    for condition in (ODD, ODD_EMULATED):
        with guest("loop", COUNT=2) as (debugger, _, _output):
            debugger.on_msr_write(STAR, condition=condition, script="event_sc(0);", short_circuit=True)
            posts = debugger.on_msr_write(STAR, stage=Stage.POST)
            debugger.run()
            assert debugger.hits(posts) == 2


@pytest.mark.parametrize("condition", [ODD, ODD_EMULATED])
def test_a_fault_of_a_script_behind_a_condition_is_at_its_own_place(condition: bytes) -> None:
    with guest("loop", COUNT=1) as (debugger, _, _output):
        faults: list[ScriptRunError] = []
        debugger.print_listeners.append(lambda printed: faults.append(printed.fault) if printed.fault else None)
        debugger.on_msr_write(STAR, condition=condition, script="x = 0;\n  y = 5 / x;")
        debugger.run()
        assert [(fault.line, fault.column) for fault in faults] == [(2, 9)]


def test_code_that_fails_does_not_keep_the_rest_from_being_done() -> None:
    with guest("loop", COUNT=2) as (debugger, _, _output):
        called: list[int] = []
        printed = prints(debugger)
        made = debugger.on_msr_write(
            STAR, lambda trap: called.append(trap.value & 0xFF), code=UD2, script='printf("s");', condition=ODD_EMULATED
        )
        debugger.run()
        assert called == [1]
        assert printed[0] == "s"
        assert "ud2" in printed[1]
        assert made.faults == 1


def test_stages_cores_and_switches_hold_for_all_of_it() -> None:
    with guest("smp", 2, COUNT=50) as (debugger, _, _output):
        counts = "[rcx]"
        made = debugger.on_msr_write(
            STAR,
            core=1,
            stage=Stage.ALL,
            condition="mov rax, [rcx]; and eax, 1",
            script="@r8 = 1; .n = .n + 1;",
            code=f"inc qword ptr {counts}",
            buffer=8,
        )
        off = debugger.on_msr_write(STAR, code="inc qword ptr [rcx]", buffer=8)
        debugger.enable(off, False)
        debugger.run()
        assert made.buffer is not None and off.buffer is not None
        assert int.from_bytes(bytes(made.buffer), "little") == 50
        assert debugger.hits(made) == 100
        assert debugger.evaluate("print(.n);").split() == [b"32"]
        assert bytes(off.buffer) == bytes(8)


def test_two_vcpus_with_one_buffer_that_code_and_scripts_share() -> None:
    with guest("smp", 2, COUNT=200) as (debugger, _, _output):
        made = debugger.on_msr_write(
            STAR,
            # The script counts by itself, and keeps what it finds of the code's count. Last 8 bytes: one past the end.
            script="interlocked_increment($buffer + 8); if (poi($buffer) > 0n400) { .bad = 1; } eq($buffer + 10, $buffer);",
            code="lock inc qword ptr [rcx]; mov rax, [rcx+0x10]; cmp rax, rcx; je same; ud2; same: inc qword ptr [rax+0x18]",
            buffer=0x20,
        )
        told = prints(debugger)
        debugger.run()
        assert told == []
        assert made.buffer is not None
        words = struct.unpack("<4Q", bytes(made.buffer))
        assert (words[0], words[1], words[3]) == (400, 400, 400)
        assert words[2] >> 56 == 0x5C


def test_a_script_reaches_its_buffer_and_not_a_byte_more() -> None:
    with guest("loop", COUNT=1) as (debugger, _, _output):
        told = prints(debugger)
        addresses = ", ".join(f"check_address($buffer + {offset:x})" for offset in (0, 9, 10))
        debugger.on_msr_write(STAR, script=f'printf("%d%d%d ", {addresses}); eb($buffer + a, 1);', buffer=10)
        debugger.on_msr_write(STAR, script='printf("%llx", $buffer);')
        debugger.run()
        assert told == ["110 ", "0"]


def test_a_buffer_outlives_what_is_done_to_other_events() -> None:
    with guest("loop", COUNT=3) as (debugger, _, _output):
        made = debugger.on_msr_write(STAR, script="eq($buffer, poi($buffer) + 1); pause();", buffer=8)
        for _ in range(3):
            assert debugger.run().reason in (StopReason.PAUSED, StopReason.BREAK)
            debugger.enable(made, False)
            debugger.clear(debugger.on_msr_write(STAR))
            debugger.enable(made)
        assert made.buffer is not None
        assert int.from_bytes(bytes(made.buffer), "little") == 3


# ---- hostile code ----

_CHUNKS, _STRINGS = 8, 1250


@pytest.mark.parametrize("chunk", range(_CHUNKS))
def test_random_bytes_at_the_traps_of_a_running_guest(chunk: int) -> None:
    """10,000 of them, half as code and half as conditions: nothing dies or hangs, each trap is answered, each failure told."""
    dice = random.Random(chunk)
    with guest("loop", COUNT=_STRINGS) as (debugger, _, output):
        told = prints(debugger)
        failed = 0

        def one(trap: LiveTrap) -> None:
            nonlocal failed
            code = dice.randbytes(dice.randrange(1, 24))
            is_condition = dice.random() < 0.5
            made = event()
            Coded(debugger, UserCode(condition=code) if is_condition else UserCode(code=code), made, lambda: 0)
            assert made.callback is not None
            before = list(trap.values)
            told.clear()
            made.callback(trap)
            assert len(told) == made.faults <= 1
            assert made.faults == 0 or trap.changed == 0
            assert all(text.count("\n") == 1 for text in told)
            failed += made.faults
            # So that the guest comes to its end whatever it is.
            trap.values[:], trap.changed = before, 0

        made = debugger.on_msr_write(STAR, one)
        stop = debugger.run(timeout=120)
        assert stop.exit_status == OK_STATUS
        assert debugger.hits(made) == _STRINGS
        assert _STRINGS // 2 < failed < _STRINGS
        assert f"sum={_STRINGS * (_STRINGS + 1) // 2:016x} last=5a5a5a5a00000001" in output.text
