"""What HyperDbg's requests do to a debugger's events, and how each is answered."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from vmexit.debugger import Debugger, State
from vmexit.errors import VmexitError
from vmexit.events.event import Event, EventError
from vmexit.events.msrs import LAST_MSR, UNNAMED_READS, UNNAMED_WRITES, MsrSet
from vmexit.link.wire import Access, Action, Stage
from vmexit.sdk.actions import Actions, Step
from vmexit.sdk.codes import (
    ALL_CORES,
    ALL_EVENTS,
    ALL_MSRS,
    ALL_PROCESSES,
    ActionType,
    CallingStage,
    Error,
    EventType,
    Ioctl,
    ModifyType,
    MsrAction,
    Status,
)
from vmexit.sdk.structures import (
    EventAndActionResult,
    GeneralAction,
    GeneralEventDetail,
    ModifyEvents,
    ReadAndWriteOnMsr,
    ShortCircuitingEvent,
    unpack,
)
from vmexit.usercode.hexcode import MAX_CODE

_ACCESSES = {
    EventType.WRMSR_INSTRUCTION_EXECUTION: (Access.WRMSR, UNNAMED_WRITES, "!msrwrite"),
    EventType.RDMSR_INSTRUCTION_EXECUTION: (Access.RDMSR, UNNAMED_READS, "!msrread"),
}
_STAGES = {CallingStage.POST: Stage.POST, CallingStage.ALL: Stage.ALL}
_ERRORS = {"core": Error.INVALID_CORE_ID, "pid": Error.INVALID_PROCESS_ID, "sc": Error.SHORT_CIRCUITING_WITH_POST_EVENT}
"""Of the option that an event is refused for."""
_MOST_BUFFER = 0x100_0000

_Structure = TypeVar("_Structure", bound=ctypes.LittleEndianStructure)


class _RefusedError(Exception):
    """A request that is answered with an error of HyperDbg's."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.name)
        self.error = error


