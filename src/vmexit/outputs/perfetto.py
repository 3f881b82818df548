"""Traces for the Perfetto viewer (ui.perfetto.dev), in its own binary format.

A trace is packets in a row, each with its length before it, so that a file that was cut off anywhere still opens; numbers have
64 bits and times nanoseconds, neither of which the older JSON format keeps. The messages and their field numbers are those of
Perfetto's protos/perfetto/trace/trace_packet.proto and of track_event/ and interned_data/ beside it; the encoding is protobuf's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmexit.link.wire import RecordFlag
from vmexit.outputs.encoders import Names, RowEncoder, flag_names, has_place, has_value, what
from vmexit.outputs.rows import Row
from vmexit.trap import Trap

if TYPE_CHECKING:
    from vmexit.names import TrapNames

# Trace, TracePacket
_PACKET = 1
_CLOCK_SNAPSHOT, _TIMESTAMP, _SEQUENCE, _TRACK_EVENT, _INTERNED, _SEQUENCE_FLAGS, _TRACK_DESCRIPTOR = 6, 8, 10, 11, 12, 13, 60
_CLEARED, _NEEDS_STATE = 1, 2
# ClockSnapshot and its Clock; the clocks
_CLOCKS, _CLOCK_ID, _CLOCK_TIME = 1, 1, 2
_REALTIME, _MONOTONIC, _BOOTTIME = 1, 3, 6
# TrackDescriptor, ProcessDescriptor
_UUID, _NAME, _PROCESS, _PARENT = 1, 2, 3, 5
_PID, _PROCESS_NAME = 1, 6
# TrackEvent
_ANNOTATIONS, _TYPE, _NAME_IID, _TRACK = 4, 9, 10, 11
_INSTANT = 3
# DebugAnnotation
_ANNOTATION_NAME, _UINT, _STRING, _POINTER = 1, 3, 6, 7
# InternedData, and what it is made of
_EVENT_NAMES, _ANNOTATION_NAMES = 2, 3
_IID, _INTERNED_NAME = 1, 2

_ARGUMENTS = ("MSR", "name", "value", "RIP", "stage", "event", "sequence", "text", "flags", "fault", "place", "thread")
_ARGUMENT_IIDS = {name: number for number, name in enumerate(_ARGUMENTS, 1)}
_SHORT = 0x80


def _varint(value: int) -> bytes:
    if value < _SHORT:
        return bytes((value,))
    parts = []
    while value >= _SHORT:
        parts.append(value & 0x7F | _SHORT)
        value >>= 7
    parts.append(value)
    return bytes(parts)


_NUMBER_KEYS = [_varint(field << 3) for field in range(64)]
_MESSAGE_KEYS = [_varint(field << 3 | 2) for field in range(64)]
_LENGTHS = [_varint(length) for length in range(1024)]


def _number(field: int, value: int) -> bytes:
    return _NUMBER_KEYS[field] + _varint(value)


def _message(field: int, *parts: bytes) -> bytes:
    data = b"".join(parts)
    length = len(data)
    return _MESSAGE_KEYS[field] + (_LENGTHS[length] if length < len(_LENGTHS) else _varint(length)) + data


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8", "replace"))


class PerfettoEncoder(RowEncoder):
    """An instant on its core's track for each trap; MSR, value and all else as arguments."""

    def __init__(self, machine: str, pid: int, names: TrapNames | None = None) -> None:
        """``machine``: what the tracks stand below; ``pid``: of its VMM; ``names``: of places and threads, if there are any."""
        super().__init__()
        self._trap_names = names
        self._names: Names[str | None] = Names(lambda name: name)
        self._alike: dict[tuple[int, ...], bytes] = {}
        """What all traps of a core, access, stage, MSR and event have in common."""
        self._machine = machine
        self._pid = pid
        identity = uuid.uuid4().int
        self._process = (identity & 0x7FFF_FFFF_FFFF_0000) | 1 << 62
        """Of the tracks: this one's uuid, and from the next one on those of the cores."""
        self._writer = 1 + (identity >> 64) % 0x7FFF_FFFE
        self._cores: set[int] = set()
        self._events: dict[str, int] = {}
        # Traps are told by CLOCK_MONOTONIC; a trace's clock is the one that does not stop while the machine sleeps.
        self._ahead_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        self._keys = {name: _number(_ANNOTATION_NAME, iid) for name, iid in _ARGUMENT_IIDS.items()}
        self._after = _number(_SEQUENCE, self._writer) + _number(_SEQUENCE_FLAGS, _NEEDS_STATE)

    def beginning(self) -> bytes:
        """What a file begins with: all that later packets refer to, as far as there were any."""
        clocks = ((_REALTIME, time.CLOCK_REALTIME), (_MONOTONIC, time.CLOCK_MONOTONIC), (_BOOTTIME, time.CLOCK_BOOTTIME))
        readings = (
            _message(_CLOCKS, _number(_CLOCK_ID, number), _number(_CLOCK_TIME, time.clock_gettime_ns(clock)))
            for number, clock in clocks
        )
        process = _message(_PROCESS, _number(_PID, self._pid), _text(_PROCESS_NAME, self._machine))
        interned = (
            *(
                _message(_ANNOTATION_NAMES, _number(_IID, iid), _text(_INTERNED_NAME, name))
                for name, iid in _ARGUMENT_IIDS.items()
            ),
            *(self._event_name(name, iid) for name, iid in list(self._events.items())),
        )
        return b"".join(
            (
                self._packet(_message(_CLOCK_SNAPSHOT, *readings), flags=0),
                self._packet(_message(_TRACK_DESCRIPTOR, _number(_UUID, self._process), process), flags=0),
                *(self._track(core) for core in sorted(self._cores)),
                self._packet(_message(_INTERNED, *interned), flags=_CLEARED),
            )
        )

    def _packet(self, *parts: bytes, flags: int) -> bytes:
        return _message(_PACKET, *parts, _number(_SEQUENCE, self._writer), _number(_SEQUENCE_FLAGS, flags))

    def _track(self, core: int) -> bytes:
        track = (_number(_UUID, self._process + 1 + core), _number(_PARENT, self._process), _text(_NAME, f"core {core:x}"))
        return self._packet(_message(_TRACK_DESCRIPTOR, *track), flags=0)

    @staticmethod
    def _event_name(name: str, iid: int) -> bytes:
        return _message(_EVENT_NAMES, _number(_IID, iid), _text(_INTERNED_NAME, name))

    def message(self, row: Row) -> bytes:
        trap = row.trap
        key = (trap.core, trap.access, trap.stage, trap.msr, trap.event)
        before, interned = b"", b""
        alike = self._alike.get(key)
        if alike is None:
            before, interned, alike = self._meet(trap)
            self._alike[key] = alike
        parts = [alike]
        if has_value(trap):
            parts.append(self._hexadecimal("value", trap.value))
        if has_place(trap):
            parts.append(self._hexadecimal("RIP", trap.rip))
        parts += self._origin(trap)
        parts.append(_message(_ANNOTATIONS, self._keys["sequence"], _number(_UINT, trap.sequence)))
        if row.text:
            parts.append(self._words("text", row.text.decode("utf-8", "replace")))
        if trap.flags:
            parts.append(self._words("flags", " ".join(flag_names(trap.flags))))
        if row.fault is not None:
            parts.append(self._words("fault", row.fault))
        event = _message(_TRACK_EVENT, *parts)
        time_part = _number(_TIMESTAMP, trap.time_ns + self._ahead_ns)
        return before + _message(_PACKET, time_part, event, interned, self._after)

    def _origin(self, trap: Trap) -> Iterator[bytes]:
        """Where it is and what called it, and which thread executes it, as far as that is known."""
        if self._trap_names is None:
            return
        if place := self._trap_names.origin(trap):
            yield self._words("place", place)
        if trap.flags & RecordFlag.PROCESS_KNOWN:
            yield self._words("thread", self._trap_names.thread(trap.pid, trap.tid))

    def _meet(self, trap: Trap) -> tuple[bytes, bytes, bytes]:
        """Of the first trap of its like: the packets that come before it, what its packet brings along, what all of them hold."""
        access, stage = what(trap)
        name = self._names[trap.msr]
        before, interned = b"", b""
        if trap.core not in self._cores:
            self._cores.add(trap.core)
            before = self._track(trap.core)
        title = f"{access} {name or f'{trap.msr:08x}'}"
        iid = self._events.get(title)
        if iid is None:
            iid = self._events[title] = len(self._events) + 1
            interned = _message(_INTERNED, self._event_name(title, iid))
        alike = (
            _number(_TYPE, _INSTANT),
            _number(_NAME_IID, iid),
            _number(_TRACK, self._process + 1 + trap.core),
            self._hexadecimal("MSR", trap.msr),
            self._words("name", name) if name is not None else b"",
            self._words("stage", stage),
            _message(_ANNOTATIONS, self._keys["event"], _number(_UINT, trap.event)),
        )
        return before, interned, b"".join(alike)

    def _hexadecimal(self, name: str, value: int) -> bytes:
        return _message(_ANNOTATIONS, self._keys[name], _number(_POINTER, value))

    def _words(self, name: str, text: str) -> bytes:
        return _message(_ANNOTATIONS, self._keys[name], _text(_STRING, text))
