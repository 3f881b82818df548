"""Real peers for outputs: processes that read a pipe or serve a socket, note what they get, and die when they are told to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS
from vmexit import Debugger, State, StopReason

WAIT_S = 60.0
_FIRST = 0x5A5A5A5A

# Arguments: kind, address, the file for what comes, after how many bytes to die (0: never), bytes a read, seconds between reads.
_PEER = textwrap.dedent("""
    import os, signal, socket, sys, time
    kind, address, path, most, size, pause = sys.argv[1:4] + [int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])]
    got = 0
    def note(data):
        global got
        os.write(out, data)
        got += len(data)
        if most and got >= most:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if kind == "fifo":
        print("ready", flush=True)
        fd = os.open(address, os.O_RDONLY)
        while data := os.read(fd, size):
            note(data)
        sys.exit()
    if kind == "tcp":
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", int(address)))
    else:
        server = socket.socket(socket.AF_UNIX)
        if os.path.exists(address):
            os.unlink(address)
        server.bind(address)
    server.listen()
    print(server.getsockname()[1] if kind == "tcp" else address, flush=True)
    while True:
        connection, _ = server.accept()
        while data := connection.recv(size):
            note(data)
""")


class Peer:
    """One such process, which is ready when it is made."""

    def __init__(self, kind: str, address: str, file: Path, dies_after: int = 0, size: int = 4096, pause: float = 0.0) -> None:
        self.file = file
        arguments = [kind, address, str(file), str(dies_after), str(size), str(pause)]
        self.process = subprocess.Popen([sys.executable, "-c", _PEER, *arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address

    @property
    def got(self) -> bytes:
        """What it has got so far."""
        return self.file.read_bytes() if self.file.exists() else b""

    def await_death(self) -> None:
        """It ends by itself."""
        assert self.process.wait(WAIT_S) == -signal.SIGKILL

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def peers() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and ends them."""
    made: list[Peer] = []

    def make(*arguments: object, **options: object) -> Peer:
        made.append(Peer(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for peer in made:
            peer.close()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Waits for that. AssertionError where it does not come."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def lines(count: int) -> list[bytes]:
    """What SCRIPT prints in the guest "loop" with that COUNT."""
    return [b"%x" % (_FIRST << 32 | number) for number in range(count, 0, -1)]


SCRIPT = 'printf("%llx\\n", $value);'
STAR = 0xC0000081


def finish(debugger: Debugger) -> None:
    """Lets the guest run to its end, which has to be a good one, unless it is there already."""
    stop = debugger.stop if debugger.state is State.ENDED else debugger.run(timeout=120)
    assert stop is not None and (stop.reason, stop.exit_status) == (StopReason.ENDED, OK_STATUS)


def need_root() -> None:
    """Skips the test for anybody else."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
