"""What programs' requests do, and how those that make no sense are answered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from tests.commands.fakes import EVERYTHING, Typist
from vmexit.events.msrs import UNNAMED_WRITES, MsrSet
from vmexit.link import wire
from vmexit.link.wire import Access, Action, Capability, Stage
from vmexit.sdk import (
    ALL_EVENTS,
    ALL_MSRS,
    ActionType,
    CallingStage,
    Client,
    DeviceError,
    Error,
    EventAndActionResult,
    EventType,
    GeneralAction,
    GeneralEventDetail,
    Ioctl,
    ModifyEvents,
    ModifyType,
    ReadAndWriteOnMsr,
    SdkError,
    ShortCircuitingEvent,
    Status,
    unpack,
)

LSTAR, EFER = 0xC0000082, 0xC0000080
TAG = 0x1000007
NOP = b"\x90\xc3"
# mov rax, [rcx]; ret -- which can be lifted; mov rax, [rax]; ret -- which cannot
LIFTED, EMULATED = bytes.fromhex("488b01c3"), bytes.fromhex("488b00c3")
RESULT = ctypes.sizeof(EventAndActionResult)


def refused(request: Callable[[], object]) -> int:
    """The error that a request is answered with."""
    with pytest.raises(SdkError) as error:
        request()
    return error.value.code


def failed(request: Callable[[], object]) -> int | None:
    """The status that a request fails with."""
    with pytest.raises(DeviceError) as error:
        request()
    return error.value.status


def ids(typist: Typist) -> list[tuple[int, int]]:
    """(event's number, flags) of what the agent has."""
    return [(event.id - 1, event.flags & 1) for event in (wire.unpack("event", data) for data in typist.link.events)]


# ---- events ----


def test_an_event_is_disabled_until_its_action_comes(typist: Typist, client: Client) -> None:
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))
    (event,) = typist.debugger.events
    assert (event.enabled, event.access, event.msrs, event.stage) == (False, Access.WRMSR, MsrSet.of(LSTAR), Stage.PRE)
    assert "(disabled)" in typist.types("events")
    assert "!msrwrite c0000082 (of a program, tag 1000007)" in typist.shown[0]
    assert ids(typist) == [(0, 0)]
    assert not client.is_enabled(TAG)
    client.add_action(GeneralAction.of(TAG))
    assert client.is_enabled(TAG)
    assert (event.enabled, event.action) == (True, Action.BREAK)
    assert ids(typist) == [(0, 1)]


def test_what_an_event_says(typist: Typist, client: Client) -> None:
    client.trap(GeneralEventDetail.of(1, 0x10, core=1, short_circuit=True))
    client.trap(GeneralEventDetail.of(2, event_type=EventType.RDMSR_INSTRUCTION_EXECUTION, stage=CallingStage.ALL))
    client.trap(GeneralEventDetail.of(3, ALL_MSRS, stage=CallingStage.POST, process=0))
    client.trap(GeneralEventDetail.of(4, 0x20, stage=77))
    one, two, three, four = typist.debugger.events
    assert (one.core, one.short_circuit, one.msrs) == (1, True, MsrSet.of(0x10))
    assert (two.access, two.stage, two.core, two.process) == (Access.RDMSR, Stage.ALL, None, None)
    assert (three.access, three.stage, three.msrs) == (Access.WRMSR, Stage.POST, MsrSet.all_but(UNNAMED_WRITES))
    assert four.stage == Stage.PRE


