"""Tests of the command line: what it accepts, what it says, and its exit status."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from vmexit import cli
from vmexit.console import run as runs
from vmexit.errors import TargetError, VmexitError
from vmexit.setup.doctor import Check

Shown = pytest.CaptureFixture[str]


def test_version(capsys: Shown) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vmexit {version('vmexit')}\n"


def test_it_starts_quickly() -> None:
    """Neither numpy nor QMP nor the prompt's library is loaded for that; the limit is generous, and of processor time."""
    heavy = {"numpy", "capstone", "qemu", "prompt_toolkit"}
    script = f"import sys; from vmexit.cli import main; main(['--version']); print(*{heavy} & set(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ""
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_an_msr_is_explained_quickly_too() -> None:
    heavy = {"numpy", "cffi", "capstone", "qemu", "prompt_toolkit", "llvmlite"}
    script = f"import sys; from vmexit.cli import main; main(['msr', 'efer', 'd01']); print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("EFER = 0xd01 SCE LME LMA NXE", "")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["IA32_LSTAR"], "c0000082 LSTAR (Intel and AMD): where SYSCALL enters the kernel from 64-bit code\n"),
        (["0xC0000080", "500"], "EFER = 0x500 LME LMA\n"),
        (["efer", "500", "0n3329"], "EFER 0x500 -> 0xd01 +SCE +NXE\n"),
        ([], "0         P5_MC_ADDR "),
    ],
)
def test_msr(words: list[str], shown: str, capsys: Shown) -> None:
    assert cli.main(["msr", *words]) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["attach", "-h"],
        ["msr", "--help"],
        ["demo", "-h"],
        ["doctor", "-h"],
        ["record", "-h"],
        ["record", "run", "-h"],
        ["report", "-h"],
    ],
)
def test_help(arguments: list[str], capsys: Shown) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: vmexit")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "what to do? run, attach, watch, host, record, report, eval, msr, demo or doctor (see vmexit --help)"),
        (["walk"], "argument ACTION: invalid choice: 'walk'"),
        (["--bogus"], "unrecognized: --bogus"),
        (["run"], "QEMU's arguments are missing: vmexit run [options] -- QEMU ARGUMENTS"),
        (["run", "-m", "512"], "unrecognized: -m 512; QEMU's own arguments come behind --"),
        (["run", "-m", "512", "--", "-smp", "2"], "unrecognized: -m 512; QEMU's own arguments come behind --"),
        (["run", "disk.img"], "unrecognized: disk.img; QEMU's own"),
        (["run", "-x"], "argument -x: expected one argument (see vmexit run --help)"),
        (["run", "--bat", "--"], "unrecognized: --bat"),
        (["run", "--script", "/nonexistent/file", "--"], "--script /nonexistent/file: No such file or directory"),
        (["run", "--script", "/", "--"], "--script /: Is a directory"),
        (["run", "--kernel-image", "/nonexistent/file", "--"], "there is no file /nonexistent/file"),
        (["run", "--system-map", "/", "--"], "there is no file /"),
        (["run", "--pdb", "/nonexistent.pdb", "--"], "there is no file /nonexistent.pdb"),
        (["run", "--vmlinux", "a", "--kernel-image", "b", "--"], "argument --kernel-image: not allowed with argument --vmlinux"),
        (["doctor", "--", "x"], "only 'vmexit run' takes arguments behind --"),
        (["msr", "lsttar"], "there is no MSR 'lsttar': did you mean LSTAR, STAR, CSTAR?"),
        (["msr", "efer", "1", "2", "3"], "'msr' takes 3 arguments at most"),
        (["msr", "efer", "{"], "'{' is no value of an MSR"),
        (["msr", "", "1"], "there is no MSR ''"),
        (["msr", "//"], "there is no MSR '//'"),
        (["msr", "dead0"], "nothing is known of MSR dead0"),
        (["run", "--accel", "xen", "--"], "argument --accel: invalid choice: 'xen'"),
        (["run", "--vmm", "v", "--qemu", "q", "--"], "--vmm and --qemu: one of them is started, not both"),
        (["attach", "four"], "argument PID: 'four' is no process number (see vmexit attach --help)"),
        (["attach", "-5"], "argument PID: '-5' is no process number"),
        (["attach", "0"], "argument PID: '0' is no process number"),
        (["attach", "5", "--", "x"], "only 'vmexit run' takes arguments behind --"),
        (["demo", "--kernel"], "argument --kernel: expected one argument"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], error: str, capsys: Shown) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"vmexit: {error}")
    assert shown.err.count("\n") == 1


