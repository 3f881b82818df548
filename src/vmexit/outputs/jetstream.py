"""NATS JetStream: each message is stored by the server, which says so; until then it is sent again after every break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from vmexit.outputs.sink import STEP_S, OutputError, Sink, SinkError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext

_CONNECT_S = 3
_ANSWER_S = 3.0
_STORED_S = 10.0
"""A server that has not stored the oldest message after so long is connected to anew."""
_WINDOW = 512
"""Messages that are on their way at once."""
_ID = "Nats-Msg-Id"
"""The header by which the server knows a message that it was sent twice."""
_WORD = re.compile(r"[^\s.*>]+")
_Result = TypeVar("_Result")


def check_address(url: str, subject: str) -> str:
    """The server's URL in full. Raises OutputError for one that makes no sense, and where the client library is missing."""
    whole = url if "://" in url else f"nats://{url}"
    try:
        parts = urlsplit(whole)
        sound = parts.scheme in ("nats", "tls", "ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise OutputError(f"'{url}' is no address of a NATS server", 0, "nats://HOST:4222, or HOST:PORT")
    if not all(_WORD.fullmatch(word) for word in subject.split(".")):
        raise OutputError(f"'{subject}' is no subject", 1, "words with dots between them, without * and >")
    try:
        import nats  # noqa: F401
    except ImportError:
        raise OutputError("the NATS client is not installed", None, "pip install 'vmexit[nats]'") from None
    return whole


async def _ignore(*_: object) -> None:
    """What the client tells by the way also comes out of what it is asked next."""


class JetStreamSink(Sink):
    """A subject that a stream of the server stores. It connects anew by itself only: what is in doubt is its own to know."""

    def __init__(self, url: str, subject: str) -> None:
        super().__init__()
        self._url = url
        self._subject = subject
        self._run_id = uuid.uuid4().hex
        self._number = 0
        """Of the next message; a message that is sent again has the number that it had."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Client | None = None
        self._stream: JetStreamContext | None = None
        self._sent: deque[tuple[bytes, asyncio.Future[Any], float]] = deque()
        """What is on its way: the message, the server's word for it, and when it was sent."""
        self._unsent: deque[bytes] = deque()

    def _do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Raises SinkError for whatever goes wrong."""
        assert self._loop is not None
        import nats.errors

        try:
            return self._loop.run_until_complete(work)
        except (nats.errors.Error, OSError, EOFError) as error:
            raise SinkError(_text(error)) from None

    def connect(self) -> None:
        self.close()
        self._loop = asyncio.new_event_loop()
        try:
            self._do(self._connect())
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        import nats.errors
        import nats.js.errors
        from nats.aio.client import Client

        client = self._client = Client()
        reasons: list[Exception] = []

        async def note(error: Exception) -> None:
            reasons.append(error)

        try:
            await client.connect(
                [self._url],
                name="vmexit",
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=_CONNECT_S,
                error_cb=note,
                disconnected_cb=_ignore,
                closed_cb=_ignore,
            )
        except nats.errors.NoServersError:
            raise SinkError(_text(reasons[-1]) if reasons else "no server is there") from None
        except nats.errors.Error as error:
            is_refused = "authorization" in str(error).lower()
            raise SinkError(_text(error), for_good=is_refused) from None
        self._stream = client.jetstream(timeout=_ANSWER_S)
        try:
            await self._stream.find_stream_name_by_subject(self._subject)
        except nats.js.errors.NotFoundError:
            why = f"no stream of the server takes the subject '{self._subject}': 'nats stream add' makes one"
            raise SinkError(why, for_good=True) from None
        except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError):
            raise SinkError("the server has no JetStream (nats-server -js)", for_good=True) from None

    def send(self, messages: Sequence[bytes]) -> None:
        self._unsent.extend(messages)
        self._do(self._send())

    async def _send(self) -> None:
        assert self._stream is not None
        while self._unsent:
            while len(self._sent) >= _WINDOW:
                await self._wait()
            message = self._unsent[0]
            headers = {_ID: f"{self._run_id}-{self._number}"}
            future = await self._stream.publish_async(self._subject, message, headers=headers)
            self._unsent.popleft()
            self._number += 1
            self._sent.append((message, future, time.monotonic()))
            if len(self._sent) % 64 == 0:
                await asyncio.sleep(0)
                self._forget_stored()
        self._forget_stored()

    async def _wait(self) -> None:
        """Waits a moment for the server's word for the oldest message. Raises SinkError where it does not come."""
        _, future, when = self._sent[0]
        await asyncio.wait([future], timeout=STEP_S)
        self._forget_stored()
        if self._client is None or not self._client.is_connected:
            raise SinkError("the connection is broken")
        if self._sent and self._sent[0][1] is future and (self.is_over() or time.monotonic() - when > _STORED_S):
            raise SinkError("the server does not store what it gets")

    def _forget_stored(self) -> None:
        while self._sent and self._sent[0][1].done():
            if (error := self._sent[0][1].exception()) is not None:
                raise SinkError(_text(error))
            self._sent.popleft()
            self.moved()

    def idle(self) -> None:
        self._do(self._settle(time.monotonic() + STEP_S))

    def settle(self, deadline: float) -> None:
        self._do(self._settle(deadline))

    async def _settle(self, deadline: float) -> None:
        await asyncio.sleep(0.001)  # answers the server's pings
        while self._sent and time.monotonic() < deadline:
            await self._wait()
        if self._client is None or not self._client.is_connected:
            raise SinkError("the connection is broken")

    def in_doubt(self) -> int:
        return len(self._sent) + len(self._unsent)

    def take_back(self) -> list[bytes]:
        found = [message for message, _, _ in self._sent]
        self._number -= len(found)
        found += self._unsent
        for _, future, _ in self._sent:
            if future.done():
                future.exception()
        self._sent.clear()
        self._unsent.clear()
        return found

    def close(self) -> None:
        loop, client = self._loop, self._client
        self._loop = self._client = self._stream = None
        if loop is None:
            return
        try:
            loop.run_until_complete(_leave(client))
        finally:
            loop.close()


async def _leave(client: Client | None) -> None:
    """Closes the connection, and ends all that the client has begun."""
    if client is not None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.close(), 1)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _text(error: BaseException) -> str:
    """What is wrong in a few words."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    description = getattr(error, "description", None) or str(error).removeprefix("nats: ") or type(error).__name__
    return " ".join(str(description).split()).strip("'")
