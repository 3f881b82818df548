"""Tests of the prompt: units, and whole sessions at a terminal with a real QEMU."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from tests.console.vmexits import TIME_S, terminal, wait_until_gone
from tests.machines import guest_arguments
from vmexit.console.prompt import harmless, history

PROMPT = r"0: vmexit> *$"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("one\r\ntwo\n", "one\ntwo\n"),
        ("10%\r20%\r\n", "10%\n20%\n"),
        ("\x1b[2J\x1b[1;1Hhello\x1b[K\x1bc\a", "hello"),
        ("\x1b]0;title\x07x\x1b]2;y\x1b\\z", "xz"),
        ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m\x1b[0m"),
        ("\x1b(Ba\x1b[?25lb\x1b", "ab"),
        ("tab\tkept, \x00\x08\x9b not", "tab\tkept,  not"),
        ("é\ufffd", "é\ufffd"),
    ],
)
def test_what_a_guest_prints_cannot_hurt_the_prompt(written: str, shown: str) -> None:
    assert harmless(written) == shown


def test_the_history_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history().store_string("events")
    path = tmp_path / "state" / "vmexit" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(history().load_history_strings()) == ["events"]


def test_a_history_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmexit").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(history(), InMemoryHistory)
    (tmp_path / "vmexit").unlink()
    kept = history()
    (tmp_path / "vmexit" / "history").unlink()
    (tmp_path / "vmexit").rmdir()
    kept.store_string("events")


def test_a_session(tmp_path: Path) -> None:
    _, arguments = guest_arguments("sequence")
    with terminal(tmp_path, arguments) as at:
        at.waits_for("the machine is halted before its first instruction; 'g' starts it")
        at.waits_for(PROMPT)
        at.types("!msrw\t")
        at.waits_for(r"!msrwrite")
        at.enters("174 st\tpost", "event 0 breaks at each wrmsr of 174 SYSENTER_CS \\(stage post, all cores\\)")
        at.enters("events d 0", PROMPT)
        at.enters("!msrwrite 174", "event 1 breaks")
        at.enters("g", r"event 1 triggered \(pre\) on core 0: wrmsr, MSR 174, value 0{12}8877\s+MSR +SYSENTER_CS = 0x8877")
        at.waits_for(r"RIP +0{8}`001.* 0F 30 +wrmsr")
        at.waits_for(r"msr=c0000084 value=0000000000047700")
        at.waits_for(PROMPT)
        at.enters("r rcx", "rcx=0000000000000174")
        at.enters("r eax = 5", "eax=00000005")
        at.enters("db rip l 2", "  0F 30  ")
        at.enters("events", r"0    \(disabled\)  0 hits")
        at.enters("bogus", "there is no command 'bogus'.*\\s+bogus\\s+\\^~~~~")
        at.enters("events sc on", "will be skipped")
        at.types("g\r")
        at.waits_for("msr=00000174 value=0000000000000000")
        at.waits_for("QEMU ended with status 33")
        assert at.ends() == 33
        assert at.is_sane
        assert at.text.rstrip().endswith("QEMU ended with status 33")


def test_ctrl_c_and_ctrl_d(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang", SPIN=10)
    with terminal(tmp_path, arguments) as at:
        at.waits_for(PROMPT)
        qemu = at.qemu
        at.types("half a command")
        at.waits_for("half a command")
        at.types("\x03")
        at.enters("g", "the machine runs; Ctrl-C halts it")
        at.waits_for(r"vmexit> *$")
        at.enters("r", "'r' needs a halted machine \\('pause' halts it\\)")
        end = at.waits_for(r"tick 0")
        at.types("\x03")
        at.waits_for("halted, core 0\\s+RIP", after=end)
        at.waits_for(PROMPT)
        at.enters("g", r"vmexit> *$")
        at.enters("pause", "halted, core 0")
        assert "half a command" not in at.text[-200:]
        at.types("\x04")
        assert at.ends() == 0
        assert at.is_sane
        assert wait_until_gone(qemu)


def test_output_does_not_tear_the_line_being_typed(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang", SPIN=10, TICK=100_000)
    with terminal(tmp_path, arguments, "-x", "!msrwrite 10") as at:
        at.waits_for("vmexit> *$")
        at.types("eve")
        end = at.waits_for("vmexit> +eve")
        end = at.waits_for(r"tick [0-9a-f]{16}\s+vmexit> +eve *$", after=end)
        at.types("nts\r")
        at.waits_for(r"0    \(enabled\)   0 hits  !msrwrite 10", after=end)


def test_ctrl_c_in_a_flood_at_a_slow_terminal(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang", SPIN=10)
    with terminal(tmp_path, arguments, "-x", "!msrwrite log", bytes_a_second=20_000) as at:
        at.waits_for(r"wrmsr  c0000081  [0-9a-f]{16}")
        at.take(2)
        end = len(at.text)
        at.types("\x03")
        at.waits_for(r"traps were recorded that are not shown here; the last 100 are:", after=end)
        at.waits_for(r"halted, core 0", after=end)
        at.waits_for(PROMPT, after=end)
        # A backlog of a ring alone would be twice as much.
        assert len(at.text) - end < 600_000
        at.enters("events", r"0    \(enabled\)  +[0-9,]+ hits")


def test_a_command_of_several_lines(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang")
    with terminal(tmp_path, arguments) as at:
        at.waits_for(PROMPT)
        at.enters("!msrwrite 10 script {", r"\.\.\. ")
        at.enters('printf("}");', r"\.\.\. ")
        at.enters("}", "event 0 runs a script at each wrmsr of 10")
        at.enters(".exit", "")
        assert at.ends() == 0


def test_what_was_typed_is_remembered(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang")
    with terminal(tmp_path, arguments) as at:
        at.waits_for(PROMPT)
        at.enters("settings syntax masm", "syntax        masm")
        at.enters(".exit", "")
        at.ends()
    with terminal(tmp_path, arguments) as at:
        at.waits_for(PROMPT)
        at.types("\x1b[A\x1b[A")
        at.waits_for("settings syntax masm")
        at.enters("", "syntax        masm")


def test_commands_given_beforehand_and_ctrl_c_while_they_wait(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang", SPIN=10)
    with terminal(tmp_path, arguments, "-x", "!msrwrite 10", "-x", "g", "-x", "settings syntax masm") as at:
        at.waits_for("tick")
        at.types("\x03")
        at.waits_for("halted, core 0")
        at.waits_for("interrupted: the commands that were still to come are left out")
        at.waits_for(PROMPT)
        at.enters("settings", "syntax        intel")


def test_ctrl_c_ends_a_sleep(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang")
    with terminal(tmp_path, arguments) as at:
        at.waits_for(PROMPT)
        at.types("sleep 0n500000\r")
        at.executes()
        at.types("\x03")
        at.enters("~", r"current core: 0")


def test_ctrl_c_ends_a_long_text_at_a_slow_terminal(tmp_path: Path) -> None:
    _, arguments = guest_arguments("sequence")
    with terminal(tmp_path, arguments, "-x", "!msrwrite 174", "-x", "g") as at:
        at.waits_for(PROMPT)
        at.speed = 20_000
        at.types("db 100000 l 20000\r")
        at.waits_for("00000000`00100010")
        at.types("\x03")
        at.waits_for(r"\.\.\. interrupted\s+0: vmexit> *$")
        at.speed = float("inf")
        at.enters("~", "current core: 0")


def test_a_break_in_batch_mode_at_a_terminal_does_not_ask(tmp_path: Path) -> None:
    _, arguments = guest_arguments("sequence")
    with terminal(tmp_path, arguments, "--batch", "-x", "!msrwrite 174") as at:
        at.waits_for("event 0 triggered")
        assert at.ends() == 33
        assert "vmexit>" not in at.text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, None)])
def test_signals_at_the_prompt(tmp_path: Path, number: signal.Signals, status: int | None) -> None:
    _, arguments = guest_arguments("hang", SPIN=10)
    with terminal(tmp_path, arguments, "-x", "!msrwrite log") as at:
        end = at.waits_for("wrmsr  c0000081")
        qemu = at.qemu
        os.kill(at.process.pid, number)
        if status is None:  # the same as the key
            at.waits_for("halted, core 0", after=end)
            return
        assert at.ends() == status
        assert at.is_sane
        assert wait_until_gone(qemu)
        assert "Traceback" not in at.text


def test_the_terminal_goes_away(tmp_path: Path) -> None:
    _, arguments = guest_arguments("hang", SPIN=10)
    with terminal(tmp_path, arguments, "-x", "!msrwrite log") as at:
        at.waits_for("wrmsr  c0000081")
        qemu = at.qemu
        at.hang_up()
        assert wait_until_gone(qemu)
        at.process.wait(TIME_S)


def test_colours(tmp_path: Path) -> None:
    _, arguments = guest_arguments("sequence")
    with terminal(tmp_path, arguments, "-x", "!msrwrite 174", "-x", "g") as at:
        at.waits_for(PROMPT)
        assert b"\x1b[1mevent 0 triggered" in at.raw


def test_no_colours_where_they_are_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    _, arguments = guest_arguments("sequence")
    with terminal(tmp_path, arguments, "-x", "!msrwrite 174", "-x", "!msrwrite log", "-x", "g") as at:
        at.waits_for(PROMPT)
        at.enters("bogus", "no command")
        assert not [code for code in (b"\x1b[1m", b"\x1b[2m", b"\x1b[31m", b"\x1b[0;1m") if code in at.raw]


def test_a_terminal_that_can_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    _, arguments = guest_arguments("sequence")
    from tests.console.vmexits import Terminal

    at = Terminal("run", "--", *arguments, home=tmp_path, TERM="dumb")
    try:
        at.waits_for("0: vmexit> ")
        at.enters("!msrwrite 174", "event 0 breaks")
        at.enters("g", "event 0 triggered")
        at.enters("r ecx", "ecx=00000174")
        at.types("g\r")
        assert at.ends() == 33
        assert b"\x1b" not in at.raw
    finally:
        at.close()