class Runs:
    """Stands in for a session; notes what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: int | BaseException = 0) -> None:
        self.options: runs.Options | None = None
        self._result = result
        monkeypatch.setattr(runs, "run", self)

    def __call__(self, options: runs.Options) -> int:
        self.options = options
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> runs.Options:
    session = Runs(monkeypatch)
    assert cli.main(["run", *arguments]) == 0
    assert session.options
    return session.options


def test_what_stands_behind_the_dashes_is_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    options = told(monkeypatch, "--", "-m", "512", "--batch", "-x", "--", "-help")
    assert options.arguments == ["-m", "512", "--batch", "-x", "--", "-help"]
    assert not options.batch
    assert options.qemu == "qemu-system-x86_64"
    assert not options.commands
    assert told(monkeypatch, "--").arguments == []


def test_what_helps_to_recognise_the_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image, system_map = tmp_path / "image", tmp_path / "map"
    for path in (image, system_map):
        path.touch()
    options = told(monkeypatch, "--vmlinux", str(image), "--system-map", str(system_map), "--")
    assert (options.given.image, options.given.system_map, options.recognises) == (image, system_map, True)
    options = told(monkeypatch, "--kernel-image", str(image), "--no-recognition", "--")
    assert (options.given.image, options.given.system_map, options.recognises) == (image, None, False)


def test_which_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, "--").accelerator == "tcg"
    assert told(monkeypatch, "--accel", "kvm", "--", "-m", "1").accelerator == "kvm"
    options = told(monkeypatch, "--vmm", "firecracker", "--", "--id", "1")
    assert (options.vmm, options.arguments) == ("firecracker", ["--id", "1"])
    session = Runs(monkeypatch)
    assert cli.main(["attach", "-x", "events", "--batch", "4711"]) == 0
    assert session.options is not None
    assert (session.options.pid, session.options.batch, len(session.options.commands)) == (4711, True, 1)


def test_the_machines_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    from vmexit.targets import attach

    found = [attach.Machine(4711, "vm one", 2, 512 << 20, True), attach.Machine(4712, "other", 0, 1 << 20, False)]
    monkeypatch.setattr(attach, "machines", lambda: found)
    assert cli.main(["attach"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PID", "NAME", "VCPUS", "MEMORY"]
    assert lines[1].split() == ["4711", "vm", "one", "2", "512", "MB"]
    assert lines[2].split() == ["4712", "other", "?", "1", "MB", "(emulated,", "with", "the", "agent)"]
    monkeypatch.setattr(attach, "machines", list)
    assert cli.main(["attach"]) == 1
    assert capsys.readouterr().err.startswith("vmexit: there is no virtual machine here that KVM runs")


def test_one_of_the_list_is_chosen(monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    from vmexit.targets import attach

    monkeypatch.setattr(attach, "machines", lambda: [attach.Machine(4711, "vm", 2, 512 << 20, True)])
    monkeypatch.setattr("os.isatty", lambda fd: True)
    typed = iter(["4711", "", "it"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    session = Runs(monkeypatch)
    assert cli.main(["attach"]) == 0
    assert session.options is not None and session.options.pid == 4711
    session.options = None
    assert cli.main(["attach"]) == 0
    assert session.options is None
    assert cli.main(["attach"]) == 2
    assert capsys.readouterr().err == "vmexit: 'it' is no process number\n"


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "s"
    script.write_bytes(b"one {\r\n}\n\ntwo \xff // x\n")
    options = told(
        monkeypatch, "--qemu", "/q", "-x", "first", "--script", str(script), "--batch", "-x", "last {\n}\nreally", "--"
    )
    assert options.qemu == "/q"
    assert options.batch
    assert [(command.text, command.source, command.line) for command in options.commands] == [
        ("first", "-x", None),
        ("one {\n}", str(script), 1),
        ("two \ufffd // x", str(script), 4),
        ("last {\n}", "-x", None),
        ("really", "-x", None),
    ]


@pytest.mark.parametrize(
    ("result", "status", "error"),
    [
        (33, 33, ""),
        (TargetError("no QEMU"), 1, "vmexit: no QEMU\n"),
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("a\nmistake"), 1, "vmexit: internal error: RuntimeError: a\\nmistake (test_cli.py:"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: Shown, result: int | BaseException, status: int, error: str
) -> None:
    Runs(monkeypatch, result)
    assert cli.main(["run", "--"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(error)
    assert shown.count("\n") == (1 if error else 0)


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    from vmexit import demo

    kernels: list[Any] = []

    def run(kernel: Path | None = None, record: Path | None = None) -> int:
        kernels.append(kernel)
        if kernel == Path("/bad"):
            raise VmexitError("this is no kernel")
        return 0

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--kernel", "/boot/vmlinuz"]) == 0
    assert cli.main(["demo", "--kernel", "/bad"]) == 1
    assert kernels == [None, Path("/boot/vmlinuz"), Path("/bad")]
    assert capsys.readouterr().err == "vmexit: this is no kernel\n"


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (None, 0), (False, 1)])
def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: Shown, ok: bool | None, status: int) -> None:
    from vmexit.setup import doctor

    asked: list[object] = []

    def checks(qemu: object = None) -> list[Check]:
        asked.append(qemu)
        return [Check("Python", True, "3.11"), Check("thing", ok, "detail")]

    monkeypatch.setattr(doctor, "checks", checks)
    assert cli.main(["doctor", "--qemu", "/q"]) == status
    assert asked == ["/q"]
    assert "Python" in capsys.readouterr().out


def test_a_reader_that_has_had_enough() -> None:
    command = f"{sys.executable} -m vmexit doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 1, 141)


def test_it_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vmexit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vmexit {version('vmexit')}\n"