def test_the_codes_of_the_manual(typist: Typist, client: Client) -> None:
    event, action = GeneralEventDetail.of(TAG, LSTAR), GeneralAction.of(TAG, immediate=False)
    assert client.ioctl(Ioctl.REGISTER_EVENT_MANUAL, bytes(event), RESULT) == b"\1" + bytes(7)
    assert client.ioctl(Ioctl.ADD_ACTION_TO_EVENT_MANUAL, bytes(action), 4096) == b"\1" + bytes(7)
    (made,) = typist.debugger.events
    assert made.enabled
    assert not made.immediate
    modify = ModifyEvents(Tag=TAG, TypeOfAction=ModifyType.DISABLE)
    answer = unpack(ModifyEvents, client.ioctl(Ioctl.MODIFY_EVENTS_MANUAL, bytes(modify), 24))
    assert (answer.Tag, answer.KernelStatus, answer.TypeOfAction) == (TAG, Error.SUCCESSFUL, ModifyType.DISABLE)
    assert not made.enabled


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"EventType": 11}, Error.EVENT_TYPE_IS_INVALID),
        ({"EventType": 0xFFFFFFFF}, Error.EVENT_TYPE_IS_INVALID),
        ({"CoreId": 2}, Error.INVALID_CORE_ID),
        ({"CoreId": 0xFFFFFFFE}, Error.INVALID_CORE_ID),
        ({"EventStage": 2, "EnableShortCircuiting": 1}, Error.SHORT_CIRCUITING_WITH_POST_EVENT),
        ({"EventStage": 3, "EnableShortCircuiting": 1}, Error.SHORT_CIRCUITING_WITH_POST_EVENT),
        ({"ConditionBufferSize": 1}, Error.UNABLE_TO_CREATE_EVENT),
        ({"ConditionBufferSize": 0xFFFFFFFF}, Error.UNABLE_TO_CREATE_EVENT),
        ({"Tag": ALL_EVENTS}, Error.UNABLE_TO_CREATE_EVENT),
    ],
)
def test_events_that_make_no_sense(typist: Typist, client: Client, changes: dict[str, int], error: Error) -> None:
    event = GeneralEventDetail.of(TAG, LSTAR)
    for name, value in changes.items():
        setattr(event, name, value)
    assert refused(lambda: client.register_event(event)) == error
    assert not list(typist.debugger.events)
    client.trap(GeneralEventDetail.of(TAG, LSTAR))


def test_an_msr_is_a_number_of_32_bits(typist: Typist, client: Client) -> None:
    assert refused(lambda: client.register_event(GeneralEventDetail.of(TAG, 1 << 32))) == Error.UNABLE_TO_CREATE_EVENT
    assert not list(typist.debugger.events)


def test_a_process(typist: Typist, client: Client) -> None:
    assert refused(lambda: client.register_event(GeneralEventDetail.of(TAG, LSTAR, process=4))) == Error.INVALID_PROCESS_ID


def test_a_tag_is_given_once(typist: Typist, client: Client) -> None:
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))
    assert refused(lambda: client.register_event(GeneralEventDetail.of(TAG, EFER))) == Error.UNABLE_TO_CREATE_EVENT
    typist.types("events c 0")
    assert refused(lambda: client.add_action(GeneralAction.of(TAG))) == Error.TAG_NOT_EXISTS
    client.register_event(GeneralEventDetail.of(TAG, EFER))


def test_too_many_events(typist: Typist, client: Client) -> None:
    for number in range(wire.MAX_EVENTS):
        client.register_event(GeneralEventDetail.of(number, number))
    assert refused(lambda: client.register_event(GeneralEventDetail.of(TAG, LSTAR))) == Error.UNABLE_TO_CREATE_EVENT


def test_a_machine_that_cannot(typist: Typist, client: Client) -> None:
    typist.link.capabilities = EVERYTHING & ~Capability.BREAK
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))
    assert refused(lambda: client.add_action(GeneralAction.of(TAG))) == Error.UNABLE_TO_CREATE_ACTION
    (event,) = typist.debugger.events
    assert (event.enabled, event.action) == (False, Action.RECORD)
    typist.link.capabilities = EVERYTHING
    client.add_action(GeneralAction.of(TAG))
    assert event.enabled


def test_a_machine_that_has_ended(typist: Typist, client: Client) -> None:
    typist.target.ended(0)
    typist.debugger.pump()
    assert refused(lambda: client.register_event(GeneralEventDetail.of(TAG, LSTAR))) == Error.UNABLE_TO_CREATE_EVENT
    assert failed(lambda: client.read_msr(LSTAR)) == Status.DEVICE_NOT_READY


# ---- actions ----


@pytest.mark.parametrize(
    ("condition", "code", "action", "way"),
    [
        (b"", b"", Action.BREAK, ""),
        (LIFTED, b"", Action.SCRIPT, "lifted"),
        (EMULATED, b"", Action.ASK, "emulated"),
        (b"", NOP, Action.ASK, "emulated"),
        (LIFTED, NOP, Action.ASK, "emulated"),
    ],
)
def test_how_actions_are_done(typist: Typist, client: Client, condition: bytes, code: bytes, action: Action, way: str) -> None:
    client.trap(GeneralEventDetail.of(TAG, LSTAR), condition=condition, code=code, buffer=16 if code else 0)
    (event,) = typist.debugger.events
    assert (event.enabled, event.action, event.way) == (True, action, way)


