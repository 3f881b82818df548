"""Hostile and garbled messages on the control socket: each is refused, none is acted upon, and the link works on."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Action, MessageType, Status

from .build import unusable
from .host import PATIENCE_S, FakeHost, Variant, collect, column, event, eventually, exchange, greet, reply, request, wrmsr

HEADER = wire.size("message")
EVENT = wire.size("event")
VERSION = wire.VERSION.to_bytes(4, "little")
MOST = HEADER + wire.MAX_EVENTS * EVENT
"""The longest message that the agent takes, in bytes."""


@pytest.fixture(scope="module")
def only_host() -> Iterator[FakeHost]:
    """One for all tests here: each must leave it well. A wrong step in memory is seen, where gcc can do that."""
    host = FakeHost(Variant(1, sanitizer="" if unusable("address") else "address"), vcpus=2, log=1)
    yield host
    host.close()


@pytest.fixture
def host(only_host: FakeHost) -> Iterator[FakeHost]:
    """That host, and nobody is connected to it."""
    only_host.said.clear()
    yield only_host
    only_host.hang_up()
    assert only_host.process.poll() is None, only_host.errors()


@pytest.fixture
def raw(host: FakeHost) -> socket.socket:
    """A connection that has shaken hands and set one event that records."""
    connection = host.raw()
    greet(connection)
    assert exchange(connection, MessageType.EVENTS, event(1), argument=1) == (Status.OK, b"")
    return connection


def check_still_well(host: FakeHost, connection: socket.socket) -> None:
    """The link answers, and the one event is still in force."""
    before = len(host.executed())
    assert exchange(connection, MessageType.OVERFLOW, argument=0)[0] == Status.OK
    host.run(wrmsr(0x10, 1))
    assert len(host.executed()) == before + 1
    connection.close()
    link = host.connect()
    assert link.rings.hits(0) == 0
    link.set_events([event(1)])
    host.run(wrmsr(0x10, 2))
    assert column(collect(link, 1), "value") == [(2,)]


# ---- shaking hands ----


@pytest.mark.parametrize("kind", [0, *range(2, 12), 12, 63, 64, 65, 0xFFFF])
def test_nothing_before_the_greeting(host: FakeHost, kind: int) -> None:
    connection = host.raw()
    assert exchange(connection, kind, event(1) if kind == MessageType.EVENTS else b"", argument=1) == (Status.REFUSED, b"")
    greet(connection)
    check_still_well(host, connection)


@pytest.mark.parametrize("payload", [b"", b"\0" * 3, VERSION + b"\0", VERSION * 2])
def test_malformed_greeting(host: FakeHost, payload: bytes) -> None:
    connection = host.raw()
    assert exchange(connection, MessageType.HELLO, payload) == (Status.REFUSED, b"")
    greet(connection)
    connection.close()


@pytest.mark.parametrize("version", [0, wire.VERSION + 1, 0xFFFFFFFF])
def test_wrong_version(host: FakeHost, version: int) -> None:
    connection = host.raw()
    assert exchange(connection, MessageType.HELLO, version.to_bytes(4, "little")) == (Status.WRONG_VERSION, b"")
    assert exchange(connection, MessageType.OVERFLOW)[0] == Status.REFUSED
    greet(connection)
    check_still_well(host, connection)


def test_second_greeting(host: FakeHost, raw: socket.socket) -> None:
    assert exchange(raw, MessageType.HELLO, VERSION) == (Status.REFUSED, b"")
    check_still_well(host, raw)


def test_a_second_debugger_is_told_busy(host: FakeHost, raw: socket.socket) -> None:
    for _ in range(3):
        second = host.raw()
        assert reply(second) == (Status.BUSY, b"")
        with pytest.raises(EOFError):
            reply(second)
        second.close()
        with pytest.raises(RequestError, match="another debugger is attached") as error:
            host.connect()
        assert error.value.status == Status.BUSY
    check_still_well(host, raw)


def test_a_debugger_that_never_greets(host: FakeHost) -> None:
    host.raw().close()
    silent = host.raw()
    with pytest.raises(RequestError):
        Link(host.path)
    silent.close()
    assert host.connect().plugin_api == 1


def test_another_user(host: FakeHost, raw: socket.socket) -> None:
    """Even where the socket can be reached, for one that is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    raw.close()
    host.path.chmod(0o666)
    host.path.parent.chmod(0o755)
    script = (
        "import os, socket, sys; os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(10); s.connect(sys.argv[1])\n"
        "try: print('got', len(s.recv(100)))\n"
        "except ConnectionResetError: print('got 0')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script, host.path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("got 0\n", "")
    assert host.connect().plugin_api == 1


# ---- malformed datagrams ----


@pytest.mark.parametrize("length", [1, 4, 8, 16, HEADER - 1])
def test_truncated_header(host: FakeHost, raw: socket.socket, length: int) -> None:
    raw.send(wire.pack("message", magic=wire.MAGIC, type=int(MessageType.EVENTS))[:length])
    assert reply(raw) == (Status.REFUSED, b"")
    check_still_well(host, raw)


def test_empty_datagram_ends_the_link(host: FakeHost, raw: socket.socket) -> None:
    """It cannot be told from a connection that was closed."""
    raw.send(b"")
    with pytest.raises(EOFError):
        reply(raw)
    assert host.connect().plugin_api == 1


@pytest.mark.parametrize("magic", [0, 1, wire.MAGIC + 1, wire.MAGIC ^ 0x80000000, 0xFFFFFFFF])
def test_wrong_magic(host: FakeHost, raw: socket.socket, magic: int) -> None:
    request(raw, MessageType.EVENTS, magic=magic)
    assert reply(raw) == (Status.REFUSED, b"")
    check_still_well(host, raw)


@pytest.mark.parametrize("length", [0, EVENT - 1, EVENT + 1, 2 * EVENT, 0x7FFFFFFF, 0xFFFFFFFF, 2**32 - HEADER])
def test_wrong_length(host: FakeHost, raw: socket.socket, length: int) -> None:
    request(raw, MessageType.EVENTS, event(2), length=length, fields=[("argument", 1)])
    assert reply(raw) == (Status.REFUSED, b"")
    check_still_well(host, raw)


@pytest.mark.parametrize("length", [MOST + 1, MOST + EVENT, 200_000])
def test_more_than_there_is_room_for(host: FakeHost, raw: socket.socket, length: int) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    request(raw, MessageType.EVENTS, b"\1" * (length - HEADER), fields=[("argument", (length - HEADER) // EVENT)])
    assert reply(raw) == (Status.REFUSED, b"")
    check_still_well(host, raw)


@pytest.mark.parametrize("kind", [0, 12, 63, 64, 65, 0x101, 0xFFFF])
def test_unknown_type(host: FakeHost, raw: socket.socket, kind: int) -> None:
    request(raw, kind)
    assert reply(raw) == (Status.REFUSED, b"")
    check_still_well(host, raw)


# ---- tables of events ----

WRONG_FIELDS = [
    *[("id", 0), ("id", 1), ("id", wire.MAX_EVENT_ID + 1), ("slot", wire.MAX_EVENTS), ("slot", 0xFFFFFFFF)],
    *[("access", 0), ("access", 4), ("access", 255), ("stages", 0), ("stages", 4), ("stages", 255)],
    *[
        ("actions", 0),
        ("actions", 8),
        ("actions", 16),
        ("actions", 255),
        ("flags", 16),  # to ask first, but it does not ask
        ("flags", 32),
        ("flags", 255),
        ("condition", 1),
        ("condition", 0xFFFFFFFF),
        ("script", 1),
        ("script", 0xFFFFFFFF),
    ],
    *[("range_count", 0), ("range_count", wire.MAX_RANGES + 1), ("range_count", 0xFFFFFFFF)],
    *[("ranges", [(2, 1)]), ("ranges", [(0xFFFFFFFF, 0)])],
    *[("value", 1), ("value", 1 << 63)],
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_every_field_of_an_event(host: FakeHost, raw: socket.socket, field: str, value: object) -> None:
    """Alone, and behind a sound event; the table before stays in force."""
    sound = {
        "id": 2,
        "slot": 1,
        "access": 1,
        "stages": 1,
        "actions": 1,
        "flags": 3,
        "core": wire.ALL_CORES,
        "process": wire.ALL_PROCESSES,
        "range_count": 1,
        "ranges": [(0, 0xFFFFFFFF)],
    }
    wrong = wire.pack("event", **{**sound, field: value})
    if field != "id":
        assert exchange(raw, MessageType.EVENTS, wrong, argument=1) == (Status.REFUSED, b"")
    assert exchange(raw, MessageType.EVENTS, event(1, slot=7) + wrong, argument=2) == (Status.REFUSED, b"")
    host.run(wrmsr(0x10, 1))
    assert len(host.executed()) == 1  # the sound part of it would have skipped the instruction
    assert exchange(raw, MessageType.EVENTS, wire.pack("event", **sound), argument=1)[0] == Status.OK
    host.run(wrmsr(0x10, 1))
    assert len(host.executed()) == 1
    assert exchange(raw, MessageType.EVENTS, event(1), argument=1)[0] == Status.OK
    check_still_well(host, raw)


def test_wrong_count_of_events(host: FakeHost, raw: socket.socket) -> None:
    table = [event(number, slot=0) for number in range(1, wire.MAX_EVENTS + 2)]
    for count, claimed in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 0xFFFFFFFF), (1, 0x10000001)):
        assert exchange(raw, MessageType.EVENTS, b"".join(table[:count]), argument=claimed)[0] == Status.REFUSED
    assert exchange(raw, MessageType.EVENTS, b"".join(table), argument=len(table))[0] == Status.REFUSED
    assert exchange(raw, MessageType.EVENTS, b"".join(table[:-1]), argument=wire.MAX_EVENTS)[0] == Status.OK
    assert exchange(raw, MessageType.EVENTS, event(1), argument=1)[0] == Status.OK
    check_still_well(host, raw)


def test_falling_numbers_of_events(host: FakeHost, raw: socket.socket) -> None:
    assert exchange(raw, MessageType.EVENTS, event(3) + event(2), argument=2)[0] == Status.REFUSED
    assert exchange(raw, MessageType.EVENTS, event(0xFFFFFFFF, slot=1) + event(1), argument=2)[0] == Status.REFUSED
    check_still_well(host, raw)


# ---- the other requests ----

ABOUT_A_VCPU = (
    *[
        MessageType.GET_REGISTERS,
        MessageType.GET_REGISTER,
        MessageType.SET_REGISTER,
        MessageType.TRANSLATE,
        MessageType.READ_VIRTUAL,
        MessageType.READ_PHYSICAL,
    ],
    *[MessageType.WRITE_VIRTUAL, MessageType.WRITE_PHYSICAL, MessageType.DECIDE, MessageType.READ_MSR, MessageType.WRITE_MSR],
)


@pytest.mark.parametrize("vcpu", [2, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_vcpu_that_there_is_not(host: FakeHost, raw: socket.socket, vcpu: int) -> None:
    host.tell("stop")
    host.expect("STOP")
    for kind in ABOUT_A_VCPU:
        payload = b"x" if kind in (MessageType.WRITE_VIRTUAL, MessageType.WRITE_PHYSICAL) else b""
        argument = 1 if kind in (MessageType.READ_VIRTUAL, MessageType.READ_PHYSICAL, MessageType.DECIDE) else 0
        assert exchange(raw, kind, payload, vcpu=vcpu, argument=argument, address=0x1000) == (Status.REFUSED, b""), kind
    host.tell("cont")
    check_still_well(host, raw)


@pytest.mark.parametrize(
    ("kind", "argument", "payload"),
    [
        *[
            (kind, argument, b"")
            for kind in (MessageType.OVERFLOW, MessageType.HOLD, MessageType.DECIDE)
            for argument in (2, 0xFFFFFFFF)
        ],
        *[(kind, 1, b"x") for kind in (MessageType.OVERFLOW, MessageType.HOLD, MessageType.DECIDE, MessageType.SET_REGISTER)],
        *[
            (kind, number, b"")
            for kind in (MessageType.SET_REGISTER, MessageType.GET_REGISTER)
            for number in (wire.constant("SCRIPT_REGISTERS"), 0xFFFFFFFF)
        ],
        *[(MessageType.TRANSLATE, way, b"") for way in (2, 0xFFFFFFFF)],
        *[(kind, 0, b"x") for kind in (MessageType.GET_REGISTER, MessageType.TRANSLATE)],
        *[(kind, 0xC0000080, b"x") for kind in (MessageType.READ_MSR, MessageType.WRITE_MSR)],
        (MessageType.GET_REGISTERS, 0, b"x"),
        *[(kind, size, b"") for kind in (MessageType.READ_VIRTUAL, MessageType.READ_PHYSICAL) for size in (0, 4097, 0xFFFFFFFF)],
        *[(kind, 1, b"x") for kind in (MessageType.READ_VIRTUAL, MessageType.READ_PHYSICAL)],
        *[
            (kind, 0, b"x" * size)
            for kind in (MessageType.WRITE_VIRTUAL, MessageType.WRITE_PHYSICAL)
            for size in (0, 4097, 40000)
        ],
    ],
)
def test_arguments_out_of_range(host: FakeHost, raw: socket.socket, kind: MessageType, argument: int, payload: bytes) -> None:
    host.tell("stop")
    host.expect("STOP")
    assert exchange(raw, kind, payload, argument=argument, address=0x8000) == (Status.REFUSED, b"")
    assert exchange(raw, MessageType.READ_VIRTUAL, argument=4096, address=0x8000) == (Status.OK, b"\0" * 4096)
    host.tell("cont")
    check_still_well(host, raw)


@pytest.mark.parametrize("address", [(1 << 20) - 1, 1 << 40, 2**64 - 1, 2**64 - 4096])
def test_addresses_that_nothing_is_at(host: FakeHost, raw: socket.socket, address: int) -> None:
    host.tell("stop")
    host.expect("STOP")
    for kind in (MessageType.READ_VIRTUAL, MessageType.READ_PHYSICAL):
        assert exchange(raw, kind, argument=4096, address=address) == (Status.UNREADABLE, b"")
    for kind in (MessageType.WRITE_VIRTUAL, MessageType.WRITE_PHYSICAL):
        assert exchange(raw, kind, b"\xff" * 4096, address=address) == (Status.UNREADABLE, b"")
    host.tell("cont")
    check_still_well(host, raw)


# ---- garbage ----

GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.builds(
        lambda kind, vcpu, argument, address, payload, off: (
            wire.pack(
                "message",
                magic=wire.MAGIC,
                type=kind,
                serial=1,
                vcpu=vcpu,
                argument=argument,
                address=address,
                length=max(0, len(payload) + off),
            )
            + payload
        ),
        # HOLD is left out: it is allowed to have an effect.
        st.sampled_from([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 64]),
        st.sampled_from([0, 1, 2, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
        st.sampled_from([0, 1, 2, 4096, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
        st.sampled_from([0, 0x1000, 2**20 - 1, 2**64 - 1]) | st.integers(0, 2**64 - 1),
        st.binary(max_size=64) | st.binary(min_size=EVENT, max_size=EVENT) | st.just(VERSION),
        st.sampled_from([0, 0, 0, 0, 1, -1]),
    ),
)


def one_answer(connection: socket.socket) -> int:
    """The status of the next message that is no notice."""
    while True:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        for fd in fds:
            os.close(fd)
        if not data:
            raise EOFError
        header = wire.unpack("message", data)
        assert header.magic == wire.MAGIC and len(data) == HEADER + header.length
        if header.type != MessageType.VCPU or header.status != Status.OK:
            return int(header.status)


def greets(garbage: list[bytes]) -> bool:
    """Whether there is a sound greeting among it."""
    for datagram in garbage:
        if len(datagram) == HEADER + 4 and datagram[HEADER:] == VERSION:
            header = wire.unpack("message", datagram)
            if (header.magic, header.type, header.length) == (wire.MAGIC, MessageType.HELLO, 4):
                return True
    return False


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(garbage=st.lists(GARBAGE, min_size=1, max_size=8))
def test_garbage(host: FakeHost, garbage: list[bytes]) -> None:
    """Each datagram gets one answer with a status that there is, before and after shaking hands."""
    for greeted in (False, True):
        with host.raw() as connection:
            if greeted:
                greet(connection)
            for datagram in garbage:
                connection.send(datagram)
                assert one_answer(connection) in set(Status) - {Status.BUSY}
            expected = Status.OK if greeted or greets(garbage) else Status.REFUSED
            assert exchange(connection, MessageType.EVENTS)[0] == expected


def test_a_debugger_that_does_not_read(host: FakeHost) -> None:
    """It blocks itself; the machine runs on, and the next debugger is served."""
    with host.raw() as connection:
        greet(connection)
        connection.setblocking(False)
        sent = blocked = 0
        deadline = time.monotonic() + PATIENCE_S
        while blocked < 20:
            assert time.monotonic() < deadline
            try:
                request(connection, MessageType.READ_PHYSICAL, fields=[("argument", 4096), ("address", 0)])
                sent, blocked = sent + 1, 0
            except BlockingIOError:
                blocked += 1
                time.sleep(0.005)
        assert sent > 20
        host.run(wrmsr(0x10, 1))
    host.connect()


def test_descriptors_that_are_sent_along_are_not_kept(host: FakeHost, raw: socket.socket) -> None:
    folder = Path(f"/proc/{host.process.pid}/fd")
    before = len(list(folder.iterdir()))
    for _ in range(10):
        header = wire.pack("message", magic=wire.MAGIC, type=int(MessageType.OVERFLOW), serial=1)
        raw.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
        assert reply(raw)[0] == Status.OK
    # The last ones are closed when the answer is on its way.
    eventually(lambda: len(list(folder.iterdir())) == before)
    check_still_well(host, raw)


def test_many_debuggers_leave_nothing_behind(host: FakeHost) -> None:
    folder = Path(f"/proc/{host.process.pid}/fd")
    host.connect().close()
    before = len(list(folder.iterdir()))
    for _ in range(30):
        link = host.connect()
        link.set_events([event(1)])
        link.close()
    eventually(lambda: len(list(folder.iterdir())) <= before)


# ---- the shared memory's seals ----


def test_the_shared_memory_cannot_be_resized(host: FakeHost) -> None:
    with host.raw() as connection:
        request(connection, MessageType.HELLO, VERSION)
        _, (memory, wake), _, _ = socket.recv_fds(connection, 1 << 12, 2)
        size = os.fstat(memory).st_size
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK and seals & fcntl.F_SEAL_GROW and seals & fcntl.F_SEAL_SEAL
        for other in (0, 4096, size - 1, size + 1, size * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(memory, other)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(memory).st_size == size
        os.close(memory)
        os.close(wake)


# ---- scripts ----

CODE = bytes.fromhex("31c0c3")  # xor eax, eax; ret
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def script_file(data: bytes = CODE.ljust(8192, b"\xcc"), seals: int = SEALS) -> int:
    """A file in memory, the caller's to close."""
    file = os.memfd_create("script", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(file, data)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def add_script(connection: socket.socket, files: list[int], **fields: int) -> int:
    """The agent's answer; the files are closed."""
    described = {"script": 1, "entry": 0, "code_size": len(CODE), "constants_size": 4096, **fields}
    try:
        request(connection, MessageType.ADD_SCRIPT, wire.pack("script_file", **described), files=files)
    finally:
        for file in files:
            os.close(file)
    return reply(connection)[0]


def test_a_script_that_is_sound_is_run(host: FakeHost, raw: socket.socket) -> None:
    assert add_script(raw, [script_file()]) == Status.OK
    assert exchange(raw, MessageType.EVENTS, event(1, actions=Action.SCRIPT, script=1), argument=1)[0] == Status.OK
    host.run(wrmsr(0x10, 1))
    assert len(host.executed()) == 1
    # Nobody names it any more, so it is gone.
    assert exchange(raw, MessageType.EVENTS, event(1), argument=1)[0] == Status.OK
    assert exchange(raw, MessageType.EVENTS, event(1, actions=Action.SCRIPT, script=1), argument=1)[0] == Status.REFUSED
    check_still_well(host, raw)


@pytest.mark.parametrize(
    "fields",
    [
        {"script": 0},
        {"code_size": 0},
        {"entry": len(CODE)},
        {"entry": 0xFFFFFFFF},
        {"code_size": 8193},
        {"code_size": 0xFFFFFFFF},
        {"constants_size": 4097},
        {"constants_size": 0xFFFFFFFF},
        {"buffer_size": 1},
    ],
)
def test_every_field_of_a_script(host: FakeHost, raw: socket.socket, fields: dict[str, int]) -> None:
    assert add_script(raw, [script_file()], **fields) == Status.REFUSED
    check_still_well(host, raw)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, SEALS & ~fcntl.F_SEAL_SHRINK])
def test_a_file_that_somebody_can_still_change(host: FakeHost, raw: socket.socket, seals: int) -> None:
    assert add_script(raw, [script_file(seals=seals)]) == Status.REFUSED
    check_still_well(host, raw)


def test_files_that_are_none(host: FakeHost, raw: socket.socket) -> None:
    assert add_script(raw, []) == Status.REFUSED
    assert add_script(raw, [os.open("/dev/null", os.O_RDONLY)]) == Status.REFUSED
    assert add_script(raw, [os.open("/proc/self/exe", os.O_RDONLY)]) == Status.REFUSED
    assert add_script(raw, list(os.pipe())) == Status.REFUSED
    check_still_well(host, raw)


BUFFER_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def test_a_buffer_that_is_sound_is_taken(host: FakeHost, raw: socket.socket) -> None:
    for count, size in enumerate((1, 4096), 1):
        files = [script_file(), script_file(bytes(4096), BUFFER_SEALS)]
        assert add_script(raw, files, buffer_size=size) == Status.OK
        assert exchange(raw, MessageType.EVENTS, event(1, actions=Action.SCRIPT, script=1), argument=1)[0] == Status.OK
        host.run(wrmsr(0x10, 1))
        assert len(host.executed()) == count
        assert exchange(raw, MessageType.EVENTS, event(1), argument=1)[0] == Status.OK
    check_still_well(host, raw)


@pytest.mark.parametrize(
    ("size", "seals"),
    [
        (0, BUFFER_SEALS),
        (4097, BUFFER_SEALS),
        (0xFFFFFFFF, BUFFER_SEALS),
        (wire.MAX_BUFFER + 1, BUFFER_SEALS),
        (4096, 0),
        (4096, fcntl.F_SEAL_GROW),
        (4096, SEALS),
    ],
)
def test_a_buffer_that_is_none(host: FakeHost, raw: socket.socket, size: int, seals: int) -> None:
    """Too short, too long, or one that somebody could cut off or nobody could write."""
    assert add_script(raw, [script_file(), script_file(bytes(4096), seals)], buffer_size=size) == Status.REFUSED
    check_still_well(host, raw)


def test_a_buffer_that_is_no_file_in_memory(host: FakeHost, raw: socket.socket) -> None:
    for path in ("/dev/zero", "/proc/self/exe"):
        assert add_script(raw, [script_file(), os.open(path, os.O_RDONLY)], buffer_size=1) == Status.REFUSED
    check_still_well(host, raw)


def test_files_that_nobody_asked_for_are_closed(host: FakeHost, raw: socket.socket) -> None:
    descriptors = Path(f"/proc/{host.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for count in (1, 2, 3) * 20:
        files = [script_file() for _ in range(count)]
        request(raw, MessageType.OVERFLOW, files=files)
        assert reply(raw)[0] == Status.OK
        for file in files:
            os.close(file)
    # The last ones are closed when the answer is on its way.
    eventually(lambda: len(list(descriptors.iterdir())) == before)
    check_still_well(host, raw)


def test_the_same_number_twice(host: FakeHost, raw: socket.socket) -> None:
    assert add_script(raw, [script_file()], script=7) == Status.OK
    assert add_script(raw, [script_file()], script=7) == Status.REFUSED
    assert exchange(raw, MessageType.EVENTS, event(1), argument=1)[0] == Status.OK
    assert add_script(raw, [script_file()], script=7) == Status.OK
    check_still_well(host, raw)


@pytest.mark.parametrize(("steps", "stack"), [(0, 262144), (1000, 0), (1000, 32767), (1000, 1 << 20 | 1), (1000, 0xFFFFFFFF)])
def test_limits_of_scripts(host: FakeHost, raw: socket.socket, steps: int, stack: int) -> None:
    assert exchange(raw, MessageType.SCRIPT_LIMITS, argument=stack, address=steps)[0] == Status.REFUSED
    assert exchange(raw, MessageType.SCRIPT_LIMITS, argument=262144, address=1000)[0] == Status.OK
    check_still_well(host, raw)


def test_events_by_somebody_who_does_not_know_what_scripts_did(host: FakeHost, raw: socket.socket) -> None:
    assert exchange(raw, MessageType.EVENTS, event(1), argument=1, address=1)[0] == Status.STALE
    check_still_well(host, raw)
