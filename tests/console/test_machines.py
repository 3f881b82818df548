"""``vmexit run`` with KVM and with other VMMs, ``vmexit attach`` and ``detach``, as a person uses them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.console.vmexits import TIME_S, Terminal, run
from tests.guests.build import OK_STATUS, build, qemu_arguments
from tests.machines import need_kvm
from tests.vmm import build_vmm, vmm_arguments
from vmexit.targets.attach import machines

LOG = ("--batch", "-x", "!msrwrite c0000082 log")


@pytest.fixture(autouse=True)
def kvm() -> None:
    need_kvm()


@pytest.fixture
def hang() -> Iterator[int]:
    """The process of a VMM that knows nothing of vmexit and whose guest writes STAR without end."""
    pytest.importorskip("pyinjector", reason="pyinjector is missing: attaching to a running VMM needs it")
    process = subprocess.Popen([build_vmm(), *vmm_arguments(build("hang"))], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIME_S
    while not any(machine.pid == process.pid and machine.vcpus for machine in machines()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    yield process.pid
    process.kill()
    process.wait()


def test_qemu_with_kvm() -> None:
    done = run("run", "--accel", "kvm", *LOG, "--", "-cpu", "host", *qemu_arguments(build("sequence"), machine="microvm"))
    assert done.returncode == OK_STATUS
    assert re.search(r"pre +wrmsr +c0000082 .*ffff923344556677", done.stdout)
    assert "msr=c0000082 value=ffff923344556677" in done.stdout
    assert done.stderr.splitlines()[-1] == f"QEMU ended with status {OK_STATUS}"


def test_another_vmm() -> None:
    vmm = build_vmm()
    done = run("run", "--vmm", str(vmm), *LOG, "--", *vmm_arguments(build("sequence")))
    assert done.returncode == OK_STATUS
    assert re.search(r"pre +wrmsr +c0000082 .*ffff923344556677", done.stdout)
    assert "msr=c0000082 value=ffff923344556677" in done.stdout
    assert done.stderr.splitlines()[-1] == f"{vmm.name} ended with status {OK_STATUS}"


def test_a_break_at_the_prompt_of_another_vmm() -> None:
    lines = "!msrwrite c0000082\ng\nr rdx\nr eax = 1234\ng\n"
    done = run("run", "--vmm", str(build_vmm()), "--", *vmm_arguments(build("sequence")), given=lines)
    assert "event 0 triggered (pre) on core 0" in done.stdout
    assert "rdx=00000000ffff9233" in done.stdout
    assert "msr=c0000082 value=ffff923300001234" in done.stdout


def test_what_never_traps_is_told() -> None:
    done = run(
        "run", "--vmm", str(build_vmm()), "-x", "!msrwrite log", "-x", "!msrwrite 808", "--", *vmm_arguments(build("hang"))
    )
    assert "800 to 8ff (KVM lets no filter apply to x2APIC MSRs)" in done.stdout
    assert "MSR 808 cannot be trapped in vmm-" in done.stderr
    assert done.returncode == 1


def test_a_vmm_that_is_none() -> None:
    done = run("run", "--vmm", "true", "--")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vmexit: true did not start a virtual machine of KVM's: it ended with status 0\n"


def test_attached_looked_at_and_let_go_of(hang: int) -> None:
    for _ in range(2):
        done = run("attach", str(hang), "-x", "!msrwrite c0000081 log", "-x", "sleep 0n3000", "-x", "detach")
        assert done.stderr == ""
        assert done.returncode == 0
        assert re.search(r"pre +wrmsr +c0000081", done.stdout)
        assert done.stdout.splitlines()[-1] == f"detached; 'vmexit attach {hang}' comes back"
        os.kill(hang, 0)


def test_attached_with_a_break(hang: int) -> None:
    lines = "!msrwrite c0000081\nsleep 0n3000\nr rcx\n.status\n.exit\n"
    done = run("attach", str(hang), given=lines)
    assert "event 0 triggered (pre) on core 0" in done.stdout
    assert "rcx=00000000c0000081" in done.stdout
    assert f"(process {hang}), 1 core" in done.stdout
    assert done.returncode == 0
    os.kill(hang, 0)  # it is not vmexit's to end
    done = run("attach", str(hang), "-x", "!msrwrite log", "-x", "sleep 0n3000", "-x", ".exit")
    assert re.search(r"pre +wrmsr +c0000081", done.stdout)


def test_the_list(hang: int) -> None:
    done = run("attach")
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.split()[0] == str(hang)]
    assert line.split()[2:] == ["1", line.split()[3], "MB"]


def test_one_of_the_list_is_chosen_at_a_terminal(hang: int, tmp_path: Path) -> None:
    at = Terminal("attach", home=tmp_path)
    try:
        at.waits_for(rf"{hang}  vmm-\S+ +1 +\d+ MB")
        at.waits_for(r"attach to which PID\? ")
        at.enters(str(hang), "vmexit> *$")
        at.enters(".status", rf"\(process {hang}\), 1 core")
        at.enters("!msrwrite c0000081", r"event 0 triggered \(pre\) on core 0")
        at.enters("r rcx", "rcx=00000000c0000081")
        at.enters("events d 0", "vmexit> *$")
        end = at.enters("g", "the machine runs; Ctrl-C halts it")
        at.types("\x03")
        at.waits_for("halted, core 0", after=end)
        at.types("detach\r")
        assert at.ends() == 0
        assert f"detached; 'vmexit attach {hang}' comes back" in at.text
        os.kill(hang, 0)
    finally:
        at.close()


def test_none_of_the_list_is_chosen_at_a_terminal(hang: int, tmp_path: Path) -> None:
    """Enter alone, and what is no number."""
    for typed, status, said in (("", 0, ""), ("it", 2, "vmexit: 'it' is no process number")):
        at = Terminal("attach", home=tmp_path)
        try:
            at.waits_for(r"attach to which PID\? ")
            at.types(f"{typed}\r")
            assert at.ends() == status
            assert said in at.text
        finally:
            at.close()
    os.kill(hang, 0)


def test_a_process_that_is_no_vmm() -> None:
    done = run("attach", str(os.getpid()))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"vmexit: process \d+ \(.*\) runs no virtual machine of KVM's; .*\n", done.stderr)


def test_let_go_of_and_come_back_to() -> None:
    """A machine that vmexit has started outlives it."""
    arguments = ["-cpu", "host", *qemu_arguments(build("hang"), machine="microvm", serial="null")]
    done = run("run", "--accel", "kvm", "-x", "detach", "--", *arguments)
    found = re.search(r"'vmexit attach (\d+)' comes back", done.stdout)
    assert found is not None
    pid = int(found[1])
    try:
        time.sleep(0.3)
        done = run("attach", str(pid), "-x", "!msrwrite c0000081 log", "-x", "sleep 0n3000", "-x", "detach")
        assert re.search(r"pre +wrmsr +c0000081", done.stdout)
    finally:
        os.kill(pid, signal.SIGKILL)
