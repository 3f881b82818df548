"""Tests of whole sessions without a prompt: given commands, pipes, batch mode, how it all ends. With a real QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from fcntl import F_GETPIPE_SZ, fcntl, ioctl
from pathlib import Path
from termios import FIONREAD

import pytest

from tests.console.vmexits import TIME_S, children, is_alive, run, vmexit, wait_until_gone
from tests.guests.build import symbols
from tests.machines import guest_arguments
from tests.outputs.peers import wait_until

_LINE = re.compile(r" +\d+\.\d{6}  0     pre   wrmsr  c0000081  ([0-9a-f]{16})  [0-9a-f]{16}")
SHUT_DOWN = "the guest has shut down (guest-shutdown)"


@pytest.fixture(scope="module")
def sequence() -> list[str]:
    return guest_arguments("sequence")[1]


@pytest.fixture
def hang() -> list[str]:
    return guest_arguments("hang", SPIN=10)[1]


class Background:
    """A session with pipes that goes on while the test does."""

    def __init__(self, *arguments: str, output: int | None = subprocess.PIPE, first: str = "") -> None:
        """``first``: statements of Python that its process carries out before."""
        program = f"{first}\nimport sys\nfrom vmexit.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", program] if first else vmexit()
        self.process = subprocess.Popen(
            [*command, "run", *arguments], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, text: str) -> None:
        """Until its output holds that."""
        assert self.process.stdout
        while text not in (line := self.process.stdout.readline()):
            assert line, "it has ended"

    @property
    def qemu(self) -> int:
        deadline = time.monotonic() + TIME_S
        while not (found := children(self.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (pid,) = found
        return pid

    def ends(self) -> tuple[str, str, int]:
        """What it still prints, and its status."""
        out, err = self.process.communicate(timeout=TIME_S)
        return out, err, self.process.returncode


@pytest.fixture
def backgrounds() -> Iterator[list[Background]]:
    """Those in here are ended with the test."""
    started: list[Background] = []
    yield started
    for one in started:
        left = children(one.process.pid)
        one.process.kill()
        for stream in (one.process.stdin, one.process.stdout, one.process.stderr):
            if stream:
                stream.close()
        one.process.wait()
        for pid in left:
            os.kill(pid, signal.SIGKILL)


# ---- batch ----


def test_batch_prints_everything_and_ends_with_the_guest(sequence: list[str]) -> None:
    done = run("run", "--batch", "-x", "!msrwrite c0000082 log", "--", *sequence)
    lines = done.stdout.splitlines()
    assert lines[0] == "event 0 prints each wrmsr of c0000082 LSTAR (stage pre, all cores)"
    place = next(i for i, line in enumerate(lines) if "wrmsr  c0000082" in line)
    assert lines[place - 1] == "     seconds  core  stage        MSR       value             RIP"
    # What the guest printed later stands below, whatever comes sooner to vmexit.
    assert lines.index("msr=c0000082 value=ffff923344556677") > place
    # To QEMU 10 the guest's way to end is a shutdown.
    assert [line for line in lines if line != SHUT_DOWN][-1] == "msr=c0000081 value=a1b2c3d4e5f60718"
    assert SHUT_DOWN not in lines[:-1]
    assert done.stderr == "QEMU ended with status 33\n"
    assert done.returncode == 33


def test_batch_shows_a_break_and_goes_on(sequence: list[str]) -> None:
    done = run("run", "--batch", "-x", "!msrwrite c0000081", "--", *sequence)
    assert done.stdout.count("event 0 triggered (pre) on core 0: wrmsr, MSR c0000081") == 11
    assert "value=a1b2c3d4e5f60718" in done.stdout
    assert done.returncode == 33


def test_in_batch_the_given_commands_are_carried_out_at_the_break(sequence: list[str]) -> None:
    done = run(
        "run", "--batch", "-x", "!msrwrite 174", "-x", "g", "-x", "r ecx", "-x", "events c all", "-x", "g", "--", *sequence
    )
    assert re.search(r"event 0 triggered.*\nMSR   SYSENTER_CS.*\nRIP .*wrmsr\necx=00000174\nmsr=00000174", done.stdout)
    assert done.returncode == 33


def test_what_qemu_prints_goes_where_it_belongs(sequence: list[str]) -> None:
    done = run("run", "--batch", "--", *sequence, "-cpu", "qemu64,+vmx")
    assert "msr=c0000081" in done.stdout
    assert "warning: TCG doesn't support requested feature" in done.stderr
    assert "warning" not in done.stdout


def test_a_pipe_is_the_guests_in_batch_mode(sequence: list[str]) -> None:
    """Bytes of a pipe reach the guest's serial port, not the console."""
    done = run("run", "--batch", "--", *sequence, given="g\nnonsense\n")
    assert done.returncode == 33
    assert "nonsense" not in done.stdout + done.stderr


