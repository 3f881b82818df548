"""Which process wrote an MSR, found out at the trap itself in a real Linux, against what the guest says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machines import Output, linux_arguments
from vmexit import Debugger, LiveTrap, StopReason, Trap
from vmexit.errors import VmexitError
from vmexit.events import Event
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.recipe import CPU, Recipe, Step
from vmexit.guest_view import GuestView
from vmexit.link.wire import RecordFlag
from vmexit.prints import Printed
from vmexit.processes import pack
from vmexit.targets.qemu import Qemu

BOOT_S = 150
LSTAR, FS_BASE, WRITTEN = 0xC000_0082, 0xC000_0100, 0

# Two programs that take turns on the last CPU; what each writes into MSR 0 says which of them it is.
COMMANDS = """
    last=$(($(nproc) - 1))
    for number in 1 2; do
        taskset $((1 << last)) sh -c '
            echo "program '$number'=$$"
            while :; do printf "\\00'$number'\\0\\0\\0\\0\\0\\0\\0" > /dev/cpu/'$last'/msr; done' &
    done
    sleep 1
    echo ready
    sleep 1000
"""


def known(trap: Trap) -> bool:
    return bool(trap.flags & RecordFlag.PROCESS_KNOWN)


@pytest.mark.parametrize(
    ("command_line", "more", "vcpus"), [("", [], 2), ("pti=on", ["-cpu", "max"], 1)], ids=["plain", "isolated"]
)
def test_a_real_kernel(command_line: str, more: list[str], vcpus: int, tmp_path: Path) -> None:
    output = Output()
    arguments = [*linux_arguments(COMMANDS, command_line=command_line, vcpus=vcpus), *more]
    with Debugger(Qemu(arguments, output=output)) as debugger:
        debugger.guest = GuestView(debugger, cache=Cache(tmp_path))
        before: list[int] = []

        def on_lstar(trap: LiveTrap) -> None:
            before.append(debugger.hits(first))
            assert debugger.knows_processes  # the debugger's own question of this write comes first

        def run_on(*events: Event) -> None:
            """Until each of these has been triggered some more times."""
            enough = [(event, debugger.hits(event) + 50) for event in events]
            stop = debugger.run(until=lambda: all(debugger.hits(event) >= hits for event, hits in enough), timeout=BOOT_S)
            assert stop.reason == StopReason.CONDITION, output.text

        debugger.on_msr_write(LSTAR, on_lstar)
        first = debugger.on_msr_write(range(1 << 32), pid=1)  # waits until it is known who that is
        written = debugger.on_msr_write(WRITTEN, with_process=True)
        fs_base = debugger.on_msr_write(FS_BASE, with_process=True)
        stop = debugger.run(until=lambda: "\nready" in output.text, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        programs = {int(number): int(pid) for number, pid in re.findall(r"program (\d)=(\d+)", output.text)}
        assert set(programs) == {1, 2}
        run_on(written)

        # What runs is what the guest says, across context switches.
        assert written.recording is not None and fs_base.recording is not None and first.recording is not None
        traps = list(written.recording)
        assert {trap.value for trap in traps} <= {1, 2}
        assert all(known(trap) and trap.pid == trap.tid == programs[trap.value] for trap in traps)
        names = {debugger.thread_names.get(trap.pid, trap.tid) for trap in traps}
        assert names <= {"sh", "busybox", "exe"}, names
        # Each program sets FS itself when it begins (arch_prctl); with FSGSBASE the kernel needs no WRMSR for that.
        assert more or set(programs.values()) <= {trap.pid for trap in fs_base.recording if known(trap)}
        assert before[0] == 0
        assert [trap.pid for trap in first.recording] == [1] * debugger.hits(first) != []

        # An event about one of them, and scripts.
        printed: list[Printed] = []
        debugger.print_listeners.append(printed.append)
        debugger.clear(first)
        one = debugger.on_msr_write(WRITTEN, pid=programs[1])
        debugger.attached = programs[2]
        two = debugger.on_msr_write(WRITTEN)
        nobody = debugger.on_msr_write(WRITTEN, pid=0x3F_FFFF)
        script = 'printf("%d %d %d %s %llx %llx\\n", $value, $pid, $tid, $pname, $proc, $thread);'
        telling = debugger.on_msr_write(WRITTEN, script=script, pid="all")
        run_on(one, two)
        assert one.recording is not None and two.recording is not None
        assert {(trap.value, trap.pid) for trap in one.recording} == {(1, programs[1])}
        assert {(trap.value, trap.pid) for trap in two.recording} == {(2, programs[2])}
        assert debugger.hits(one) + debugger.hits(two) == debugger.hits(telling) >= 100 and debugger.hits(nobody) == 0
        lines = b"".join(each.text for each in printed).decode().splitlines()
        assert len(lines) == debugger.hits(telling)
        linux = debugger.guest.linux
        tasks = {pid: linux.tasks.find(pid) for pid in programs.values()}
        for line in set(lines):
            value, pid, tid, name, process, thread = line.split()
            task = tasks[int(pid)]
            assert programs[int(value)] == int(pid) == int(tid) and task is not None
            assert (name, int(process, 16), int(thread, 16)) == (task.comm, task.address, task.address)

        # Nothing is known any more: nobody is taken for anybody.
        debugger.guest.reset()
        counts = [debugger.hits(event) for event in (one, two)]
        run_on(written)
        assert [debugger.hits(event) for event in (one, two)] == counts
        assert not known(list(written.recording)[-1])


def test_a_way_that_is_too_long() -> None:
    step = Step("pid", CPU, 0, 4)
    for steps in ([step] * 17, [Step(f"other {n}", CPU, 0, 8) for n in range(8)]):
        with pytest.raises(VmexitError, match="the agent"):
            pack(Recipe((1 << 63,), tuple(steps)))
    with pytest.raises(VmexitError, match="4097 CPUs"):
        pack(Recipe(tuple(range(1, 4098)), (step,)))
