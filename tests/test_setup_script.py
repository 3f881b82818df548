"""What tools/setup does, and what it says on machines that lack something (a PATH of few programs)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PROGRAMS = "bash cat cut dirname env flock grep id ldd mkdir sed sha256sum tail true"


class Machine:
    """A copy of what tools/setup reads, and the programs that it finds."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.programs = folder / "bin"
        (self.project / "tools").mkdir(parents=True)
        shutil.copy(PROJECT / "tools" / "setup", self.project / "tools")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(PROJECT / name, self.project)
        self.agent = self.project / "src" / "vmexit" / "agent"
        self.agent.mkdir(parents=True)
        (self.agent / "agent.c").write_text("int agent;\n")
        (self.agent / "agent.h").touch()
        self.programs.mkdir()
        for name in PROGRAMS.split():
            self.add(name, Path(shutil.which(name) or name))
        self.play("python3", f'exec "{sys.executable}" "$@"')

    def add(self, name: str, target: Path) -> None:
        """Put a real program on PATH."""
        (self.programs / name).symlink_to(target)

    def play(self, name: str, script: str) -> None:
        """Put a program on PATH that a script plays."""
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def setup(self, target: str) -> list[str]:
        """Run tools/setup, which must fail; return its lines."""
        done = subprocess.run(
            [self.project / "tools" / "setup", target],
            env={"PATH": str(self.programs), "HOME": str(self.project)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        return done.stderr.splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_unknown_target(machine: Machine) -> None:
    assert machine.setup("everything") == ["setup: usage: tools/setup demo|test|lint|bench"]


def test_old_python(machine: Machine) -> None:
    machine.play("python3", "exit 1")
    (line,) = machine.setup("demo")
    assert line.startswith("setup: Python 3.11 or later is missing: install it (Debian 12 or later: python3")


def test_not_a_debian(machine: Machine) -> None:
    (line,) = machine.setup("demo")
    assert line == (
        "setup: missing: qemu-system-x86 busybox-static gcc (Debian's names); "
        "this is not a Debian: install them by its own means, then try again"
    )


def test_neither_root_nor_sudo(machine: Machine) -> None:
    machine.play("id", "echo 1000")
    machine.play("apt-get", "exit 0")
    missing = "qemu-system-x86 busybox-static gdb gcc"
    expected = "setup: missing Debian packages, and neither root nor sudo to install them with: apt-get install " + missing
    assert machine.setup("bench") == [expected]
    machine.play("sudo", "exit 1")
    assert machine.setup("bench") == [expected]


def test_sudo_is_used_without_asking(machine: Machine) -> None:
    machine.play("id", "echo 1000")
    machine.play("sudo", 'echo "sudo $*" >>"$HOME/calls"; shift; exec "$@"')
    machine.play("apt-get", 'echo "apt-get $*" >>"$HOME/calls"')
    packages = "qemu-system-x86 busybox-static gcc"
    assert machine.setup("demo") == [
        f"setup: installing Debian packages: {packages}",
        f"setup: still missing after their installation: {packages} (see build/setup.log)",
    ]
    calls = (machine.project / "calls").read_text().splitlines()
    assert all(call.startswith("sudo -n ") for call in calls if call.startswith("sudo"))
    assert "apt-get -qq update" in calls
    (install,) = [call for call in calls if call.startswith("apt-get") and "install" in call]
    assert install.endswith(f"install --no-install-recommends {packages}")


def test_no_network_for_debian_packages(machine: Machine) -> None:
    machine.play("id", "echo 0")
    machine.play("apt-get", "echo \"E: Temporary failure resolving 'deb.example.org'\" >&2; exit 100")
    assert machine.setup("lint") == [
        "setup: installing Debian packages: gcc",
        "setup: cannot install Debian packages (no network?): gcc: "
        "Temporary failure resolving 'deb.example.org' (see build/setup.log)",
    ]


def test_dynamic_busybox_will_not_do(machine: Machine) -> None:
    machine.add("busybox", Path("/bin/ls"))
    machine.add("gcc", Path("/usr/bin/gcc"))
    (line,) = machine.setup("demo")
    assert line.startswith("setup: missing: qemu-system-x86 busybox-static (Debian's names)")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "ERROR: No matching distribution found for cffi",
            "cannot install vmexit into .venv (no network?): No matching distribution found for cffi",
        ),
        (
            "  error: the agent does not compile (gcc: exit 1)\nERROR: Failed building",
            "the agent does not compile",
        ),
    ],
)
def test_package_that_cannot_be_installed(machine: Machine, log: str, expected: str) -> None:
    machine.add("gcc", Path("/usr/bin/gcc"))
    scripts = machine.project / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "pip").write_text(f"#!{scripts}/python\n")
    (scripts / "python").write_text(f"#!/bin/sh\ncat <<'END'\n{log}\nEND\nexit 1\n")
    (scripts / "python").chmod(0o755)
    assert machine.setup("lint") == [
        "setup: installing vmexit with its agent and the Python packages for 'dev' into .venv",
        f"setup: {expected} (see build/setup.log)",
    ]


def test_agent_is_compiled_again_when_its_sources_change(machine: Machine) -> None:
    """With pip and setup.py played by a script: what is done at the first, second, third and fourth time."""
    machine.add("gcc", Path("/usr/bin/gcc"))
    scripts = machine.project / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "pip").write_text(f"#!{scripts}/python\n")
    (scripts / "python").write_text('#!/bin/sh\necho "$*" >>"$HOME/calls"\necho >src/vmexit/agent/agent.so\n')
    (scripts / "python").chmod(0o755)
    env = {**os.environ, "PATH": str(machine.programs), "HOME": str(machine.project)}

    def calls() -> list[str]:
        log = machine.project / "calls"
        log.unlink(missing_ok=True)
        subprocess.run([machine.project / "tools" / "setup", "lint"], env=env, check=True, capture_output=True)
        return log.read_text().splitlines() if log.exists() else []

    install = "-m pip --disable-pip-version-check --no-input -q install -e .[dev]"
    assert calls() == [install]
    assert calls() == []
    (machine.agent / "agent.h").write_text("/* changed */\n")
    assert calls() == ["setup.py -q build_ext --inplace"]
    (machine.agent / "agent.so").unlink()
    assert calls() == ["setup.py -q build_ext --inplace"]
    (machine.project / "pyproject.toml").write_text("[project]\n")
    assert calls() == [install]
    assert calls() == []


@pytest.mark.parametrize(("target", "is_wanted"), [("test", True), ("demo", False)])
def test_a_browser_is_for_the_tests_and_no_reason_to_give_up(machine: Machine, target: str, is_wanted: bool) -> None:
    for name in ("qemu-system-x86_64", "busybox", "apt-cache"):
        machine.play(name, "exit 0")
    machine.add("gcc", Path("/usr/bin/gcc"))
    machine.play("id", "echo 0")
    machine.play("apt-get", "exit 1")
    scripts = machine.project / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "pip").write_text(f"#!{scripts}/python\n")
    (scripts / "python").write_text("#!/bin/sh\necho 'ERROR: no network'\nexit 1\n")
    (scripts / "python").chmod(0o755)
    lines = machine.setup(target)
    browser = [
        "setup: installing Debian packages: chromium",
        "setup: cannot install chromium; the tests that need a browser are skipped (see build/setup.log)",
    ]
    assert lines[:-2] == (browser if is_wanted else [])
    assert lines[-1] == "setup: cannot install vmexit into .venv (no network?): no network (see build/setup.log)"