def test_further_actions(typist: Typist, client: Client) -> None:
    event = GeneralEventDetail.of(TAG, LSTAR, short_circuit=True, condition_size=len(LIFTED))
    client.register_event(event, LIFTED)
    (made,) = typist.debugger.events
    client.add_action(GeneralAction.of(TAG))
    assert made.action == Action.SCRIPT
    client.add_action(GeneralAction.of(TAG, ActionType.RUN_CUSTOM_CODE, code_size=len(NOP)), NOP)
    assert (made.action, made.script, made.way, made.short_circuit) == (Action.ASK, None, "emulated", False)
    client.add_action(GeneralAction.of(TAG))
    assert (made.enabled, made.action) == (True, Action.ASK)
    assert len(list(typist.debugger.events)) == 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"EventTag": TAG + 1}, Error.TAG_NOT_EXISTS),
        ({"ActionType": 3}, Error.INVALID_ACTION_TYPE),
        ({"ActionType": 0xFFFFFFFF}, Error.INVALID_ACTION_TYPE),
        ({"ActionType": ActionType.RUN_CUSTOM_CODE}, Error.ACTION_BUFFER_SIZE_IS_ZERO),
        ({"ActionType": ActionType.RUN_SCRIPT}, Error.ACTION_BUFFER_SIZE_IS_ZERO),
        ({"ActionType": ActionType.RUN_SCRIPT, "ScriptBufferSize": 24}, Error.INVALID_ACTION_TYPE),
        ({"ActionType": ActionType.RUN_CUSTOM_CODE, "CustomCodeBufferSize": 3}, Error.UNABLE_TO_CREATE_ACTION),
        ({"ActionType": ActionType.RUN_CUSTOM_CODE, "CustomCodeBufferSize": 0xFFFFFFFF}, Error.UNABLE_TO_CREATE_ACTION),
        (
            {"ActionType": ActionType.RUN_CUSTOM_CODE, "CustomCodeBufferSize": 2, "PreAllocatedBuffer": 0xFFFFFFFF},
            Error.REQUESTED_BUFFER_IS_TOO_BIG,
        ),
    ],
)
def test_actions_that_make_no_sense(typist: Typist, client: Client, changes: dict[str, int], error: Error) -> None:
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))
    action = GeneralAction.of(TAG)
    for name, value in changes.items():
        setattr(action, name, value)
    assert refused(lambda: client.add_action(action, NOP)) == error
    assert not client.is_enabled(TAG)
    assert ids(typist) == [(0, 0)]


# ---- modifying ----


def test_enabled_disabled_cleared(typist: Typist, client: Client) -> None:
    client.trap(GeneralEventDetail.of(TAG, LSTAR))
    client.modify(TAG, ModifyType.DISABLE)
    assert not client.is_enabled(TAG)
    assert ids(typist) == [(0, 0)]
    client.modify(TAG, ModifyType.ENABLE)
    assert client.is_enabled(TAG)
    client.modify(TAG, ModifyType.CLEAR)
    assert refused(lambda: client.is_enabled(TAG)) == Error.MODIFY_EVENTS_INVALID_TAG
    assert not list(typist.debugger.events)


def test_all_events_are_those_of_the_prompt_too(typist: Typist, client: Client) -> None:
    typist.types("!msrwrite 10")
    client.trap(GeneralEventDetail.of(TAG, LSTAR))
    client.register_event(GeneralEventDetail.of(TAG + 1, EFER))
    client.modify(ALL_EVENTS, ModifyType.DISABLE)
    assert ids(typist) == [(0, 0), (1, 0), (2, 0)]
    client.modify(ALL_EVENTS, ModifyType.ENABLE)
    assert ids(typist) == [(0, 1), (1, 1), (2, 0)]  # the last has no action yet
    client.modify(ALL_EVENTS, ModifyType.CLEAR)
    assert ids(typist) == []
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))


