"""Events with machine code, on a real guest: what they do at traps, and what failures do to them."""

import pytest

from tests.machines import guest
from vmexit import Trap
from vmexit.coded import Coded, UserCode, lift_condition
from vmexit.events.event import Event
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, RecordFlag, Stage
from vmexit.prints import Printed
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


def test_a_condition_guards_the_records() -> None:
    with guest("loop", COUNT=6) as (debugger, _, _output):
        seen: list[int] = []
        debugger.listeners.append(lambda traps: seen.extend(trap.value & 0xFF for trap in traps))
        made = event()
        odd = UserCode(condition=bytes.fromhex("488b01 83e001"))  # mov rax, [rcx]; and eax, 1
        assert not lift_condition(debugger, odd, made)  # a script makes no records
        Coded(debugger, odd, made, lambda: 0)
        debugger.add(made)
        debugger.run()
        assert seen == [5, 3, 1]
