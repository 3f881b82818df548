"""The client of the control socket, against an agent that is played by a thread and does as the test wants."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.link.layout import header
from vmexit.errors import LinkError
from vmexit.link import client, wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Capability, MessageType, Status

HEADER = wire.size("message")
PAGE = 4096


class Played:
    """An agent. ``script`` is called in its thread with each request (header and payload) and answers or not."""

    def __init__(self, path: Path) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(str(path))
        self.listening.listen()
        self.requests: list[tuple[int, int, int, int, bytes]] = []
        self.connection: socket.socket | None = None
        self.greeting = b""
        self.memory_size = 0
        self.script: Callable[[Played, int, bytes], None] = Played.greet_and_agree
        self.failures: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.connection, _ = self.listening.accept()
        except OSError:
            return
        with contextlib.suppress(ConnectionResetError), self.connection:
            while data := self.connection.recv(1 << 16):
                header = wire.unpack("message", data)
                assert header.magic == wire.MAGIC and header.length == len(data) - HEADER
                self.requests.append((header.type, header.vcpu, header.argument, header.address, data[HEADER:]))
                try:
                    self.script(self, header.serial, data[HEADER:])
                except BrokenPipeError:
                    return
                except BaseException as error:
                    self.failures.append(error)
                    return

    def send(self, payload: bytes = b"", fds: list[int] | None = None, **fields: int) -> None:
        """One message; its type is that of the last request and its length tells the truth unless they are given."""
        assert self.connection is not None
        header = {"magic": wire.MAGIC, "type": self.requests[-1][0], "length": len(payload), **fields}
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.connection.sendmsg([wire.pack("message", **header) + payload], rights)

    def greet(self, serial: int, **hello: object) -> None:
        """Answers a greeting as the agent does."""
        vcpus = 2
        shared = header(vcpus, 16)
        memory = os.memfd_create("played")
        wake = os.eventfd(0)
        os.truncate(memory, shared["size"])
        os.pwrite(memory, wire.pack("shared", **shared), 0)
        fields = {"version": wire.VERSION, "capabilities": 255, "vcpus": vcpus, "plugin_api": 3, "door": b"tcg", **hello}
        try:
            self.send(wire.pack("hello", **fields), [memory, wake], serial=serial)
        finally:
            os.close(memory)
            os.close(wake)

    def greet_and_agree(self, serial: int, payload: bytes) -> None:
        """The script of a friendly agent."""
        kind, _, argument, address, _ = self.requests[-1]
        if kind == MessageType.HELLO:
            self.greet(serial)
        elif kind in (MessageType.READ_VIRTUAL, MessageType.READ_PHYSICAL):
            self.send(b"r" * argument, serial=serial)
        elif kind == MessageType.GET_REGISTERS:
            self.send(b"".join(number.to_bytes(8, "little") for number in range(wire.REGISTERS)), serial=serial)
        elif kind == MessageType.GET_REGISTER:
            self.send(argument.to_bytes(8, "little"), serial=serial)
        elif kind == MessageType.TRANSLATE:
            self.send((address + 1).to_bytes(8, "little"), serial=serial)
        else:
            self.send(serial=serial)

    def vcpu_up(self, vcpu: int = 0) -> None:
        """The notice that a vCPU has come up."""
        fd = os.eventfd(0)
        self.send(fds=[fd], type=MessageType.VCPU, vcpu=vcpu)
        os.close(fd)

    def close(self) -> None:
        """Ends the thread; an assertion that failed in it is raised here."""
        self.listening.close()
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the agent listens."""
    return tmp_path / "agent"


@pytest.fixture
def agent(path: Path) -> Iterator[Played]:
    """A friendly agent until the test gives it another script."""
    played = Played(path)
    yield played
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nobody:
        nobody.connect(str(path))  # so that it does not wait for its first connection
    played.close()


@pytest.fixture
def link(agent: Played, path: Path) -> Iterator[Link]:
    """A link to the friendly agent; and no descriptor may be left when it is closed."""
    link = Link(path)
    yield link
    link.close()


