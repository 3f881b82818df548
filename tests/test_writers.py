"""Who writes MSRs: programs that have the kernel write them, at each trap against what the guest's own tracer says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from tests.machines import Output, linux_arguments, newer_kernel
from vmexit import Debugger, LiveTrap, Stage, StopReason, Trap
from vmexit.events import Event
from vmexit.guest.linux.cache import Cache
from vmexit.guest_view import GuestView
from vmexit.link.wire import RecordFlag
from vmexit.setup.kernel import Kernel, find_kernel
from vmexit.targets.qemu import Qemu

SOURCE = Path(__file__).parent / "writers.c"
BOOT_S = 170
WRITTEN, MARK = 0, 1
BASES = range(0xC000_0100, 0xC000_0103, 2)
"""FS_BASE and KERNEL_GS_BASE."""
WATCHED = (range(WRITTEN, MARK + 1), BASES)
BASE, MSR, TRACED, PERF = range(1, 5)  # the kinds of writers.c
ROUNDS = 40

# What the guest's own kernel tells of these writes (its tracepoint msr:write_msr): between two marks on each CPU, while the
# programs, more than there are CPUs, take turns. Then they do so for ever.
COMMANDS = f"""
    tracer=/sys/kernel/tracing
    mount -t tracefs none $tracer
    echo 8192 > $tracer/buffer_size_kb
    echo 'msr == 0xc0000100 || msr == 0xc0000102 || msr <= 1' > $tracer/events/msr/write_msr/filter
    echo 1 > $tracer/events/msr/write_msr/enable
    last=$(($(nproc) - 1))
    mark() {{
        for cpu in $(seq 0 $last); do
            taskset $((1 << cpu)) sh -c 'printf "\\0'$1'\\0\\0\\0\\0\\0\\0\\0" |
                dd of=/dev/cpu/'$cpu'/msr bs=8 count=1 seek=1 oflag=seek_bytes conv=notrunc 2>/dev/null'
        done
    }}
    mark 1
    for kind in base msr ptrace base; do
        {{ writers $kind {ROUNDS} $last; echo "$kind=$?"; }} &
    done
    wait
    mark 2
    echo 0 > $tracer/tracing_on
    grep write_msr: $tracer/trace
    echo
    echo traced
    for kind in base msr ptrace; do
        writers $kind 0 $last &
    done
    sleep 1000