class _FailedError(Exception):
    """A request that is answered with a status alone."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass
class _Registered:
    """An event that a program has made."""

    event: Event
    actions: Actions


@dataclass
class Requests:
    """Carries requests out; one object for all programs, because tags are theirs in common. Thread-safe."""

    debugger: Debugger
    failures: Callable[[], int] = lambda: 16
    """So many runs of machine code that fail in a row disable their event; 0: none do."""
    _events: dict[int, _Registered] = field(default_factory=dict)
    """By tag."""

    def serve(self, code: int, data: bytes, room: int) -> tuple[Status, bytes]:
        """Carries a request out: its status, and an answer of ``room`` bytes at most. Raises nothing."""
        try:
            with self.debugger.lock:
                return self._serve(code, data, room)
        except _FailedError as failed:
            return failed.status, b""
        except Exception:
            # Whatever it is, it is no reason to leave a program without an answer.
            return Status.UNSUCCESSFUL, b""

    def _serve(self, code: int, data: bytes, room: int) -> tuple[Status, bytes]:
        match code:
            case Ioctl.REGISTER_EVENT | Ioctl.REGISTER_EVENT_MANUAL:
                detail = _taken(GeneralEventDetail, data, room, EventAndActionResult)
                return Status.SUCCESS, self._result(self._register, detail, data)
            case Ioctl.ADD_ACTION_TO_EVENT | Ioctl.ADD_ACTION_TO_EVENT_MANUAL:
                action = _taken(GeneralAction, data, room, EventAndActionResult)
                return Status.SUCCESS, self._result(self._add_action, action, data)
            case Ioctl.MODIFY_EVENTS | Ioctl.MODIFY_EVENTS_MANUAL:
                modification = _taken(ModifyEvents, data, room)
                modification.KernelStatus = _status_of(self._modify, modification)
                return Status.SUCCESS, bytes(modification)
            case Ioctl.SHORT_CIRCUITING_EVENT:
                decision = _taken(ShortCircuitingEvent, data, room)
                decision.KernelStatus = _status_of(self._short_circuit, decision)
                return Status.SUCCESS, bytes(decision)
            case Ioctl.READ_OR_WRITE_MSR:
                return Status.SUCCESS, self._access_msr(_taken(ReadAndWriteOnMsr, data, room, ctypes.c_uint8), room)
            case _:
                raise _FailedError(Status.NOT_IMPLEMENTED)

    @staticmethod
    def _result(carry_out: Callable[[_Structure, bytes], None], asked: _Structure, data: bytes) -> bytes:
        error = Error.NONE
        try:
            carry_out(asked, data[ctypes.sizeof(asked) :])
        except _RefusedError as refused:
            error = refused.error
        return bytes(EventAndActionResult(IsSuccessful=int(error == Error.NONE), Error=error))

    # ---- events ----

    def _find(self, tag: int) -> _Registered | None:
        self.debugger.sync_events()
        found = self._events.get(tag)
        if found is not None and found.event.number not in self.debugger.events:  # cleared at the prompt, or by a script
            del self._events[tag]
            return None
        return found

    def _register(self, detail: GeneralEventDetail, rest: bytes) -> None:
        stage = _STAGES.get(detail.EventStage, Stage.PRE)
        if stage != Stage.PRE and detail.EnableShortCircuiting:
            raise _RefusedError(Error.SHORT_CIRCUITING_WITH_POST_EVENT)
        core = None if detail.CoreId == ALL_CORES else int(detail.CoreId)
        if core is not None and core >= self.debugger.target.vcpus:
            raise _RefusedError(Error.INVALID_CORE_ID)
        if detail.EventType not in _ACCESSES:
            raise _RefusedError(Error.EVENT_TYPE_IS_INVALID)
        size, tag, msr = int(detail.ConditionBufferSize), int(detail.Tag), int(detail.Options.OptionalParam1)
        if size > min(len(rest), MAX_CODE) or msr > LAST_MSR or tag == ALL_EVENTS or self._find(tag) is not None:
            raise _RefusedError(Error.UNABLE_TO_CREATE_EVENT)
        access, unnamed, command = _ACCESSES[EventType(detail.EventType)]
        named = "" if msr == ALL_MSRS else f" {msr:x}"
        event = Event(
            access=access,
            msrs=MsrSet.all_but(unnamed) if msr == ALL_MSRS else MsrSet.of(msr),
            stage=stage,
            core=core,
            process=None if detail.ProcessId in (ALL_PROCESSES, 0) else int(detail.ProcessId),
            # Until its action comes; it is disabled.
            action=Action.RECORD,
            short_circuit=bool(detail.EnableShortCircuiting),
            enabled=False,
            text=f"{command}{named} (of a program, tag {tag:x})",
        )
        try:
            self.debugger.add(event)
        except EventError as error:
            raise _RefusedError(_ERRORS.get(error.option, Error.UNABLE_TO_CREATE_EVENT)) from None
        except VmexitError:
            raise _RefusedError(Error.UNABLE_TO_CREATE_EVENT) from None
        self._events[tag] = _Registered(event, Actions(self.debugger, event, rest[:size] or None, self.failures))

    def _add_action(self, action: GeneralAction, rest: bytes) -> None:
        registered = self._find(int(action.EventTag))
        if registered is None:
            raise _RefusedError(Error.TAG_NOT_EXISTS)
        step = _step(action, rest)
        try:
            registered.actions.add(step, immediate=bool(action.ImmediateMessagePassing))
        except EventError as error:
            raise _RefusedError(_ERRORS.get(error.option, Error.UNABLE_TO_CREATE_ACTION)) from None
        except VmexitError:
            raise _RefusedError(Error.UNABLE_TO_CREATE_ACTION) from None

    def _modify(self, asked: ModifyEvents) -> None:
        is_all = asked.Tag == ALL_EVENTS
        registered = None if is_all else self._find(int(asked.Tag))
        if not is_all and registered is None:
            raise _RefusedError(Error.MODIFY_EVENTS_INVALID_TAG)
        if asked.TypeOfAction not in list(ModifyType):
            raise _RefusedError(Error.MODIFY_EVENTS_INVALID_TYPE_OF_ACTION)
        kind = ModifyType(asked.TypeOfAction)
        if kind == ModifyType.QUERY_STATE:
            if registered is None:
                raise _RefusedError(Error.TAG_NOT_EXISTS)
            asked.IsEnabled = int(registered.event.enabled)
            return
        waiting = {id(one.event) for one in self._events.values() if not one.actions}
        if kind == ModifyType.ENABLE and registered is not None and id(registered.event) in waiting:
            raise _RefusedError(Error.EVENT_IS_NOT_APPLIED)
        for event in [registered.event] if registered is not None else list(self.debugger.events):
            if kind == ModifyType.CLEAR:
                self.debugger.clear(event)
            elif kind == ModifyType.DISABLE or id(event) not in waiting:
                self.debugger.enable(event, kind == ModifyType.ENABLE)
        if kind == ModifyType.CLEAR:
            self._events = {tag: one for tag, one in self._events.items() if one.event.number in self.debugger.events}

    def _short_circuit(self, asked: ShortCircuitingEvent) -> None:
        self.debugger.decide(bool(asked.IsShortCircuiting))

    # ---- MSRs ----

    def _access_msr(self, asked: ReadAndWriteOnMsr, room: int) -> bytes:
        debugger = self.debugger
        vcpus = debugger.target.vcpus
        cores = range(vcpus) if asked.CoreNumber == ALL_CORES else [int(asked.CoreNumber)]
        is_read = asked.ActionType == MsrAction.READ
        if cores[-1] >= vcpus or asked.Msr > LAST_MSR or asked.ActionType not in list(MsrAction):
            raise _FailedError(Status.INVALID_PARAMETER)
        if is_read and room < 8 * len(cores):
            raise _FailedError(Status.BUFFER_TOO_SMALL)
        if debugger.state != State.HALTED:
            raise _FailedError(Status.DEVICE_NOT_READY)
        values = []
        try:
            for core in cores:
                if is_read:
                    values.append(debugger.read_msr(int(asked.Msr), core))
                else:
                    debugger.write_msr(int(asked.Msr), int(asked.Value), core)
        except VmexitError:
            raise _FailedError(Status.UNSUCCESSFUL) from None
        return struct.pack(f"<{len(values)}Q", *values)


def _taken(
    kind: type[_Structure],
    data: bytes,
    room: int,
    answer: type[ctypes.LittleEndianStructure] | type[ctypes.c_uint8] | None = None,
) -> _Structure:
    """The structure that a request begins with; ``answer``: what has to fit into the room, by default the same."""
    if len(data) < ctypes.sizeof(kind) or room == 0:
        raise _FailedError(Status.INVALID_PARAMETER)
    if room < ctypes.sizeof(answer or kind):
        raise _FailedError(Status.BUFFER_TOO_SMALL)
    return unpack(kind, data)


def _status_of(carry_out: Callable[[_Structure], None], asked: _Structure) -> Error:
    """KernelStatus."""
    try:
        carry_out(asked)
    except _RefusedError as refused:
        return refused.error
    except VmexitError:
        return Error.EVENT_IS_NOT_APPLIED
    return Error.SUCCESSFUL


def _step(action: GeneralAction, rest: bytes) -> Step:
    """What an action does. Compiled scripts are HyperDbg's own: no other machine can run them."""
    if action.ActionType == ActionType.BREAK_TO_DEBUGGER:
        return Step()
    sizes = {ActionType.RUN_CUSTOM_CODE: action.CustomCodeBufferSize, ActionType.RUN_SCRIPT: action.ScriptBufferSize}
    if sizes.get(action.ActionType) == 0:
        raise _RefusedError(Error.ACTION_BUFFER_SIZE_IS_ZERO)
    if action.ActionType != ActionType.RUN_CUSTOM_CODE:
        raise _RefusedError(Error.INVALID_ACTION_TYPE)
    size, buffer = int(action.CustomCodeBufferSize), int(action.PreAllocatedBuffer)
    if size > min(len(rest), MAX_CODE):
        raise _RefusedError(Error.UNABLE_TO_CREATE_ACTION)
    if buffer > _MOST_BUFFER:
        raise _RefusedError(Error.REQUESTED_BUFFER_IS_TOO_BIG)
    return Step(rest[:size], buffer or None)
