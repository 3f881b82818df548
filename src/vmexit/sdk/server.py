"""Serves the binary interface on a Unix socket, in a thread of its own: any number of programs, however they behave."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vmexit.errors import VmexitError
from vmexit.sdk import wire
from vmexit.sdk.codes import Status

_MOST_CLIENTS = 64
_WAITING = 512
"""Programs that have connected and are not welcomed yet."""
_LONGEST_PATH = 107
"""Bytes that the kernel takes as the name of a socket."""
_CHUNK = 1 << 16
_MOST_UNSENT = 1 << 16
_NO_DESCRIPTORS_S = 0.05
_CREDENTIALS = struct.Struct("iii")

Serve = Callable[[int, bytes, int], tuple[int, bytes]]
"""Carries out a request (code, structure, room for an answer), and gives a status and the answer."""


@dataclass
class _Client:
    """A connection, with what has come of its next request and what is still to be sent."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    is_over: bool = False
    """It is hung up on once everything is sent."""


class Server:
    """Listens from its making to its closing."""

    def __init__(self, path: Path, serve: Serve) -> None:
        """Raises VmexitError, with the reason, where it cannot listen at ``path``."""
        self.path = path
        self._serve = serve
        self._listening = _listen(path)
        self._inode = path.stat().st_ino
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._clients: dict[int, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="vmexit-sdk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hangs up on everybody, and removes the socket. Not while the debugger's lock is held."""
        if self._is_over:
            return
        self._is_over = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for client in list(self._clients.values()):
            self._hang_up(client)
        self._selector.close()
        self._listening.close()
        os.close(self._wake)
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    # ---- in the thread ----

    def _run(self) -> None:
        while not self._is_over:
            for key, events in self._selector.select():
                if key.fileobj is self._listening:
                    self._welcome()
                elif (client := self._clients.get(key.fd)) is not None:
                    self._attend(client, events)

    def _welcome(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            time.sleep(_NO_DESCRIPTORS_S)  # it has gone again, or there are no descriptors left for now
            return
        connection.setblocking(False)
        client = _Client(connection)
        if not _is_ours(connection):
            connection.close()
            return
        if len(self._clients) >= _MOST_CLIENTS:
            with contextlib.suppress(OSError):
                connection.send(wire.answer(Status.INSUFFICIENT_RESOURCES))
            connection.close()
            return
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ)

    def _attend(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._send(client)
            if events & selectors.EVENT_READ:
                data = client.socket.recv(_CHUNK)
                if not data:
                    self._hang_up(client)
                    return
                client.received += data
            self._answer(client)
            self._send(client)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._hang_up(client)
            return
        if client.is_over and not client.unsent:
            self._hang_up(client)
            return
        # One that does not read its answers is not read from either.
        wanted = selectors.EVENT_WRITE if client.unsent else 0
        if not client.is_over and len(client.unsent) < _MOST_UNSENT:
            wanted |= selectors.EVENT_READ
        self._selector.modify(client.socket, wanted)

    def _answer(self, client: _Client) -> None:
        """Carries out the requests that have come whole."""
        header = wire.REQUEST.size
        while not client.is_over and len(client.unsent) < _MOST_UNSENT and len(client.received) >= header:
            code, size, room = wire.REQUEST.unpack_from(client.received)
            if size > wire.MOST_INPUT:
                client.unsent += wire.answer(Status.INVALID_BUFFER_SIZE)
                client.is_over = True
                return
            if len(client.received) < header + size:
                return
            data = bytes(client.received[header : header + size])
            del client.received[: header + size]
            client.unsent += wire.answer(*self._serve(code, data, room))

    def _send(self, client: _Client) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while client.unsent:
                del client.unsent[: client.socket.send(client.unsent)]

    def _hang_up(self, client: _Client) -> None:
        self._clients.pop(client.socket.fileno(), None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.socket)
        client.socket.close()


def _is_ours(connection: socket.socket) -> bool:
    """Whether it is this user's, or root's; the socket's mode says the same."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user in (os.geteuid(), 0)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise VmexitError(f"the name of a socket has {_LONGEST_PATH} bytes at most; {path} is longer")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # So that it has this mode from the beginning, whatever the umask.
        os.fchmod(listening.fileno(), 0o600)
        _make_room(path)
        listening.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101
        listening.listen(_WAITING)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise VmexitError(f"cannot listen at {path}: {error.strerror or error}") from None
    except BaseException:
        listening.close()
        raise
    return listening


def _make_room(path: Path) -> None:
    """Removes a socket that nobody listens at any more, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise VmexitError(f"cannot listen at {path}: there is something else of that name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise VmexitError(f"cannot listen at {path}: somebody does so already")
