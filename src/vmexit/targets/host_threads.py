"""The host's threads: which process each belongs to, and what it calls itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

_STATUS = re.compile(rb"Name:\t(?P<name>.*)\n(?:.*\n)*?Tgid:\t(?P<process>[0-9]+)\n")
_IDLE = 0
_MOST = 1 << 16


def _read_status(thread: int) -> bytes:
    return Path(f"/proc/{thread}/status").read_bytes()


class HostThreads:
    """What /proc tells of threads, looked at anew each time that records of them come.

    Of a thread that has ended it is what was known before; one that began and ended between two looks stays unknown.
    """

    def __init__(self, read_status: Callable[[int], bytes] = _read_status) -> None:
        """``read_status``: gives /proc/N/status, or raises OSError."""
        self._read_status = read_status
        self._known: dict[int, tuple[int, str]] = {_IDLE: (_IDLE, "idle")}

    def processes(self, threads: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """The process of each, and whether it is known."""
        unique, which = np.unique(threads, return_inverse=True)
        found = [self._look(thread) for thread in unique.tolist()]
        processes = np.array([process or 0 for process in found], np.uint32)
        return processes[which], np.array([process is not None for process in found], np.bool_)[which]

    def name(self, process: int, thread: int) -> str | None:
        """What a thread of that process called itself when it was last looked at; None: it is not known."""
        known = self._known.get(thread)
        return known[1] if known is not None and known[0] == process else None

    def _look(self, thread: int) -> int | None:
        if thread != _IDLE:
            try:
                status = _STATUS.match(self._read_status(thread))
            except OSError:
                status = None
            if status is not None:
                if len(self._known) >= _MOST:
                    self._known = {_IDLE: self._known[_IDLE]}
                self._known[thread] = int(status["process"]), status["name"].decode("utf-8", "replace")
        known = self._known.get(thread)
        return known[0] if known is not None else None
