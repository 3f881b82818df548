"""Starting QEMU: what cannot work is said in one line, and nothing is left behind."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS, build, qemu_arguments
from tests.machines import Output
from vmexit import Debugger, State, StopReason
from vmexit.errors import TargetError, UsageError, VmexitError
from vmexit.link.wire import Capability
from vmexit.targets.qemu import Qemu, check_arguments

TCG = ["-accel", "tcg"]


def script(folder: Path, text: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-accel", "kvm"], "-accel kvm"),
        (["-accel", "kvm,dirty-ring-size=4096"], "-accel kvm"),
        (["-enable-kvm"], "-enable-kvm"),
        (["--enable-kvm"], "--enable-kvm"),
        (["-machine", "q35,accel=kvm"], "-machine q35,accel=kvm"),
        (["-M", "accel=kvm:tcg"], "-M accel=kvm"),
        (["-daemonize"], "-daemonize"),
    ],
)
def test_a_clash_is_explained(arguments: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=f"^{word}") as error:
        Qemu(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["-append", "accel=kvm"], ["-name", "kvm"], ["-accel", "tcg"], ["-drive", "file=kvm.img"], ["-machine", "q35"]]
)
def test_no_clash(arguments: list[str]) -> None:
    assert check_arguments(arguments) is False


def test_halted_at_the_start_because_the_user_wants_it() -> None:
    assert check_arguments(["-m", "1", "-S"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('echo "qemu-system-x86_64: -plugin: invalid option" >&2; exit 1', "built without plugins"),
        ('echo "$0: TCG plugin requires API version 9" >&2; exit 1', "plugin interface is of a version"),
        ('echo "$0: -m: expected a sensible number" >&2; exit 1', "QEMU did not start: -m: expected a sensible number"),
        ("exit 3", "status 3"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_a_qemu_that_does_not_start(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TargetError, match=says) as error:
        Qemu(TCG, qemu=script(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/nonexistent/qemu", "no-such-qemu"])
def test_a_qemu_that_is_not_there(name: str) -> None:
    with pytest.raises(TargetError, match=r"is not there; install it .*--qemu"):
        Qemu(TCG, qemu=name)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o755)
    with pytest.raises(TargetError, match="cannot be started"):
        Qemu(TCG, qemu=str(path))


@pytest.mark.parametrize("arguments", [["-no-such-option"], ["-kernel", "/nonexistent"], ["-m", "lots"], ["-machine", "toaster"]])
def test_arguments_that_qemu_refuses(arguments: list[str]) -> None:
    with pytest.raises(TargetError, match=r"QEMU did not start: .*") as error:
        Qemu([*TCG, "-display", "none", *arguments])
    assert "\n" not in str(error.value)


def test_another_architecture() -> None:
    binary = "/usr/bin/qemu-system-aarch64"
    if not Path(binary).exists():
        pytest.skip("no qemu-system-aarch64 here (Debian: qemu-system-arm)")
    with pytest.raises(TargetError, match="x86"):
        Qemu(["-machine", "virt"], qemu=binary)


def test_a_good_one_tells_what_it_is_and_can_do() -> None:
    with Debugger(Qemu(["-accel", "tcg", *qemu_arguments(build("sequence"), 2)], output=Output())) as debugger:
        assert debugger.target.name.startswith("QEMU ")
        assert debugger.target.vcpus == 2
        assert Capability.RECORD in debugger.target.link.capabilities
        # What Debian's and Ubuntu's export.
        assert debugger.target.link.capabilities == Capability((1 << 8) - 1) | Capability.HALT


def test_the_socket_is_gone_once_both_have_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Debugger(Qemu([*TCG, *qemu_arguments(build("hang"))], output=Output())):
        assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_leaked() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with Debugger(Qemu([*TCG, *qemu_arguments(build("sequence"), machine="microvm")], output=Output())) as debugger:
            assert debugger.run(timeout=60).exit_status == OK_STATUS

    once()
    before = count()
    once()
    with pytest.raises(VmexitError):
        Qemu([*TCG, "-machine", "toaster"])
    assert count() == before


def test_somebody_else_resumes_and_pauses_it(tmp_path: Path) -> None:
    """Another monitor is as good as ours: its `cont` and `stop` are noticed."""
    monitor = tmp_path / "monitor"
    arguments = [*TCG, *qemu_arguments(build("hang")), "-monitor", f"unix:{monitor},server=on,wait=off"]

    def say(command: str) -> None:
        """Returns once the monitor has carried it out, which its next prompt tells."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(60)
            peer.connect(str(monitor))
            wait_for_prompt(peer)
            peer.send(command.encode() + b"\n")
            wait_for_prompt(peer)

    def wait_for_prompt(peer: socket.socket) -> None:
        said = b""
        while not said.endswith(b"(qemu) "):
            data = peer.recv(4096)
            assert data, said
            said += data

    with Debugger(Qemu(arguments, output=Output())) as debugger:
        debugger.run(timeout=0.2)
        for command, state in (("cont", State.RUNNING), ("stop", State.HALTED)):
            say(command)
            deadline = time.monotonic() + 60
            while debugger.state is not state:
                assert time.monotonic() < deadline
                debugger.pump(0.05)
        assert debugger.stop is not None and debugger.stop.reason == StopReason.PAUSED
