"""NATS JetStream, with Debian's nats-server, which a test starts, kills and starts again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machines import guest
from tests.outputs.peers import STAR, finish, wait_until
from vmexit import Debugger, VmexitError

pytest.importorskip("nats", reason="nats-py is not installed (vmexit[nats])")

COUNT = 3000
SUBJECT = "msr.host1"


class Server:
    """A nats-server that stores in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("nats-server")
        if program is None:
            pytest.skip("nats-server is not installed (Debian's package nats-server)")
        self._command = [program, "-a", "127.0.0.1", "-sd", str(folder), *options]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self.process = subprocess.Popen([*self._command, "-p", str(self.port)], stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            return False

        wait_until(answers, "nats-server to answer")

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def do(self, work: Any) -> Any:
        """Something that a client does: ``work(jetstream)`` is awaited."""

        async def run() -> Any:
            import nats

            client = await nats.connect(self.url)
            try:
                return await work(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(run())

    def add_stream(self) -> None:
        """A stream that takes every subject of "msr"."""
        self.do(lambda stream: stream.add_stream(name="MSR", subjects=["msr.>"]))

    def stored(self) -> list[dict[str, Any]]:
        """What it has stored, in order."""

        async def read(stream: Any) -> list[dict[str, Any]]:
            count = (await stream.stream_info("MSR")).state.messages
            from nats.js.api import AckPolicy, ConsumerConfig

            config = ConsumerConfig(ack_policy=AckPolicy.NONE)
            consumer = await stream.pull_subscribe("msr.>", stream="MSR", config=config)
            found: list[dict[str, Any]] = []
            while len(found) < count:
                found += [json.loads(message.data) for message in await consumer.fetch(min(500, count - len(found)))]
            return found

        result: list[dict[str, Any]] = self.do(read)
        return result


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One with JetStream."""
    server = Server(tmp_path, "-js")
    yield server
    server.kill()


def forward(debugger: Debugger, server: Server) -> None:
    debugger.outputs.create("fleet", "nats", server.url, SUBJECT)
    debugger.outputs.open("fleet")
    debugger.on_msr_write(STAR, outputs=("fleet",))


def values(count: int) -> list[str]:
    return [f"{0x5A5A5A5A << 32 | number:#x}" for number in range(count, 0, -1)]


def test_each_trap_is_stored(server: Server) -> None:
    server.add_stream()
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, server)
        finish(debugger)
        debugger.close()
        output = debugger.outputs["fleet"]
        assert (output.sent, output.waiting, output.dropped) == (COUNT, 0, 0)
    stored = server.stored()
    assert [each["value"] for each in stored] == values(COUNT)
    assert {each["name"] for each in stored} == {"STAR"} and {each["host"] for each in stored} == {socket.gethostname()}


def test_a_server_that_is_killed_and_comes_again(server: Server) -> None:
    server.add_stream()
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, server)
        output = debugger.outputs["fleet"]
        debugger.run(until=lambda: output.sent > 100, timeout=60)
        wait_until(lambda: output.sent > 100, "some to be stored")
        server.kill()
        wait_until(lambda: output.trouble is not None, "the trouble")
        server.start()
        finish(debugger)
        wait_until(lambda: output.waiting == 0, "everything to be stored")
        debugger.close()
        assert (output.sent, output.dropped) == (COUNT, 0)
    found = [each["value"] for each in server.stored()]
    # What was on its way is sent again, with the same number, by which the server knows it.
    assert list(dict.fromkeys(found)) == values(COUNT)


def test_a_server_that_is_not_there_yet(server: Server) -> None:
    server.add_stream()
    server.kill()
    with guest("loop", COUNT=100) as (debugger, _, _):
        forward(debugger, server)
        assert debugger.outputs["fleet"].trouble == "Connection refused"
        finish(debugger)
        server.start()
        wait_until(lambda: debugger.outputs["fleet"].waiting == 0, "everything to be stored")
        assert debugger.outputs["fleet"].sent == 100


def refusal(server: Server) -> str:
    with guest("loop", COUNT=1) as (debugger, _, _), pytest.raises(VmexitError) as caught:
        forward(debugger, server)
    return str(caught.value)


def test_no_stream_for_the_subject(server: Server) -> None:
    assert "no stream of the server takes the subject 'msr.host1'" in refusal(server)


def test_no_jetstream(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        assert "the server has no JetStream (nats-server -js)" in refusal(server)
    finally:
        server.kill()


def test_a_wrong_password(tmp_path: Path) -> None:
    server = Server(tmp_path, "-js", "--user", "u", "--pass", "p")
    try:
        assert "cannot be opened: Authorization Violation" in refusal(server)
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("url", "subject", "part", "what"),
    [
        ("http://x:4222", "a", 0, "no address of a NATS server"),
        ("nats://:4222", "a", 0, "no address of a NATS server"),
        ("nats://x:port", "a", 0, "no address of a NATS server"),
        ("x:4222", "a.*", 1, "'a.*' is no subject"),
        ("x:4222", "a..b", 1, "'a..b' is no subject"),
        ("x:4222", "a b", 1, "'a b' is no subject"),
    ],
)
def test_addresses_that_make_no_sense(url: str, subject: str, part: int, what: str) -> None:
    from vmexit.outputs import OutputError
    from vmexit.outputs.jetstream import check_address

    with pytest.raises(OutputError, match=re.escape(what)) as caught:
        check_address(url, subject)
    assert caught.value.part == part


def test_a_scheme_need_not_be_there() -> None:
    from vmexit.outputs.jetstream import check_address

    assert check_address("somewhere:4222", "a.b") == "nats://somewhere:4222"
