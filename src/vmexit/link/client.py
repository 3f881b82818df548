"""The control socket: what the debugger asks the agent for now and then."""

import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vmexit.errors import LinkError
from vmexit.link import wire
from vmexit.link.rings import Rings
from vmexit.link.wire import Capability, MessageType, Status

_ANSWER_S = 10.0
_AHEAD = 8
"""Pages of memory that are asked for at once. Many more would fill the socket, and leave no place for a notice."""
_HEADER = wire.size("message")
_MOST = _HEADER + max(wire.MAX_TRANSFER, wire.REGISTERS * 8, wire.size("hello"))

_RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS

_MEANING = {
    Status.REFUSED: "the agent refused the request",
    Status.BUSY: "another debugger is attached to this machine",
    Status.RUNNING: "the machine runs; halt it first (pause)",
    Status.UNREADABLE: "the address is not mapped",
    Status.UNAVAILABLE: "this machine does not let the agent do that",
    Status.WRONG_VERSION: "the agent in this machine is of another version of vmexit",
    Status.STALE: "scripts have changed events in the meantime",
    Status.NO_MSR: "there is no such MSR",
    Status.NO_VALUE: "the MSR does not take this value",
}


class RequestError(LinkError):
    """The agent answered with an error; ``status`` says which."""

    def __init__(self, status: Status) -> None:
        super().__init__(_MEANING.get(status, f"the agent answered {status.name.lower()}"))
        self.status = status