def test_nothing_is_lost_at_full_speed(tmp_path: Path) -> None:
    image, arguments = guest_arguments("loop", COUNT=100_000)
    path = tmp_path / "log"
    with path.open("w") as file:
        command = vmexit("run", "--batch", "-x", "!msrwrite c0000081 log imm no", "--", *arguments)
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, timeout=TIME_S, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 33
    found = [match[1] for match in map(_LINE.match, path.read_text().splitlines()) if match]
    assert found == [f"5a5a5a5a{i:08x}" for i in range(100_000, 0, -1)]
    assert symbols(image)["loop_wrmsr"]


def test_the_guest_can_wait_for_another_monitor(tmp_path: Path, sequence: list[str], backgrounds: list[Background]) -> None:
    path = tmp_path / "qmp"
    qmp = ["-qmp", f"unix:{path},server=on,wait=off"]
    one = Background("--batch", "-x", "!msrwrite c0000082 log", "--", *sequence, "-S", *qmp)
    backgrounds.append(one)
    one.wait_for("event 0 prints")
    assert one.process.stderr
    assert "-S" in one.process.stderr.readline()
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(path))
        stream = monitor.makefile("rw")
        for command in ("qmp_capabilities", "cont"):
            stream.write(json.dumps({"execute": command}))
            stream.flush()
        out, _, status = one.ends()
    assert re.search(r"^    \d\.\d{6}  0     pre   wrmsr  c0000082", out, re.MULTILINE)
    assert status == 33


def test_a_guest_that_shuts_down_but_stays(tmp_path: Path) -> None:
    # Skipping the write to EFER makes the guest's first step into 64-bit code a triple fault.
    _, arguments = guest_arguments("sequence")
    done = run("run", "--batch", "-x", "!msrwrite c0000080 sc on", "--", *arguments, "-no-shutdown")
    assert "halted: the guest has shut down" in done.stdout
    assert done.stderr == "QEMU ended with status 0\n"
    assert done.returncode == 0


# ---- given commands ----


def test_commands_come_in_the_order_in_which_they_were_given(tmp_path: Path, sequence: list[str]) -> None:
    script = tmp_path / "boot.vmx"
    script.write_text("// a comment\nsettings overflow drop /* another */\r\n\n!MsrWrite 10\n")
    done = run("run", "--batch", "-x", "settings syntax att", "--script", str(script), "-x", "events", "--", *sequence)
    shown = [line.split()[0] for line in done.stdout.splitlines()[:4]]
    assert shown == ["syntax", "overflow", "event", "0"]


@pytest.mark.parametrize("options", [[], ["--batch"]])
def test_a_command_that_fails_ends_it_all(sequence: list[str], options: list[str]) -> None:
    done = run("run", *options, "-x", "!msrwrite 10", "-x", "!msrwrite 10 stage past", "-x", "g", "--", *sequence)
    assert done.stderr == (
        "-x: 'past' is no value of 'stage': did you mean 'post'?\n!msrwrite 10 stage past\n                   ^~~~\n"
    )
    assert "msr=" not in done.stdout
    assert done.returncode == 1


def test_a_script_that_fails_says_where(tmp_path: Path, sequence: list[str]) -> None:
    script = tmp_path / "boot.vmx"
    script.write_text('events\n\n!msrwrite 10 script {\n  printf("}");\n} stage\npast\n')
    done = run("run", "--script", str(script), "--", *sequence)
    assert done.stderr.startswith(f"{script}:5: a value for 'stage' is missing")
    script.write_text("events\n# comment\n")
    done = run("run", "--script", str(script), "--", *sequence)
    assert done.stderr.startswith(f"{script}:2: there is no command '#' (a comment begins with //)")
    assert done.returncode == 1


def test_g_waits_in_given_commands_and_the_rest_comes_after(sequence: list[str]) -> None:
    done = run("run", "--batch", "-x", "!msrwrite c0000082 log", "-x", "g", "-x", "events", "-x", ".status", "--", *sequence)
    printed = done.stdout.replace(f"{SHUT_DOWN}\n", "")
    assert re.search(r"value=a1b2c3d4e5f60718\n0    \(enabled\)   1 hit   !msrwrite c0000082 log  // c0000082 LSTAR\n", printed)
    assert "state    ended" in done.stdout
    assert done.returncode == 33
    done = run("run", "--batch", "-x", "g", "-x", "g", "--", *sequence)
    assert done.stderr == "-x: the machine has ended\n"
    assert done.returncode == 1


