"""The machine code of an event, from the command line's braces to what is run at its traps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmexit.commands.command import Arguments
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token
from vmexit.errors import CommandError
from vmexit.events.event import Event
from vmexit.usercode.assemble import assemble
from vmexit.usercode.errors import CodeError
from vmexit.usercode.hexcode import parse

if TYPE_CHECKING:
    from vmexit.commands.event_options import EventOptions


def attach(session: Session, arguments: Arguments, options: EventOptions, event: Event) -> None:
    """Makes the event one that runs its machine code. Raises CommandError at what is wrong with it, EventError for an option."""
    # Unicorn takes a moment to load, which a debugger without machine code does not need.
    from vmexit.coded import UserCode
    from vmexit.coded import attach as attach_code

    code = {name: _bytes(arguments, *given) for name, given in options.machine_code.items()}
    is_first = options.script is not None and "code" in code and options.machine_code["code"][0].start < options.script.start
    attach_code(session.debugger, UserCode(code.get("condition"), code.get("code"), options.buffer, is_first), event)


def _bytes(arguments: Arguments, block: Token, is_assembly: bool) -> bytes:
    try:
        return assemble(block.text) if is_assembly else parse(block.text)
    except CodeError as error:
        # Where escapes were undone the text is not in the line as it is; then all of it is to blame.
        begin = arguments.line.find(block.text, block.start)
        if begin < 0 or begin > block.end:
            raise arguments.error(str(error), block) from None
        end = len(block.text) if error.end is None else error.end
        raise CommandError(str(error), arguments.line, begin + error.start, begin + end) from None
