"""Tests of g, pause, sleep, ~, settings, .status, help, .exit and .cls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.fakes import Typist, linux_guest
from vmexit.commands import registry
from vmexit.debugger import Overflow
from vmexit.errors import TargetError
from vmexit.guest.disassembly import Syntax


def test_go_and_pause(typist: Typist) -> None:
    assert typist.types("pause") == "the machine is halted already"
    assert typist.types("G") == ""
    assert "running" in typist.types("status")
    assert typist.types("g") == "the machine runs already"
    typist.types("Pause")
    assert "halted" in typist.types("status")
    assert typist.driver.done == ["go", "pause"]


def test_when_the_machine_has_ended(typist: Typist) -> None:
    typist.types("!msrwrite 10 log")
    typist.types("g")
    typist.link.rings.hits_of = {0: 3}
    typist.target.ended(33)
    typist.debugger.pump()
    for line in ("g", "pause", "r", "u", "db 0", "events sc on", "!msrwrite 10"):
        with pytest.raises(TargetError, match="the machine has ended"):
            typist.types(line)
    assert typist.types("events") == "0    (enabled)   3 hits  !msrwrite 10 log  // 10 TSC"
    assert "state    ended" in typist.types(".status")
    assert typist.types("~ 1") == "current core: 1"


@pytest.mark.parametrize(("line", "seconds"), [("sleep 3e8", "1"), ("SLEEP 0n500", "0.5"), ("sleep 0", "0")])
def test_sleep(typist: Typist, line: str, seconds: str) -> None:
    typist.types(line)
    assert typist.driver.done == [f"sleep {seconds}"]


def test_core(typist: Typist) -> None:
    typist.map(0x101000, b"\x0f\x30")
    typist.put(1, rip=0x101000, cr0=0x80000001, efer=0x500)
    assert typist.types("~") == "current core: 0 (there are 2)"
    assert typist.types("~ 1") == "current core: 1\n00000000`00101000 0F 30                               wrmsr"
    assert typist.types("CORE") == "current core: 1 (there are 2)"
    assert typist.types("core 0") == "current core: 0\n00000000`00000000 (cannot be read)"
    typist.types("g")
    assert typist.types("~ 1") == "current core: 1"


def test_settings(typist: Typist) -> None:
    assert [line.split()[:2] for line in typist.types("settings").split("\n")] == [
        ["code-failures", "10"],
        ["overflow", "wait"],
        ["recognition", "on"],
        ["script-stack", "40000"],
        ["script-steps", "f4240"],
        ["sdk-socket", "off"],
        ["syntax", "intel"],
    ]
    assert typist.types("settings SYNTAX").startswith("syntax        intel  (intel|att|masm) ")
    assert typist.types("settings syntax Att").startswith("syntax        att ")
    assert typist.session.settings.syntax is Syntax.ATT
    assert typist.types("settings overflow drop").startswith("overflow      drop ")
    assert typist.debugger.overflow is Overflow.DROP
    assert typist.link.drop
    assert typist.types("settings code-failures 0n20").split()[1] == "14"
    assert typist.session.debugger.code_failures == 20
    assert typist.types("settings script-steps 0n5000").split()[1] == "1388"
    assert typist.debugger.script_steps == 5000
    typist.types("settings overflow wait")
    assert not typist.link.drop


def test_status(typist: Typist) -> None:
    typist.types("!msrwrite 10")
    typist.types("!msrwrite 11 log")
    typist.types("events d 1")
    typist.link.rings.dropped = 1234
    assert (
        typist.types(".status")
        == typist.types("Status")
        == (
            "machine  FakeMachine 1.0, 2 cores\n"
            "state    halted: before its first instruction; current core 0\n"
            "agent    through tcg, QEMU plugin interface 1; can record, read, modify, skip, post, break, memory, memory write\n"
            "process  none is attached; those that run here are not known\n"
            "events   2, of which 1 enabled\n"
            "records  0; 1,234 dropped, 7 waits for room (overflow wait)"
        )
    )
    typist.types("g")
    assert "state    running" in typist.types(".status")


def test_help_lists_every_command(typist: Typist) -> None:
    lines = typist.types("help").split("\n")
    assert len(lines) == len(list(registry.infos()))
    for info in registry.infos():
        assert any(line.startswith(info.name) and line.endswith(info.summary) for line in lines)


@pytest.mark.parametrize("name", list(registry.names()))
def test_help_explains_every_command(typist: Typist, name: str) -> None:
    shown = typist.types(f"help {name.upper()}")
    command = registry.find(name)
    assert command is not None
    info = command.INFO
    assert shown.startswith(info.usage[0])
    assert all(parameter in shown for parameter, _ in info.parameters)
    assert all(example in shown for example, _ in info.examples)
    assert ("It needs a halted machine." in shown) == info.halted
    assert all(len(line) <= 110 for line in shown.split("\n") if "pid all" not in line and "|" not in line)
    assert "  " not in shown.split("\n\n")[1]


@pytest.mark.parametrize(
    "example", [example for info in registry.infos() for example, _ in info.examples], ids=lambda example: str(example)
)
def test_the_examples_in_the_help_texts_work(
    typist: Typist, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typist.boot(linux_guest())
    typist.types("!msrwrite 1")
    typist.target.is_at_trap = True
    typist.map(0, b"\x90" * 0x1000)
    typist.map(0x100000, b"\x90" * 0x1000, physical=True)
    typist.map(0xFF000, b"\x90" * 0x1000, physical=True)
    typist.types("? .writes = 1;")
    typist.types(f"output create log file {tmp_path}/log")
    monkeypatch.chdir(tmp_path)
    Path("boot.vmx").write_text("!msrwrite $arg1\n")
    typist.types(example)


@pytest.mark.parametrize(
    ("line", "done"), [(".exit", "leave"), ("exit", "leave"), ("QUIT", "leave"), (".cls", "clear"), ("cls", "clear")]
)
def test_leaving_and_clearing(typist: Typist, line: str, done: str) -> None:
    assert typist.types(line) == ""
    assert typist.driver.done == [done]


@pytest.mark.parametrize(
    ("line", "message", "column", "width"),
    [
        ("g 5", "'g' takes no arguments", 2, 1),
        ("pause now please", "'pause' takes no arguments", 6, 10),
        (".exit 1", "'.exit' takes no arguments", 6, 1),
        ("cls all", "'cls' takes no arguments", 4, 3),
        (".status x", "'.status' takes no arguments", 8, 1),
        ("sleep", "'sleep' needs a number of milliseconds", 5, 1),
        ("sleep 10 10", "'sleep' takes 1 argument at most", 9, 2),
        ("sleep long", "'long' is no number of milliseconds", 6, 4),
        ("sleep 100000000", "100000000 is too big: the biggest number of milliseconds", 6, 9),
        ("~ 2", "there is no core 2 (there are 0 to 1)", 2, 1),
        ("~ x", "'x' is no core number", 2, 1),
        ("core 1 2", "'core' takes 1 argument at most", 7, 1),
        ("settings sintax", "'sintax' is no setting: did you mean 'syntax'?", 9, 6),
        (
            "settings what",
            "'what' is no setting (it is code-failures, overflow, recognition, script-stack, script-steps, sdk-socket or syntax)",
            9,
            4,
        ),
        ("settings syntax at&t", "'at&t' is no value of 'syntax': did you mean 'att'?", 16, 4),
        ("settings overflow on", "'on' is no value of 'overflow' (it is wait or drop)", 18, 2),
        ("settings script-steps many", "'many' is no value of 'script-steps' (a number is hexadecimal", 22, 4),
        ("settings sdk-socket {x}", "'sdk-socket' takes PATH or off", 20, 3),
        ("settings syntax att now", "'settings' takes 2 arguments at most", 20, 3),
        ("help msrwrite", "there is no command 'msrwrite': did you mean '!msrwrite'?", 5, 8),
        ("help a b", "'help' takes 1 argument at most", 7, 1),
    ],
)
def test_what_is_wrong(typist: Typist, line: str, message: str, column: int, width: int) -> None:
    first, _, mark = typist.fails(line).split("\n")
    assert first.startswith(message)
    assert mark == " " * column + "^" + "~" * (width - 1)
    assert not typist.driver.done


def test_the_only_core() -> None:
    typist = Typist(vcpus=1)
    assert typist.fails("~ 1").startswith("there is no core 1 (there is only core 0)")
    assert typist.types("~") == "current core: 0 (there are 1)"
    typist.close()


def test_detach(typist: Typist) -> None:
    assert typist.types("detach") == "detached; 'vmexit attach 4711' comes back"
    assert typist.driver.done == ["leave"]
    assert typist.link.closed
