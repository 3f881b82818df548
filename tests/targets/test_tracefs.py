"""Looking at this host, and at virtual machines of KVM's, through the real tracepoints. Needs root."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS, build
from tests.machines import need_kvm
from tests.vmm import build_vmm, vmm_arguments
from vmexit import Debugger, Stage, State, StopReason, Trap
from vmexit.errors import TargetError, VmexitError
from vmexit.events.event import Event
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, RecordFlag
from vmexit.targets import trace_instance
from vmexit.targets.attach import vcpus_of
from vmexit.targets.trace_instance import Instance
from vmexit.targets.tracefs import Host, Watched

TSC_DEADLINE = 0x6E0
STAR = 0xC000_0081
SYSENTER_CS = 0x174
_PATIENCE_S = 60.0

Start = Callable[..., "subprocess.Popen[str]"]


def need_tracing(system: str, name: str) -> None:
    """Skips the test where the tracepoint cannot be had."""
    try:
        Instance([(system, name)]).close()
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture
def host() -> Iterator[Debugger]:
    """This host, which writes IA32_TSC_DEADLINE for each timer that is set."""
    need_tracing("msr", "write_msr")
    device = Path("/sys/devices/system/clockevents/clockevent0/current_device")
    if not device.exists() or device.read_text().strip() != "lapic-deadline":
        pytest.skip("this host's timers do not go by IA32_TSC_DEADLINE: nothing is known to write MSRs here")
    with Debugger(Host()) as debugger:
        yield debugger


@pytest.fixture
def timers() -> Iterator[Callable[[int], int]]:
    """Starts a process that sets timers on one CPU without end; gives its number."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(cpu: int) -> int:
        program = f"import os, time; os.sched_setaffinity(0, {{{cpu}}}); print(flush=True)\nwhile True: time.sleep(0.0005)"
        process = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def event(msr: int, *, core: int | None = None, process: int | None = None) -> Event:
    return Event(
        access=Access.WRMSR,
        msrs=MsrSet.of(msr),
        stage=Stage.POST,
        core=core,
        process=process,
        action=Action.RECORD,
        text="test",
    )


def collect(debugger: Debugger, count: int) -> list[Trap]:
    """At least so many traps, from now on."""
    traps: list[Trap] = []
    debugger.listeners.append(traps.extend)
    deadline = time.monotonic() + _PATIENCE_S
    while len(traps) < count and time.monotonic() < deadline:
        debugger.pump(0.05)
    debugger.listeners.remove(traps.extend)
    assert len(traps) >= count
    return traps


def settled(debugger: Debugger, made: Event) -> int:
    """The hits of an event that nothing more comes of, once those are taken that the kernel had noted by then."""
    hits = -1
    while hits != (hits := debugger.hits(made)):
        debugger.pump(0.05)
    return hits


def instances() -> set[str]:
    """Those of vmexits."""
    root, mount = trace_instance._find_tracefs()
    try:
        return {path.name for path in (root / "instances").iterdir() if path.name.startswith("vmexit-")}
    finally:
        if mount is not None:
            os.close(mount)


def instances_of(pid: int) -> set[str]:
    return {name for name in instances() if name.startswith(f"vmexit-{pid}-")}


