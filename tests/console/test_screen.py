"""Tests of standard output and error as one screen."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from vmexit.console.screen import OutputGoneError, Screen


class Pipes:
    """A screen into two pipes."""

    def __init__(self) -> None:
        self.out, out = os.pipe()
        self.err, err = os.pipe()
        self.open = {self.out, self.err, out, err}
        self.ends = (out, err)
        self.screen = Screen(out, err)

    def close(self, *fds: int) -> None:
        for fd in fds or tuple(self.open):
            os.close(fd)
            self.open.discard(fd)

    def read(self) -> str:
        return os.read(self.out, 1 << 20).decode()

    def read_errors(self) -> str:
        return os.read(self.err, 1 << 20).decode()


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


def test_lines(pipes: Pipes) -> None:
    pipes.screen.write("one")
    pipes.screen.write("two\nthree\n")
    pipes.screen.error("four")
    assert pipes.read() == "one\ntwo\nthree\n"
    assert pipes.read_errors() == "four\n"


def test_what_the_guest_prints_is_handed_on_as_it_is(pipes: Pipes) -> None:
    pipes.screen.guest("stdout", b"\x1b[2Jlogin: \xff")
    assert os.read(pipes.out, 100) == b"\x1b[2Jlogin: \xff"
    pipes.screen.guest("stderr", b"warning\n")
    assert pipes.read_errors() == "warning\n"


def test_a_line_of_the_guest_that_is_not_whole_is_not_gone_on_with(pipes: Pipes) -> None:
    pipes.screen.guest("stdout", b"login: ")
    pipes.screen.write("event")
    pipes.screen.write("event")
    pipes.screen.guest("stdout", b"root\n")
    pipes.screen.write("event")
    assert pipes.read() == "login: \nevent\nevent\nroot\nevent\n"


def test_an_unfinished_line_on_standard_output_is_not_ended_on_standard_error(pipes: Pipes) -> None:
    pipes.screen.guest("stdout", b"login: ")
    pipes.screen.error("oops")
    assert pipes.read_errors() == "oops\n"
    pipes.screen.write("event")
    assert pipes.read() == "login: \nevent\n"


def test_unless_both_are_the_same() -> None:
    ours, out = os.pipe()
    err = os.dup(out)
    screen = Screen(out, err)
    screen.guest("stdout", b"login: ")
    screen.error("oops")
    screen.write("event")
    assert os.read(ours, 100) == b"login: \noops\nevent\n"
    for fd in (ours, out, err):
        os.close(fd)


def test_a_pipe_is_no_terminal(pipes: Pipes) -> None:
    assert not pipes.screen.is_terminal
    assert not pipes.screen.colour
    pipes.screen.clear()
    pipes.screen.write("x")
    assert pipes.read() == "x\n"


def test_colour_is_for_terminals_and_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Screen(theirs).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(theirs).is_terminal
    assert not Screen(theirs).colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(theirs).colour
    os.close(ours)
    os.close(theirs)


def test_a_reader_that_has_gone(pipes: Pipes) -> None:
    pipes.close(pipes.out)
    with pytest.raises(OutputGoneError) as caught:
        pipes.screen.write("x")
    assert isinstance(caught.value.error, BrokenPipeError)
    pipes.screen.guest("stdout", b"nobody reads this\n")
    with pytest.raises(OutputGoneError):
        pipes.screen.check()
    # Errors can still be told; and that nobody reads those is no reason to stop.
    pipes.screen.error("x")
    assert pipes.read_errors() == "x\n"
    pipes.close(pipes.err)
    pipes.screen.error("x")


def test_a_descriptor_that_does_not_block_and_is_full(pipes: Pipes) -> None:
    os.set_blocking(pipes.ends[0], False)
    text = "0123456789" * 50_000 + "\n"
    received: list[bytes] = []

    def read() -> None:
        while sum(map(len, received)) < len(text):
            received.append(os.read(pipes.out, 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    pipes.screen.write(text)
    reader.join(10)
    assert b"".join(received).decode() == text


def test_texts_of_several_threads_are_not_torn_apart(pipes: Pipes) -> None:
    def write(n: int) -> None:
        for _ in range(20):
            pipes.screen.write(str(n) * 500)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    received = b""
    for thread in threads:
        thread.start()
    while received.count(b"\n") < 60:
        received += os.read(pipes.out, 1 << 16)
    for thread in threads:
        thread.join()
    assert sorted(received.decode().splitlines()) == sorted(str(n) * 500 for n in range(3) for _ in range(20))
