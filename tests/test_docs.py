"""The examples in the documents: each is run as it stands.

In a Markdown file, a block of ``python`` is a program; ``GUEST`` in it is a list of QEMU's arguments for a small guest. A
block of ``console`` holds commands behind ``$ `` and what they print; each such line has to come out in this order, with
whatever numbers. ``$GUEST`` in a command stands for a small guest's arguments. A line ``...`` stands for any number of lines.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guests.build import OK_STATUS, build, qemu_arguments

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[object]:
    """The blocks of one language, as pytest's parameters."""
    return [
        pytest.param(match[2], id=f"{path.name}:{path.read_text()[: match.start()].count(chr(10)) + 1}")
        for path in DOCUMENTS
        for match in _BLOCK.finditer(path.read_text())
        if match[1] == language
    ]


def guest_arguments() -> list[str]:
    return ["-accel", "tcg", *qemu_arguments(build("sequence"), machine="microvm")]


@pytest.mark.parametrize("program", blocks("python"))
def test_python(program: str) -> None:
    prelude = f"GUEST = {guest_arguments()!r}\n"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def _pattern(line: str) -> re.Pattern[str]:
    """A printed line with every number, and every run of blanks, replaced by any."""
    parts = re.split(r"(\b(?:0x)?(?=[0-9a-f]*\d)[0-9a-f]+\b|\s+)", line.strip())
    return re.compile("".join(part if i % 2 == 0 and not part else _wild(part, i % 2 == 1) for i, part in enumerate(parts)))


def _wild(part: str, is_separator: bool) -> str:
    if not is_separator:
        return re.escape(part)
    return r"\s+" if part.isspace() else r"(?:0x)?[0-9a-f]+"


@pytest.mark.parametrize("session", blocks("console"))
def test_console(session: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"}
    for command, _, wanted in (part.partition("\n") for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]):
        # A command goes on behind a backslash.
        while command.endswith("\\"):
            more, _, wanted = wanted.partition("\n")
            command = command[:-1] + more
        result = subprocess.run(
            ["bash", "-c", command.replace("$GUEST", shlex.join(guest_arguments()))],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode in (0, OK_STATUS), result.stdout
        printed = iter(result.stdout.splitlines())
        for line in wanted.splitlines():
            if line.strip() in ("", "..."):
                continue
            assert any(_pattern(line).search(each) for each in printed), f"{line!r} does not come (in time) in\n{result.stdout}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