class TestHost:
    def test_its_writes_are_seen(self, host: Debugger) -> None:
        started = time.monotonic_ns()
        assert host.state is State.RUNNING
        made = host.add(event(TSC_DEADLINE))
        traps = collect(host, 100)
        assert [trap.sequence for trap in traps] == list(range(len(traps)))
        assert {(trap.msr, trap.access, trap.stage, trap.event) for trap in traps} == {
            (TSC_DEADLINE, Access.WRMSR, Stage.POST, made.number)
        }
        assert all(started < trap.time_ns < time.monotonic_ns() for trap in traps)
        times = [trap.time_ns for trap in traps]
        assert times == sorted(times)
        assert host.hits(made) == host.summary.total >= 100
        assert host.dropped() == 0

    def test_one_core(self, host: Debugger, timers: Callable[[int], int]) -> None:
        core = max(os.sched_getaffinity(0))
        timers(core)
        host.add(event(TSC_DEADLINE, core=core))
        assert {trap.core for trap in collect(host, 50)} == {core}
        assert f"CPU == {core}" in filter_of(host)

    def test_one_process(self, host: Debugger, timers: Callable[[int], int]) -> None:
        core = max(os.sched_getaffinity(0))
        pid = timers(core)
        other = timers(core)
        host.add(event(TSC_DEADLINE, process=pid))
        traps = collect(host, 50)
        assert {(trap.core, trap.pid, trap.tid) for trap in traps} == {(core, pid, pid)}
        assert all(RecordFlag.PROCESS_KNOWN in trap.flags for trap in traps)
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        assert host.names.thread(pid, pid) == f"pid {pid:x} {name}"
        assert filter_of(host) == f"(msr == {TSC_DEADLINE:#x} && (common_pid == {pid}))"
        assert other != pid

    def test_a_process_that_is_not_there(self, host: Debugger) -> None:
        with pytest.raises(TargetError, match="there is no process 4194305"):
            host.add(event(TSC_DEADLINE, process=4194305))
        assert not len(host.events)

    def test_what_is_disabled_is_not_seen(self, host: Debugger) -> None:
        made = host.add(event(TSC_DEADLINE))
        collect(host, 10)
        host.enable(made, False)
        hits = settled(host, made)
        time.sleep(0.2)
        host.pump()
        assert host.hits(made) == hits
        host.enable(made)
        collect(host, 10)

    def test_noise_is_left_out_unless_named(self, host: Debugger) -> None:
        made = host.on_msr_write(stage=Stage.POST)
        assert TSC_DEADLINE not in made.msrs
        assert "msr != 0x6e0" in filter_of(host)

    def test_paused_and_gone_on_with(self, host: Debugger) -> None:
        made = host.add(event(TSC_DEADLINE))
        assert host.run(until=lambda: host.hits(made) > 20, timeout=_PATIENCE_S).reason is StopReason.CONDITION
        hits = settled(host, made)
        time.sleep(0.2)
        host.pump()
        assert host.hits(made) == hits
        assert host.run(until=lambda: host.hits(made) > hits, timeout=_PATIENCE_S).reason is StopReason.CONDITION

    def test_losses_are_counted(self, host: Debugger) -> None:
        target = host.target
        assert isinstance(target, Host)
        target._instance.write("buffer_size_kb", "1")
        made = host.add(event(TSC_DEADLINE))
        deadline = time.monotonic() + _PATIENCE_S
        while not host.dropped() and time.monotonic() < deadline:
            for _ in range(5000):
                time.sleep(0.00001)
            host.pump()
        assert host.dropped() > 0
        assert host.hits(made) > 0

    def test_what_cannot_be_done_is_refused(self, host: Debugger) -> None:
        with pytest.raises(VmexitError, match="stage pre is not possible here: a tracepoint only tells"):
            host.on_msr_write(TSC_DEADLINE)
        with pytest.raises(VmexitError, match="a callback is not possible here: a tracepoint only tells"):
            host.on_msr_write(TSC_DEADLINE, lambda trap: None, stage=Stage.POST)
        with pytest.raises(VmexitError, match="a script is not possible here: a tracepoint only tells"):
            host.on_msr_write(TSC_DEADLINE, script="print(1);", stage=Stage.POST)
        with pytest.raises(VmexitError, match=r"breaking is not possible here: .*'log' prints each access"):
            host.add(Event(access=Access.WRMSR, msrs=MsrSet.of(TSC_DEADLINE), stage=Stage.POST))
        with pytest.raises(VmexitError, match="there is no core fff"):
            host.add(event(TSC_DEADLINE, core=0xFFF))
        for refused in (host.registers, lambda: host.read_memory(0, 0, 8), lambda: host.decide(True)):
            with pytest.raises(TargetError, match="is not possible here: a tracepoint only tells"):
                refused()
        assert not len(host.events)

    def test_what_is_evaluated_beside_it_works(self, host: Debugger) -> None:
        assert host.evaluate('printf("%x", 3 + 4);') == b"7"


