"""What another process writes."""

from __future__ import annotations

import os
import threading

import pytest

from tests.outputs.peers import WAIT_S, wait_until
from vmexit import output
from vmexit.output import OutputReader


class Pipe:
    def __init__(self) -> None:
        read_end, self.fd = os.pipe()
        self.got: list[bytes] = []
        self.came = threading.Event()
        self.reader = OutputReader(os.fdopen(read_end, "rb", 0), self._take)

    def _take(self, data: bytes) -> None:
        self.got.append(data)
        self.came.set()

    def end(self) -> list[bytes]:
        os.close(self.fd)
        self.reader.finish()
        return self.got


def test_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PARTIAL_LINE_S", WAIT_S)
    pipe = Pipe()
    for part in (b"one\ntw", b"o\nthree\n"):
        os.write(pipe.fd, part)
    assert b"".join(pipe.end()) == b"one\ntwo\nthree\n"
    assert all(part.endswith(b"\n") for part in pipe.got)


def test_what_has_no_end_comes_after_a_moment() -> None:
    pipe = Pipe()
    os.write(pipe.fd, b"login: ")
    assert pipe.came.wait(WAIT_S)
    assert pipe.got == [b"login: "]
    assert pipe.end() == [b"login: "]


def test_the_rest_at_the_end() -> None:
    pipe = Pipe()
    os.write(pipe.fd, b"a\nb")
    assert b"".join(pipe.end()) == b"a\nb"


def test_a_line_without_end_is_not_gathered_for_ever() -> None:
    pipe = Pipe()
    threading.Thread(target=lambda: (os.write(pipe.fd, b"x" * 300_000), None), daemon=True).start()
    assert pipe.came.wait(WAIT_S)
    assert len(pipe.got[0]) < 200_000
    wait_until(lambda: sum(map(len, pipe.got)) == 300_000, "all of it")
    pipe.end()


def test_a_reader_that_fails_leaves_nothing_open() -> None:
    read_end, write_end = os.pipe()

    def fail(data: bytes) -> None:
        raise OSError("full")

    reader = OutputReader(os.fdopen(read_end, "rb", 0), fail)
    os.write(write_end, b"line\n")
    reader.finish()
    os.close(write_end)


def test_what_is_in_the_pipe_is_passed_on_when_it_has_settled() -> None:
    pipe = Pipe()
    for i in range(50):
        os.write(pipe.fd, b"%d\n" % i)
        pipe.reader.settle(WAIT_S)
        assert b"".join(pipe.got).endswith(b"%d\n" % i)
    pipe.end()
    pipe.reader.settle(WAIT_S)
