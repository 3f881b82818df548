"""One output: a bounded queue, and a thread that brings what is in it to its destination."""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections import deque
from collections.abc import Sequence

from vmexit.outputs.encoders import Encoder
from vmexit.outputs.rows import Item
from vmexit.outputs.sink import OutputError, Sink, SinkError

_MOST_BYTES = 8 << 20
"""What a queue holds before the guest has to wait, or something is dropped."""
_BATCH = 4096
"""Records or prints that are made messages of at once, about."""
_IDLE_S = 0.1
_RETRIES_S = (0.1, 0.2, 0.4, 0.8, 1.0)
"""How long it is waited between attempts to connect."""
_PATIENCE_S = 2.0
"""How long a guest that waits for room waits for a destination that is away."""
_FIRST_S = 15.0
_STUCK_S = 2.0
_LONGEST = 12


class OutputState(enum.Enum):
    """Of an output."""

    CREATED = "not opened"
    OPENED = "opened"
    CLOSED = "closed"
    """It cannot be opened again."""


class Output:
    """One output. Thread-safe."""

    def __init__(self, name: str, kind: str, address: Sequence[str], sink: Sink, encoder: Encoder) -> None:
        self.name = name
        self.kind = kind
        self.address = tuple(address)
        self.state = OutputState.CREATED
        self.structured = encoder.structured
        """It tells of traps, not only of what is printed."""
        self._sink = sink
        self._encoder = encoder
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._queued = 0
        self._queued_bytes = 0
        self._at_hand = 0
        """Messages that are encoded, and not given to the sink."""
        self._given = 0
        """Messages that the sink has got and not given back."""
        self._dropped = 0
        self._deadline: float | None = None
        """When it has to be over; None: it goes on."""
        self._trouble: str | None = None
        self._patience = 0.0
        """How long it may take nothing while it is being closed, in seconds."""
        self._last_moment = 0.0
        self._away_since = 0.0
        self._full_since: float | None = None
        self._is_connected = False
        self._was_connected = False
        self._first = threading.Event()
        self._refused: SinkError | None = None
        self._thread: threading.Thread | None = None
        sink.is_over = self._is_over
        sink.moved = self._moved

    def __repr__(self) -> str:
        return f"<Output {self.name!r} {self.kind} {' '.join(self.address)}: {self.state.value}>"

    # ---- how it is doing ----

    @property
    def sent(self) -> int:
        """Messages that the destination has: prints, lines of the log, or traps."""
        return max(0, self._given - self._sink.in_doubt())

    @property
    def waiting(self) -> int:
        """Messages on their way: in the queue, or not yet surely taken."""
        if self.state is not OutputState.OPENED:
            return 0
        return self._queued + self._encoder.held + self._at_hand + self._sink.in_doubt()

    @property
    def dropped(self) -> int:
        """Messages that were lost: no room for them, no destination, or one that broke with them."""
        return self._dropped

    @property
    def trouble(self) -> str | None:
        """Why its destination takes nothing at the moment; None: it does."""
        if (why := self._sink.trouble) is not None:
            self._away(why)
        elif self._is_connected:
            self._trouble = None
        return self._trouble

    @property
    def is_full(self) -> bool:
        """Whether there is no room in its queue."""
        return self._queued_bytes >= _MOST_BYTES

    @property
    def holds_back(self) -> bool:
        """Whether a guest that is to lose nothing has to wait: its queue is full, and the destination not away for long."""
        if self.state is not OutputState.OPENED or not self.is_full:
            self._full_since = None
            return False
        if self._full_since is None:
            self._full_since = time.monotonic()
        return not self._is_away(_PATIENCE_S)

    @property
    def held_back_s(self) -> float:
        """For how long the guest has waited for it, in seconds."""
        since = self._full_since
        return 0.0 if since is None else time.monotonic() - since

    def _is_away(self, seconds: float) -> bool:
        return self.trouble is not None and time.monotonic() - self._away_since > seconds

    def _away(self, why: str) -> None:
        if self._trouble is None:
            # One that never was there is not waited for.
            self._away_since = time.monotonic() if self._was_connected else 0.0
        self._trouble = why

    # ---- opening and closing ----

    def open(self) -> None:
        """Connects it. Raises OutputError where that cannot be; a destination that may still come is waited for (``trouble``)."""
        if self.state is not OutputState.CREATED:
            raise OutputError(f"the output '{self.name}' is {self.state.value}{self._hint()}")
        self._refused = None
        self._first.clear()
        self._deadline = None
        self.state = OutputState.OPENED
        self._thread = threading.Thread(target=self._run, name=f"vmexit-output-{self.name}", daemon=True)
        self._thread.start()
        self._first.wait(_FIRST_S)
        if self._refused is not None:
            self._thread.join()
            self.state = OutputState.CREATED
            raise OutputError(f"the output '{self.name}' cannot be opened: {self._refused}")

    def _hint(self) -> str:
        return " already" if self.state is OutputState.OPENED else ", and cannot be opened again: create another one"

    def begin_closing(self, seconds: float) -> None:
        """It has to deliver what is waiting: until it has taken nothing for so many seconds, or for twelve times as many."""
        with self._changed:
            if self.state is OutputState.OPENED and self._deadline is None:
                self._patience = seconds
                self._deadline = time.monotonic() + seconds
                self._last_moment = time.monotonic() + _LONGEST * seconds
            self._changed.notify_all()

    def close(self, seconds: float = 5.0) -> None:
        """Delivers what is waiting and lets go of the destination. What is left counts as dropped.

        It is given up when it has taken nothing for so many seconds, and after twelve times as many in any case.
        """
        self.begin_closing(seconds)
        if self._thread is not None:
            self._thread.join(_LONGEST * seconds + _STUCK_S)
        with self._changed:
            self._dropped += self.waiting  # none, unless the thread hangs in the kernel
            self.state = OutputState.CLOSED

    # ---- what comes ----

    def put(self, item: Item, *, waits: bool) -> None:
        """Takes in what came of an event. ``waits``: the guest waits where there is no room, so that this must not lose any."""
        with self._changed:
            if self.state is not OutputState.OPENED or self._deadline is not None:
                self._dropped += item.count
                return
            if self.is_full and (not waits or self._is_away(_PATIENCE_S)):
                self._dropped += item.count
                return
            self._queue.append(item)
            self._queued += item.count
            self._queued_bytes += item.size
            if len(self._queue) == 1:
                self._changed.notify_all()

    def wait_for_room(self, seconds: float) -> None:
        """Waits until its queue is no longer full, for so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_full, seconds)

    # ---- its thread ----

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _moved(self) -> None:
        """Its destination has taken something."""
        if self._deadline is not None:
            self._deadline = min(time.monotonic() + self._patience, self._last_moment)

    def _run(self) -> None:
        pending: list[bytes] = []
        try:
            pending = self._deliver()
        except Exception as error:  # a mistake of ours, which must not be the guest's or the screen's
            self._trouble = f"internal error: {type(error).__name__}: {error}"
            self._first.set()
        finally:
            self._end(pending)

    def _deliver(self) -> list[bytes]:
        """Until it is closed; gives what could not be delivered."""
        pending: list[bytes] = []
        attempts = 0
        while not self._is_over():
            if not self._is_connected:
                try:
                    self._sink.connect()
                except SinkError as error:
                    if error.for_good and not self._first.is_set():
                        self._refused = error
                        self._first.set()
                        return pending
                    self._away(str(error))
                    self._first.set()
                    self._rest(_RETRIES_S[min(attempts, len(_RETRIES_S) - 1)])
                    attempts += 1
                    if not pending and self._is_done():
                        return []
                    continue
                attempts = 0
                self._is_connected = self._was_connected = True
                self._trouble = None
                self._first.set()
            try:
                if not pending:
                    pending = self._next()
                if pending:
                    self._hand_over(pending)
                    pending = []
                elif self._is_done():
                    self._sink.settle(self._deadline or 0.0)
                    if not self._sink.in_doubt():
                        return []
                    raise SinkError("it takes nothing")
                else:
                    self._sink.idle()
            except SinkError as error:
                pending = self._recover(error)
        return pending

    def _hand_over(self, messages: list[bytes]) -> None:
        with self._changed:
            self._at_hand = 0
            self._given += len(messages)
        self._sink.send(messages)

    def _recover(self, error: SinkError) -> list[bytes]:
        """Takes back what is not surely taken. Gives what is to be sent again."""
        back = self._sink.take_back()
        with self._changed:
            lost, self._sink.lost = self._sink.lost, 0
            self._given -= len(back) + lost
            self._dropped += lost
            self._at_hand = len(back)
        self._is_connected = False
        self._away(str(error))
        return back

    def _next(self) -> list[bytes]:
        """Waits a moment for something to come; the messages that it makes."""
        items: list[Item] = []
        with self._changed:
            if not self._queue and self._deadline is None:
                self._changed.wait(_IDLE_S)
            count = 0
            while self._queue and count < _BATCH:
                item = self._queue.popleft()
                items.append(item)
                count += item.count
                self._queued_bytes -= item.size
            was_full = self._queued_bytes + sum(item.size for item in items) >= _MOST_BYTES
            if was_full:
                self._changed.notify_all()
        messages = self._encoder.encode(items)
        if not items:
            messages += self._encoder.rest(all_of_them=self._deadline is not None)
        with self._changed:
            self._queued -= count
            self._at_hand = len(messages)
        return messages

    def _is_done(self) -> bool:
        with self._changed:
            return self._deadline is not None and not self._queue and not self._encoder.held

    def _rest(self, seconds: float) -> None:
        """Waits until it is time to try again, or to be over."""
        until = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(self._is_over, max(0.0, until - time.monotonic()))

    def _end(self, pending: list[bytes]) -> None:
        """What was not delivered counts as dropped."""
        back = []
        if self._is_connected:
            with contextlib.suppress(SinkError):
                self._sink.settle(0.0)
            back = self._sink.take_back()
        self._sink.close()
        self._is_connected = False
        with self._changed:
            lost, self._sink.lost = self._sink.lost, 0
            self._given -= len(back) + lost
            undelivered = len(back) + lost + self._queued + self._encoder.held
            if self._at_hand:
                undelivered += len(pending)
            self._dropped += undelivered
            self._queue.clear()
            self._queued = self._queued_bytes = self._at_hand = 0
            if self._refused is None:
                self.state = OutputState.CLOSED
            self._changed.notify_all()
