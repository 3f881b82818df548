"""HyperDbg's structures, byte for byte, with its names for their fields.

``bytes(structure)`` is what is sent; ``unpack`` makes one of what has come. Fields that are not given are 0; ``of`` gives
those that mean "all" their values.
"""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

from vmexit.sdk.codes import ALL_CORES, ALL_MSRS, ALL_PROCESSES, ActionType, CallingStage, EventType

_U8, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64
_OUTPUTS = 5


class EventOptions(ctypes.LittleEndianStructure):
    """DEBUGGER_EVENT_OPTIONS. Of an event on MSRs the first is the MSR, or ALL_MSRS."""

    _fields_ = tuple((f"OptionalParam{number}", _U64) for number in range(1, 7))


class GeneralEventDetail(ctypes.LittleEndianStructure):
    """DEBUGGER_GENERAL_EVENT_DETAIL; the condition's machine code follows it."""

    _fields_ = (
        ("CommandsEventListFlink", _U64),
        ("CommandsEventListBlink", _U64),
        ("CoreId", _U32),
        ("ProcessId", _U32),
        ("IsEnabled", _U8),
        ("EnableShortCircuiting", _U8),
        ("EventStage", _U32),
        ("HasCustomOutput", _U8),
        ("OutputSourceTags", _U64 * _OUTPUTS),
        ("CountOfActions", _U32),
        ("Tag", _U64),
        ("EventType", _U32),
        ("Options", EventOptions),
        ("CommandStringBuffer", _U64),
        ("ConditionBufferSize", _U32),
    )

    @classmethod
    def of(
        cls,
        tag: int,
        msr: int = ALL_MSRS,
        *,
        event_type: int = EventType.WRMSR_INSTRUCTION_EXECUTION,
        core: int = ALL_CORES,
        process: int = ALL_PROCESSES,
        stage: int = CallingStage.PRE,
        short_circuit: bool = False,
        condition_size: int = 0,
    ) -> GeneralEventDetail:
        """An event as HyperDbg's own command makes it."""
        return cls(
            CoreId=core,
            ProcessId=process,
            IsEnabled=1,
            EnableShortCircuiting=int(short_circuit),
            EventStage=stage,
            Tag=tag,
            EventType=event_type,
            Options=EventOptions(OptionalParam1=msr),
            ConditionBufferSize=condition_size,
        )


class GeneralAction(ctypes.LittleEndianStructure):
    """DEBUGGER_GENERAL_ACTION; the machine code, or the script, follows it."""

    _fields_ = (
        ("EventTag", _U64),
        ("ActionType", _U32),
        ("ImmediateMessagePassing", _U8),
        ("PreAllocatedBuffer", _U32),
        ("CustomCodeBufferSize", _U32),
        ("ScriptBufferSize", _U32),
        ("ScriptBufferPointer", _U32),
    )

    @classmethod
    def of(
        cls, tag: int, action: int = ActionType.BREAK_TO_DEBUGGER, *, code_size: int = 0, buffer: int = 0, immediate: bool = True
    ) -> GeneralAction:
        """An action; ``buffer``: bytes that its code keeps."""
        return cls(
            EventTag=tag,
            ActionType=action,
            ImmediateMessagePassing=int(immediate),
            PreAllocatedBuffer=buffer,
            CustomCodeBufferSize=code_size,
        )


class EventAndActionResult(ctypes.LittleEndianStructure):
    """DEBUGGER_EVENT_AND_ACTION_RESULT."""

    _fields_ = (("IsSuccessful", _U8), ("Error", _U32))


class ModifyEvents(ctypes.LittleEndianStructure):
    """DEBUGGER_MODIFY_EVENTS: request and answer."""

    _fields_ = (("Tag", _U64), ("KernelStatus", _U64), ("TypeOfAction", _U32), ("IsEnabled", _U8))


class ShortCircuitingEvent(ctypes.LittleEndianStructure):
    """DEBUGGER_SHORT_CIRCUITING_EVENT: request and answer."""

    _fields_ = (("KernelStatus", _U64), ("IsShortCircuiting", _U8))


class ReadAndWriteOnMsr(ctypes.LittleEndianStructure):
    """DEBUGGER_READ_AND_WRITE_ON_MSR. A read is answered with a UINT64 for each core that was asked for, a write with nothing."""

    _fields_ = (("Msr", _U64), ("CoreNumber", _U32), ("ActionType", _U32), ("Value", _U64))


_Structure = TypeVar("_Structure", bound=ctypes.LittleEndianStructure)


def unpack(kind: type[_Structure], data: bytes) -> _Structure:
    """The structure that ``data`` begins with. Raises ValueError where that is too short for one."""
    return kind.from_buffer_copy(data)


def fields_of(kind: type[ctypes.LittleEndianStructure]) -> dict[str, tuple[int, int]]:
    """Each field's offset and size, in bytes, with those of what is within it ("Options.OptionalParam1")."""
    found: dict[str, tuple[int, int]] = {}
    for name, inner, *_ in kind._fields_:
        descriptor: Any = getattr(kind, name)
        found[name] = descriptor.offset, descriptor.size
        if isinstance(inner, type) and issubclass(inner, ctypes.LittleEndianStructure):
            for deeper, (offset, size) in fields_of(inner).items():
                found[f"{name}.{deeper}"] = descriptor.offset + offset, size
    return found
