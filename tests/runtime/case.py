"""End-to-end cases as plain text: what is run, and what a person has to see.

A file of cases holds one case after another, separated by blank lines; a line that begins with # is a comment. A case is made of
lines ``WORD text``; a line that begins with white space goes on with the line before. The words:

NAME        what has to be true; the case's name
GUEST       a bare-metal guest (tests/guests) with its constants: ``loop COUNT=100``; or ``linux``
INIT        (linux) shell commands that its init runs before it switches off
CORES       vCPUs; 1 unless given, 2 for linux
QEMU        further arguments for QEMU
OPTIONS     further options of ``vmexit run``; ``--batch`` and one ``-x`` a RUN are given anyway, unless there is TYPE
RUN         a command (-x)
TYPE        a command that is typed on standard input; then without --batch
EXPECT      what has to be printed, after what earlier EXPECTs were met by; ``{label}`` is an address in the guest's image,
            ``{label+2}`` too, both as 16 hex digits; ``/.../`` is a regular expression
COUNT       ``N text``: so many lines hold the text
NEVER       what must not be printed
ERROR       what has to be printed on standard error
STATUS      of vmexit; 33 (a content guest) for a bare-metal guest unless given, 0 for linux
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.guests.build import OK_STATUS, symbols
from tests.machines import guest_arguments, linux_arguments

_ONCE = ("NAME", "GUEST", "CORES", "STATUS")
_MANY = ("INIT", "QEMU", "OPTIONS", "RUN", "TYPE", "EXPECT", "COUNT", "NEVER", "ERROR")
_TIME_S = 120


@dataclass
class Case:
    """One case of a file."""

    file: Path
    line: int
    lines: list[tuple[str, str]] = field(default_factory=list)

    def one(self, word: str, default: str = "") -> str:
        """The text of a word that stands at most once."""
        return next((text for key, text in self.lines if key == word), default)

    def all(self, word: str) -> list[str]:
        """The texts of a word that may stand more than once."""
        return [text for key, text in self.lines if key == word]

    @property
    def name(self) -> str:
        """What has to be true."""
        return self.one("NAME")


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises ValueError, with the line, for one that is not written as the module says."""
    cases: list[Case] = []
    current: Case | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            current = None
        elif line[0].isspace() and current and current.lines:
            word, text = current.lines[-1]
            current.lines[-1] = (word, f"{text}\n{line.strip()}")
        else:
            if current is None:
                current = Case(path, number)
                cases.append(current)
            word, _, text = line.partition(" ")
            if word not in _ONCE + _MANY or (word in _ONCE and current.one(word)):
                raise ValueError(f"{path.name}:{number}: {word!r} is no word of a case, or stands twice")
            current.lines.append((word, text.strip()))
    for case in cases:
        if not (case.name and case.one("GUEST") and (case.all("EXPECT") or case.all("ERROR") or case.all("COUNT"))):
            raise ValueError(f"{path.name}:{case.line}: a case has a NAME, a GUEST and something to EXPECT")
    return cases


def _pattern(text: str, labels: dict[str, int]) -> re.Pattern[str]:
    def address(match: re.Match[str]) -> str:
        return f"{labels[match[1]] + int(match[2] or 0):016x}"

    text = re.sub(r"\{(\w+)(\+\d+)?\}", address, text)
    if len(text) > 1 and text[0] == text[-1] == "/":
        return re.compile(text[1:-1], re.MULTILINE)
    # How many blanks stand between two columns is nobody's business.
    return re.compile(r"[ \t]+".join(map(re.escape, text.split())))


def run_case(case: Case) -> None:
    """Runs a case. AssertionError, with all that was printed, where it is not met."""
    name, *constants = shlex.split(case.one("GUEST"))
    labels: dict[str, int] = {}
    if name == "linux":
        arguments = linux_arguments("\n".join(case.all("INIT")), vcpus=int(case.one("CORES", "2")))
        status = 0
    else:
        defines = dict(constant.split("=") for constant in constants)
        image, arguments = guest_arguments(name, int(case.one("CORES", "1")), **defines)
        labels, status = symbols(image), OK_STATUS
    typed = case.all("TYPE")
    options = [word for text in case.all("OPTIONS") for word in shlex.split(text)]
    options += [] if typed else ["--batch"]
    options += [part for command in case.all("RUN") for part in ("-x", command)]
    further = [word for text in case.all("QEMU") for word in shlex.split(text)]
    result = subprocess.run(
        [sys.executable, "-m", "vmexit", "run", *options, "--", *arguments, *further],
        input="".join(f"{line}\n" for line in typed) if typed else None,
        stdin=None if typed else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIME_S,
        check=False,
    )
    shown = f"{case.file.name}:{case.line}: {case.name}\n---- stdout\n{result.stdout}\n---- stderr\n{result.stderr}"
    position = 0
    for text in case.all("EXPECT"):
        found = _pattern(text, labels).search(result.stdout, position)
        assert found, f"EXPECT {text!r} is not met after offset {position}\n{shown}"
        position = found.end()
    for text in case.all("COUNT"):
        wanted, _, what = text.partition(" ")
        pattern = _pattern(what, labels)
        count = sum(bool(pattern.search(line)) for line in result.stdout.splitlines())
        assert count == int(wanted), f"COUNT {text!r}: {count} lines\n{shown}"
    for text in case.all("NEVER"):
        pattern = _pattern(text, labels)
        assert not pattern.search(result.stdout + result.stderr), f"NEVER {text!r} was printed\n{shown}"
    for text in case.all("ERROR"):
        assert _pattern(text, labels).search(result.stderr), f"ERROR {text!r} is not met\n{shown}"
    assert "Traceback" not in result.stderr, shown
    assert result.returncode == int(case.one("STATUS", str(status))), f"status {result.returncode}\n{shown}"
