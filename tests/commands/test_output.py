"""The command ``output``, and the option of that name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands.fakes import Typist
from vmexit.outputs import OutputState


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_none(typist: Typist) -> None:
    assert typist.types("output") == "no outputs; 'output create NAME KIND ADDRESS' makes one"


def test_the_life_of_one(typist: Typist, path: Path) -> None:
    assert typist.types(f"output create one file {path}") == ""
    assert typist.types("output") == f"1  file  not opened  one  sent 0  waiting 0  dropped 0  {path}"
    assert not path.exists()
    assert typist.types("OUTPUT Open one") == ""
    assert typist.types("output") == f"1  file  opened  one  sent 0  waiting 0  dropped 0  {path}"
    assert typist.types("output close one") == "closed; sent 0"
    assert typist.types("output") == f"1  file  closed  one  sent 0  waiting 0  dropped 0  {path}"
    line = "output open one"
    assert typist.fails(line) == (
        f"the output 'one' is closed, and cannot be opened again: create another one\n{line}\n{' ' * 12}^~~"
    )
    assert "the output 'one' is closed already" in typist.fails("output close one")
    assert "choose another name, also for the same address" in typist.fails(f"output create one file {path}")
    typist.types(f"output create two file {path}")
    assert typist.types("output").splitlines()[1].startswith("2  file  not opened  two")


def test_one_that_has_nobody_to_send_to(typist: Typist, tmp_path: Path) -> None:
    typist.types(f"output create u unix {tmp_path}/nobody")
    said = typist.types("output open u")
    assert said == "opened, but nothing can be sent yet: No such file or directory; it is tried again"
    assert typist.types("output").endswith(f"{tmp_path}/nobody  (No such file or directory)")
    typist.types("output close u")


@pytest.mark.parametrize(
    ("line", "message", "marked"),
    [
        ("output creat x file /x", "'creat' is nothing that can be done to outputs: did you mean 'create'?", "creat"),
        ("output close nothing", "there is no output 'nothing' ('output' lists them)", "nothing"),
        ("output create x fil /x", "'fil' is no kind of output: did you mean 'file'?", "fil"),
        ("output create a,b file /x", "'a,b' is no name for an output: no blanks, commas, quotes and braces", "a,b"),
        ("output create x file /nowhere/at/all", "there is no folder /nowhere/at", "/nowhere/at/all"),
        ("output create x file /tmp", "/tmp is a folder", "/tmp"),
        ("output create x file /tmp/a b", "an output of kind 'file' takes PATH (a path with blanks stands in quotes)", "b"),
        ("output create x namedpipe /dev/null", "/dev/null is no named pipe", "/dev/null"),
        ("output create x unix /dev/null", "/dev/null is no socket", "/dev/null"),
        ("output create x tcp here", "'here' is no HOST:PORT (as 192.168.1.10:8080; the port is decimal)", "here"),
        ("output create x tcp 1.2.3.4:99999", "there is no port 99999 (1 to 65535)", "1.2.3.4:99999"),
        ("output create x tcp ::1:80", "'::1:80' is no HOST:PORT (an IPv6 address stands in brackets: [::1]:9000)", "::1:80"),
        ("output create x module /dev/null", "/dev/null is no shared library: not a 64-bit little-endian ELF file", "/dev/null"),
        ("output create x perfetto /nowhere/x", "there is no folder /nowhere", "/nowhere/x"),
    ],
)
def test_what_is_wrong_is_marked(typist: Typist, line: str, message: str, marked: str) -> None:
    said, source, mark = typist.fails(line).split("\n")
    assert said == message
    assert source[mark.index("^") : len(mark)] == marked
    assert not len(typist.debugger.outputs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("output open", "'output open' needs the name of an output"),
        ("output create x", "the kind of the output is missing (it is file, namedpipe, tcp,"),
        ("output create x tcp", "'output create x tcp' needs HOST:PORT"),
        ("output create x nats nats://127.0.0.1:4222", "'output create x nats' needs URL and SUBJECT"),
    ],
)
def test_what_is_missing(typist: Typist, line: str, message: str) -> None:
    said, source, mark = typist.fails(line).split("\n")
    assert said.startswith(message) and source == line and mark == " " * len(line) + "^"


def test_the_address_of_a_socket_is_short(typist: Typist) -> None:
    assert "has 107 bytes at most" in typist.fails(f"output create x unix /tmp/{'a' * 110}")


def test_a_url_is_no_comment(typist: Typist) -> None:
    pytest.importorskip("nats", reason="nats-py is not installed (vmexit[nats])")
    typist.types("output create x nats nats://127.0.0.1:4222 msr.one")
    assert typist.debugger.outputs["x"].address == ("nats://127.0.0.1:4222", "msr.one")
    typist.types('output create y nats "tls://h:1" msr.two')
    assert typist.debugger.outputs["y"].address == ("tls://h:1", "msr.two")
    said, source, mark = typist.fails("output create z nats nats://127.0.0.1:4222 msr.>").split("\n")
    assert "'msr.>' is no subject" in said and source[mark.index("^") : len(mark)] == "msr.>"


def test_no_pipe_there(typist: Typist, tmp_path: Path) -> None:
    said = typist.fails(f"output create x namedpipe {tmp_path}/p")
    assert f"('mkfifo {tmp_path}/p' makes it)" in said
    os.mkfifo(tmp_path / "p")
    assert "its kind is 'namedpipe'" in typist.fails(f"output create x file {tmp_path}/p")
    typist.types(f"output create x namedpipe {tmp_path}/p")


class TestOption:
    """``output { }`` of an event."""

    def test_names(self, typist: Typist, path: Path) -> None:
        typist.types(f"output create one file {path}")
        typist.types(f"output create two jsonl {path}2")
        typist.types("output open one")
        typist.types("output open two")
        said = typist.types("!msrwrite 10 output { one , two } script { print($value); }")
        assert said == "event 0 runs a script at each wrmsr of 10 TSC (stage pre, all cores)"
        (event,) = typist.debugger.events
        assert event.outputs == ("one", "two")
        typist.debugger.close()

    def test_one_that_is_not_opened_is_only_told(self, typist: Typist, path: Path) -> None:
        typist.types(f"output create one file {path}")
        said = typist.types("!msrwrite 10 log output { one }")
        assert said.endswith("\nnot opened yet, so that what goes there is dropped: one ('output open one')")
        assert len(typist.debugger.events) == 1

    @pytest.mark.parametrize(
        ("rest", "message", "marked"),
        [
            ("log output { onw }", "there is no output 'onw': did you mean 'one'?", "onw"),
            ("log output { one, gone }", "the output 'gone' is closed, and cannot be used any more", "gone"),
            ("log output { one,, one }", "a name is missing between the commas", "{ one,, one }"),
            ("log output { a,b,c,d,e,f }", "an event has 5 outputs at most, not 6", "{ a,b,c,d,e,f }"),
            ("log imm no output { one }", "'imm no' does not go together with 'output' (leave 'imm no' out)", "{ one }"),
            ("log output", "'output' needs something in braces behind it (output { ... })", "output"),
            ("log output { }", "the braces of 'output' are empty", "{ }"),
        ],
    )
    def test_what_is_refused(self, typist: Typist, path: Path, rest: str, message: str, marked: str) -> None:
        typist.types(f"output create one file {path}")
        typist.types(f"output create gone file {path}")
        typist.types("output open gone")
        typist.types("output close gone")
        said, source, mark = typist.fails(f"!msrwrite 10 {rest}").split("\n")
        assert said == message
        assert source[mark.index("^") : len(mark)] == marked
        assert not list(typist.debugger.events)


def test_completion(typist: Typist, path: Path) -> None:
    from vmexit.commands.output import ManageOutputs

    typist.types(f"output create one file {path}")
    command = ManageOutputs()
    assert list(command.complete(typist.session, [])) == ["create", "open", "close"]
    assert list(command.complete(typist.session, ["open"])) == ["one"]
    assert "perfetto" in command.complete(typist.session, ["create", "x"])
    typist.types("output open one")
    assert list(command.complete(typist.session, ["open"])) == []
    assert list(command.complete(typist.session, ["close"])) == ["one"]
    typist.types("output close one")
    assert typist.debugger.outputs["one"].state is OutputState.CLOSED