"""


W = TypeVar("W", "Write", Trap)


class Write(NamedTuple):
    """One write, by either account."""

    msr: int
    value: int
    tid: int


class Thread(NamedTuple):
    """A thread as it has introduced itself."""

    pid: int
    tid: int
    name: str


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, which the guest's programs are compiled with")
    path = tmp_path_factory.mktemp("program") / "writers"
    options = "-O1 -Wall -Wextra -Werror -ffreestanding -fno-stack-protector -fno-tree-loop-distribute-patterns"
    done = subprocess.run(["gcc", *options.split(), "-static", "-nostdlib", "-o", path, SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def owner(value: int) -> tuple[int, int, int]:
    """Kind, process and thread that a value of writers.c says."""
    return value >> 44, value >> 30 & 0x3FFF, value >> 16 & 0x3FFF


def introduced(text: str) -> list[Thread]:
    return [Thread(int(pid), int(tid), name) for pid, tid, name in re.findall(r"^thread (\d+) (\d+) (\S+)$", text, re.MULTILINE)]


def said_by_the_guest(text: str, core: int) -> list[Write]:
    """What its tracer has recorded on this CPU: "comm-TID [CPU] flags time: write_msr: MSR, value VALUE"."""
    found = re.findall(r"-(\d+) +\[0*(\d+)\] .* write_msr: ([0-9a-f]+), value ([0-9a-f]+)$", text, re.MULTILINE)
    return [Write(int(msr, 16), int(value, 16), int(tid)) for tid, cpu, msr, value in found if int(cpu) == core]


def between_marks(writes: Sequence[W]) -> list[W]:
    """What lies between the two writes of MARK."""
    marks = [index for index, write in enumerate(writes) if write.msr == MARK]
    assert [writes[index].value for index in marks] == [1, 2]
    return list(writes[marks[0] + 1 : marks[1]])


def told(traps: Iterable[Trap]) -> list[Write]:
    """By vmexit."""
    return [Write(trap.msr, trap.value, trap.tid) for trap in traps]


def by_core(traps: Iterable[Trap]) -> list[tuple[int, Write]]:
    """The same, core by core: two events may tell of the traps of two cores in different orders."""
    ordered = sorted(traps, key=lambda trap: trap.core)
    return list(zip((trap.core for trap in ordered), told(ordered), strict=True))


# The default processor has no WRFSBASE, and a kernel that does not use it writes the MSRs.
CONFIGURATIONS = {
    "one-cpu": ("", [], 1, find_kernel),
    "two-cpus": ("", [], 2, find_kernel),
    "isolated": ("nofsgsbase pti=on", ["-cpu", "max"], 2, find_kernel),
    "newer": ("", ["-cpu", "qemu64,-cx16"], 2, newer_kernel),
}


@pytest.mark.parametrize(("command_line", "more", "vcpus", "kernel"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_each_write_is_of_the_thread_that_the_guest_says(
    command_line: str, more: list[str], vcpus: int, kernel: Callable[[], Kernel], program: Path, tmp_path: Path
) -> None:
    output = Output()
    files = {"bin/writers": program}
    arguments = linux_arguments(COMMANDS, command_line=command_line, vcpus=vcpus, kernel=kernel(), files=files)
    with Debugger(Qemu([*arguments, *more], output=output)) as debugger:
        debugger.guest = GuestView(debugger, cache=Cache(tmp_path))
        events = [debugger.on_msr_write(msrs, with_process=True) for msrs in WATCHED]
        stop = debugger.run(until=lambda: "\ntraced\n" in output.text, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        text = output.text.split("\ntraced\n")[0]
        assert sorted(re.findall(r"^(\w+)=(\d+)$", text, re.MULTILINE)) == sorted(
            (kind, "0") for kind in ("base", "base", "msr", "ptrace")
        )
        traps = recorded(events)
        written = [trap for core in range(vcpus) for trap in between_marks([trap for trap in traps if trap.core == core])]
        check_against_the_guest(text, traps, vcpus)
        check_against_the_values(introduced(text), sorted(written), debugger)
        check_filters(debugger, events, output)


def recorded(events: Iterable[Event]) -> list[Trap]:
    """The records of several events, in the order in which they were made."""
    return sorted(trap for event in events if event.recording is not None for trap in event.recording)


def check_against_the_guest(text: str, traps: Sequence[Trap], vcpus: int) -> None:
    """Its own tracer tells of the same writes, by the same threads, in the same order."""
    for core in range(vcpus):
        said = between_marks(said_by_the_guest(text, core))
        assert told(between_marks([trap for trap in traps if trap.core == core])) == said
        assert len(said) > ROUNDS


def check_against_the_values(threads: Sequence[Thread], traps: Sequence[Trap], debugger: Debugger) -> None:
    """Each value says whose it is.

    A thread that sets its bases is the current one the first time that the kernel writes them. At every later time, and with a
    base that a tracer has set always, it is switched to, and the current thread is still the one that is switched from.
    """
    assert all(RecordFlag.PROCESS_KNOWN in trap.flags for trap in traps)
    assert len(threads) == 8
    names = {(pid, tid): name for pid, tid, name in threads}
    processes = {tid: pid for pid, tid, _ in threads}
    assert all(processes.get(trap.tid, trap.pid) == trap.pid for trap in traps)
    first: dict[tuple[int, int], Trap] = {}
    switches: list[tuple[int, int]] = []
    for trap in traps:
        kind, pid, tid = owner(trap.value)
        if kind not in (BASE, MSR, TRACED) or (pid, tid) not in names:
            continue
        if kind == TRACED or (trap.msr, trap.value) in first:
            assert kind != MSR and trap.tid != tid
            switches.append((trap.tid, tid))
        else:
            assert (trap.pid, trap.tid) == (pid, tid)
        first.setdefault((trap.msr, trap.value), trap)
    for (pid, tid), name in names.items():
        count = sum(owner(value)[2] == tid for _, value in first)
        assert count == (0 if name == "tracer" else ROUNDS if name.startswith("msrs") else 2 * ROUNDS), name
        # The two of ptrace need not have been the current thread at any write, or not since they had their names.
        assert name in ("tracer", "traced") or debugger.thread_names.get(pid, tid) == name
    assert {to for _, to in switches} >= {tid for (_, tid), name in names.items() if name == "traced"}


def check_filters(debugger: Debugger, events: Sequence[Event], output: Output) -> None:
    """Events about one process get the records that an event about all has of it, no more and no less, while all take turns."""

    def endless() -> list[Thread]:
        return introduced(output.text.split("\ntraced\n")[1])

    stop = debugger.run(until=lambda: len(endless()) == 6, timeout=BOOT_S)
    assert stop.reason == StopReason.CONDITION, output.text
    threads = endless()
    names = {tid: name for _, tid, name in threads}
    before = len(recorded(events))
    about = {pid: [debugger.on_msr_write(msrs, pid=pid) for msrs in WATCHED] for pid, _, _ in threads}
    assert len(about) == 4
    turns: Counter[tuple[str, str]] = Counter()

    def count_turns(traps: Sequence[Trap]) -> None:
        """From which of them to which, by what is written when one of them is switched to."""
        for trap in traps:
            kind, _, tid = owner(trap.value)
            if kind in (BASE, TRACED) and trap.tid != tid and {trap.tid, tid} <= names.keys():
                turns[names[trap.tid], names[tid]] += 1

    def enough() -> bool:
        # What is traced goes on after its tracer, and the two with bases of their own after anyone.
        to = {name: sum(count for (_, to), count in turns.items() if to == name) for name in ("bases", "bases-2", "traced")}
        return min(to.values()) >= 20 and all(sum(map(debugger.hits, mine)) >= 20 for mine in about.values())

    debugger.listeners.append(count_turns)
    stop = debugger.run(until=enough, timeout=BOOT_S)
    assert stop.reason == StopReason.CONDITION, (turns, output.text)
    since = recorded(events)[before:]
    for pid, mine in about.items():
        assert by_core(recorded(mine)) == by_core(trap for trap in since if trap.pid == pid) != []
        assert {trap.pid for trap in recorded(mine)} == {pid}
    by_msr = [trap for mine in about.values() for trap in recorded(mine) if trap.msr == WRITTEN]
    assert by_msr and all(owner(trap.value) == (MSR, trap.pid, trap.tid) for trap in by_msr)


# ---- performance counters ----

COUNTERS = range(0xC001_0000, 0xC001_0008)
"""PERFEVTSEL0 to 3 and PERFCTR0 to 3 of AMD's K7 and later."""
RDPMC, RDMSR = bytes.fromhex("0f33"), bytes.fromhex("0f32")

