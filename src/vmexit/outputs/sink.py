"""What every destination is: something that is connected to, takes messages, and tells which of them it surely has."""

from __future__ import annotations

import abc
import select
import time
from collections.abc import Callable, Sequence

from vmexit.errors import VmexitError

_MOMENT_S = 0.002
STEP_S = 0.05
"""How long a sink waits at most before it looks whether the time is over."""


class OutputError(VmexitError):
    """An output that cannot be made, opened or closed as asked.

    ``part``: which word of the address is to blame, from 0; None: none of them. ``hint`` says what to do.
    """

    def __init__(self, message: str, part: int | None = None, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.message = message
        self.part = part
        self.hint = hint


class SinkError(Exception):
    """The destination takes nothing now; str() says why. ``for_good``: trying again would not help."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


class Sink(abc.ABC):
    """One destination. All but ``in_doubt`` is called by one thread, that of its output.

    Messages that ``send`` was given are the sink's until they are surely taken, or until ``take_back``.
    """

    def __init__(self) -> None:
        self.is_over: Callable[[], bool] = lambda: False
        """Asked while it waits: whether there is no more time; then it raises SinkError."""
        self.moved: Callable[[], None] = lambda: None
        """To be called whenever the destination has taken something."""
        self.trouble: str | None = None
        """Why nothing is taken just now, where ``send`` waits for that to end."""
        self.lost = 0
        """Messages that were lost with nobody to blame but the destination, since this was last set to 0."""

    @abc.abstractmethod
    def connect(self) -> None:
        """Connects, or connects anew. Takes some seconds at most. Raises SinkError."""

    @abc.abstractmethod
    def send(self, messages: Sequence[bytes]) -> None:
        """Hands all of them over, and waits as long as the destination needs. Raises SinkError when it takes no more."""

    @abc.abstractmethod
    def in_doubt(self) -> int:
        """How many messages it was given that are not surely taken yet."""

    @abc.abstractmethod
    def take_back(self) -> list[bytes]:
        """These messages, oldest first, to be given to it again once it is connected; it forgets them."""

    def idle(self) -> None:  # noqa: B027 (most have nothing to do)
        """Called now and then while there is nothing to send. Raises SinkError where the destination is gone."""

    def settle(self, deadline: float) -> None:
        """Waits until all is surely taken, up to that time (time.monotonic). Raises SinkError."""
        while self.in_doubt() and time.monotonic() < deadline:
            self.idle()
            time.sleep(_MOMENT_S)

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the destination. Does nothing where there is none."""

    def wait_writable(self, fd: int) -> None:
        """Waits a moment for room. Raises SinkError when there is no more time."""
        if self.is_over():
            raise SinkError("it takes nothing")
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll(STEP_S * 1000)
