"""What every command is made of: its description, its arguments, and the errors that point at one of them."""

from __future__ import annotations

import abc
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vmexit.commands.tokens import Token, TokenKind, parse_number
from vmexit.errors import CommandError

if TYPE_CHECKING:
    from vmexit.commands.session import Session


@dataclass(frozen=True, slots=True)
class Info:
    """All that is said about a command: ``help`` and the command reference are made of it."""

    names: tuple[str, ...]
    """In lower case; the first is its name, the others are short for it or its variants."""
    usage: tuple[str, ...]
    """How it is typed: [optional], a|b for a choice, CAPITALS for what the user puts in."""
    summary: str
    """One line, without a full stop."""
    text: str
    """What it does: paragraphs with an empty line between them."""
    parameters: tuple[tuple[str, str], ...] = ()
    """Each as it stands in the usage, and what it means."""
    examples: tuple[tuple[str, str], ...] = ()
    """A whole command, and what it does."""
    halted: bool = False
    """It needs a halted machine."""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class Arguments:
    """A command line in tokens: that of the command's name, and those behind it."""

    def __init__(self, line: str, tokens: Sequence[Token]) -> None:
        """``tokens``: all of the line; at least one."""
        self.line = line
        self.command = tokens[0]
        self.tokens = list(tokens[1:])

    @property
    def name(self) -> str:
        """The command's name as it was typed, in lower case."""
        return self.command.lower

    def error(self, message: str, token: Token, *, until: Token | None = None, hint: str | None = None) -> CommandError:
        """An error that points at a token, or at all from it to ``until``."""
        return CommandError(message, self.line, token.start, (until or token).end, hint)

    def missing(self, message: str, hint: str | None = None) -> CommandError:
        """An error that points behind the last token, where something should follow."""
        end = (self.tokens[-1] if self.tokens else self.command).end
        return CommandError(message, self.line, end, end, hint)

    def at_most(self, count: int) -> None:
        """Raises CommandError where there are more arguments than that."""
        if len(self.tokens) > count:
            what = "takes no arguments" if count == 0 else f"takes {count} argument{'s' * (count > 1)} at most"
            raise self.error(f"'{self.name}' {what}", self.tokens[count], until=self.tokens[-1])

    def number(self, token: Token, what: str, most: int = 0xFFFF_FFFF) -> int:
        """The number that a token stands for, from 0 to ``most``. ``what``: what it is, for the CommandError."""
        number = parse_number(token.text)
        if number is None or token.kind is TokenKind.BLOCK:
            raise self.error(f"'{token.text}' is no {what}", token, hint="a number is hexadecimal; decimal ones begin with 0n")
        if number > most:
            raise self.error(f"{token.text} is too big: the biggest {what} is {most:x}", token)
        return number

    def choice(self, token: Token, choices: Sequence[str], what: str) -> str:
        """Which of the choices (in lower case) a token is, in any letter case. ``what``: what it says, for the CommandError."""
        if token.lower in choices:
            return token.lower
        hint = did_you_mean(token.lower, choices) or f"it is {one_of(choices)}"
        raise self.error(f"'{token.text}' is no {what}", token, hint=hint)


def one_of(choices: Sequence[str]) -> str:
    """As people say it: "pre, post or all"."""
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """A hint for a word that is misspelt; None where nothing is like it."""
    found = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f"did you mean '{found[0]}'?" if found else None


class Command(abc.ABC):
    """A command. One object serves all of its names and has no state of its own."""

    INFO: ClassVar[Info]

    @abc.abstractmethod
    def run(self, session: Session, arguments: Arguments) -> None:
        """Does it. Raises CommandError, with the place, for a line that makes no sense, other VmexitErrors where it fails."""

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        """What the next argument can be; ``before``: the arguments that are there already, in lower case."""
        return ()

    def complete_word(self, session: Session, before: Sequence[str], word: str) -> Iterable[str]:
        """The same, where there is more than anybody wants to see before the word has begun."""
        return self.complete(session, before)
