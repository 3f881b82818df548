"""``help``: what commands there are, and how each is used."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from vmexit.commands import registry
from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session

_WIDTH = 100


class Help(Command):
    """Explains commands."""

    INFO = Info(
        names=("help", ".help"),
        usage=("help", "help COMMAND"),
        summary="list the commands, or explain one",
        text="""Numbers are hexadecimal; 0n before one makes it decimal, and backticks within one are ignored. Counts shown
are decimal. Commands and options can be typed in any letter case. // and /* */ are comments. While a brace or a quote is
open, the command goes on in the next line.""",
        examples=(("help !msrwrite", "explains one command"),),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(1)
        if not arguments.tokens:
            session.emit(overview())
            return
        token = arguments.tokens[0]
        command = registry.find(token.lower)
        if command is None:
            raise registry.unknown(arguments, token)
        session.emit(explanation(command.INFO))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return () if before else registry.names()


def overview() -> str:
    """A line for each command."""
    return "\n".join(f"{', '.join(_main_names(info)):<22} {info.summary}" for info in registry.infos())


def _main_names(info: Info) -> Sequence[str]:
    return [name for name in info.names if name.removeprefix("!") not in info.names or not name.startswith("!")][:5]


def explanation(info: Info) -> str:
    """All that there is to know about a command."""
    parts = ["\n".join(info.usage), *(_wrapped(paragraph) for paragraph in info.text.split("\n\n"))]
    if info.parameters:
        parts.append("\n".join(f"{name}\n{_wrapped(text, 4)}" for name, text in info.parameters))
    if info.examples:
        width = max(len(example) for example, _ in info.examples)
        parts.append("\n".join(f"    {example:<{width}}   {text}" for example, text in info.examples))
    if info.halted:
        parts.append("It needs a halted machine.")
    return "\n\n".join(parts)


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(
        " ".join(text.split()), _WIDTH, break_on_hyphens=False, initial_indent=" " * indent, subsequent_indent=" " * indent
    )
