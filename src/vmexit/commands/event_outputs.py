"""The outputs of an event, from the command line's braces to names that are known to be right."""

from __future__ import annotations

from vmexit.commands.command import Arguments, did_you_mean
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token
from vmexit.errors import CommandError
from vmexit.outputs import OutputState
from vmexit.outputs.outputs import MOST


def names(arguments: Arguments, block: Token) -> tuple[str, ...]:
    """The names between the braces, as they are written. Raises CommandError for too many, and for a comma too many."""
    found = tuple(name.strip() for name in block.text.split(","))
    if not all(found):
        raise arguments.error("a name is missing between the commas", block)
    if len(found) > MOST:
        raise arguments.error(f"an event has {MOST} outputs at most, not {len(found)}", block)
    return found


def check(session: Session, arguments: Arguments, block: Token, immediate: bool) -> tuple[str, ...]:
    """The names, each of an output that is there and not closed. Raises CommandError at the one that is to blame."""
    found = names(arguments, block)
    outputs = session.debugger.outputs
    for name in found:
        if name not in outputs:
            hint = did_you_mean(name, [output.name for output in outputs]) or "'output create' makes one"
            raise _error(arguments, block, name, f"there is no output '{name}'", hint)
        if outputs[name].state is OutputState.CLOSED:
            raise _error(arguments, block, name, f"the output '{name}' is closed, and cannot be used any more", None)
    if not immediate:
        raise arguments.error("'imm no' does not go together with 'output'", block, hint="leave 'imm no' out")
    return found


def _error(arguments: Arguments, block: Token, name: str, message: str, hint: str | None) -> CommandError:
    """An error that points at that name in the braces."""
    at = arguments.line.find(name, block.start)
    if not block.start <= at < block.end:
        return arguments.error(message, block, hint=hint)
    return CommandError(message, arguments.line, at, at + len(name), hint)


def notice(session: Session, found: tuple[str, ...]) -> str:
    """What is said of outputs that are not opened yet; "" where all are."""
    closed = [name for name in found if session.debugger.outputs[name].state is OutputState.CREATED]
    if not closed:
        return ""
    commands = ", ".join(f"'output open {name}'" for name in closed)
    return f"\nnot opened yet, so that what goes there is dropped: {', '.join(closed)} ({commands})"