def test_modifications_that_make_no_sense(typist: Typist, client: Client) -> None:
    client.register_event(GeneralEventDetail.of(TAG, LSTAR))
    assert refused(lambda: client.modify(TAG, 4)) == Error.MODIFY_EVENTS_INVALID_TYPE_OF_ACTION
    assert refused(lambda: client.modify(TAG + 1, 4)) == Error.MODIFY_EVENTS_INVALID_TAG
    assert refused(lambda: client.modify(ALL_EVENTS, 0xFFFFFFFF)) == Error.MODIFY_EVENTS_INVALID_TYPE_OF_ACTION
    assert refused(lambda: client.is_enabled(ALL_EVENTS)) == Error.TAG_NOT_EXISTS
    assert refused(lambda: client.modify(TAG, ModifyType.ENABLE)) == Error.EVENT_IS_NOT_APPLIED


def test_short_circuiting(typist: Typist, client: Client) -> None:
    assert refused(lambda: client.short_circuit(True)) == Error.EVENT_IS_NOT_APPLIED
    typist.target.is_at_trap = True
    client.short_circuit(True)
    typist.debugger.core = 1
    client.short_circuit(False)
    assert typist.link.decided == [(0, True), (1, False)]


# ---- MSRs ----


def test_msrs(typist: Typist, client: Client) -> None:
    assert client.read_msr(EFER) == [0x500, 0x500]
    client.write_msr(EFER, 0xD01, 1)
    assert client.read_msr(EFER) == [0x500, 0xD01]
    assert client.read_msr(EFER, 1) == [0xD01]
    client.write_msr(EFER, 0x500)
    assert client.read_msr(EFER) == [0x500, 0x500]


def test_msrs_that_cannot_be_reached(typist: Typist, client: Client) -> None:
    assert failed(lambda: client.read_msr(0x4711)) == Status.UNSUCCESSFUL
    assert failed(lambda: client.write_msr(0x200, 1)) == Status.UNSUCCESSFUL
    assert failed(lambda: client.read_msr(EFER, 2)) == Status.INVALID_PARAMETER
    assert failed(lambda: client.read_msr(1 << 32)) == Status.INVALID_PARAMETER
    typist.types("g")
    assert failed(lambda: client.read_msr(EFER)) == Status.DEVICE_NOT_READY
    asked = ReadAndWriteOnMsr(Msr=EFER, CoreNumber=0xFFFFFFFF, ActionType=2)
    assert failed(lambda: client.ioctl(Ioctl.READ_OR_WRITE_MSR, bytes(asked), 100)) == Status.INVALID_PARAMETER
    asked.ActionType = 0
    assert failed(lambda: client.ioctl(Ioctl.READ_OR_WRITE_MSR, bytes(asked), 15)) == Status.BUFFER_TOO_SMALL


# ---- malformed ----

REQUESTS = [
    (Ioctl.REGISTER_EVENT, bytes(GeneralEventDetail.of(TAG, LSTAR))),
    (Ioctl.REGISTER_EVENT_MANUAL, bytes(GeneralEventDetail.of(TAG, LSTAR))),
    (Ioctl.ADD_ACTION_TO_EVENT, bytes(GeneralAction.of(TAG))),
    (Ioctl.MODIFY_EVENTS, bytes(ModifyEvents(Tag=TAG))),
    (Ioctl.SHORT_CIRCUITING_EVENT, bytes(ShortCircuitingEvent())),
    (Ioctl.READ_OR_WRITE_MSR, bytes(ReadAndWriteOnMsr())),
]


@pytest.mark.parametrize(("code", "data"), REQUESTS, ids=[code.name for code, _ in REQUESTS])
def test_too_short_or_no_room(typist: Typist, client: Client, code: Ioctl, data: bytes) -> None:
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        assert failed(lambda length=length: client.ioctl(code, data[:length], 100)) == Status.INVALID_PARAMETER  # type: ignore[misc]
    assert failed(lambda: client.ioctl(code, data, 0)) == Status.INVALID_PARAMETER
    assert failed(lambda: client.ioctl(code, data, 7)) == Status.BUFFER_TOO_SMALL
    assert not list(typist.debugger.events)


@pytest.mark.parametrize("code", [0, 1, 0x22_2000, Ioctl.REGISTER_EVENT + 1, 0xFFFFFFFF])
def test_unknown_requests(client: Client, code: int) -> None:
    assert failed(lambda: client.ioctl(code, b"x" * 200, 200)) == Status.NOT_IMPLEMENTED
