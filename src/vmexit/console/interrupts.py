"""What Ctrl-C, SIGTERM and SIGHUP do."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class TerminatedError(SystemExit):
    """Somebody wants vmexit to end (SIGTERM, SIGHUP). Comes out of wherever the main thread is."""

    def __init__(self, number: int) -> None:
        """``number``: the signal's."""
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class InterruptedCommandsError(Exception):
    """Ctrl-C has halted the machine that commands were waiting for; those that would have come next are not wanted any more."""


class Interrupts:
    """Handles Ctrl-C: it raises KeyboardInterrupt or, where a person is there to go on, is only noted the first time."""

    def __init__(self) -> None:
        self.are_noted = False
        """Whether the first one is noted."""
        self.noted = False
        """Whether there was one."""
        self.ends_are_noted = False
        """Whether the first SIGTERM or SIGHUP is noted in the same way, to be raised later (``raise_noted_end``)."""
        self._noted_end: int | None = None
        self.on_noted: Callable[[], None] = lambda: None
        """Called at once, in the middle of anything: it may just set something."""

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.are_noted and not self.noted:
            self.noted = True
            self.on_noted()
        else:
            raise KeyboardInterrupt

    def _on_termination(self, number: int, frame: FrameType | None) -> None:
        if not self.ends_are_noted or self.noted:
            raise TerminatedError(number)
        self.noted = True
        self._noted_end = number
        self.on_noted()

    def raise_noted_end(self) -> None:
        """Raises TerminatedError where a SIGTERM or SIGHUP was noted."""
        if self._noted_end is not None:
            raise TerminatedError(self._noted_end)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, in the main thread. What was ignored before (nohup, a job in the background) stays ignored."""
        before = {}
        for number, handler in (
            (signal.SIGINT, self._on_interrupt),
            (signal.SIGTERM, self._on_termination),
            (signal.SIGHUP, self._on_termination),
        ):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