def test_leaving_in_given_commands(sequence: list[str]) -> None:
    done = run("run", "--batch", "-x", ".exit", "-x", "nonsense", "--", *sequence)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# ---- commands from a pipe ----


def test_commands_from_a_pipe(sequence: list[str]) -> None:
    given = "!msrwrite 174\ng\nr ecx\nbogus\nr eax = 5\ng\nevents\n"
    done = run("run", "--", *sequence, given=given)
    assert "ecx=00000174\neax=00000005\n" in done.stdout
    assert "msr=00000174 value=0000000000000005" in done.stdout
    assert done.stdout.splitlines()[-1] == "0    (enabled)   1 hit   !msrwrite 174  // 174 SYSENTER_CS"
    assert done.stderr.startswith("there is no command 'bogus'")
    assert done.stderr.endswith("\nQEMU ended with status 33\n")
    assert done.returncode == 33


def test_a_guest_that_was_started_goes_on_to_its_end_when_nothing_more_comes(sequence: list[str]) -> None:
    done = run("run", "--", *sequence, given="!msrwrite c0000081\ng\n")
    assert done.stdout.count("triggered") == 11
    assert done.returncode == 33
    done = run("run", "-x", "!msrwrite c0000082 log", "--", *sequence, given="")
    assert "wrmsr  c0000082" in done.stdout
    assert done.returncode == 33


def test_a_guest_that_was_not_started_is_ended(sequence: list[str]) -> None:
    for arguments in (["--", *sequence], ["-x", "!msrwrite 10 log", "--", *sequence, "-S"]):
        done = run("run", *arguments, given="events\n")
        assert "msr=" not in done.stdout
        assert done.stderr == ""
        assert done.returncode == 0


def test_pausing_a_running_machine_from_a_pipe(hang: list[str], backgrounds: list[Background]) -> None:
    one = Background("-x", "!msrwrite 10", "--", *hang)
    backgrounds.append(one)
    one.wait_for("tick")
    assert one.process.stdin
    one.process.stdin.write("pause\nr rip\n.exit\n")
    one.process.stdin.flush()
    out, err, status = one.ends()
    assert re.search(r"halted, core 0\nRIP   .*\nrip=00000000001", out)
    assert (err, status) == ("", 0)


def test_several_lines_make_one_command(sequence: list[str]) -> None:
    done = run("run", "--", *sequence, given='!msrwrite 10 script {\n  printf("}\\n");\n}\n')
    assert done.stdout.split("\n")[0] == "event 0 runs a script at each wrmsr of 10 TSC (stage pre, all cores)"
    assert done.stderr == ""


# ---- how it ends ----


def test_qemu_ended_by_a_signal(hang: list[str], backgrounds: list[Background]) -> None:
    one = Background("--batch", "--", *hang)
    backgrounds.append(one)
    one.wait_for("tick")
    os.kill(one.qemu, signal.SIGKILL)
    _, err, status = one.ends()
    assert err == "QEMU was ended by signal 9 (SIGKILL)\n"
    assert status == 137


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
@pytest.mark.parametrize("command", ["!msrwrite log imm no", "!msrwrite", "!msrwrite 10"])
def test_signals_in_batch_mode(
    hang: list[str], backgrounds: list[Background], number: signal.Signals, status: int, command: str, tmp_path: Path
) -> None:
    path = tmp_path / "output"  # which takes all that comes, as nobody reads it
    with path.open("w") as output:
        one = Background("--batch", "-x", command, "--", *hang, output=output.fileno())
    backgrounds.append(one)
    qemu = one.qemu
    # The guest has done something: it ticks, and so it is trapped.
    wait_until(lambda: any(word in path.read_bytes() for word in (b"tick", b"triggered", b"  wrmsr  ")), "a sign of the guest")
    one.process.send_signal(number)
    _, err, ended = one.ends()
    assert ended == status
    assert err == ("" if number == signal.SIGINT else f"vmexit: ended by {number.name}\n")
    assert wait_until_gone(qemu)


