"""All commands by name, and carrying one out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from vmexit.commands.command import Arguments, Command, Info, did_you_mean
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token, TokenKind, tokenize
from vmexit.errors import CommandError


@functools.cache
def _commands() -> tuple[Command, ...]:
    """In the order in which they are listed."""
    # Here because ``help`` is a command that looks at all of them.
    from vmexit.commands.attach import Attach, DetachProcess
    from vmexit.commands.core import Core
    from vmexit.commands.disassemble import Disassemble
    from vmexit.commands.evaluate import Evaluate, Print
    from vmexit.commands.events import Events
    from vmexit.commands.guest import Guest
    from vmexit.commands.help import Help
    from vmexit.commands.leaving import Clear, Detach, Exit
    from vmexit.commands.memory import ShowMemory
    from vmexit.commands.msr import MsrRead, MsrWrite
    from vmexit.commands.msr_access import ReadMsr, WriteMsr
    from vmexit.commands.msr_explain import ExplainMsr
    from vmexit.commands.output import ManageOutputs
    from vmexit.commands.registers import Register
    from vmexit.commands.running import Go, Pause, Sleep
    from vmexit.commands.script_file import ScriptFile
    from vmexit.commands.settings import ChangeSettings
    from vmexit.commands.stack import Stack
    from vmexit.commands.status import Status
    from vmexit.commands.symbols import Examine, Modules
    from vmexit.commands.tasks import Process, Processes, Thread
    from vmexit.commands.types import ShowType

    return (
        MsrWrite(),
        MsrRead(),
        ExplainMsr(),
        ReadMsr(),
        WriteMsr(),
        Events(),
        ManageOutputs(),
        Go(),
        Pause(),
        Evaluate(),
        Print(),
        Register(),
        Disassemble(),
        ShowMemory(),
        Guest(),
        Processes(),
        Process(),
        Thread(),
        Attach(),
        DetachProcess(),
        Stack(),
        Modules(),
        Examine(),
        ShowType(),
        Core(),
        Status(),
        ChangeSettings(),
        ScriptFile(),
        Sleep(),
        Clear(),
        Help(),
        Detach(),
        Exit(),
    )


@functools.cache
def _by_name() -> Mapping[str, Command]:
    return {name: command for command in _commands() for name in command.INFO.names}


def infos() -> Iterable[Info]:
    """What is said about each command."""
    return [command.INFO for command in _commands()]


def names() -> Iterable[str]:
    """Every name that a command answers to."""
    return list(_by_name())


def find(name: str) -> Command | None:
    """The command of that name, which is in lower case."""
    return _by_name().get(name)


def unknown(arguments: Arguments, token: Token) -> CommandError:
    """The error for a name that no command has."""
    if token.text.startswith("#"):
        hint = "a comment begins with //"
    else:
        hint = did_you_mean(token.lower, names()) or "'help' lists the commands"
    return arguments.error(f"there is no command '{token.text}'", token, hint=hint)


def execute(session: Session, line: str) -> None:
    """Carries out one command; does nothing for a line of white space and comments.

    Raises CommandError, which knows what part of the line is wrong, or another VmexitError where the command itself is right.
    """
    tokens = tokenize(line)
    if not tokens:
        return
    if len(tokens[0].text) > 1 and line.startswith("?", tokens[0].start):
        # It needs no space behind it.
        start = tokens[0].start
        tokens = [Token(TokenKind.WORD, "?", start, start + 1), Token(TokenKind.WORD, line[start + 1 :], start + 1, len(line))]
    arguments = Arguments(line, tokens)
    if tokens[0].kind is TokenKind.BLOCK:
        raise arguments.error("a command does not begin with a brace", tokens[0])
    command = find(arguments.name)
    if command is None:
        raise unknown(arguments, tokens[0])
    if command.INFO.halted:
        session.check_halted(arguments)
    command.run(session, arguments)
