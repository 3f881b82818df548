"""Where everything is shown: standard output and standard error, whole lines at a time."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading


class OutputGoneError(Exception):
    """Standard output cannot be written to any more; ``error`` says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _are_one(one: int, other: int) -> bool:
    """Whether two descriptors are of the same file."""
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


class Screen:
    """Standard output and error. Thread-safe; what one call writes is not torn apart by another."""

    def __init__(self, out: int = 1, err: int = 2) -> None:
        """``out`` and ``err``: file descriptors."""
        self._out, self._err = out, err
        self.is_terminal = os.isatty(out)
        self.colour = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        # Where the guest has written something that is not a whole line yet. Both may be the same terminal or file.
        self._open_lines: set[int] = set()
        self._places = {out: out, err: out if _are_one(out, err) else err}
        self._failure: OSError | None = None

    def write(self, text: str) -> None:
        """Shows lines; a newline at their end is added where it is missing. Raises OutputGoneError."""
        self._deliver(self._out, text if text.endswith("\n") else f"{text}\n")
        self.check()

    def ask(self, text: str) -> None:
        """Shows the beginning of a line that a person goes on with."""
        with self._lock:
            self._put(self._out, text.encode())

    def error(self, text: str) -> None:
        """Shows lines on standard error."""
        self._deliver(self._err, f"{text}\n")

    def guest(self, stream: str, data: bytes) -> None:
        """Hands on what the machine has written to its "stdout" or "stderr"."""
        fd = self._err if stream == "stderr" else self._out
        with self._lock:
            self._put(fd, data)
            if data.endswith(b"\n"):
                self._open_lines.discard(self._places[fd])
            else:
                self._open_lines.add(self._places[fd])

    @property
    def width(self) -> int | None:
        """Columns of a terminal; None: it is none, or does not say."""
        try:
            return (os.get_terminal_size(self._out).columns or None) if self.is_terminal else None
        except OSError:
            return None

    def clear(self) -> None:
        """Clears a terminal."""
        if self.is_terminal:
            with self._lock:
                self._put(self._out, b"\033[H\033[2J\033[3J")

    def check(self) -> None:
        """Raises OutputGoneError if something could not be written."""
        if self._failure is not None:
            raise OutputGoneError(self._failure)

    def _deliver(self, fd: int, text: str) -> None:
        with self._lock:
            self._put_text(fd, text)

    def _put_text(self, fd: int, text: str) -> None:
        """To be called with the lock held."""
        if self._places[fd] in self._open_lines:
            text = f"\n{text}"
            self._open_lines.discard(self._places[fd])
        self._put(fd, text.encode(getattr(sys.stdout, "encoding", None) or "utf-8", "replace"))

    def _put(self, fd: int, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                # Somebody may have made the descriptor non-blocking for all who share it.
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(fd, rest) :]
                    continue
                select.select([], [fd], [])
        except OSError as error:
            if fd == self._out:
                self._failure = error
