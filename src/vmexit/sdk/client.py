"""A program's side of the binary interface: sends HyperDbg's structures to a debugger, over its socket."""

from __future__ import annotations

import ctypes
import socket
import struct
from pathlib import Path
from types import TracebackType

from vmexit.errors import VmexitError
from vmexit.sdk import wire
from vmexit.sdk.codes import ALL_CORES, ActionType, Error, Ioctl, ModifyType, MsrAction, Status
from vmexit.sdk.structures import (
    EventAndActionResult,
    GeneralAction,
    GeneralEventDetail,
    ModifyEvents,
    ReadAndWriteOnMsr,
    ShortCircuitingEvent,
    unpack,
)

_MOST_CORES = 4096


class SdkError(VmexitError):
    """The debugger has refused what a structure asks for; ``code`` is HyperDbg's error."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the debugger answered {code:x} ({_name(Error, code)})")
        self.code = code


class DeviceError(VmexitError):
    """A request that was not carried out at all, or could not be sent; ``status``: its NTSTATUS, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def _seconds(time: float) -> tuple[int, int]:
    """As struct timeval; never 0, which would be for ever."""
    return int(time), max(int(time % 1 * 1_000_000), 1)


def _name(kind: type[Error] | type[Status], code: int) -> str:
    try:
        return kind(code).name
    except ValueError:
        return "unknown"


class Client:
    """A connection to a debugger (``settings sdk-socket PATH``). Not thread-safe; events outlive it."""

    def __init__(self, path: str | Path, timeout: float | None = 10.0) -> None:
        """Connects. ``timeout``: seconds that an answer may take. Raises DeviceError where nobody listens."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # One without a timeout of Python's waits where many connect at the same time; this one ends that.
            if timeout is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *_seconds(timeout)))
            self._socket.connect(str(path))
            self._socket.settimeout(timeout)
        except OSError as error:
            self._socket.close()
            raise DeviceError(f"there is no debugger at {path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- as DeviceIoControl ----

    def ioctl(self, code: int, data: bytes, room: int) -> bytes:
        """Sends any request: a code, a structure and what follows it, bytes of room for the answer. Raises DeviceError."""
        try:
            self._socket.sendall(wire.request(code, data, room))
            status, size = wire.ANSWER.unpack(self._receive(wire.ANSWER.size))
            answer = self._receive(size)
        except OSError as error:
            raise DeviceError(f"the debugger does not answer: {error.strerror or error}") from None
        if status != Status.SUCCESS:
            raise DeviceError(f"the request failed with status {status:x} ({_name(Status, status)})", status)
        return answer

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise DeviceError("the debugger has closed the connection")
            data += more
        return data

    # ---- HyperDbg's requests ----

    def register_event(self, event: GeneralEventDetail, condition: bytes = b"") -> None:
        """Makes an event, disabled until an action is added. Raises SdkError, DeviceError."""
        self._result(Ioctl.REGISTER_EVENT, bytes(event) + condition)

    def add_action(self, action: GeneralAction, code: bytes = b"") -> None:
        """Adds an action to the event with that tag, and enables it. Raises SdkError, DeviceError."""
        self._result(Ioctl.ADD_ACTION_TO_EVENT, bytes(action) + code)

    def trap(self, event: GeneralEventDetail, *, condition: bytes = b"", code: bytes = b"", buffer: int = 0) -> None:
        """Both: the event, with machine code that is run at each trap, or without any a break."""
        event.ConditionBufferSize = len(condition)
        self.register_event(event, condition)
        kind = ActionType.RUN_CUSTOM_CODE if code else ActionType.BREAK_TO_DEBUGGER
        self.add_action(GeneralAction.of(event.Tag, kind, code_size=len(code), buffer=buffer), code)

    def modify(self, tag: int, action: int) -> bool:
        """Enables, disables, clears (ModifyType), or only asks; gives the answer's IsEnabled. Raises SdkError, DeviceError."""
        data = bytes(ModifyEvents(Tag=tag, TypeOfAction=action))
        answer = unpack(ModifyEvents, self._sized(Ioctl.MODIFY_EVENTS, data, ctypes.sizeof(ModifyEvents)))
        if answer.KernelStatus != Error.SUCCESSFUL:
            raise SdkError(answer.KernelStatus)
        return bool(answer.IsEnabled)

    def is_enabled(self, tag: int) -> bool:
        """Whether the event with that tag is enabled."""
        return self.modify(tag, ModifyType.QUERY_STATE)

    def short_circuit(self, on: bool) -> None:
        """Has the instruction skipped, or not, that the current core is stopped before. Raises SdkError, DeviceError."""
        data = bytes(ShortCircuitingEvent(IsShortCircuiting=int(on)))
        answer = unpack(
            ShortCircuitingEvent, self._sized(Ioctl.SHORT_CIRCUITING_EVENT, data, ctypes.sizeof(ShortCircuitingEvent))
        )
        if answer.KernelStatus != Error.SUCCESSFUL:
            raise SdkError(answer.KernelStatus)

    def read_msr(self, msr: int, core: int = ALL_CORES) -> list[int]:
        """What an MSR of a halted machine holds, on each core or on one. Raises DeviceError."""
        asked = ReadAndWriteOnMsr(Msr=msr, CoreNumber=core, ActionType=MsrAction.READ)
        answer = self.ioctl(Ioctl.READ_OR_WRITE_MSR, bytes(asked), 8 * _MOST_CORES)
        return [value for (value,) in struct.iter_unpack("<Q", answer[: len(answer) & ~7])]

    def write_msr(self, msr: int, value: int, core: int = ALL_CORES) -> None:
        """Changes an MSR of a halted machine, on each core or on one. Raises DeviceError."""
        asked = ReadAndWriteOnMsr(Msr=msr, CoreNumber=core, ActionType=MsrAction.WRITE, Value=value)
        self.ioctl(Ioctl.READ_OR_WRITE_MSR, bytes(asked), len(bytes(asked)))

    def _sized(self, code: int, data: bytes, size: int) -> bytes:
        answer = self.ioctl(code, data, size)
        if len(answer) != size:
            raise DeviceError(f"the debugger answered with {len(answer)} bytes where {size} belong")
        return answer

    def _result(self, code: int, data: bytes) -> None:
        answer = unpack(EventAndActionResult, self._sized(code, data, ctypes.sizeof(EventAndActionResult)))
        if not answer.IsSuccessful:
            raise SdkError(answer.Error)
