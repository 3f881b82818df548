"""``.script``: carry out the commands of a file."""

from __future__ import annotations

import re
from pathlib import Path

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.commands.tokens import commands_of
from vmexit.errors import VmexitError

_ARGUMENT = re.compile(r"\$arg([0-9]+)")
_MOST_FILES = 8


class InFileError(VmexitError):
    """What went wrong with a command of a file, and where in the file that is."""

    def __init__(self, place: str, error: VmexitError) -> None:
        super().__init__(f"{place}: {error}")
        self._place = place
        self._error = error

    def render(self) -> str:
        """The place, then the error with its mark under what is wrong."""
        render = getattr(self._error, "render", None)
        return f"{self._place}: {render() if render else self._error}"


class ScriptFile(Command):
    """Carries out the commands of a file."""

    INFO = Info(
        names=(".script",),
        usage=(".script FILE [ARGUMENT ...]",),
        summary="carry out the commands of a file",
        text="""Carries out the commands of a file, one after the other, up to the first that fails. A command goes on over
several lines while a quote or a brace is open.

$arg0 stands for the file's path in it, $arg1 and so on for the arguments.""",
        parameters=(
            ("FILE", "Its path; in quotes where there are spaces in it."),
            ("ARGUMENT", "Any word, or text in quotes."),
        ),
        examples=((".script boot.vmx c0000082", "carries out boot.vmx, in which $arg1 is c0000082"),),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        if not arguments.tokens:
            raise arguments.missing("'.script' needs a file")
        given = [token.text for token in arguments.tokens]
        if session.script_files >= _MOST_FILES:
            raise arguments.error(f"script files call each other more than {_MOST_FILES} deep", arguments.tokens[0])
        try:
            text = Path(given[0]).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise arguments.error(f"'{given[0]}' cannot be read: {error.strerror}", arguments.tokens[0]) from None
        session.script_files += 1
        try:
            _carry_out(session, given, text)
        finally:
            session.script_files -= 1


def _carry_out(session: Session, given: list[str], text: str) -> None:
    # Here because it knows all commands, this one too.
    from vmexit.commands.registry import execute

    def argument(match: re.Match[str]) -> str:
        number = int(match[1])
        if number >= len(given):
            raise VmexitError(f"there is no {match[0]}: {len(given) - 1} arguments were given")
        return given[number]

    for line, command in commands_of(text.split("\n")):
        try:
            execute(session, _ARGUMENT.sub(argument, command))
        except VmexitError as error:
            raise InFileError(f"{given[0]}:{line}", error) from None
        if session.is_over:
            return
