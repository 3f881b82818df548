"""What is shipped: a source distribution, and the wheel that is built from nothing but it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from vmexit.setup.elf import read_elf

PROJECT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project as a fresh clone has it."""
    copy = tmp_path / "project"
    shutil.copytree(PROJECT, copy, ignore=LEFT_OUT)
    return copy


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_from_source_distribution(project: Path, tmp_path: Path) -> None:
    # Without isolation: setuptools is here, and no network is needed.
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    done = run(project, "-W", "ignore", "-c", build)
    assert done.returncode == 0, done.stderr
    (sdist,) = (project / "dist").iterdir()
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xzf", sdist, "-C", tmp_path / "unpacked"], check=True)
    (source,) = (tmp_path / "unpacked").iterdir()
    shipped = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    ours = {
        str(path.relative_to(project))
        for folder in ("src", "tests", "docs", "benchmarks", "tools", ".ci")
        for path in (project / folder).rglob("*")
        if path.is_file() and ".egg-info" not in str(path)
    }
    assert ours <= shipped, "the source distribution lacks files"
    assert {"LICENSE", "Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= shipped

    done = run(source, *shlex.split("-m pip -q wheel --no-deps --no-build-isolation -w wheels ."))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "wheels").iterdir()
    assert wheel.name == f"vmexit-0.1.0-py3-none-linux_{os.uname().machine}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read("vmexit-0.1.0.dist-info/METADATA").decode())
        points = archive.read("vmexit-0.1.0.dist-info/entry_points.txt").decode()
        agent = tmp_path / "agent.so"
        agent.write_bytes(archive.read("vmexit/agent/agent.so"))
    assert {
        "vmexit/py.typed",
        "vmexit/agent/wire.h",
        "vmexit/setup/kernel.py",
        "vmexit/msr/data/5-amd.txt",
        "vmexit/report/page.js",
    } <= names
    assert "vmexit/guest/windows/offsets.toml" in names
    assert {name.rpartition(".")[2] for name in names if name.startswith("vmexit/")} == {
        "py",
        "typed",
        "h",
        "so",
        "txt",
        "toml",
        "md",
        "html",
        "css",
        "js",
    }
    assert "vmexit = vmexit.cli:main" in points
    assert metadata["License-Expression"] == "GPL-2.0-or-later"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"qemu_plugin_install", "qemu_plugin_version"} <= read_elf(agent).exports


def test_agent_that_does_not_compile(project: Path) -> None:
    (project / "src" / "vmexit" / "agent" / "broken.c").write_text("int unused(int argument) { return 0; }\n")
    done = run(project, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace", CFLAGS="")
    assert done.returncode != 0
    assert "unused parameter" in done.stderr
    assert done.stderr.strip().endswith("error: the agent does not compile (gcc: exit 1)")
    assert not list(project.rglob("*.so*"))


def test_no_compiler(project: Path) -> None:
    done = run(project, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace", CC="no-such-compiler -m64")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == ("error: no C compiler (no-such-compiler) to build the agent with: install gcc and libc6-dev")