class Link:
    """A connection to the agent in a VMM. One at a time; closing it makes the agent let go of everything."""

    def __init__(self, address: Path | bytes) -> None:
        """Connects to the agent's socket (a path, or an abstract name that begins with 0) and shakes hands. Raises LinkError."""
        self._serial = 0
        self._machine: list[bool] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        self.closed = False
        try:
            self._socket.connect(address if isinstance(address, bytes) else str(address))
        except OSError as error:
            self._socket.close()
            raise LinkError(f"cannot reach the agent: {error.strerror}") from None
        try:
            self._greet()
        except BaseException:
            self._socket.close()
            raise

    def _greet(self) -> None:
        fds: list[int] = []
        payload = self._exchange(MessageType.HELLO, payload=struct.pack("<I", wire.VERSION), fds=fds)
        if len(fds) != 2 or len(payload) != wire.size("hello"):
            for fd in fds:
                os.close(fd)
            raise LinkError("the agent's greeting is not what this version of vmexit expects")
        hello = wire.unpack("hello", payload)
        memory_fd, wake_fd = fds
        try:
            self.rings = Rings(mmap.mmap(memory_fd, 0), wake_fd, hello.sequence)
        except (OSError, ValueError) as error:
            os.close(wake_fd)
            raise LinkError(f"the agent's shared memory cannot be mapped: {error}") from None
        except BaseException:
            os.close(wake_fd)
            raise
        finally:
            os.close(memory_fd)
        self.capabilities = Capability(hello.capabilities)
        self.plugin_api: int = hello.plugin_api
        self.door: str = bytes(wire.ffi.buffer(hello.door)).rstrip(b"\0").decode("ascii", "replace")

    def close(self) -> None:
        """Ends the connection; the agent switches every event off. Does nothing the second time."""
        if not self.closed:
            self.closed = True
            self._socket.close()
            self.rings.close()

    def fileno(self) -> int:
        """The socket, to be waited for: readable means a notice, or that the VMM is gone."""
        return self._socket.fileno()

    def _send(self, kind: MessageType, vcpu: int, argument: int, address: int, payload: bytes, files: Sequence[int]) -> None:
        if self.closed:
            raise LinkError("the link is closed")
        self._serial += 1
        header = wire.pack(
            "message",
            magic=wire.MAGIC,
            type=int(kind),
            serial=self._serial,
            vcpu=vcpu,
            argument=argument,
            address=address,
            length=len(payload),
        )
        try:
            socket.send_fds(self._socket, [header + payload], files)
        except OSError as error:
            raise LinkError(f"the link to the agent is broken: {error.strerror}") from None

    def _read(self) -> tuple[bytes, list[int]]:
        # socket.recv_fds does not heed its flags.
        arguments = _MOST, socket.CMSG_LEN(2 * struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC
        try:
            data, control, _, _ = self._socket.recvmsg(*arguments)
        except ConnectionResetError:
            # The agent closed the link before it had read everything; what it said before that comes only now.
            data, control, _, _ = self._socket.recvmsg(*arguments)
        fds = [fd for level, kind, words in control if (level, kind) == _RIGHTS for (fd,) in struct.iter_unpack("i", words)]
        return data, fds

    def _receive(self, fds: list[int]) -> tuple[Any, bytes]:
        """One datagram: header and payload. Descriptors that come with it are added to ``fds``."""
        try:
            data, received_fds = self._read()
        except TimeoutError:
            raise LinkError(f"the agent did not answer within {_ANSWER_S:g} s") from None
        except OSError as error:
            raise LinkError(f"the link to the agent is broken: {error.strerror}") from None
        fds.extend(received_fds)
        if len(data) < _HEADER:
            raise LinkError("the machine is gone: the agent has closed the link")
        header = wire.unpack("message", data)
        if header.magic != wire.MAGIC or len(data) != _HEADER + header.length:
            raise LinkError("the agent sent a message that this version of vmexit does not understand")
        return header, data[_HEADER:]

    def _notice(self, kind: int, vcpu: int, argument: int, fds: list[int]) -> None:
        if kind == MessageType.VCPU and len(fds) == 1 and vcpu < self.rings.vcpus:
            self.rings.vcpu_up(vcpu, fds[0])
            return
        if kind == MessageType.MACHINE:
            self._machine.append(bool(argument))
        for fd in fds:
            os.close(fd)

    def _exchange(
        self,
        kind: MessageType,
        vcpu: int = 0,
        argument: int = 0,
        address: int = 0,
        payload: bytes = b"",
        fds: list[int] | None = None,
        files: Sequence[int] = (),
    ) -> bytes:
        try:
            self._send(kind, vcpu, argument, address, payload, files)
        except LinkError:
            # An agent that is busy says so and hangs up, without waiting to be asked.
            if self.closed or not select.select([self._socket], [], [], 0)[0]:
                raise
        return self._answer(kind, self._serial, fds)

    def _answer(self, kind: MessageType, serial: int, fds: list[int] | None = None) -> bytes:
        """The answer to the request of that number; what the agent says besides is taken on the way."""
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            received: list[int] = []
            header, data = self._receive(received)
            if header.type == kind and (header.serial == serial or header.status == Status.BUSY):
                if header.status != Status.OK:
                    raise RequestError(_known_status(header.status))
                if fds is not None:
                    fds.extend(received)
                return data
            self._notice(header.type, header.vcpu, header.argument, received)
        raise LinkError(f"the agent did not answer within {_ANSWER_S:g} s")

    def handle_notices(self) -> None:
        """Takes what the agent has sent by itself. Raises LinkError when the VMM is gone."""
        while self.closed or select.select([self._socket], [], [], 0)[0]:
            if self.closed:
                raise LinkError("the link is closed")
            fds: list[int] = []
            header, _ = self._receive(fds)
            self._notice(header.type, header.vcpu, header.argument, fds)

    def take_machine(self) -> list[bool]:
        """What the agent has told of the machine since the last call, oldest first: True, it runs; False, it is halted.

        Only an agent with Capability.HALT does that, for the first time right after its greeting.
        """
        told, self._machine = self._machine, []
        return told

    # What can be asked for. Each raises LinkError, or RequestError with the agent's own reason.

    def set_events(self, events: Sequence[bytes], changes: int = 0) -> None:
        """Replaces all events (packed ``vmexit_event``, ids rising); holds from the next instruction on.

        ``changes``: how often scripts had changed events when ``events`` was made (Rings.changes); RequestError (STALE) where
        they have done so again since.
        """
        self._exchange(MessageType.EVENTS, argument=len(events), address=changes, payload=b"".join(events))

    def add_script(
        self, number: int, file: int, entry: int, code_size: int, constants_size: int, buffer: tuple[int, int] | None = None
    ) -> None:
        """Hands over a compiled script: ``file`` holds its code and, from the next page on, its constants; it stays the caller's.

        The agent forgets it unless the next set_events names ``number``, which is never 0 and never given twice. ``buffer``:
        the file of its $buffer and how many bytes that has; the file, too, stays the caller's.
        """
        buffer_file, buffer_size = buffer or (None, 0)
        described = wire.pack(
            "script_file",
            script=number,
            entry=entry,
            code_size=code_size,
            constants_size=constants_size,
            buffer_size=buffer_size,
        )
        files = [file] if buffer_file is None else [file, buffer_file]
        self._exchange(MessageType.ADD_SCRIPT, payload=described, files=files)

    def set_script_limits(self, steps: int, stack: int) -> None:
        """What a run of a script may take: steps, and bytes of the native stack (wire's MIN_STACK to MAX_STACK)."""
        self._exchange(MessageType.SCRIPT_LIMITS, argument=stack, address=steps)

    def set_recipe(self, recipe: bytes) -> None:
        """How to find the guest's current thread (a packed ``vmexit_recipe`` and its bases); empty: it is not known any more."""
        self._exchange(MessageType.SET_RECIPE, payload=recipe)

    def set_code(self, code: bytes) -> None:
        """How to find callers in the guest's kernel (a packed ``vmexit_frames`` and its pieces); empty: not known any more."""
        self._exchange(MessageType.SET_CODE, payload=code)

    def set_overflow(self, drop: bool) -> None:
        """A full ring drops and counts (True) or makes the vCPU wait (False)."""
        self._exchange(MessageType.OVERFLOW, argument=int(drop))

    def hold(self, held: bool) -> None:
        """Tells the agent whether the debugger keeps the machine halted, so that it goes on if the debugger dies."""
        self._exchange(MessageType.HOLD, argument=int(held))

    def set_halted(self, halted: bool) -> None:
        """Halts the machine, or lets it run. That it does is told by ``take_machine``, possibly only later."""
        self._exchange(MessageType.HALT, argument=int(halted))

    def decide(self, vcpu: int, skip: bool) -> None:
        """Short-circuits (or not) the one instruction that the vCPU is stopped before."""
        self._exchange(MessageType.DECIDE, vcpu, int(skip))

    def registers(self, vcpu: int) -> list[int]:
        """All registers (wire.REGISTERS) of a vCPU of a halted machine, or of one that has asked."""
        return list(struct.unpack(f"<{wire.REGISTERS}Q", self._exchange(MessageType.GET_REGISTERS, vcpu)))

    def register(self, vcpu: int, number: int) -> int:
        """One of them, or one of script.h's. Raises RequestError (UNAVAILABLE) for one that cannot be reached in this VMM."""
        return int.from_bytes(self._exchange(MessageType.GET_REGISTER, vcpu, number), "little")

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """Changes one register of a vCPU of a halted machine; by its number as ``register`` takes it."""
        self._exchange(MessageType.SET_REGISTER, vcpu, number, value)

    def read_msr(self, vcpu: int, msr: int) -> int:
        """What an MSR of a vCPU of a halted machine, or of one that has asked, holds. RequestError (NO_MSR) where it has none."""
        (value,) = struct.unpack("<Q", self._exchange(MessageType.READ_MSR, vcpu, msr))
        return int(value)

    def write_msr(self, vcpu: int, msr: int, value: int) -> None:
        """Changes an MSR of a vCPU of a halted machine. RequestError (NO_MSR, NO_VALUE) where WRMSR would fault."""
        self._exchange(MessageType.WRITE_MSR, vcpu, msr, value)

    def read_memory(self, vcpu: int, address: int, length: int, *, physical: bool = False) -> bytes:
        """Guest memory, by the page tables of that vCPU. Raises RequestError (UNREADABLE) if any of it is not mapped."""
        kind = MessageType.READ_PHYSICAL if physical else MessageType.READ_VIRTUAL
        return b"".join(self._read_pieces(kind, vcpu, _chunks(address, length)))

    def _read_pieces(self, kind: MessageType, vcpu: int, pieces: Iterator[tuple[int, int]]) -> Iterator[bytes]:
        """Asks for some pieces ahead, so that the agent reads the next one while the last is on its way."""
        asked: deque[int] = deque()
        try:
            while True:
                # Some at once, for which the agent wakes up once.
                if len(asked) <= _AHEAD // 2:
                    for start, size in islice(pieces, _AHEAD - len(asked)):
                        self._send(kind, vcpu, size, start, b"", ())
                        asked.append(self._serial)
                if not asked:
                    return
                yield self._answer(kind, asked.popleft())
        except RequestError:
            # The answers that are still to come are of no use.
            for serial in asked:
                with contextlib.suppress(RequestError):
                    self._answer(kind, serial)
            raise

    def translate(self, vcpu: int, address: int, *, to_virtual: bool = False) -> int | None:
        """The physical address of a virtual one by that vCPU's page tables, or the other way; None: it is not mapped.

        Of several virtual addresses the lowest of the upper half of the address space, else the lowest.
        """
        try:
            return int.from_bytes(self._exchange(MessageType.TRANSLATE, vcpu, int(to_virtual), address), "little")
        except RequestError as error:
            if error.status != Status.UNREADABLE:
                raise
            return None

    def write_memory(self, vcpu: int, address: int, data: bytes, *, physical: bool = False) -> None:
        """Changes guest memory, whatever protection its pages have. What lies before an unmapped page is written all the same."""
        kind = MessageType.WRITE_PHYSICAL if physical else MessageType.WRITE_VIRTUAL
        done = 0
        for start, size in _chunks(address, len(data)):
            self._exchange(kind, vcpu, 0, start, data[done : done + size])
            done += size

    @contextlib.contextmanager
    def closing(self) -> Iterator["Link"]:
        """``with link.closing():`` closes it however the block ends."""
        try:
            yield self
        finally:
            self.close()


def _known_status(status: int) -> Status:
    try:
        return Status(status)
    except ValueError:
        raise LinkError(f"the agent answered with a status ({status}) that this version of vmexit does not know") from None


def _chunks(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Pieces that one message can carry; none crosses a 4 KB page, so that an unmapped one is told exactly."""
    end = address + length
    while address < end:
        size = min(end - address, wire.MAX_TRANSFER - address % wire.MAX_TRANSFER)
        yield address & 0xFFFF_FFFF_FFFF_FFFF, size
        address += size
