"""Destinations that take bytes in a row: files, named pipes, sockets."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import termios
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from vmexit.outputs.sink import STEP_S, Sink, SinkError

_CONNECT_S = 3.0
_STALLED_MS = 30_000
"""A TCP peer that acknowledges nothing for so long is given up, and connected to anew."""
_SEND_BUFFER = 1 << 18
"""Bytes on their way that the kernel keeps for a socket: what a peer that vanishes leaves in doubt."""
_LOOK_S = 0.5
_SIOCOUTQ = termios.TIOCOUTQ


def _ioctl_number(fd: int, request: int) -> int:
    number = array.array("i", [0])
    fcntl.ioctl(fd, request, number)
    return number[0]


class StreamSink(Sink):
    """What they have in common. A message that was written in part is written again as a whole after a break."""

    _OVERHEAD = 0
    """Bytes that a message takes besides its own."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = -1
        self._written = 0
        """Bytes since it was connected."""
        self._batches: deque[tuple[int, int, Sequence[bytes]]] = deque()
        """Messages that are not surely taken, in batches, and at which byte each batch begins and ends."""

    def send(self, messages: Sequence[bytes]) -> None:
        rest = memoryview(self._framed(messages))
        self._batches.append((self._written, self._written + len(rest), messages))
        while rest:
            try:
                count = self._write(rest)
            except BlockingIOError:
                self.wait_writable(self._fd)
                continue
            except OSError as error:
                raise SinkError(error.strerror or str(error)) from None
            self._written += count
            self.moved()
            rest = rest[count:]
            self._forget_settled()
        self._forget_settled()

    def _framed(self, messages: Sequence[bytes]) -> bytes:
        return b"".join(messages)

    def _write(self, data: memoryview) -> int:
        return os.write(self._fd, data)

    @abstractmethod
    def _settled(self) -> int:
        """Bytes of those written that are surely taken."""

    def _forget_settled(self) -> None:
        settled = self._settled()
        while self._batches and self._batches[0][1] <= settled:
            self._batches.popleft()

    def _whole(self, bytes_taken: int) -> tuple[int, list[bytes]]:
        """The messages that end behind that byte, and at which byte the first of them begins."""
        found: list[bytes] = []
        first = bytes_taken
        for start, _, messages in list(self._batches):
            at = start
            for message in messages:
                end = at + len(message) + self._OVERHEAD
                if end > bytes_taken or found:
                    first = first if found else at
                    found.append(message)
                at = end
        return first, found

    def in_doubt(self) -> int:
        try:
            return len(self._whole(self._settled())[1])
        except (OSError, ValueError, RuntimeError):
            return 0  # it is being closed, or changed, by its thread

    def take_back(self) -> list[bytes]:
        _, found = self._whole(self._settled())
        self._batches.clear()
        self._written = 0
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileSink(StreamSink):
    """A file, or a device. It is appended to, unless it begins anew; a file that was renamed or removed is made again."""

    def __init__(self, path: Path, beginning: Callable[[], bytes] | None = None) -> None:
        """``beginning``: gives what each new file begins with; then a file that is there already is emptied."""
        super().__init__()
        self._path = path
        self._beginning = beginning
        self._has_begun = False
        self._is_file = False
        self._end = 0
        self._looked = 0.0

    def connect(self) -> None:
        self.close()
        anew = self._beginning is not None and not self._has_begun
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_TRUNC if anew else 0)
        try:
            self._fd = os.open(self._path, flags, 0o666)
            status = os.fstat(self._fd)
            self._is_file = stat.S_ISREG(status.st_mode)
            self._end = status.st_size
            if self._beginning is not None and self._end == 0:
                self._begin(self._beginning())
            self._has_begun = True
        except OSError as error:
            self.close()
            raise SinkError(error.strerror or str(error), for_good=error.errno != errno.ENOSPC) from None

    def _begin(self, data: bytes) -> None:
        if os.write(self._fd, data) < len(data):
            os.ftruncate(self._fd, 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = len(data)

    def _write(self, data: memoryview) -> int:
        if time.monotonic() - self._looked > _LOOK_S:
            self._look()
        return os.write(self._fd, data)

    def _look(self) -> None:
        """Raises SinkError where the path is no longer that of the file."""
        self._looked = time.monotonic()
        if not self._is_file:
            return
        try:
            there, ours = self._path.stat(), os.fstat(self._fd)
        except OSError:
            raise SinkError("the file is gone") from None
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise SinkError("the file is another one")

    def idle(self) -> None:
        if time.monotonic() - self._looked > _LOOK_S:
            self._look()

    def _settled(self) -> int:
        return self._written

    def take_back(self) -> list[bytes]:
        # A disk that is full takes half a line.
        first, _ = self._whole(self._written)
        if self._is_file and first < self._written:
            with contextlib.suppress(OSError):
                if os.fstat(self._fd).st_size == self._end + self._written:
                    os.ftruncate(self._fd, self._end + first)
        return super().take_back()


class FifoSink(StreamSink):
    """A named pipe. What is in it stays there when its reader goes, for the next one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._unread = 0

    def connect(self) -> None:
        if self._fd >= 0:
            return
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise SinkError("nothing reads it") from None
            raise SinkError(error.strerror or str(error), for_good=True) from None

    def _write(self, data: memoryview) -> int:
        while True:
            try:
                count = os.write(self._fd, data)
            except BrokenPipeError:
                self.trouble = "nothing reads it"
                if self.is_over():
                    raise SinkError(self.trouble) from None
                time.sleep(STEP_S)
                continue
            self.trouble = None
            return count

    def _settled(self) -> int:
        return self._written - self._unread

    def settle(self, deadline: float) -> None:
        """What a reader that is there has not read yet it will find in the pipe; without one it is lost."""
        try:
            self._unread = _ioctl_number(self._fd, termios.FIONREAD) if self._is_alone() else 0
        except OSError:
            self._unread = 0

    def _is_alone(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))


class SocketSink(StreamSink):
    """A TCP or Unix stream socket. What the peer sends is read and thrown away."""

    def __init__(self, family: int, address: str | tuple[str, int]) -> None:
        """``family``: socket.AF_UNIX or another; ``address``: a path, or host and port."""
        super().__init__()
        self._family = family
        self._address = address
        self._socket: socket.socket | None = None
        self._surely = 0
        self._failed = 0
        """Why the connection broke (errno)."""

    def connect(self) -> None:
        self.close()
        made: socket.socket | None = None
        try:
            if isinstance(self._address, tuple):
                made = socket.create_connection(self._address, _CONNECT_S)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
            else:
                made = socket.socket(self._family, socket.SOCK_STREAM)
                made.settimeout(_CONNECT_S)
                made.connect(self._address)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            made.setblocking(False)
        except OSError as error:
            if made is not None:
                made.close()
            raise SinkError(error.strerror or str(error)) from None
        self._socket = made
        self._fd = made.fileno()
        self._surely = self._failed = 0

    def _write(self, data: memoryview) -> int:
        assert self._socket is not None
        self._discard()
        try:
            return self._socket.send(data)
        except BlockingIOError:
            raise
        except OSError as error:
            self._failed = error.errno or errno.EPIPE
            raise

    def _discard(self) -> None:
        assert self._socket is not None
        if self._failed:
            raise OSError(self._failed, os.strerror(self._failed))
        try:
            self._socket.recv(1 << 16)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed = error.errno or errno.EPIPE
            raise

    def idle(self) -> None:
        try:
            self._discard()
        except OSError as error:
            raise SinkError(error.strerror or str(error)) from None

    def _settled(self) -> int:
        """TCP tells how many bytes are not acknowledged; a Unix socket, whether something is unread."""
        try:
            unsettled = _ioctl_number(self._fd, _SIOCOUTQ)
        except OSError:
            return self._surely
        if self._family != socket.AF_UNIX:
            self._surely = max(0, self._written - unsettled)
        elif unsettled == 0 and not self._has_failed():
            self._surely = self._written
        else:
            self._surely = max(self._surely, self._written - _SEND_BUFFER * 2)
        return self._surely

    def _has_failed(self) -> bool:
        """A peer that goes while something is unread takes that with it, and leaves ECONNRESET before, which is told once."""
        assert self._socket is not None
        self._failed = self._failed or self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return bool(self._failed)

    def take_back(self) -> list[bytes]:
        found = super().take_back()
        self._surely = 0
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._fd = -1
