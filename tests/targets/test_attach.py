"""Attaching to machines that run already: nothing is lost or done twice, and they run on as if nothing had been."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests import expected
from tests.guests.build import OK_STATUS, build, qemu_arguments, symbols
from tests.machines import Output, need_kvm
from tests.vmm import build_vmm, vmm_arguments
from vmexit import Debugger, Stage, State, StopReason, Trap
from vmexit.errors import TargetError
from vmexit.link.client import RequestError
from vmexit.link.wire import Capability
from vmexit.targets import attach
from vmexit.targets.attach import Attached, check_attachable, find_agent, machines
from vmexit.targets.qemu import Qemu

ROOT = Path(__file__).parents[2]
QEMU = "qemu-system-x86_64"
COUNT = 300_000
"""Writes of a guest in a loop: some seconds, of which a test takes as many as it needs."""
PARAVIRTUAL = 0x12345
PATIENCE_S = 60.0

_LOCK = """
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = 1, .filter = &all};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0)
        execv(argv[argc > 1], argv + 1);
    return 1;
}
"""
"""Starts a program under a filter of system calls that lets everything through."""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts VMMs that know nothing of vmexit."""
    processes: list[subprocess.Popen[str]] = []

    def start(kind: str, name: str, vcpus: int = 1, *, many_slots: bool = False, **defines: int | str) -> subprocess.Popen[str]:
        need_kvm()
        pytest.importorskip("pyinjector", reason="pyinjector is missing: attaching to a running VMM needs it")
        image = build(name, **defines)
        if kind == "vmm":
            command = [str(build_vmm()), *vmm_arguments(image, vcpus, many_slots=many_slots)]
        else:
            arguments = ["-accel", kind, *(("-cpu", "host") if kind == "kvm" else ())]
            command = [QEMU, *arguments, *qemu_arguments(image, vcpus, machine="microvm")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[str, int]:
    """What the VMM has printed, and its status, once its guest has come to its end."""
    said, _ = process.communicate(timeout=2 * PATIENCE_S)
    return said, process.returncode


def right_sum(count: int) -> str:
    return f"sum={count * (count + 1) // 2:016x} last=5a5a5a5a00000001"


def wait_for_vm(process: subprocess.Popen[Any]) -> None:
    """Until the guest is in its loop, or nearly."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(machine.pid == process.pid and machine.vcpus for machine in machines()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)


def some_writes(debugger: Debugger, count: int) -> list[int]:
    """The lower halves of so many values, at least, that the guest writes to STAR from now on."""
    traps: list[Trap] = []
    debugger.listeners.append(traps.extend)
    event = debugger.on_msr_write(expected.STAR)
    deadline = time.monotonic() + PATIENCE_S
    while len(traps) < count and time.monotonic() < deadline:
        debugger.pump(0.02)
    debugger.clear(event)
    debugger.pump()
    return [trap.value & 0xFFFF_FFFF for trap in traps]


@pytest.mark.parametrize("kind", ["kvm", "vmm"])
def test_twenty_times_in_mid_traffic(start: Start, kind: str) -> None:
    process = start(kind, "loop", COUNT=COUNT)
    wait_for_vm(process)
    last = COUNT + 1
    for _ in range(20):
        with Debugger(Attached(process.pid)) as debugger:
            assert debugger.state == State.RUNNING
            values = some_writes(debugger, 200)
            assert len(values) >= 200
            # Each one less than the one before: none is missing, none came twice.
            assert values == list(range(values[0], values[0] - len(values), -1))
            assert values[0] < last
            last = values[-1]
    said, status = ended(process)
    assert (said.strip(), status) == (right_sum(COUNT), OK_STATUS)


def test_two_vcpus(start: Start) -> None:
    process = start("kvm", "smp", 2, COUNT=COUNT // 2, PATIENCE=1 << 20)
    wait_for_vm(process)
    for _ in range(3):
        with Debugger(Attached(process.pid)) as debugger:
            assert debugger.target.vcpus == 2
            traps: list[Trap] = []
            debugger.listeners.append(traps.extend)
            event = debugger.on_msr_write(expected.STAR)
            deadline = time.monotonic() + PATIENCE_S
            while not all(sum(trap.core == core for trap in traps) > 50 for core in range(2)) and time.monotonic() < deadline:
                debugger.pump(0.02)
            debugger.clear(event)
            debugger.pump()
            for core in range(2):
                values = [trap.value for trap in traps if trap.core == core]
                assert values == list(range(values[0], values[0] - len(values), -1))
                assert values[0] >> 32 == core
    said, status = ended(process)
    half = COUNT // 2
    sums = [half * (half + 1) // 2 + core * half * (1 << 32) for core in range(2)]
    assert said.splitlines() == [f"core={core:02x} sum={sums[core]:016x} last={core << 32 | 1:016x}" for core in range(2)]
    assert status == OK_STATUS


@pytest.mark.parametrize("kind", ["kvm", "vmm"])
def test_breaks_registers_memory(start: Start, kind: str) -> None:
    process = start(kind, "loop", COUNT=COUNT)
    wait_for_vm(process)
    rip = symbols(build("loop", COUNT=COUNT))["loop_wrmsr"]
    with Debugger(Attached(process.pid)) as debugger:
        event = debugger.on_msr_write(expected.STAR, lambda trap: trap.halt(), stage=Stage.ALL)
        stages = []
        for _ in range(6):
            stop = debugger.run(timeout=60)
            assert stop.reason == StopReason.BREAK and stop.trap is not None
            stages.append(stop.trap.stage)
            assert debugger.registers()["rip"] == rip + (2 if stop.trap.stage == Stage.POST else 0)
            assert debugger.read_memory(0, rip, 2) == b"\x0f\x30"
        assert stages == [Stage.PRE, Stage.POST] * 3
        debugger.clear(event)
        stop = debugger.run(timeout=0.1)
        assert stop.reason == StopReason.TIMEOUT
    # It was halted when it was let go of, and runs on.
    said, status = ended(process)
    assert (said.strip(), status) == (right_sum(COUNT), OK_STATUS)


SLOTS = {
    7: (0, 0xA0000),
    3: (0xE0000, 0x20000),
    0: (1 << 20, 63 << 20),
    5: (1 << 32, 2 << 20),
    6: ((1 << 32) + (2 << 20), 0x180000),
}
"""Of the VMM with many: by their numbers, where each begins, and its size (tests/vmm/vmm.c)."""


def test_memory_that_was_set_up_before(start: Start) -> None:
    """Its slots are found by asking KVM, which changes none of them."""
    process = start("vmm", "loop", 2, many_slots=True, COUNT=COUNT)
    wait_for_vm(process)
    image = build("loop", COUNT=COUNT)
    with Debugger(Attached(process.pid)) as debugger:
        assert debugger.state == State.RUNNING
        assert Capability.MEMORY | Capability.MEMORY_WRITE in debugger.target.link.capabilities
        debugger.run(timeout=0.1)
        for number, (first, size) in SLOTS.items():
            end = debugger.read_memory(0, first + size - 16, 16, physical=True)
            assert end.rstrip(b"\0") == b"end of slot %d" % number
        # A read over the border of two slots, and one into a gap.
        assert debugger.read_memory(0, (1 << 20) - 16, 32, physical=True).startswith(b"end of slot 3")
        with pytest.raises(RequestError, match="the address is not mapped"):
            debugger.read_memory(0, 0xA0000 - 8, 16, physical=True)
        code = symbols(image)["loop_wrmsr"]
        assert debugger.read_memory(0, code, 2) == debugger.read_memory(0, code, 2, physical=True) == b"\x0f\x30"
        debugger.write_memory(0, 0x9000, b"written", physical=True)
        assert debugger.read_memory(0, 0x9000, 7, physical=True) == b"written"
    said, status = ended(process)
    assert (said.splitlines(), status) == ([right_sum(COUNT), "slots intact"], OK_STATUS)


_KILLED = """
import sys, time
from vmexit import Debugger
from vmexit.targets.attach import Attached
debugger = Debugger(Attached(int(sys.argv[1])))
debugger.on_msr_write(0xC0000081, lambda trap: trap.halt())
stop = debugger.run(timeout=60)
print(stop.reason.name, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["kvm", "vmm"])
def test_the_debugger_is_killed_while_a_vcpu_is_stopped(start: Start, kind: str) -> None:
    process = start(kind, "loop", COUNT=COUNT)
    wait_for_vm(process)
    other = subprocess.Popen([sys.executable, "-c", _KILLED, str(process.pid)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout is not None
    with other.stdout:
        assert other.stdout.readline() == "BREAK\n"
        other.kill()
        other.wait()
    with Debugger(Attached(process.pid)) as debugger:
        assert debugger.state == State.RUNNING
        values = some_writes(debugger, 50)
        assert values == list(range(values[0], values[0] - len(values), -1))
    said, status = ended(process)
    assert (said.strip(), status) == (right_sum(COUNT), OK_STATUS)


def test_what_the_vmm_keeps_to_itself_is_its_own_again(start: Start) -> None:
    """QEMU's filter is restored: its reads of MSR 35h still end in QEMU, which knows how many cores there are."""
    process = start("kvm", "hang")
    wait_for_vm(process)
    with Debugger(Attached(process.pid)) as debugger:
        debugger.on_msr_write()
        debugger.run(timeout=0.2)
    assert process.poll() is None
    with Debugger(Attached(process.pid)) as debugger:
        assert some_writes(debugger, 5)


def test_a_paused_qemu(start: Start, tmp_path: Path) -> None:
    need_kvm()
    pytest.importorskip("pyinjector")
    command = [QEMU, "-accel", "kvm", "-cpu", "host", *qemu_arguments(build("sequence"), machine="microvm"), "-S"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not any(machine.pid == process.pid and machine.vcpus for machine in machines()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        with Debugger(Attached(process.pid)) as debugger:
            assert debugger.state == State.HALTED
            event = debugger.on_msr_write(expected.LSTAR)
            stop = debugger.run(timeout=60)
            assert stop.reason == StopReason.ENDED
            assert debugger.hits(event) == 1
        assert ended(process)[1] == OK_STATUS
    finally:
        process.kill()
        process.communicate()


def test_a_qemu_that_was_paused_after_it_had_run(tmp_path: Path) -> None:
    """Its vCPU's thread does not come to the agent, and KVM has a thread of its own that seems to be in KVM_RUN for ever."""
    need_kvm()
    pytest.importorskip("pyinjector")
    monitor = tmp_path / "monitor"
    arguments = [*qemu_arguments(build("hang"), machine="microvm"), "-qmp", f"unix:{monitor},server=on,wait=off"]
    process = subprocess.Popen(
        [QEMU, "-accel", "kvm", "-cpu", "host", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_for_vm(process)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(monitor))
            lines = connection.makefile("rw")
            for command in ("qmp_capabilities", "stop"):
                lines.write(f'{{"execute": "{command}"}}\n')
                lines.flush()
            while '"STOP"' not in lines.readline():
                pass
            lines.close()
        with Debugger(Attached(process.pid)) as debugger:
            assert debugger.state == State.HALTED
            event = debugger.on_msr_write(expected.STAR)
            assert debugger.run(until=lambda: debugger.hits(event) > 3, timeout=60).reason == StopReason.CONDITION
    finally:
        process.kill()
        process.wait()


def test_a_guest_that_was_started_with_the_agent_and_let_go_of() -> None:
    """Emulated too: its debugger detaches, and another one comes."""
    output = Output()
    arguments = ["-accel", "tcg", *qemu_arguments(build("hang"), machine="microvm")]
    debugger = Debugger(Qemu(arguments, output=output))
    pid = debugger.target.pid
    try:
        debugger.run(timeout=0.3)
        debugger.detach()
        assert debugger.state == State.ENDED
        for _ in range(3):
            with Debugger(Attached(pid)) as other:
                assert other.target.link.door == "tcg"
                assert other.state == State.RUNNING
                values = some_writes(other, 5)
                assert values == list(range(values[0], values[0] + len(values)))
                assert other.run(timeout=0.2).reason == StopReason.TIMEOUT
                assert other.registers()["rip"] != 0
        assert [machine.kvm for machine in machines() if machine.pid == pid] == [False]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_only_one_debugger_at_a_time(start: Start) -> None:
    process = start("vmm", "hang")
    wait_for_vm(process)
    with Debugger(Attached(process.pid)) as debugger:
        with pytest.raises(TargetError, match=r"process \d+: another debugger is attached to this machine"):
            Attached(process.pid)
        assert some_writes(debugger, 5)


def test_the_list(start: Start) -> None:
    process = start("kvm", "hang", 2)
    wait_for_vm(process)
    (machine,) = [machine for machine in machines() if machine.pid == process.pid]
    assert (machine.vcpus, machine.kvm, machine.name) == (2, True, "qemu-system-x86")
    assert machine.memory > 1 << 20


def test_it_ends_under_us(start: Start) -> None:
    process = start("vmm", "hang")
    wait_for_vm(process)
    with Debugger(Attached(process.pid)) as debugger:
        process.kill()
        assert debugger.run(timeout=60).reason == StopReason.ENDED


class TestRefused:
    """One line each, with what would help."""

    def refused(self, pid: int, says: str) -> None:
        with pytest.raises(TargetError, match=says) as error:
            Attached(pid)
        assert "\n" not in str(error.value)

    def test_no_such_process(self) -> None:
        self.refused(2**31 - 1, "there is no process 2147483647")

    def test_no_vmm(self) -> None:
        self.refused(os.getpid(), "runs no virtual machine of KVM's; 'vmexit attach' without a number lists")

    def test_an_emulated_guest_without_the_agent(self, start: Start) -> None:
        process = start("tcg", "hang")
        deadline = time.monotonic() + PATIENCE_S
        while "qemu" not in Path(f"/proc/{process.pid}/comm").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.refused(process.pid, r"emulates its machine \(TCG\) and was started without the agent: start it by 'vmexit run'")

    def test_a_static_vmm(self) -> None:
        need_kvm()
        process = subprocess.Popen([build_vmm(static=True), *vmm_arguments(build("hang"))], stdout=subprocess.DEVNULL)
        try:
            wait_for_vm(process)
            self.refused(process.pid, "linked statically")
        finally:
            process.kill()
            process.wait()

    def test_one_that_is_traced(self, start: Start) -> None:
        process = start("vmm", "hang")
        wait_for_vm(process)
        tracer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import ctypes,time; ctypes.CDLL(None).ptrace(0x4206, {process.pid}, None, None); time.sleep(60)",
            ]
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while "TracerPid:\t0" in Path(f"/proc/{process.pid}/status").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            self.refused(process.pid, f"is being traced by process {tracer.pid}")
        finally:
            tracer.kill()
            tracer.wait()

    def test_one_that_is_really_locked_by_seccomp(self, tmp_path: Path) -> None:
        need_kvm()
        lock = tmp_path / "lock.c"
        lock.write_text(_LOCK)
        subprocess.run(["gcc", "-o", tmp_path / "lock", lock], check=True)
        command = [str(tmp_path / "lock"), str(build_vmm()), *vmm_arguments(build("hang"))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)
        try:
            wait_for_vm(process)
            self.refused(process.pid, "is locked by seccomp, which may end it .* start it without")
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()

    def test_one_that_is_really_another_users(self, start: Start) -> None:
        if os.geteuid() != 0:
            pytest.skip("who is not root cannot become somebody else")
        process = start("vmm", "hang")
        wait_for_vm(process)
        os.seteuid(65534)
        try:
            self.refused(process.pid, r"process \d+ \(vmm-.*\) is root's: run vmexit as that user, or as root")
        finally:
            os.seteuid(0)

    @pytest.mark.parametrize(
        ("status", "says"), [("Seccomp:\t2\n", "locked by seccomp.*without -sandbox"), ("TracerPid:\t7\n", "traced by process 7")]
    )
    def test_by_what_the_kernel_tells(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, says: str) -> None:
        self.play(tmp_path, monkeypatch, status)
        self.refused(77, says)

    def test_another_users(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play(tmp_path, monkeypatch, "")
        owner = os.getuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        self.refused(77, r"process 77 \(played\) is .*'s: run vmexit as that user, or as root")

    def test_energy_counters_of_qemus_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play(tmp_path, monkeypatch, "", comm="qemu-system-x86", arguments="qemu\0-accel\0kvm,rapl=on\0")
        self.refused(77, "keeps MSRs to itself .* without rapl=on")

    def play(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, status: str, *, comm: str = "played", arguments: str = "played\0"
    ) -> None:
        """A process 77 that runs a virtual machine, in a /proc of its own."""
        process = folder / "77"
        (process / "fd").mkdir(parents=True)
        (process / "fd" / "3").symlink_to("anon_inode:kvm-vm")
        (process / "task" / "77").mkdir(parents=True)
        for place in (process, process / "task" / "77"):
            (place / "status").write_text(status)
        (process / "comm").write_text(comm + "\n")
        (process / "cmdline").write_text(arguments)
        monkeypatch.setattr(attach, "_PROC", folder)
        assert find_agent(77) is None
        if status == "" and comm == "played":
            check_attachable(77)