def test_ctrl_c_twice_ends_at_once(hang: list[str], backgrounds: list[Background]) -> None:
    patient = "from vmexit.targets import process\nprocess._QUIT_S = 3600.0"
    one = Background("--batch", "-x", "!msrwrite 10", "--", *hang, first=patient)
    backgrounds.append(one)
    one.wait_for("tick")
    qemu = one.qemu
    os.kill(qemu, signal.SIGSTOP)  # it will not do what it is asked
    before = sockets(one.process.pid)
    one.process.send_signal(signal.SIGINT)
    wait_until(lambda: sockets(one.process.pid) < before, "the agent's to be closed, and QEMU to be asked to end")
    time.sleep(0.3)
    assert is_alive(qemu)
    one.process.send_signal(signal.SIGINT)
    _, err, status = one.ends()
    assert status == 130
    assert "Traceback" not in err
    assert wait_until_gone(qemu)


def test_ctrl_c_when_nobody_reads_the_output(hang: list[str], backgrounds: list[Background]) -> None:
    one = Background("--batch", "-x", "!msrwrite log", "--", *hang)
    backgrounds.append(one)
    qemu = one.qemu
    assert one.process.stdout
    pipe = one.process.stdout.fileno()
    # Full, or with no room for what comes next.
    wait_until(lambda: waiting_in(pipe) > fcntl(pipe, F_GETPIPE_SZ) * 3 // 4, "the pipe to be full")
    time.sleep(0.2)
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(TIME_S) == 130
    assert wait_until_gone(qemu)


def test_a_reader_that_has_had_enough(hang: list[str]) -> None:
    pipeline = f"{shlex.join(vmexit('run', '--batch', '-x', '!msrwrite log', '--', *hang))} | head -5; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, timeout=TIME_S, check=False)
    assert len(done.stdout.splitlines()) == 5
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_disk_that_is_full(sequence: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = vmexit("run", "--batch", "-x", "!msrwrite log", "--", *sequence)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIME_S, check=False)
    assert done.stderr == "vmexit: standard output: No space left on device\n"
    assert done.returncode == 1


def test_descriptors_that_are_closed(sequence: list[str]) -> None:
    command = f"{shlex.join(vmexit('run', '--batch', '-x', '!msrwrite log', '--', *sequence))} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=TIME_S, check=False).returncode == 33


def test_the_guest_outlives_a_debugger_that_is_killed(hang: list[str], backgrounds: list[Background]) -> None:
    one = Background("--batch", "-x", "!msrwrite log", "--", *hang)
    backgrounds.append(one)
    one.wait_for("wrmsr  c0000081")
    qemu = one.qemu
    one.process.kill()
    one.process.wait()
    try:
        before = cpu_time(qemu)
        wait_until(lambda: cpu_time(qemu) > before + 0.1, "the guest to go on")
        assert is_alive(qemu)
    finally:
        os.kill(qemu, signal.SIGKILL)
    assert wait_until_gone(qemu)


def sockets(pid: int) -> int:
    """How many a process has open."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it is closed by now
            count += str(path.readlink()).startswith("socket:")
    return count


def waiting_in(pipe: int) -> int:
    """Bytes in it that nobody has read."""
    (count,) = struct.unpack("i", ioctl(pipe, FIONREAD, bytes(4)))
    return int(count)


def cpu_time(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_job_in_the_background_ignores_ctrl_c_as_it_should(hang: list[str]) -> None:
    """A shell starts such jobs with SIGINT ignored."""
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "-", *vmexit("run", "--batch", "--", *hang)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.stdout.close()
    assert process.wait(TIME_S) == 143


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["-accel", "kvm"], 2, "-accel kvm: to trap in a guest that KVM runs, say --accel kvm before the --"),
        (["-bogus"], 1, "QEMU did not start: -bogus: invalid option"),
        (["-machine", "toaster"], 1, "QEMU did not start: unsupported machine type"),
    ],
)
def test_a_qemu_that_cannot_be_used(arguments: list[str], status: int, error: str) -> None:
    done = run("run", "--", *arguments)
    assert done.stderr.startswith(f"vmexit: {error}")
    assert done.stderr.count("\n") == 1
    assert done.returncode == status


def test_what_qemu_says_about_itself_is_not_lost() -> None:
    done = run("run", "--", "-device", "help")
    assert "name " in done.stdout
    assert done.stderr.startswith("vmexit: QEMU did not start")


def test_another_qemu(tmp_path: Path, sequence: list[str]) -> None:
    wrapper = tmp_path / "my-qemu"
    wrapper.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    assert run("run", "--batch", "--qemu", str(wrapper), "--", *sequence).returncode == 33
    assert (tmp_path / "used").exists()
    for qemu in ("/nonexistent", "/bin/false", sys.executable):
        done = run("run", "--qemu", qemu, "--", *sequence)
        assert done.stderr.startswith("vmexit: ")
        assert done.stderr.count("\n") == 1
        assert done.returncode == 1
