"""Which results go to which outputs, as a program sees it, on real guests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.machines import guest
from tests.outputs.peers import SCRIPT, STAR, finish, lines
from vmexit import Action, Debugger, Event, LiveTrap, MsrSet, Overflow, StopReason, VmexitError
from vmexit.link.wire import Access
from vmexit.outputs import OutputError, OutputState
from vmexit.prints import Printed


def add(debugger: Debugger, kind: str, path: Path) -> Path:
    """An output named after its kind."""
    debugger.outputs.create(kind, kind, str(path / kind))
    debugger.outputs.open(kind)
    return path / kind


def test_lines_of_the_log(tmp_path: Path) -> None:
    with guest("loop", COUNT=3) as (debugger, _, _):
        path = add(debugger, "file", tmp_path)
        debugger.on_msr_write(STAR, outputs=("file",))
        finish(debugger)
        debugger.close()
        found = path.read_text().splitlines()
        assert len(found) == 3 and all("pre   wrmsr  c0000081  5a5a5a5a0000000" in line for line in found)


def test_a_script_and_the_log_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    with guest("loop", COUNT=3) as (debugger, _, _):
        path = add(debugger, "file", tmp_path)
        debugger.add(
            Event(
                access=Access.WRMSR,
                msrs=MsrSet.of(STAR),
                action=Action.RECORD | Action.SCRIPT,
                script=debugger.compiler.compile('printf("one\\n"); printf("two\\n");'),
                outputs=("file",),
            )
        )
        finish(debugger)
        debugger.close()
        found = path.read_text().splitlines()
        assert found[1::3] == ["one"] * 3 and found[2::3] == ["two"] * 3 and all("wrmsr" in line for line in found[::3])


def test_several_outputs_and_events(tmp_path: Path) -> None:
    with guest("loop", COUNT=50) as (debugger, _, _):
        text, rows = add(debugger, "file", tmp_path), add(debugger, "jsonl", tmp_path)
        printed: list[Printed] = []
        debugger.print_listeners.append(printed.append)
        debugger.on_msr_write(STAR, script=SCRIPT, outputs=("file", "jsonl", "file"))
        debugger.on_msr_write(STAR, script='printf("other\\n");')
        debugger.on_msr_write(STAR, outputs=("jsonl",))
        finish(debugger)
        debugger.close()
        assert text.read_bytes().splitlines() == lines(50)
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert [each["text"].encode() for each in found if each["event"] == 0] == [line + b"\n" for line in lines(50)]
        assert [each["text"] for each in found if each["event"] == 2] == [""] * 50 and len(found) == 100
        assert b"".join(each.text for each in printed if each.event == 1) == b"other\n" * 50


def test_a_script_that_prints_nothing_is_a_trap_all_the_same(tmp_path: Path) -> None:
    with guest("loop", COUNT=5) as (debugger, _, _):
        path = add(debugger, "jsonl", tmp_path)
        debugger.on_msr_write(STAR, script=".n = .n + 1;", outputs=("jsonl",))
        finish(debugger)
        debugger.close()
        assert [json.loads(line)["action"] for line in path.read_text().splitlines()] == [["record"]] * 5


def test_a_fault_is_told_with_its_trap(tmp_path: Path) -> None:
    with guest("loop", COUNT=2) as (debugger, _, _):
        path = add(debugger, "jsonl", tmp_path)
        debugger.on_msr_write(STAR, script='printf("before"); print(poi(8000000000000000));', outputs=("jsonl",))
        finish(debugger)
        debugger.close()
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [each["text"] for each in found] == ["before"] * 2 and all("8000000000000000" in each["fault"] for each in found)


def test_breaks_and_callbacks(tmp_path: Path) -> None:
    with guest("loop", COUNT=3) as (debugger, _, _):
        text, rows = add(debugger, "file", tmp_path), add(debugger, "jsonl", tmp_path)
        event = debugger.add(Event(access=Access.WRMSR, msrs=MsrSet.of(STAR), outputs=("file", "jsonl")))
        assert debugger.run(timeout=60).reason is StopReason.BREAK
        debugger.clear(event)
        seen: list[int] = []

        def callback(trap: LiveTrap) -> None:
            seen.append(trap.value)

        debugger.on_msr_write(STAR, callback, outputs=("jsonl",))
        finish(debugger)
        debugger.close()
        assert text.read_text().count("\n") == 1
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert [each["action"] for each in found] == [["break"], *[["ask"]] * len(seen)]
        assert [each["value"] for each in found[1:]] == [f"{value:#x}" for value in seen] and len(seen) in (2, 3)


def test_what_is_on_its_way_when_an_event_is_cleared_still_goes_there(tmp_path: Path) -> None:
    with guest("loop", COUNT=2000) as (debugger, _, _):
        path = add(debugger, "file", tmp_path)
        event = debugger.on_msr_write(STAR, script=SCRIPT + " if ($value == 0x5a5a5a5a00000100) { event_clear($event_id); }")
        debugger.clear(event)
        event = debugger.on_msr_write(
            STAR, script=SCRIPT + " if ($value == 0x5a5a5a5a00000100) { event_clear($event_id); }", outputs=("file",)
        )
        finish(debugger)
        debugger.close()
        assert path.read_bytes().splitlines() == lines(2000)[: 2000 - 0x100 + 1]


def test_what_is_not_opened_or_closed_again_is_counted(tmp_path: Path) -> None:
    with guest("loop", COUNT=40) as (debugger, _, _):
        output = debugger.outputs.create("a", "file", str(tmp_path / "a"))
        debugger.on_msr_write(STAR, script=SCRIPT, outputs=("a",))
        finish(debugger)
        assert (output.state, output.sent, output.dropped) == (OutputState.CREATED, 0, 40)
        assert debugger.outputs.news() == [f"output 'a' (file {tmp_path}/a): 40 messages not delivered so far"]


def test_refusals(tmp_path: Path) -> None:
    with guest("loop", COUNT=1) as (debugger, _, _):
        outputs = debugger.outputs
        with pytest.raises(OutputError, match="there is no output 'x'"):
            outputs.open("x")
        with pytest.raises(OutputError, match="there are no outputs of kind 'post'"):
            outputs.create("x", "post", "here")
        with pytest.raises(OutputError, match="takes URL and SUBJECT"):
            outputs.create("x", "nats", "here")
        for number in range(6):
            outputs.create(f"{number}", "file", str(tmp_path / "x"))
        with pytest.raises(VmexitError, match="an event has 5 outputs at most, not 6"):
            debugger.on_msr_write(STAR, outputs=[output.name for output in outputs])
        with pytest.raises(VmexitError, match="there is no output 'y'"):
            debugger.on_msr_write(STAR, outputs=("y",))
        outputs.open("0")
        with pytest.raises(OutputError, match="is opened already"):
            outputs.open("0")
        outputs.close("0")
        with pytest.raises(VmexitError, match="the output '0' is closed"):
            debugger.on_msr_write(STAR, outputs=("0",))
        assert not list(debugger.events) and len(outputs) == 6 and "0" in outputs


def test_a_guest_that_waits_can_be_halted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes nothing holds the guest up for ever; halting it works all the same, and so does the other policy."""
    import os

    monkeypatch.setattr("vmexit.outputs.output._MOST_BYTES", 100_000)
    monkeypatch.setattr("vmexit.outputs.outputs._STALL_S", 0.1)
    monkeypatch.setattr("vmexit.outputs.outputs._FLUSH_S", 0.2)
    os.mkfifo(tmp_path / "p")
    reader = os.open(tmp_path / "p", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with guest("loop", COUNT=300_000) as (debugger, _, _):
            output = debugger.outputs.create("p", "namedpipe", str(tmp_path / "p"))
            debugger.outputs.open("p")
            debugger.on_msr_write(STAR, script=SCRIPT, outputs=("p",))
            stop = debugger.run(until=lambda: output.is_full and output.held_back_s > 0.2, timeout=60)
            assert stop.reason is StopReason.CONDITION
            # Nor does it go on after a while.
            assert debugger.run(timeout=0.5).reason is StopReason.TIMEOUT
            assert output.is_full and output.dropped == 0
            assert any("the guest waits for it" in line for line in debugger.outputs.news())
            debugger.set_overflow(Overflow.DROP)
            finish(debugger)
            assert output.dropped > 0
            debugger.outputs.finish(0.1)
            assert output.sent + output.dropped + debugger.dropped() == 300_000
    finally:
        os.close(reader)
