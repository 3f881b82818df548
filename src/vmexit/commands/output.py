"""``output``: list, create, open and close the outputs that events forward their results to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info, did_you_mean, one_of
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token, words_of
from vmexit.errors import CommandError
from vmexit.outputs import Output, OutputError, OutputState
from vmexit.outputs.kinds import KINDS

_ACTIONS = ("create", "open", "close")
_ADDRESS = 3
"""The place of the address's first word among the arguments."""


class ManageOutputs(Command):
    """Looks after outputs."""

    INFO = Info(
        names=("output",),
        usage=("output", "output create NAME KIND ADDRESS", "output open|close NAME"),
        summary="list, create, open or close outputs, which events forward their results to",
        text="""Without arguments it lists the outputs: number, kind, state, name, how many messages were sent, are
waiting and were dropped, the address, and what keeps it from being sent to.

An output is created, then opened; events name those that are theirs ('output { NAME , NAME }', five at most),
and what their scripts print then goes there and not to the screen. So do the lines of 'log' and of breaks;
'jsonl', 'perfetto' and 'nats' get each trap with all its fields. An output that was closed cannot be opened
again.

A destination that is slow makes the guest wait, or loses what there is no room for, as 'settings overflow'
says. One that is gone is connected to again; meanwhile 8 MB are kept for it, and what comes beyond that is
dropped, counted and told.""",
        parameters=(
            ("NAME", "A name of your choice."),
            ("file PATH", "A file, which is appended to."),
            ("namedpipe PATH", "A named pipe that is there (mkfifo)."),
            ("tcp HOST:PORT", "A TCP server. The port is decimal."),
            (
                "module PATH",
                "A shared library that exports hyperdbg_event_forwarding(const char *, unsigned int); it runs in a process of "
                "its own, and is called with each message and its length.",
            ),
            ("unix PATH", "A server on a Unix stream socket; @NAME is an abstract one."),
            ("jsonl PATH", "A file with a JSON object on a line for each trap, which is appended to."),
            ("perfetto PATH", "A trace for the Perfetto viewer (ui.perfetto.dev), a track for each core. It replaces the file."),
            (
                "nats URL SUBJECT",
                "A subject that a stream of a NATS server (JetStream) stores: a JSON object for each trap. Needs vmexit[nats].",
            ),
        ),
        examples=(
            ("output create text file /tmp/text.log", "creates an output"),
            ("output open log", "from now on it can be sent to"),
            ("!msrwrite lstar log output { log }", "its lines go there"),
            ("output create trace perfetto /tmp/trace.pftrace", "a trace to look at"),
            ("output close log", "delivers what is waiting, and closes it for good"),
        ),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        outputs = session.debugger.outputs
        if not arguments.tokens:
            session.emit(_table(list(outputs)))
            return
        action = arguments.tokens[0]
        if action.lower not in _ACTIONS:
            hint = did_you_mean(action.lower, _ACTIONS) or "create, open or close; without any of them the outputs are listed"
            raise arguments.error(f"'{action.text}' is nothing that can be done to outputs", action, hint=hint)
        if len(arguments.tokens) == 1:
            raise arguments.missing(f"'output {action.lower}' needs the name of an output")
        name = arguments.tokens[1]
        if action.lower == "create":
            self._create(session, arguments, name)
            return
        arguments.at_most(2)
        if name.text not in outputs:
            hint = did_you_mean(name.text, [output.name for output in outputs]) or "'output' lists them"
            raise arguments.error(f"there is no output '{name.text}'", name, hint=hint)
        try:
            if action.lower == "open":
                output = outputs.open(name.text)
                if output.trouble:
                    session.emit(f"opened, but nothing can be sent yet: {output.trouble}; it is tried again")
            else:
                output = outputs.close(name.text)
                session.emit(_farewell(output))
        except OutputError as error:
            raise arguments.error(error.message, name, hint=error.hint) from None

    def _create(self, session: Session, arguments: Arguments, name: Token) -> None:
        if len(arguments.tokens) == 2:
            raise arguments.missing("the kind of the output is missing", f"it is {one_of(list(KINDS))}")
        token = arguments.tokens[2]
        kind = arguments.choice(token, list(KINDS), "kind of output")
        words = KINDS[kind].address
        address = _whole(arguments, arguments.tokens[_ADDRESS:])
        if len(address) < len(words):
            raise _missing(arguments, address, f"'output create {name.text} {kind}' needs {' and '.join(words)}")
        if len(address) > len(words):
            first, last = address[len(words)], address[-1]
            hint = "a path with blanks stands in quotes" if "PATH" in words else None
            raise arguments.error(f"an output of kind '{kind}' takes {' and '.join(words)}", first, until=last, hint=hint)
        try:
            session.debugger.outputs.create(name.text, kind, *(word.text for word in address))
        except OutputError as error:
            blamed = name if error.part is None else address[error.part]
            raise arguments.error(error.message, blamed, hint=error.hint) from None

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        if not before:
            return _ACTIONS
        states = {"open": (OutputState.CREATED,), "close": (OutputState.CREATED, OutputState.OPENED)}.get(before[0], ())
        if len(before) == 1:
            return [output.name for output in session.debugger.outputs if output.state in states]
        return list(KINDS) if len(before) == 2 and before[0] == "create" else ()


def _whole(arguments: Arguments, address: list[Token]) -> list[Token]:
    """The words of an address. What begins a comment elsewhere does not behind the colon of a URL."""
    end = (address or arguments.tokens)[-1].end
    if not address or not arguments.line.startswith("//", end) or not address[-1].text.endswith(":"):
        return address
    first = address[-1]
    start = first.start
    words = words_of(arguments.line[start:].split())
    found, at = address[:-1], start
    for word in words:
        at = arguments.line.index(word.text, at)
        found.append(Token(word.kind, word.text, at, at + len(word.text)))
        at += len(word.text)
    return found


def _missing(arguments: Arguments, address: list[Token], message: str) -> CommandError:
    """An error that points behind what is there of an address."""
    if not address:
        return arguments.missing(message)
    end = address[-1].end
    return CommandError(message, arguments.line, end, end)


def _farewell(output: Output) -> str:
    text = f"closed; sent {output.sent:,}"
    return f"{text}, dropped {output.dropped:,}" if output.dropped else text


def _table(outputs: list[Output]) -> str:
    if not outputs:
        return "no outputs; 'output create NAME KIND ADDRESS' makes one"
    rows = [
        (
            str(number),
            output.kind,
            output.state.value,
            output.name,
            f"sent {output.sent:,}",
            f"waiting {output.waiting:,}",
            f"dropped {output.dropped:,}",
            " ".join(output.address) + (f"  ({output.trouble})" if output.trouble else ""),
        )
        for number, output in enumerate(outputs, 1)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
