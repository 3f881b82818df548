"""The caller in the records of a real Linux, against what a callback at the same trap sees of the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.machines import Output, linux_arguments
from vmexit import Debugger, LiveTrap, StopReason, Trap
from vmexit.guest.linux.cache import Cache
from vmexit.guest.system import CodeMap
from vmexit.guest_view import GuestView
from vmexit.lines import Columns
from vmexit.link.wire import RecordFlag
from vmexit.targets.qemu import Qemu

BOOT_S = 150
FMASK, FS_BASE, WRITTEN = 0xC000_0084, 0xC000_0100, 0x1A0
COMMANDS = """
    for number in 1 2 3; do write_msr 0 0x1a0 000000000000100$number; done
    read_msr 0 0x1a0
    sleep 0.2
"""


@pytest.mark.parametrize(
    ("command_line", "more", "vcpus"), [("", [], 2), ("pti=on", ["-cpu", "max"], 1)], ids=["plain", "isolated"]
)
def test_as_a_break_has_it(command_line: str, more: list[str], vcpus: int, tmp_path: Path) -> None:
    output = Output()
    arguments = [*linux_arguments(COMMANDS, command_line=command_line, vcpus=vcpus), *more]
    with Debugger(Qemu(arguments, output=output)) as debugger:
        debugger.guest = GuestView(debugger, cache=Cache(tmp_path))
        newest: dict[int, Trap] = {}
        debugger.listeners.append(lambda traps: newest.update({trap.core: trap for trap in traps}))
        columns = Columns(0, names=debugger.names)
        seen: Counter[tuple[str, str]] = Counter()

        def look(trap: LiveTrap) -> None:
            recorded, caller = newest[trap.core], trap.caller
            assert recorded.rip == trap.rip and recorded.msr == trap.msr
            found = debugger.callers.of(recorded)
            if found == 0:
                # Before the kernel was recognised, and where a second vCPU starts, which nobody has called.
                assert not seen or caller is None, f"{trap.symbol} <- {caller}"
                return
            assert caller is not None and found == caller.address
            assert (RecordFlag.CALLER_GUESSED in recorded.flags) is caller.is_guess is False
            assert f"  {trap.symbol} <- {caller}" in columns.line(recorded)
            seen[str(trap.symbol).partition("+")[0], str(caller).partition("+")[0]] += 1

        everything = range(1 << 32)
        debugger.on_msr_write(everything, with_process=True)
        debugger.on_msr_write(everything, look)
        debugger.on_msr_read(WRITTEN, with_process=True)
        debugger.on_msr_read(WRITTEN, look)
        stop = debugger.run(timeout=BOOT_S)
        assert (stop.reason, stop.exit_status) == (StopReason.ENDED, 0), output.text
        assert seen["native_write_msr_safe", "__wrmsr_safe_on_cpu"] == 3
        assert seen["native_read_msr_safe", "__rdmsr_safe_on_cpu"] >= 1
        assert seen["native_write_msr", "syscall_init"] >= 1
        # With FSGSBASE a switch writes no MSR.
        assert more or seen["native_write_msr", "__switch_to"] > 10


def test_without_tables_it_is_a_guess(tmp_path: Path) -> None:
    """The same kernel, of whose code the agent is told nothing more than where it is."""
    output = Output()
    with Debugger(Qemu(linux_arguments(COMMANDS, vcpus=1), output=output)) as debugger:
        debugger.guest = GuestView(debugger, cache=Cache(tmp_path))
        set_code = debugger.set_code

        def set_bare(code: CodeMap | None) -> None:
            if code is not None:
                pieces = tuple(type(piece)(piece.first, piece.last) for piece in code.pieces)
                code = CodeMap(pieces, code.rsp, code.rbp, code.call)
            set_code(code)

        debugger.set_code = set_bare  # type: ignore[method-assign]
        event = debugger.on_msr_write(WRITTEN, with_process=True)
        stop = debugger.run(timeout=BOOT_S)
        assert stop.exit_status == 0, output.text
        assert event.recording is not None
        columns = Columns(0, names=debugger.names)
        lines = [columns.line(trap) for trap in event.recording][-3:]
        assert len(lines) == 3
        assert all("  native_write_msr_safe+0x4 [kernel] <- ? __wrmsr_safe_on_cpu+0x" in line for line in lines), lines


def test_in_files(tmp_path: Path) -> None:
    """JSON, a trace, and a recording and what is made of it."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "vmexit", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BOOT_S, env=environment, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    recording, objects, page, trace = (str(tmp_path / name) for name in ("r", "objects", "page", "trace"))
    run(
        *("record", "-o", recording),
        *("-x", f"output create j jsonl {objects}", "-x", "output open j"),
        *("-x", f"output create p perfetto {trace}", "-x", "output open p"),
        *("-e", "!msrwrite 1a0 log output { j , p }", "-e", "!msrwrite 1a0 log"),
        *("--", *linux_arguments(COMMANDS, vcpus=1)),
    )
    told = [json.loads(line) for line in Path(objects).read_text().splitlines()][-3:]
    for one in told:
        assert one["symbol"].startswith("native_write_msr_safe+0x") and one["symbol"].endswith(" [kernel]")
        assert one["caller_symbol"].startswith("__wrmsr_safe_on_cpu+0x") and int(one["caller"], 16) >> 63 == 1
        assert "caller_guessed" not in one["flags"]
    origin = f"{told[0]['symbol']} <- {told[0]['caller_symbol']}"
    traced = Path(trace).read_bytes()
    assert traced.count(origin.encode()) >= 3
    assert all(f"pid {one['pid']:x} ".encode() in traced for one in told)
    lines = [line for line in run("report", "--traps", recording).splitlines() if "  000001a0  " in line]
    assert len(lines) >= 6 and all(f"  {origin}  pid " in line for line in lines[-6:])
    run("report", recording, "--html", page)
    assert json.dumps(origin)[1:-1].replace("<", "\\u003c") in Path(page).read_text()
