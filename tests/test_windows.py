"""A made-up Windows that runs in QEMU: threads that write MSRs, as vmexit sees them at the trap and at the prompt."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands.fakes import FakeDriver
from tests.guest.windows.fake_pdb import make_pdb
from tests.guest.windows.fake_windows import (
    CALLER,
    LAYOUTS,
    PHYSICAL,
    SYSTEM_CALL,
    SYSTEM_CALL_SHADOW,
    UNKNOWN,
    WRITER,
    FakeWindows,
    Layout,
)
from tests.machines import Output, guest_arguments
from vmexit import Debugger, LiveTrap, StopReason
from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.guest.linux.cache import Cache
from vmexit.guest.memory import PAGE
from vmexit.guest.system import Help
from vmexit.guest_view import GuestView
from vmexit.targets.qemu import Qemu

LSTAR, MISC_ENABLE = 0xC000_0082, 0x1A0
TIMEOUT = 60
ORDER = (0x123C, 8, 0x1A8, 0, 0x1238, 0x123C)
"""The threads that write, each its own number."""


@contextmanager
def booted(folder: Path, windows: FakeWindows, *, entry: int = SYSTEM_CALL) -> Iterator[tuple[Debugger, Output]]:
    """QEMU with that memory, and the guest that executes its threads; halted before its first instruction."""
    table = windows.allocate(16 * len(ORDER) + 16)
    windows.write(table, b"".join(struct.pack("<QQ", windows.threads[tid], tid) for tid in ORDER))
    windows.relink()
    memory = b"".join(bytes(windows.pages[number]) for number in sorted(windows.pages))
    assert sorted(windows.pages) == list(range(PHYSICAL // PAGE, PHYSICAL // PAGE + len(windows.pages)))
    path = folder / "memory"
    path.write_bytes(memory)
    _, arguments = guest_arguments(
        "windows",
        ROOT=windows.root,
        KPCR=windows.kpcrs[0],
        ENTRY=windows.address(entry),
        WRITER=windows.address(WRITER),
        THREADS=table,
    )
    loader = f"loader,file={path},addr={PHYSICAL:#x},force-raw=on"
    output = Output()
    with Debugger(Qemu([*arguments, "-device", loader], output=output)) as debugger:
        yield debugger, output


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[layout.name for layout in LAYOUTS.values()])
@pytest.mark.parametrize("entry", [SYSTEM_CALL, SYSTEM_CALL_SHADOW], ids=["plain", "shadow"])
def test_who_wrote_it(layout: Layout, entry: int, tmp_path: Path) -> None:
    windows = FakeWindows(layout, vcpus=1)
    with booted(tmp_path, windows, entry=entry) as (debugger, output):
        view = GuestView(debugger, cache=Cache(tmp_path / "linux"))
        lines: list[str | None] = []
        seen: list[tuple[int, str, str]] = []

        def on_write(trap: LiveTrap) -> None:
            view.at_trap(trap.core)
            task = view.current(trap.core)
            seen.append((trap.value, str(task), str(view.name_of(trap.rip))))

        debugger.on_msr_write(LSTAR, lambda trap: lines.append(view.at_lstar(trap.core, trap.value)))
        debugger.on_msr_write(MISC_ENABLE, on_write)
        stop = debugger.run(timeout=TIMEOUT)
        assert (stop.reason, stop.exit_status) == (StopReason.ENDED, 33), output.text
        assert output.text == "threads=00000006\n"
    base = windows.base
    assert lines == [f"{layout.name} x86_64, build {layout.build}, base {base:#x}, 19 symbols, 2 modules"]
    names = {
        0x123C: "a-long-program (process 4660, thread 4668)",
        0x1238: "a-long-program (process 4660, thread 4664)",
        8: "System (process 4, thread 8)",
        0x1A8: "smss.exe (process 420, thread 424)",
        0: "Idle (process 0, thread 0)",
    }
    assert seen == [(tid, names[tid], "KeWriteMsr+0x2 [nt]") for tid in ORDER]


def test_at_the_prompt(tmp_path: Path) -> None:
    """A build that nothing is known of, halted at a write, without and with its PDB."""
    windows = FakeWindows(UNKNOWN, vcpus=1, without=frozenset({"PsGetThreadProcess"}))
    (tmp_path / "ntkrnlmp.pdb").write_bytes(make_pdb(UNKNOWN, {"KiWriteMsr": CALLER, "KeWriteMsr": WRITER}))
    with booted(tmp_path, windows) as (debugger, _):
        shown: list[str] = []
        session = Session(debugger, shown.append, FakeDriver(debugger))
        session.debugger.guest = GuestView(debugger, cache=Cache(tmp_path / "linux"))

        def types(line: str) -> str:
            shown.clear()
            registry.execute(session, line)
            return "\n".join(shown)

        debugger.on_msr_write(MISC_ENABLE, LiveTrap.halt)
        debugger.run(timeout=TIMEOUT)
        assert "build 30000 is none that vmexit knows; give its PDB" in types("guest")
        assert types("u nt!KeWriteMsr+2 l 1").startswith("KeWriteMsr+0x2 [nt]:")
        lines = types(f"guest pdb {tmp_path}/ntkrnlmp.pdb").split("\n")
        assert lines[0].startswith("Windows x86_64, build 30000, base ") and len(lines) == 4
        assert lines[3] == "core 0   a-long-program (process 4660, thread 4668)"
        assert (
            "smss.exe" in types("ps") and "123c" in types(".thread") and types("k").split("\n")[1].endswith("KeWriteMsr+0x2 [nt]")
        )
        debugger.run(timeout=TIMEOUT)
        assert types(".thread").split("\n")[1].split()[:3] == ["8", "0n8", "4"]
        assert "UniqueProcessId" in types("dt _EPROCESS")
        view = GuestView(debugger, given=Help(pdb=tmp_path / "memory"), cache=Cache(tmp_path / "elsewhere" / "linux"))
        assert view.recognised.remarks[0].endswith("memory is of no use: it is no PDB (MSF 7.00)")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[layout.name for layout in LAYOUTS.values()])
def test_events_about_a_process(layout: Layout, tmp_path: Path) -> None:
    """The agent itself follows the way to the thread, at each trap."""
    windows = FakeWindows(layout, vcpus=1)
    printed: list[str] = []
    with booted(tmp_path, windows) as (debugger, output):
        view = GuestView(debugger, cache=Cache(tmp_path / "linux"))
        debugger.on_msr_write(LSTAR, lambda trap: print(view.at_lstar(trap.core, trap.value)))
        debugger.print_listeners.append(lambda each: printed.append(each.text.decode()))
        own = debugger.on_msr_write(MISC_ENABLE, pid=0x1234)
        other = debugger.on_msr_write(MISC_ENABLE, pid=0x5678)
        every = debugger.on_msr_write(MISC_ENABLE, with_process=True)
        text = 'printf("%llx %llx %s %llx %llx\\n", $pid, $tid, $pname, $proc, $thread);'
        debugger.on_msr_write(MISC_ENABLE, script=text)
        stop = debugger.run(timeout=TIMEOUT)
        assert stop.exit_status == 33, output.text
        assert own.recording is not None and every.recording is not None
        assert [trap.value for trap in own.recording] == [tid for tid in ORDER if tid in (0x1238, 0x123C)]
        assert debugger.hits(other) == 0
        seen = [(trap.pid, trap.tid) for trap in every.recording]
    owners = {0x123C: 0x1234, 0x1238: 0x1234, 8: 4, 0x1A8: 0x1A4, 0: 0}
    names = {0x1234: "a-long-program", 4: "System", 0x1A4: "smss.exe", 0: "Idle"}
    assert seen == [(owners[tid], tid) for tid in ORDER]
    # What has called it is code of the bare guest's, and is taken for none of Windows'.
    assert {trap.caller_number for trap in every.recording} == {0}
    assert "".join(printed).splitlines() == [
        f"{owners[tid]:x} {tid:x} {names[owners[tid]]} {windows.processes[owners[tid]]:x} {windows.threads[tid]:x}"
        for tid in ORDER
    ]
