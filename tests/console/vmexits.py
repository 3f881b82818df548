"""``vmexit`` as a process: with pipes, or at a terminal that a test types at."""

from __future__ import annotations

import contextlib
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from fcntl import ioctl
from pathlib import Path

TIME_S = 120
_TAKE_THE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
_FORWARD = re.compile(r"\x1b\[(\d*)C")
_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]|\r|\x07")


def vmexit(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "vmexit", *arguments]


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; ``given`` comes through a pipe on standard input."""
    stdin = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    return subprocess.run(vmexit(*arguments), capture_output=True, text=True, timeout=TIME_S, check=False, **stdin)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still live."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return [child for child in found if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 60) -> bool:
    """Whether a process ends within that time."""
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


class Terminal:
    """``vmexit`` at a terminal of 100 columns, and what it has shown there so far."""

    def __init__(self, *arguments: str, home: Path, bytes_a_second: float = float("inf"), **environment: str) -> None:
        """``home``: where its history lies. ``bytes_a_second``: how fast the terminal takes what it is to show."""
        self._ours, theirs = os.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.speed = bytes_a_second
        self._taken = b""
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_THE_TERMINAL, *vmexit(*arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home), **environment},
        )
        self._theirs = theirs  # kept open to look at its settings

    @property
    def text(self) -> str:
        """All that has been shown, without colours and movements of the cursor."""
        text = _FORWARD.sub(lambda match: " " * int(match[1] or 1), self._taken.decode(errors="replace"))
        return _CODES.sub("", text)

    @property
    def raw(self) -> bytes:
        """The same with them."""
        return self._taken

    def take(self, seconds: float = 0.05) -> None:
        """Lets the terminal show what there is, for that long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            most = 1 << 16 if self.speed == float("inf") else max(1, int(self.speed / 100))
            if not select.select([self._ours], [], [], left)[0]:
                return
            with contextlib.suppress(OSError):
                self._taken += os.read(self._ours, most)
            if self.speed != float("inf"):
                time.sleep(0.01)

    def types(self, text: str) -> None:
        """Presses keys; Enter is \\r."""
        os.write(self._ours, text.encode())

    def waits_for(self, pattern: str, *, after: int = 0, seconds: float = 60) -> int:
        """Waits until it shows a text (regular expression) behind an offset into all it has shown; gives where that ends."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.text, after)
            if found:
                return found.end()
            assert time.monotonic() < deadline, f"{pattern!r} was not shown within {seconds:g} s:\n{self.text[-3000:]}"
            self.take()

    def executes(self, seconds: float = 60) -> None:
        """Waits until it carries out a command: while it reads one, the terminal's keys are its own."""
        deadline = time.monotonic() + seconds
        while not self.is_sane:
            assert time.monotonic() < deadline, f"it still reads a command:\n{self.text[-3000:]}"
            self.take()

    def enters(self, line: str, pattern: str) -> int:
        """Types a line and waits for what comes of it."""
        before = len(self.text)
        self.types(f"{line}\r")
        return self.waits_for(pattern, after=before)

    def ends(self, seconds: float = 60) -> int:
        """Waits until it ends; gives its exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.text[-3000:]}"
            self.take()
        self.take(0.1)
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def is_sane(self) -> bool:
        """Whether the terminal echoes and edits lines, as a shell wants to find it."""
        flags = termios.tcgetattr(self._theirs)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON and flags & termios.ISIG)

    @property
    def qemu(self) -> int:
        """The QEMU that it has started."""
        (pid,) = children(self.process.pid)
        return pid

    def hang_up(self) -> None:
        """The terminal goes away."""
        os.close(self._ours)
        os.close(self._theirs)
        self._ours = self._theirs = -1

    def close(self) -> None:
        """Ends what is still there."""
        left = children(self.process.pid)  # the guest outlives a debugger that is killed
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for fd in (self._ours, self._theirs):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def terminal(home: Path, arguments: Sequence[str], *options: str, **how: float) -> Iterator[Terminal]:
    """``vmexit run options -- arguments`` at a terminal."""
    at = Terminal("run", *options, "--", *arguments, home=home, **how)  # type: ignore[arg-type]
    try:
        yield at
    finally:
        at.close()