COUNTING = """
    dmesg | grep -E "Performance Events|PMU"
    echo counters
    last=$(($(nproc) - 1))
    for program in 1 2 3; do
        taskset $((1 << last)) writers perf 0 $last &
    done
    taskset $((1 << last)) writers base 0 $last &
    sleep 1000
"""


class Counters:
    """Performance counters for a processor that has none: each MSR of them holds what was last written.

    QEMU 7.2's emulation has them with no model ("-cpu max,pmu=on" neither): what is written into them is gone, and Linux, which
    looks, has "software events only". It does not know RDPMC either, which therefore is made an RDMSR in the guest: Linux reads
    its counters in one place. Nothing is ever counted, but what the kernel writes is what it would write.
    """

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self._held: dict[tuple[int, int], int] = {}
        debugger.on_msr_write(COUNTERS, self._on_write)
        for msrs in (COUNTERS, range(4)):
            debugger.on_msr_read(msrs, self._on_read, stage=Stage.POST)

    def _on_write(self, trap: LiveTrap) -> None:
        self._held[trap.core, trap.msr] = trap.value

    def _on_read(self, trap: LiveTrap) -> None:
        msr = trap.msr if trap.msr in COUNTERS else COUNTERS[4 + trap.msr]
        trap.value = self._held.get((trap.core, msr), 0)

    def replace_rdpmc(self) -> None:
        """Once the guest is known and halted."""
        linux = self._debugger.guest.linux
        address = linux.address_of("native_read_pmc")
        assert address is not None
        code = self._debugger.read_memory(0, address, 64)
        assert code.count(RDPMC) == 1
        self._debugger.write_memory(0, address + code.index(RDPMC), RDMSR)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_performance_counters_are_written_for_the_process_that_counts(vcpus: int, program: Path, tmp_path: Path) -> None:
    output = Output()
    arguments = linux_arguments(COUNTING, command_line="nmi_watchdog=0", vcpus=vcpus, files={"bin/writers": program})
    with Debugger(Qemu(arguments, output=output)) as debugger:
        debugger.guest = GuestView(debugger, cache=Cache(tmp_path))
        counters = Counters(debugger)
        stop = debugger.run(until=lambda: "\ncounters\n" in output.text, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        assert "Performance Events: AMD PMU driver." in output.text
        counters.replace_rdpmc()
        stop = debugger.run(until=lambda: len(introduced(output.text)) == 5, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        counting = {pid for pid, _, name in introduced(output.text) if name == "counting"}
        other = {pid for pid, _, name in introduced(output.text) if name == "bases"}
        assert len(counting) == 3 and len(other) == 1

        event = debugger.on_msr_write(COUNTERS, with_process=True)
        about = {pid: debugger.on_msr_write(COUNTERS, pid=pid) for pid in counting | other}
        stop = debugger.run(until=lambda: all(debugger.hits(about[pid]) >= 100 for pid in counting), timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        traps = recorded([event])
        for trap in traps:
            assert trap.pid == trap.tid in counting
            # What is counted, or from where: the period downwards, in the counter's 48 bits.
            period = PERF << 44 | trap.pid << 30 | trap.pid << 16
            assert trap.value & 0xFF == trap.pid & 0xFF if trap.msr in COUNTERS[:4] else trap.value == 2**48 - period
        for pid in counting:
            assert by_core(recorded([about[pid]])) == by_core(trap for trap in traps if trap.pid == pid)
            assert {trap.msr in COUNTERS[:4] for trap in recorded([about[pid]])} == {False, True}
            assert debugger.thread_names.get(pid, pid) == "counting"
        assert [debugger.hits(about[pid]) for pid in other] == [0]
