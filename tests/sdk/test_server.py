"""The socket: who may come, and programs that behave badly. Whatever one of them does, the others are served."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from itertools import takewhile
from pathlib import Path

import pytest

from tests.commands.fakes import Typist
from vmexit.errors import VmexitError
from vmexit.sdk import ALL_EVENTS, Client, DeviceError, GeneralEventDetail, Ioctl, ModifyEvents, ModifyType, Status
from vmexit.sdk.server import Server

PATIENCE_S = 60.0
MODIFY = bytes(ModifyEvents(Tag=ALL_EVENTS, TypeOfAction=ModifyType.DISABLE))
REQUEST = struct.pack("<III", Ioctl.MODIFY_EVENTS, len(MODIFY), 24) + MODIFY
ANSWER = 8 + 24


def raw(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(path))
    connection.settimeout(PATIENCE_S)
    return connection


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or all that come before the end."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def is_well(path: Path) -> bool:
    """Whether another program is served."""
    with Client(path) as client:
        client.modify(ALL_EVENTS, ModifyType.DISABLE)
    return True


def test_only_this_user(path: Path) -> None:
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_another_user(path: Path) -> None:
    """Even where the socket can be reached, for one that is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path.chmod(0o666)
    for folder in takewhile(lambda folder: folder != Path(tempfile.gettempdir()), path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    script = (
        "import os, socket, sys; os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM); s.settimeout(10); s.connect(sys.argv[1])\n"
        "try: print('got', len(s.recv(100)))\n"
        "except ConnectionResetError: print('got 0')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "got 0\n", done.stderr
    assert is_well(path)


def test_a_request_in_pieces(path: Path) -> None:
    with raw(path) as connection:
        for byte in REQUEST + REQUEST[:20]:
            connection.send(bytes([byte]))
        assert len(receive(connection, ANSWER)) == ANSWER
        connection.send(REQUEST[20:])
        assert len(receive(connection, ANSWER)) == ANSWER


def test_many_requests_at_once(path: Path) -> None:
    with raw(path) as connection:
        connection.sendall(REQUEST * 200)
        assert len(receive(connection, 200 * ANSWER)) == 200 * ANSWER


@pytest.mark.parametrize("size", [(1 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_absurd_size(path: Path, size: int) -> None:
    with raw(path) as connection:
        connection.send(struct.pack("<III", Ioctl.REGISTER_EVENT, size, 8))
        assert receive(connection, 100) == struct.pack("<II", Status.INVALID_BUFFER_SIZE, 0)
    assert is_well(path)


def test_the_largest_size(path: Path) -> None:
    with raw(path) as connection:
        connection.sendall(struct.pack("<III", Ioctl.REGISTER_EVENT, 1 << 20, 8) + bytes(1 << 20))
        assert receive(connection, 8) == struct.pack("<II", Status.SUCCESS, 8)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 13, len(REQUEST) - 1, len(REQUEST)])
def test_one_that_goes_away(path: Path, length: int) -> None:
    for _ in range(100):
        connection = raw(path)
        connection.send(REQUEST[:length])
        connection.close()
    assert is_well(path)


def test_one_that_stops_in_the_middle_holds_up_nobody(path: Path) -> None:
    with raw(path) as silent, raw(path) as half:
        half.send(REQUEST[:30])
        assert is_well(path)
        half.send(REQUEST[30:])
        assert len(receive(half, ANSWER)) == ANSWER
        silent.send(REQUEST)
        assert len(receive(silent, ANSWER)) == ANSWER


def test_one_that_does_not_read_its_answers(path: Path) -> None:
    """It is not read from any more once they pile up, and everybody else is served."""
    with raw(path) as deaf:
        deaf.setblocking(False)
        sent, refusals = 0, 0
        deadline = time.monotonic() + PATIENCE_S
        while refusals < 20:  # with somebody else's request in between each time
            assert time.monotonic() < deadline, "it was read from all the time"
            try:
                sent += deaf.send(REQUEST * 100)
                refusals = 0
            except BlockingIOError:
                refusals += 1
                assert is_well(path)
        deaf.settimeout(PATIENCE_S)
        answers = sent // len(REQUEST)
        assert len(receive(deaf, answers * ANSWER)) == answers * ANSWER


def test_too_many_programs(path: Path) -> None:
    there = [raw(path) for _ in range(64)]
    try:
        with raw(path) as one_more:
            assert receive(one_more, 100) == struct.pack("<II", Status.INSUFFICIENT_RESOURCES, 0)
        there[0].send(REQUEST)
        assert len(receive(there[0], ANSWER)) == ANSWER
    finally:
        for connection in there:
            connection.close()
    deadline = time.monotonic() + PATIENCE_S
    while True:  # until it has seen that they are gone
        try:
            assert is_well(path)
            break
        except DeviceError:
            assert time.monotonic() < deadline


def test_programs_at_the_same_time(typist: Typist, path: Path) -> None:
    errors: list[BaseException] = []

    def register(first: int) -> None:
        try:
            with Client(path) as client:
                for tag in range(first, first + 20):
                    client.trap(GeneralEventDetail.of(tag, tag))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=register, args=(1000 * number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(typist.link.events) == 160
    assert all(event.enabled for event in typist.debugger.events)


def test_noise(typist: Typist, path: Path) -> None:
    """Random bytes behind a sound header are answered, each time."""
    chance = random.Random(7)
    codes = list(Ioctl)
    statuses = []
    with raw(path) as connection:
        for _ in range(2000):
            data = chance.randbytes(chance.choice([0, 8, 24, 32, 33, 168, 200, 1000]))
            room = chance.choice([0, 8, 24, 4096])
            connection.sendall(struct.pack("<III", chance.choice(codes), len(data), room) + data)
            status, size = struct.unpack("<II", receive(connection, 8))
            assert len(receive(connection, size)) == size <= room
            statuses.append(status)
    assert set(statuses) <= set(Status)
    assert Status.INVALID_PARAMETER in statuses
    assert Status.SUCCESS in statuses
    assert is_well(path)


# ---- where it listens ----


def test_closed_with_the_session(typist: Typist, path: Path) -> None:
    connection = raw(path)
    typist.debugger.close()
    assert receive(connection, 1) == b""
    connection.close()
    assert not path.exists()


def test_switched_off_and_elsewhere(typist: Typist, path: Path, tmp_path: Path) -> None:
    with Client(path) as client:
        client.register_event(GeneralEventDetail.of(5, 0x10))
    other = tmp_path / "other"
    assert typist.types(f"settings sdk-socket {other}").split()[1] == str(other)
    assert not path.exists()
    with Client(other) as client:
        assert not client.is_enabled(5)
    assert typist.types("settings sdk-socket OFF").split()[1] == "off"
    assert not other.exists()
    typist.types("settings sdk-socket off")
    with pytest.raises(DeviceError, match="there is no debugger at"):
        Client(path)


def test_the_same_place_again(typist: Typist, path: Path) -> None:
    typist.types(f"settings sdk-socket {path}")
    assert is_well(path)


def test_a_path_in_quotes(typist: Typist, tmp_path: Path) -> None:
    typist.types(f'settings sdk-socket "{tmp_path / "a b"}"')
    assert is_well(tmp_path / "a b")


def test_a_socket_that_nobody_listens_at_any_more(tmp_path: Path) -> None:
    path = tmp_path / "old"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
    server = Server(path, lambda code, data, room: (0, b"x"))
    with Client(path) as client:
        assert client.ioctl(1, b"", 1) == b"x"
    server.close()
    server.close()


def test_places_where_it_cannot_listen(typist: Typist, path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    for name, message in {
        "file": "there is something else of that name",
        "folder": "there is something else of that name",
        "link": "there is something else of that name",
        "no/where": "cannot listen at .*: No such file or directory",
        "x" * 200: "the name of a socket has 107 bytes at most",
    }.items():
        with pytest.raises(VmexitError, match=message):
            typist.types(f"settings sdk-socket {tmp_path / name}")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(VmexitError, match="somebody does so already"):
        Server(path, lambda code, data, room: (0, b""))
    assert is_well(path)


def test_a_debugger_that_hangs_up(tmp_path: Path) -> None:
    path = tmp_path / "sdk"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        client = Client(path, timeout=0.05)
        with pytest.raises(DeviceError, match="does not answer"):
            client.ioctl(1, b"", 1)
        listening.accept()[0].close()
        with pytest.raises(DeviceError):
            client.ioctl(1, b"", 1)
        client.close()
