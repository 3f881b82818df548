"""What the machine prints, kept until the traps of before it are shown."""

from __future__ import annotations

import threading
import time
from collections import deque

_MOST = 1 << 20
"""Bytes that are kept; whoever brings more has to wait, and the guest with it."""


class GuestOutput:
    """Pieces of output with their times. To be given to a machine as its ``output``. Thread-safe."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, str, bytes]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._is_bounded = True

    def __call__(self, stream: str, data: bytes) -> None:
        """Takes in what was written just now to "stdout" or "stderr"."""
        now = time.monotonic_ns()
        with self._changed:
            while self._is_bounded and self._size > _MOST:
                self._changed.wait()
            self._pieces.append((now, stream, data))
            self._size += len(data)

    def first_time(self) -> int | None:
        """When the oldest piece came (CLOCK_MONOTONIC, in nanoseconds); None where there is none."""
        with self._changed:
            return self._pieces[0][0] if self._pieces else None

    def take(self) -> tuple[str, bytes]:
        """The oldest piece, which must be there: its stream and data."""
        with self._changed:
            _, stream, data = self._pieces.popleft()
            self._size -= len(data)
            self._changed.notify_all()
            return stream, data

    def release(self) -> None:
        """Nobody takes anything until the machine has ended: it must not wait for that."""
        with self._changed:
            self._is_bounded = False
            self._changed.notify_all()
