"""MSRs as they are typed in a command: a number, or a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmexit import msr
from vmexit.commands.command import Arguments, did_you_mean
from vmexit.commands.tokens import Token, TokenKind
from vmexit.errors import CommandError


@dataclass(frozen=True, slots=True)
class Named:
    """An MSR as somebody typed it."""

    address: int
    meanings: Sequence[msr.Msr]
    """What it can mean: all that is known of a number, or the one that was named."""


def parse_one(arguments: Arguments, token: Token, other: Iterable[str] = ()) -> Named:
    """The MSR that a token names; a number is a number, always. Raises CommandError.

    ``other``: words that could have been meant where it is no MSR.
    """
    if token.kind is TokenKind.NUMBER:
        address = arguments.number(token, "MSR number")
        return Named(address, msr.at(address))
    found = msr.find(token.text) if token.kind is TokenKind.WORD else None
    if found is None:
        raise _unknown(arguments, token, list(other))
    return Named(found.address, [found])


def _unknown(arguments: Arguments, token: Token, other: Sequence[str]) -> CommandError:
    if token.kind is not TokenKind.WORD:
        return arguments.error("the number or name of an MSR is typed without quotes and braces", token)
    hint = did_you_mean(token.lower, other)
    if hint is None:
        names = msr.similar(token.text)
        hint = f"did you mean {', '.join(names)}?" if names else None
    what = f"'{token.text}' is neither an MSR nor an option" if other else f"there is no MSR '{token.text}'"
    return arguments.error(what, token, hint=hint)


def complete(word: str) -> list[str]:
    """What an unfinished name, or list of names, can become."""
    done = max(word.rfind(","), word.rfind("-")) + 1
    return [word[:done].lower() + name for name in msr.beginning(word[done:])] if word[done:] else []