def filter_of(debugger: Debugger) -> str:
    target = debugger.target
    assert isinstance(target, Host)
    return target._instance.read("events/msr/write_msr/filter").strip()


class TestNothingIsLeft:
    def test_closed(self) -> None:
        need_tracing("msr", "write_msr")
        before = instances_of(os.getpid())
        with Debugger(Host()) as debugger:
            assert len(instances_of(os.getpid()) - before) == 1
            debugger.add(event(TSC_DEADLINE))
        assert instances_of(os.getpid()) == before

    def test_two_do_not_disturb_each_other(self) -> None:
        need_tracing("msr", "write_msr")
        with Debugger(Host()) as one, Debugger(Host()):
            assert len(instances_of(os.getpid())) >= 2
            one.close()
            assert len(instances_of(os.getpid())) >= 1

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_ended_by_a_signal(self, how: signal.Signals) -> None:
        with watching_host() as process:
            assert instances_of(process.pid)
            process.send_signal(how)
            _, complaint = process.communicate(timeout=_PATIENCE_S)
            assert instances_of(process.pid) == set()
            assert "Traceback" not in complaint

    def test_killed(self) -> None:
        with watching_host() as process:
            (left,) = instances_of(process.pid)
            process.kill()
            process.communicate(timeout=_PATIENCE_S)
            assert process.returncode == -signal.SIGKILL
        Instance([("msr", "write_msr")]).close()  # a later start
        assert left not in instances()

    def test_without_being_root(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("who is not root cannot become somebody else")
        os.seteuid(65534)
        try:
            with pytest.raises(TargetError, match=r"^the kernel's tracepoints are for root: run vmexit as root \(sudo\)$"):
                Host()
        finally:
            os.seteuid(0)

    @pytest.mark.parametrize(
        ("error", "said"),
        [(errno.ENODEV, "this kernel has no tracefs"), (errno.ENOSYS, "mount -t tracefs tracefs /sys/kernel/tracing")],
    )
    def test_without_tracefs(self, monkeypatch: pytest.MonkeyPatch, error: int, said: str) -> None:
        def refuse(filesystem: str) -> int:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(trace_instance, "_MOUNTED", (Path("/nowhere"),))
        monkeypatch.setattr(trace_instance, "mount_for_us", refuse)
        with pytest.raises(TargetError, match=said):
            Host()

    def test_a_tracepoint_that_is_not_there(self) -> None:
        need_tracing("msr", "write_msr")
        before = instances_of(os.getpid())
        with pytest.raises(TargetError, match="this kernel has no tracepoint msr:nothing"):
            Instance([("msr", "write_msr"), ("msr", "nothing")])
        assert instances_of(os.getpid()) == before


def test_a_session_from_a_pipe() -> None:
    need_tracing("msr", "write_msr")
    commands = ["!msrwrite 10 log", "pause", "r", ".status", "g", "g", "sleep 1", "detach"]
    command = [sys.executable, "-m", "vmexit", "host"]
    done = subprocess.run(command, input="\n".join(commands), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "paused: nothing is watched until 'g'" in done.stdout
    assert "agent    through a tracepoint; can record, post" in done.stdout
    assert "the machine runs already" in done.stdout
    assert done.stdout.endswith("nothing is watched any more\n")
    assert done.stderr.startswith("reading registers is not possible here: a tracepoint only tells")


@contextlib.contextmanager
def watching_host() -> Iterator[subprocess.Popen[str]]:
    """A vmexit that looks at this host, until the test ends it, or at last here."""
    need_tracing("msr", "write_msr")
    command = [sys.executable, "-m", "vmexit", "host", "--batch", "-x", "!msrwrite 10 log"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("event 0 prints each wrmsr of 10 "):
                process.kill()
                pytest.fail(f"it said {said!r} and {process.communicate()[1]!r}")
            yield process
        finally:
            process.kill()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts VMMs that know nothing of vmexit."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str, vcpus: int = 1, **defines: int | str) -> subprocess.Popen[str]:
        need_kvm()
        need_tracing("kvm", "kvm_msr")
        command = [str(build_vmm()), *vmm_arguments(build(name, **defines), vcpus)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def watched(process: subprocess.Popen[str], vcpus: int = 1) -> Debugger:
    """Its machine, as soon as it has one with so many vCPUs."""
    deadline = time.monotonic() + _PATIENCE_S
    while vcpus_of(process.pid) < vcpus:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return Debugger(Watched(process.pid))


COUNT = 0xFFFF_FFFF
"""Writes of a guest that runs until it is killed."""


class TestWatched:
    def test_none_is_missed(self, start: Start) -> None:
        with watched(start("loop", COUNT=COUNT)) as debugger:
            made = debugger.on_msr_write(STAR, stage=Stage.POST)
            values = [trap.value & 0xFFFF_FFFF for trap in collect(debugger, 2000)]
            assert values == list(range(values[0], values[0] - len(values), -1))
            assert debugger.dropped() == 0
            assert debugger.hits(made) == len(values)

    def test_two_vcpus(self, start: Start) -> None:
        with watched(start("smp", 2, COUNT=COUNT, PATIENCE=1 << 20), 2) as debugger:
            assert debugger.target.vcpus == 2
            debugger.on_msr_write(STAR, stage=Stage.POST)
            seen: dict[int, list[int]] = {0: [], 1: []}
            for trap in collect(debugger, 4000):
                assert trap.value >> 32 == trap.core
                seen[trap.core].append(trap.value & 0xFFFF_FFFF)
            for values in seen.values():
                assert values == list(range(values[0], values[0] - len(values), -1))

    def test_one_vcpu(self, start: Start) -> None:
        with watched(start("smp", 2, COUNT=COUNT, PATIENCE=1 << 20), 2) as debugger:
            debugger.on_msr_write(STAR, core=1, stage=Stage.POST)
            assert {trap.value >> 32 for trap in collect(debugger, 500)} == {1}

    def test_others_are_not_seen(self, start: Start) -> None:
        other = start("loop", COUNT=COUNT, MSR=SYSENTER_CS)
        with watched(start("loop", COUNT=COUNT)) as debugger:
            debugger.on_msr_write(range(1 << 32), stage=Stage.POST)
            seen = {trap.msr for trap in collect(debugger, 500)}  # it may still be setting up what it runs in
            assert STAR in seen
            assert SYSENTER_CS not in seen
        assert other.poll() is None

    def test_it_notices_nothing_and_its_end_is_noticed(self, start: Start) -> None:
        count = 100_000  # it runs when it is found, and has to for as long as that takes
        process = start("loop", COUNT=count)
        with watched(process) as debugger:
            debugger.on_msr_write(STAR, stage=Stage.POST)
            stop = debugger.run(timeout=_PATIENCE_S * 2)
            assert stop.reason is StopReason.ENDED
        said, _ = process.communicate(timeout=_PATIENCE_S)
        assert process.returncode == OK_STATUS
        assert f"sum={count * (count + 1) // 2:016x}" in said

    def test_what_runs_no_machine(self) -> None:
        with pytest.raises(TargetError, match=rf"process {os.getpid()} \(.*\) runs no virtual machine of KVM's; 'vmexit watch'"):
            Watched(os.getpid())
        with pytest.raises(TargetError, match="there is no process 4194305"):
            Watched(4194305)
