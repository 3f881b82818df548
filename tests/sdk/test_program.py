"""Programs that were written for HyperDbg, in C and in Python, on real machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS
from tests.machines import Output, guest, guest_arguments
from tests.sdk.build import HERE, compile_c
from vmexit import Debugger, StopReason
from vmexit.sdk import ActionType, Client, GeneralAction, GeneralEventDetail, ModifyType, SdkError
from vmexit.sdk.requests import Requests
from vmexit.sdk.server import Server

LSTAR, STAR = 0xC0000082, 0xC0000081
ANSWERS = """\
event: done 1, successful 1, error 0
enabled: done 1, status ffffffff, 0
action: done 1, successful 1, error 0
enabled: done 1, status ffffffff, 1
another: done 1, successful 0, error c0000000
short: done 0
"""
MSR_LINE = "msr=c0000082 value={:016x}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in C."""
    return compile_c(HERE / "program.c", tmp_path_factory.mktemp("sdk") / "program")


@contextmanager
def served(path: Path, thread: str = "multi") -> Iterator[tuple[Debugger, Output]]:
    """A guest whose debugger is open to programs."""
    with guest("sequence", thread=thread) as (debugger, _, output):
        server = Server(path, Requests(debugger).serve)
        try:
            yield debugger, output
        finally:
            server.close()


def finish(debugger: Debugger) -> None:
    stop = debugger.run(timeout=60)
    assert (stop.reason, stop.exit_status) == (StopReason.ENDED, OK_STATUS)


def run_program(program: Path, *arguments: str | Path) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("thread", ["multi", "kvm"])
def test_a_program_in_c(program: Path, tmp_path: Path, thread: str) -> None:
    with served(tmp_path / "sdk", thread=thread) as (debugger, output):
        assert run_program(program, tmp_path / "sdk", "c0000082") == ANSWERS
        finish(debugger)
        assert MSR_LINE.format(0x1234) in output.text
        (event,) = debugger.events
        assert (debugger.hits(event), event.faults) == (1, 0)


def test_its_condition(program: Path, tmp_path: Path) -> None:
    """RAX's low byte is 0 in one of these writes, once an event of before has made it so."""
    with served(tmp_path / "sdk") as (debugger, output):
        odd = 1 << 32 | 1
        debugger.on_msr_write(STAR, lambda trap: setattr(trap, "value", 1 << 32), value=odd)
        assert run_program(program, tmp_path / "sdk", "c0000081", "condition") == ANSWERS
        finish(debugger)
        values = [line.split("value=")[1] for line in output.text.splitlines() if line.startswith("msr=c0000081")]
        assert values == [f"{0x1234:016x}", f"{1 << 32:016x}", *[f"{0x1234:016x}"] * 9]


def test_it_finds_the_debugger_of_a_session(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "sdk"
    _, arguments = guest_arguments("sequence")
    command = [sys.executable, "-m", "vmexit", "run", "--", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(f"settings sdk-socket {path}\n")
        session.stdin.flush()
        assert str(path) in session.stdout.readline()
        assert run_program(program, path, "c0000082") == ANSWERS
        said, _ = session.communicate("events\ng\n", timeout=60)
        assert session.returncode == OK_STATUS
    assert "0    (enabled)   0 hits  !msrwrite c0000082 (of a program, tag 1000000)  // c0000082 LSTAR  [emulated]" in said
    assert MSR_LINE.format(0x1234) in said
    assert not path.exists()


def test_breaks_conditions_and_short_circuits(tmp_path: Path) -> None:
    # movzx eax, word ptr [rcx]: what RAX holds in its lowest two bytes
    condition = bytes.fromhex("0fb701c3")
    with served(tmp_path / "sdk") as (debugger, output), Client(tmp_path / "sdk") as client:
        client.trap(GeneralEventDetail.of(1, LSTAR))
        client.trap(GeneralEventDetail.of(2, STAR, short_circuit=True), condition=condition)
        stop = debugger.run(timeout=60)
        assert stop.reason == StopReason.BREAK
        assert stop.trap is not None
        assert stop.trap.msr == STAR
        stop = debugger.run(timeout=60)
        assert stop.trap is not None
        assert (stop.trap.msr, stop.trap.value) == (LSTAR, 0xFFFF923344556677)
        assert client.read_msr(LSTAR) == [0]
        client.write_msr(LSTAR, 0x42)
        client.short_circuit(True)
        client.modify(2, ModifyType.CLEAR)
        with pytest.raises(SdkError):
            client.is_enabled(2)
        finish(debugger)
        assert "msr=c0000081 value=0000000000000000" in output.text
        assert MSR_LINE.format(0x42) in output.text


def test_actions_in_a_row(tmp_path: Path) -> None:
    """Code that adds 1, code that adds the buffer's counter, then a break."""
    once = bytes.fromhex("48ff02c3")  # inc qword ptr [rdx]
    count = bytes.fromhex("48ff01488b01480102c3")  # inc qword ptr [rcx]; mov rax, [rcx]; add [rdx], rax
    with served(tmp_path / "sdk") as (debugger, output), Client(tmp_path / "sdk") as client:
        client.trap(GeneralEventDetail.of(1, STAR), code=once)
        client.add_action(GeneralAction.of(1, ActionType.RUN_CUSTOM_CODE, code_size=len(count), buffer=8), count)
        client.add_action(GeneralAction.of(1))
        for number in range(1, 12):
            stop = debugger.run(timeout=60)
            assert stop.reason == StopReason.BREAK, number
        finish(debugger)
        values = [int(line.split("value=")[1], 16) for line in output.text.splitlines() if line.startswith("msr=c0000081")]
        assert values[:3] == [0x1122334455667788 + 2, (1 << 32 | 1) + 3, (2 << 32 | 2) + 4]