def descriptors() -> set[int]:
    """Those that this process has open; and the one that they are listed with."""
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Whatever a test does, what was received is closed."""
    before = len(descriptors())
    yield
    assert len(descriptors()) <= before


# ---- greeting ----


def test_greeting(agent: Played, path: Path) -> None:
    before = descriptors()
    with Link(path).closing() as link:
        assert agent.requests == [(MessageType.HELLO, 0, 0, 0, wire.VERSION.to_bytes(4, "little"))]
        assert (link.capabilities, link.plugin_api, link.door) == (Capability(255), 3, "tcg")
        assert link.rings.vcpus == 2
        for fd in descriptors() - before:
            with contextlib.suppress(OSError):
                assert not os.get_inheritable(fd)


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(LinkError, match="cannot reach the agent: No such file"):
        Link(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
        bound.bind(str(path))
        with pytest.raises(LinkError, match="cannot reach the agent: Connection refused"):
            Link(path)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (Status.BUSY, "another debugger is attached to this machine"),
        (Status.WRONG_VERSION, "another version of vmexit"),
        (Status.REFUSED, "refused"),
        (77, r"a status \(77\) that this version of vmexit does not know"),
    ],
)
def test_greeting_is_refused(agent: Played, path: Path, status: int, message: str) -> None:
    agent.script = lambda played, serial, _: played.send(serial=serial, status=status)
    with pytest.raises(LinkError, match=message) as error:
        Link(path)
    if status in list(Status):
        assert isinstance(error.value, RequestError) and error.value.status == status


@pytest.mark.parametrize("reads", [False, True])
def test_busy_is_told_however_the_agent_hangs_up(path: Path, reads: bool) -> None:
    """Before the greeting was sent, or with the greeting unread."""
    told = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                if reads:
                    select.select([connection], [], [])
                connection.send(wire.pack("message", magic=wire.MAGIC, type=MessageType.HELLO, status=Status.BUSY))
            told.set()

        thread = threading.Thread(target=refuse)
        thread.start()
        original = Link._send

        def send_late(self: Link, *arguments: object) -> None:
            if not reads:
                told.wait()
            original(self, *arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "_send", send_late)
            with pytest.raises(RequestError, match="another debugger is attached"):
                Link(path)
        thread.join()


@pytest.mark.parametrize("fds", [0, 1, 3])
def test_greeting_with_the_wrong_descriptors(agent: Played, path: Path, fds: int) -> None:
    def greet(played: Played, serial: int, _: bytes) -> None:
        made = [os.eventfd(0) for _ in range(fds)]
        played.send(wire.pack("hello", version=wire.VERSION), made, serial=serial)
        for fd in made:
            os.close(fd)

    agent.script = greet
    with pytest.raises(LinkError, match=r"greeting is not|cannot be mapped"):
        Link(path)


def test_greeting_of_the_wrong_size(agent: Played, path: Path) -> None:
    def greet(played: Played, serial: int, _: bytes) -> None:
        fd = os.eventfd(0)
        played.send(b"x" * 8, [fd, fd], serial=serial)
        os.close(fd)

    agent.script = greet
    with pytest.raises(LinkError, match="greeting is not what this version"):
        Link(path)


@pytest.mark.parametrize("size", [PAGE, 4 * PAGE])
def test_greeting_with_something_else_for_memory(agent: Played, path: Path, size: int) -> None:
    def greet(played: Played, serial: int, _: bytes) -> None:
        memory, wake = os.memfd_create("other"), os.eventfd(0)
        os.truncate(memory, size)
        played.send(wire.pack("hello", version=wire.VERSION), [memory, wake], serial=serial)
        os.close(memory)
        os.close(wake)

    agent.script = greet
    with pytest.raises(LinkError, match="shared memory is not what this version"):
        Link(path)


# ---- messages that make no sense ----


def garbled(**fields: int) -> Callable[[Played, int, bytes], None]:
    """A script that greets and answers everything else with a header that is wrong there."""

    def script(played: Played, serial: int, payload: bytes) -> None:
        if played.requests[-1][0] == MessageType.HELLO:
            played.greet(serial)
        else:
            played.send(b"", None, **{"serial": serial, **fields})

    return script


@pytest.mark.parametrize("fields", [{"magic": 1}, {"length": 1}, {"length": 0xFFFFFFFF}])
def test_garbled_answer(agent: Played, link: Link, fields: dict[str, int]) -> None:
    agent.script = garbled(**fields)
    with pytest.raises(LinkError, match="does not understand"):
        link.hold(True)


def test_truncated_answer(agent: Played, link: Link) -> None:
    def script(played: Played, *_: object) -> None:
        assert played.connection is not None
        played.connection.send(b"short")

    agent.script = script
    with pytest.raises(LinkError):
        link.hold(True)


def test_answers_that_are_not_meant_are_passed_over(agent: Played, link: Link) -> None:
    """Late ones, of another kind, and notices in between."""

    def script(played: Played, serial: int, payload: bytes) -> None:
        played.send(serial=serial - 1, status=Status.REFUSED)
        played.send(serial=serial, type=MessageType.DECIDE, status=Status.REFUSED)
        played.send(serial=0, type=0, status=Status.REFUSED)
        played.vcpu_up(0)
        played.vcpu_up(1)
        played.vcpu_up(2)  # there is no such vCPU: its descriptor is closed
        played.send(serial=serial)

    agent.script = script
    link.hold(True)
    assert link.rings.vcpus_up == 2


@pytest.mark.parametrize("status", [Status.REFUSED, Status.RUNNING, Status.UNREADABLE, Status.UNAVAILABLE, 99])
def test_refusals(agent: Played, link: Link, status: int) -> None:
    agent.script = garbled(status=status)
    with pytest.raises(LinkError) as error:
        link.registers(0)
    if status in list(Status):
        assert isinstance(error.value, RequestError) and error.value.status == status
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    agent.script = Played.greet_and_agree
    link.hold(False)


def test_an_agent_that_does_not_answer(agent: Played, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.05)
    link._socket.settimeout(0.05)
    agent.script = lambda *_: None
    before = time.monotonic()
    with pytest.raises(LinkError, match=r"did not answer within 0\.05 s"):
        link.hold(True)
    assert time.monotonic() - before < 5
    monkeypatch.setattr(client, "_ANSWER_S", 60.0)
    link._socket.settimeout(60)
    agent.script = Played.greet_and_agree
    link.hold(True)


def test_the_agent_hangs_up(agent: Played, link: Link) -> None:
    def script(played: Played, *_: object) -> None:
        assert played.connection is not None
        played.connection.shutdown(socket.SHUT_RDWR)

    agent.script = script
    with pytest.raises(LinkError, match=r"gone|broken"):
        link.hold(True)
    with pytest.raises(LinkError, match=r"gone|broken"):
        link.hold(True)
    with pytest.raises(LinkError, match=r"gone|broken"):
        link.handle_notices()


# ---- requests ----


def test_requests_on_the_wire(agent: Played, link: Link) -> None:
    link.set_events([b"a" * wire.size("event"), b"b" * wire.size("event")])
    link.set_events([])
    link.set_overflow(True)
    link.hold(False)
    link.decide(3, True)
    link.set_register(1, 17, 2**64 - 1)
    assert link.registers(1) == list(range(wire.REGISTERS))
    assert link.register(1, 42) == 42
    assert link.translate(2, 0x1000) == 0x1001 and link.translate(2, 0x1000, to_virtual=True) == 0x1001
    both = b"a" * wire.size("event") + b"b" * wire.size("event")
    assert agent.requests[1:] == [
        (MessageType.EVENTS, 0, 2, 0, both),
        (MessageType.EVENTS, 0, 0, 0, b""),
        (MessageType.OVERFLOW, 0, 1, 0, b""),
        (MessageType.HOLD, 0, 0, 0, b""),
        (MessageType.DECIDE, 3, 1, 0, b""),
        (MessageType.SET_REGISTER, 1, 17, 2**64 - 1, b""),
        (MessageType.GET_REGISTERS, 1, 0, 0, b""),
        (MessageType.GET_REGISTER, 1, 42, 0, b""),
        (MessageType.TRANSLATE, 2, 0, 0x1000, b""),
        (MessageType.TRANSLATE, 2, 1, 0x1000, b""),
    ]


@pytest.mark.parametrize("physical", [False, True])
@pytest.mark.parametrize(
    ("address", "length", "pieces"),
    [
        (0x1000, 0, []),
        (0x1000, 1, [(0x1000, 1)]),
        (0x1FFF, 2, [(0x1FFF, 1), (0x2000, 1)]),
        (0x1000, 3 * PAGE, [(0x1000, PAGE), (0x2000, PAGE), (0x3000, PAGE)]),
        (0x1800, PAGE, [(0x1800, 0x800), (0x2000, 0x800)]),
        (2**64 - 1, 3, [(2**64 - 1, 1), (0, 2)]),
    ],
)
def test_memory_in_pieces(
    agent: Played, link: Link, physical: bool, address: int, length: int, pieces: list[tuple[int, int]]
) -> None:
    read = MessageType.READ_PHYSICAL if physical else MessageType.READ_VIRTUAL
    write = MessageType.WRITE_PHYSICAL if physical else MessageType.WRITE_VIRTUAL
    data = bytes(number % 251 for number in range(length))
    assert link.read_memory(1, address, length, physical=physical) == b"r" * length
    link.write_memory(1, address, data, physical=physical)
    expected = [(read, 1, size, start, b"") for start, size in pieces]
    done = 0
    for start, size in pieces:
        expected.append((write, 1, 0, start, data[done : done + size]))
        done += size
    assert agent.requests[1:] == expected


@pytest.mark.parametrize("missing", [0, 1, 6, 19])
def test_memory_that_ends_in_the_midst(agent: Played, link: Link, missing: int) -> None:
    """Pages are asked for ahead; the answers of those behind the one that is missing are nobody else's."""

    def script(agent: Played, serial: int, payload: bytes) -> None:
        kind, _, argument, address, _ = agent.requests[-1]
        if kind != MessageType.READ_PHYSICAL:
            agent.greet_and_agree(serial, payload)
        elif address == missing * PAGE:
            agent.vcpu_up(1)
            agent.send(status=Status.UNREADABLE, serial=serial)
        else:
            agent.send(bytes([address // PAGE]) * argument, serial=serial)

    agent.script = script
    with pytest.raises(RequestError) as caught:
        link.read_memory(0, 0, 20 * PAGE, physical=True)
    assert caught.value.status == Status.UNREADABLE and link.rings.vcpus_up == 1
    assert len(agent.requests) <= missing + 1 + 8
    assert link.read_memory(0, 30 * PAGE, 20 * PAGE, physical=True) == b"".join(bytes([page]) * PAGE for page in range(30, 50))
    assert link.register(0, 5) == 5


# ---- notices and the end ----


def test_notices(agent: Played, link: Link) -> None:
    link.handle_notices()
    agent.vcpu_up(1)
    assert select.select([link.fileno()], [], [], 5)[0]
    link.handle_notices()
    assert link.rings.vcpus_up == 1
    link.handle_notices()


def test_closing(agent: Played, path: Path) -> None:
    link = Link(path)
    with link.closing() as same:
        assert same is link and not link.closed
    assert link.closed
    link.close()
    with pytest.raises(LinkError, match="the link is closed"):
        link.handle_notices()
    with pytest.raises(LinkError, match="the link is closed"):
        link.hold(True)


def test_closing_after_an_error(agent: Played, path: Path) -> None:
    link = Link(path)
    with pytest.raises(ZeroDivisionError), link.closing():
        raise ZeroDivisionError
    assert link.closed
