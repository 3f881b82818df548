"""What the debugger and the agent share, read from the agent's own header (agent/wire.h)."""

import enum
from typing import Any

import numpy as np

from vmexit.link.header import read_headers

ffi, _constants = read_headers("wire.h", "script.h")


def constant(name: str) -> int:
    """The value of ``VMEXIT_<name>`` in wire.h."""
    return int(getattr(_constants, f"VMEXIT_{name}"))


class Access(enum.IntFlag):
    """What a guest does with an MSR."""

    WRMSR = constant("WRMSR")
    RDMSR = constant("RDMSR")


class Stage(enum.IntFlag):
    """When an event is triggered: before the instruction executes, after it, or both."""

    PRE = constant("PRE")
    POST = constant("POST")
    ALL = PRE | POST


class Action(enum.IntFlag):
    """What an event does when it is triggered."""

    RECORD = constant("RECORD")
    ASK = constant("ASK")
    BREAK = constant("BREAK")
    SCRIPT = constant("SCRIPT")
    PRINT = constant("PRINT")
    """Only of a record: a script has printed."""
    FAULT = constant("FAULT")
    """Only of a record: a script's run was ended."""
    NAME = constant("NAME")
    """Only of a record: the name of a thread of the guest."""
    CALLER = constant("CALLER")
    """Only of a record: the address that a number in later records stands for."""


class EventFlag(enum.IntFlag):
    """State of an event (``vmexit_event.flags``)."""

    ENABLED = constant("ENABLED")
    SHORT_CIRCUIT = constant("SHORT_CIRCUIT")
    IMMEDIATE = constant("IMMEDIATE")
    WITH_PROCESS = constant("WITH_PROCESS")
    ASK_FIRST = constant("ASK_FIRST")


class RecordFlag(enum.IntFlag):
    """What a record says beside its numbers (``vmexit_record.flags``).

    ``SKIPPED``: the event that left the record short-circuits the instruction. ``INTERRUPTED``: the machine took an interrupt
    between the instruction and its post stage, so RIP, RSP and RFLAGS are those of the interrupt's handler. ``FAULTED``: the
    access was refused (#GP), which only a tracepoint tells of. ``PROCESS_KNOWN``: its process and thread are those that the guest
    executed. ``CALLER_GUESSED``: what ``caller`` stands for only looks like where the function returns to. ``AGAIN``, of a
    question: the event has left a record of this trap, or asked, before.
    """

    SKIPPED = constant("SKIPPED")
    INTERRUPTED = constant("INTERRUPTED")
    FAULTED = constant("FAULTED")
    PROCESS_KNOWN = constant("PROCESS_KNOWN")
    CALLER_GUESSED = constant("CALLER_GUESSED")
    AGAIN = constant("AGAIN")


class Capability(enum.IntFlag):
    """What the agent can do in the VMM that it is loaded into."""

    RECORD = constant("CAN_RECORD")
    READ = constant("CAN_READ")
    MODIFY = constant("CAN_MODIFY")
    SKIP = constant("CAN_SKIP")
    POST = constant("CAN_POST")
    BREAK = constant("CAN_BREAK")
    MEMORY = constant("CAN_MEMORY")
    MEMORY_WRITE = constant("CAN_MEMORY_WRITE")
    HALT = constant("CAN_HALT")


class MessageType(enum.IntEnum):
    """Control messages (``vmexit_message.type``)."""

    HELLO = constant("HELLO")
    EVENTS = constant("EVENTS")
    OVERFLOW = constant("OVERFLOW")
    HOLD = constant("HOLD")
    DECIDE = constant("DECIDE")
    GET_REGISTERS = constant("GET_REGISTERS")
    GET_REGISTER = constant("GET_REGISTER")
    SET_REGISTER = constant("SET_REGISTER")
    READ_VIRTUAL = constant("READ_VIRTUAL")
    READ_PHYSICAL = constant("READ_PHYSICAL")
    WRITE_VIRTUAL = constant("WRITE_VIRTUAL")
    WRITE_PHYSICAL = constant("WRITE_PHYSICAL")
    TRANSLATE = constant("TRANSLATE")
    ADD_SCRIPT = constant("ADD_SCRIPT")
    SCRIPT_LIMITS = constant("SCRIPT_LIMITS")
    READ_MSR = constant("READ_MSR")
    WRITE_MSR = constant("WRITE_MSR")
    SET_RECIPE = constant("SET_RECIPE")
    SET_CODE = constant("SET_CODE")
    HALT = constant("HALT")
    VCPU = constant("VCPU")
    MACHINE = constant("MACHINE")


class Status(enum.IntEnum):
    """How the agent answers (``vmexit_message.status``)."""

    OK = constant("OK")
    REFUSED = constant("REFUSED")
    BUSY = constant("BUSY")
    RUNNING = constant("RUNNING")
    UNREADABLE = constant("UNREADABLE")
    UNAVAILABLE = constant("UNAVAILABLE")
    WRONG_VERSION = constant("WRONG_VERSION")
    STALE = constant("STALE")
    NO_MSR = constant("NO_MSR")
    NO_VALUE = constant("NO_VALUE")


class EventState(enum.IntEnum):
    """What a script has made of an event (``vmexit_shared.states``)."""

    ENABLED = constant("STATE_ENABLED")
    DISABLED = constant("STATE_DISABLED")
    CLEARED = constant("STATE_CLEARED")


MAGIC = constant("WIRE_MAGIC")
VERSION = constant("WIRE_VERSION")
MAX_EVENTS = constant("MAX_EVENTS")
MAX_EVENT_ID = constant("MAX_EVENT_ID")
MAX_RANGES = constant("MAX_RANGES")
MAX_TRANSFER = constant("MAX_TRANSFER")
MAX_GLOBALS = constant("MAX_GLOBALS")
MAX_BUFFER = constant("MAX_BUFFER")
ALL_CORES = constant("ALL_CORES")
ALL_PROCESSES = constant("ALL_PROCESSES")
WAITS_FOR_ROOM = constant("WAITS_FOR_ROOM")
REGISTERS = constant("REGISTERS")
ASKED_REGISTERS = constant("ASKED_REGISTERS")


def offset(struct: str, field: str) -> int:
    """Of a field from the start of ``struct vmexit_<struct>``, in bytes."""
    return int(ffi.offsetof(f"struct vmexit_{struct}", field))


def size(struct: str) -> int:
    """Of ``struct vmexit_<struct>``, in bytes."""
    return int(ffi.sizeof(f"struct vmexit_{struct}"))


def dtype(struct: str) -> np.dtype[np.void]:
    """The numpy type of ``struct vmexit_<struct>``; of its integer fields (arrays are padding there), unions included."""
    names, formats, offsets = [], [], []
    for name, field in ffi.typeof(f"struct vmexit_{struct}").fields:
        if field.type.kind == "primitive" and name != "reserved":
            names.append(name)
            formats.append(f"<u{ffi.sizeof(field.type)}")
            offsets.append(field.offset)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size(struct)})


RECORD = dtype("record")


def pack(struct: str, **fields: object) -> bytes:
    """The bytes of a ``struct vmexit_<struct>`` with these fields; the others are 0."""
    value = ffi.new(f"struct vmexit_{struct} *", fields)
    return bytes(ffi.buffer(value))


def unpack(struct: str, data: bytes) -> Any:
    """A ``struct vmexit_<struct>`` (its fields as attributes) from its bytes; it keeps them alive."""
    value = ffi.new(f"struct vmexit_{struct} *")
    ffi.memmove(value, data, size(struct))
    return value
