"""The kinds of outputs: what address each takes, and how that is checked before anything is opened."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmexit.link.rings import Records
from vmexit.outputs.encoders import Encoder, JsonEncoder, TextEncoder, fleet_fields
from vmexit.outputs.perfetto import PerfettoEncoder
from vmexit.outputs.sink import OutputError, Sink
from vmexit.outputs.streams import FifoSink, FileSink, SocketSink

if TYPE_CHECKING:
    from vmexit.names import TrapNames

_LONGEST_UNIX = 107
_MOST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Machine:
    """What outputs need to know of the machine whose events they tell of."""

    name: str
    pid: int
    lines: Callable[[Records], str]
    """The lines that traps are shown as."""
    names: TrapNames | None = None
    """Of their places."""


Maker = Callable[[Sequence[str], Machine], tuple[Sink, Encoder]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of output."""

    address: tuple[str, ...]
    """What the words of its address are called."""
    make: Maker
    """Raises OutputError for an address that cannot be right."""


def _path(text: str) -> Path:
    if "\0" in text:
        raise OutputError("a path holds no NUL", 0)
    return Path(text).expanduser().absolute()


def _file_path(text: str) -> Path:
    """A path that can be written to: a file, or a place where one can be made."""
    path = _path(text)
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder {path.parent}", 0) from None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"no file can be made in {path.parent}: permission denied", 0) from None
        return path
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", 0) from None
    if stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{path} is a folder", 0)
    if stat.S_ISSOCK(status.st_mode):
        raise OutputError(f"{path} is a socket", 0, "its kind is 'unix'")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path} cannot be written to: permission denied", 0)
    return path


def _file(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    path = _file_path(address[0])
    if path.is_fifo():
        raise OutputError(f"{path} is a named pipe", 0, "its kind is 'namedpipe'")
    return FileSink(path), TextEncoder(machine.lines)


def _jsonl(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    path = _file_path(address[0])
    return FifoSink(path) if path.is_fifo() else FileSink(path), JsonEncoder(machine.names)


def _perfetto(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    path = _file_path(address[0])
    if path.is_fifo():
        raise OutputError(f"{path} is a named pipe", 0, "a trace is a file")
    encoder = PerfettoEncoder(machine.name, machine.pid, machine.names)
    return FileSink(path, encoder.beginning), encoder


def _namedpipe(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    path = _path(address[0])
    try:
        mode = path.stat().st_mode
    except OSError as error:
        hint = f"'mkfifo {path}' makes it" if isinstance(error, FileNotFoundError) else None
        raise OutputError(f"there is no named pipe {path}: {error.strerror}", 0, hint) from None
    if not stat.S_ISFIFO(mode):
        raise OutputError(f"{path} is no named pipe", 0)
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path} cannot be written to: permission denied", 0)
    return FifoSink(path), TextEncoder(machine.lines)


def _tcp(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    host, port = _host_and_port(address[0])
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no sound name"
        raise OutputError(f"the host '{host}' is not known: {why}", 0) from None
    return SocketSink(family, (host, port)), TextEncoder(machine.lines)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise OutputError(f"'{text}' is no HOST:PORT", 0, "an IPv6 address stands in brackets: [::1]:9000")
    if not colon or not host or not (port.isascii() and port.isdigit()):
        raise OutputError(f"'{text}' is no HOST:PORT", 0, "as 192.168.1.10:8080; the port is decimal")
    if not 0 < int(port) <= _MOST_PORT:
        raise OutputError(f"there is no port {port}", 0, f"1 to {_MOST_PORT}")
    return host, int(port)


def _unix(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    text = address[0]
    if text.startswith("@"):
        where = "\0" + text[1:]
    else:
        path = _path(text)
        where = str(path)
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder {path.parent}", 0)
        try:
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise OutputError(f"{path} is no socket", 0)
        except FileNotFoundError:
            pass  # whoever listens there may come later
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", 0) from None
    if len(os.fsencode(where)) > _LONGEST_UNIX:
        raise OutputError(f"the address of a Unix socket has {_LONGEST_UNIX} bytes at most", 0)
    return SocketSink(socket.AF_UNIX, where), TextEncoder(machine.lines)


def _module(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    from vmexit.outputs.module import ModuleSink, check_library

    path = _path(address[0])
    check_library(path)
    return ModuleSink(path), TextEncoder(machine.lines)


def _nats(address: Sequence[str], machine: Machine) -> tuple[Sink, Encoder]:
    from vmexit.outputs.jetstream import JetStreamSink, check_address

    url = check_address(address[0], address[1])
    return JetStreamSink(url, address[1]), JsonEncoder(machine.names, **fleet_fields(machine.name))


KINDS: Mapping[str, Kind] = {
    "file": Kind(("PATH",), _file),
    "namedpipe": Kind(("PATH",), _namedpipe),
    "tcp": Kind(("HOST:PORT",), _tcp),
    "module": Kind(("PATH",), _module),
    "unix": Kind(("PATH",), _unix),
    "jsonl": Kind(("PATH",), _jsonl),
    "perfetto": Kind(("PATH",), _perfetto),
    "nats": Kind(("URL", "SUBJECT"), _nats),
}
"""By name; the first four are HyperDbg's."""
