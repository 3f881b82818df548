"""The numbers of HyperDbg's binary interface: requests, kinds of events and actions, errors; and those of the socket's own."""

from __future__ import annotations

import enum

ALL_CORES = 0xFFFF_FFFF
ALL_PROCESSES = 0xFFFF_FFFF
ALL_MSRS = 0xFFFF_FFFF
"""In OptionalParam1: every MSR but those that are accessed all the time."""
ALL_EVENTS = 0xFFFF_FFFF_FFFF_FFFF
"""A tag in ModifyEvents."""
FIRST_TAG = 0x100_0000
"""The tag of the debugger's own event 0; the others follow."""

_DEVICE_UNKNOWN = 0x22


def control_code(function: int) -> int:
    """Windows' CTL_CODE of a function of an unknown device, buffered, for any access."""
    return _DEVICE_UNKNOWN << 16 | function << 2


class Ioctl(enum.IntEnum):
    """Requests. HyperDbg has moved its functions once; the numbers that its manual names are served like those of v0.23."""

    REGISTER_EVENT = control_code(0xA05)
    ADD_ACTION_TO_EVENT = control_code(0xA06)
    MODIFY_EVENTS = control_code(0xA0B)
    READ_OR_WRITE_MSR = control_code(0xA03)
    REGISTER_EVENT_MANUAL = control_code(0x806)
    ADD_ACTION_TO_EVENT_MANUAL = control_code(0x807)
    MODIFY_EVENTS_MANUAL = control_code(0x80C)
    SHORT_CIRCUITING_EVENT = control_code(0xF00)
    """vmexit's own: HyperDbg sends that structure to another machine, never to its driver."""


class EventType(enum.IntEnum):
    """VMM_EVENT_TYPE_ENUM: those that are served."""

    RDMSR_INSTRUCTION_EXECUTION = 12
    WRMSR_INSTRUCTION_EXECUTION = 13


class ActionType(enum.IntEnum):
    """DEBUGGER_EVENT_ACTION_TYPE_ENUM."""

    BREAK_TO_DEBUGGER = 0
    RUN_SCRIPT = 1
    RUN_CUSTOM_CODE = 2


class ModifyType(enum.IntEnum):
    """DEBUGGER_MODIFY_EVENTS_TYPE."""

    QUERY_STATE = 0
    ENABLE = 1
    DISABLE = 2
    CLEAR = 3


class CallingStage(enum.IntEnum):
    """VMM_CALLBACK_EVENT_CALLING_STAGE_TYPE; as there, any other number means PRE."""

    PRE = 1
    POST = 2
    ALL = 3


class MsrAction(enum.IntEnum):
    """DEBUGGER_MSR_ACTION_TYPE."""

    READ = 0
    WRITE = 1


class Error(enum.IntEnum):
    """What stands in a result's Error and in KernelStatus."""

    NONE = 0
    SUCCESSFUL = 0xFFFF_FFFF
    """Only in KernelStatus."""
    TAG_NOT_EXISTS = 0xC000_0000
    INVALID_ACTION_TYPE = 0xC000_0001
    ACTION_BUFFER_SIZE_IS_ZERO = 0xC000_0002
    EVENT_TYPE_IS_INVALID = 0xC000_0003
    UNABLE_TO_CREATE_EVENT = 0xC000_0004
    INVALID_CORE_ID = 0xC000_0006
    MODIFY_EVENTS_INVALID_TAG = 0xC000_000E
    MODIFY_EVENTS_INVALID_TYPE_OF_ACTION = 0xC000_000F
    INVALID_PROCESS_ID = 0xC000_001E
    EVENT_IS_NOT_APPLIED = 0xC000_001F
    SHORT_CIRCUITING_WITH_POST_EVENT = 0xC000_003A
    UNABLE_TO_CREATE_ACTION = 0xC000_0044
    REQUESTED_BUFFER_IS_TOO_BIG = 0xC000_0048
    UNABLE_TO_ALLOCATE_BUFFER = 0xC000_004C


class Status(enum.IntEnum):
    """How a request as such went: Windows' NTSTATUS, as HyperDbg's driver completes it with."""

    SUCCESS = 0
    UNSUCCESSFUL = 0xC000_0001
    NOT_IMPLEMENTED = 0xC000_0002
    """No such request is served."""
    INVALID_PARAMETER = 0xC000_000D
    """It is shorter than its structure, or leaves no room for an answer."""
    BUFFER_TOO_SMALL = 0xC000_0023
    """The answer does not fit into the room that was left for it."""
    INSUFFICIENT_RESOURCES = 0xC000_009A
    """There are too many clients; the connection is closed."""
    DEVICE_NOT_READY = 0xC000_00A3
    """The machine runs, and would have to be halted; or it has ended."""
    INVALID_BUFFER_SIZE = 0xC000_0206
    """The request is larger than any can be; the connection is closed."""
