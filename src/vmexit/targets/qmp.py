"""QEMU's monitor protocol, spoken by the qemu.qmp library in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from vmexit.errors import LinkError, TargetError

_T = TypeVar("_T")
_ANSWER_S = 20.0


class Qmp:
    """A QMP session over a connected socket. Events are to be fetched; ``fileno()`` is readable when there are some."""

    def __init__(self, connected: socket.socket) -> None:
        """Shakes hands. Raises LinkError when QEMU does not answer or closes the connection."""
        # The library reports every lost connection to its logger; that QEMU has ended is told elsewhere.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._events: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._client = QMPClient("vmexit")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vmexit-qmp", daemon=True)
        self._thread.start()
        self.closed = False
        try:
            self._run(self._start(connected))
        except BaseException:
            self.close()
            raise

    async def _start(self, connected: socket.socket) -> None:
        listener = EventListener()
        self._client.register_listener(listener)
        await self._client.connect(connected)
        self._listening = asyncio.create_task(self._listen(listener))

    async def _listen(self, listener: EventListener) -> None:
        async for event in listener:
            self._events.put(event)
            os.eventfd_write(self._wake, 1)

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(_ANSWER_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise LinkError(f"QEMU's monitor did not answer within {_ANSWER_S:g} s") from None
        except ExecuteError as error:
            raise TargetError(f"QEMU: {error}") from None
        except (QMPError, EOFError, OSError) as error:
            raise LinkError(f"QEMU's monitor: {error}") from None

    def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Runs a command and gives what it returns.

        Raises TargetError with QEMU's own message where QEMU refuses, LinkError where it does not answer or is gone.
        """
        return self._run(self._client.execute(command, arguments))

    def begin(self, command: str) -> concurrent.futures.Future[object]:
        """Runs a command without waiting for it."""
        return asyncio.run_coroutine_threadsafe(self._client.execute(command), self._loop)

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._wake

    def events(self) -> list[Message]:
        """The events since the last call, oldest first."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    async def _stop(self) -> None:
        if hasattr(self, "_listening"):
            self._listening.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), 2)

    def close(self) -> None:
        """Ends the session and its thread. Does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(LinkError):
            self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()
        os.close(self._wake)
