"""The machine code of an event, from the command line's braces to what is run at its traps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmexit.commands.command import Arguments
from vmexit.commands.session import Session
from vmexit.console.tokens import Token
from vmexit.errors import CommandError, VmexitError
from vmexit.events.event import Event, EventError
from vmexit.link.wire import Action
from vmexit.usercode.assemble import assemble
from vmexit.usercode.errors import CodeError
from vmexit.usercode.hexcode import parse

if TYPE_CHECKING:
    from vmexit.commands.event_options import EventOptions


def attach(session: Session, arguments: Arguments, options: EventOptions, event: Event) -> None:
    """Makes the event one that runs its machine code. Raises CommandError at what is wrong with it, EventError for an option."""
    # Unicorn takes a moment to load, which a debugger without machine code does not need.
    from vmexit.coded import Coded, UserCode, lift_condition

    if event.action & Action.SCRIPT and (unfit := next((name for name in ("code", "buffer") if name in options.places), None)):
        raise EventError(unfit, f"'{unfit}' together with a script is not yet available; make two events of it")
    code = {name: _bytes(arguments, *given) for name, given in options.machine_code.items()}
    user_code = UserCode(code.get("condition"), code.get("code"), options.buffer)
    try:
        user_code.check()
    except VmexitError as error:
        raise EventError("buffer", str(error)) from None
    try:
        if lift_condition(session.debugger, user_code, event):
            return
    except VmexitError as error:
        raise EventError("condition", f"this script cannot stand behind a condition: {error}") from None
    if event.action & Action.SCRIPT:
        what = "with both a script and 'log'" if options.log else "that has to be emulated, together with a script,"
        raise EventError("condition", f"a condition {what} is not yet available")
    Coded(session.debugger, user_code, event, lambda: session.settings.code_failures)


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
