"""What another process writes, handed on in whole lines."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from typing import IO

_PARTIAL_LINE_S = 0.3
_LONGEST_LINE = 1 << 16
_SETTLED_S = 0.0005


class OutputReader:
    """A thread that reads a pipe to its end and passes on what comes, line by line.

    A line that nobody ends (a prompt) is passed on as it is after a moment.
    """

    def __init__(self, pipe: IO[bytes], to: Callable[[bytes], None]) -> None:
        self._pipe = pipe
        self._to = to
        self._waits = False
        self._thread = threading.Thread(target=self._run, name="vmexit-output", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._pipe, contextlib.suppress(OSError, ValueError):
            self._pass_on()

    def _pass_on(self) -> None:
        fd, pending = self._pipe.fileno(), b""
        while True:
            timeout = _PARTIAL_LINE_S if pending else None
            self._waits = True
            is_readable = bool(select.select([fd], [], [], timeout)[0])
            self._waits = False
            if not is_readable:
                self._to(pending)
                pending = b""
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                break
            pending += data
            end = len(pending) if len(pending) > _LONGEST_LINE else pending.rfind(b"\n") + 1
            if end:
                self._to(pending[:end])
                pending = pending[end:]
        if pending:
            self._to(pending)

    def settle(self, seconds: float) -> None:
        """Waits until what is in the pipe by now was passed on, whole lines at least; at most that long."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError, ValueError):  # it is closed: all was passed on
            while time.monotonic() < deadline:
                if not select.select([self._pipe], [], [], 0)[0] and self._waits:
                    return
                time.sleep(_SETTLED_S)

    def finish(self, seconds: float = 2.0) -> None:
        """Waits until everything was passed on, but not for ever: a child of the process may keep the pipe open."""
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)
