"""Addresses and values as sums of numbers, registers and symbols: ``rsp+20``, ``@rip - 0n16``, ``schedule+4``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vmexit.commands.command import did_you_mean
from vmexit.commands.tokens import Token, TokenKind, parse_number
from vmexit.errors import CommandError
from vmexit.guest import registers as register_names

_PIECE = re.compile(r"[-+=]|[^-+=\s]+")

_NOTHING = "neither a number nor a register, nor a symbol that is known"


@dataclass(frozen=True, slots=True)
class Piece:
    """A number, a name or a sign, and where it was typed."""

    text: str
    start: int
    end: int


def pieces_of(line: str, tokens: Sequence[Token]) -> list[Piece]:
    """Cuts words at signs and equals signs. Raises CommandError for text in quotes or braces."""
    pieces = []
    for token in tokens:
        if token.kind in (TokenKind.STRING, TokenKind.BLOCK):
            raise CommandError("text in quotes or braces is no number", line, token.start, token.end)
        if line[token.start : token.end] == token.text:
            pieces += [Piece(match[0], match.start(), match.end()) for match in _PIECE.finditer(line, token.start, token.end)]
        else:  # there is a comment in the word
            pieces += [Piece(match[0], token.start, token.end) for match in _PIECE.finditer(token.text)]
    return pieces


def evaluate(
    line: str, pieces: Sequence[Piece], registers: Callable[[], Mapping[str, int]], symbols: Callable[[str], int | None]
) -> int:
    """The value of one or more pieces, which may be negative or have more than 64 bits; the caller knows what fits.

    A word that is a number is one; ``@`` makes it a register in any case. A word that is neither is a symbol of the guest's, as
    is one with ``!`` in it. ``registers`` is only called where one is named, ``symbols`` (None: there is none) likewise.
    """
    total, sign, wants_term = 0, 1, True
    for piece in pieces:
        if piece.text in "+-":
            if not wants_term:
                sign = 1
            sign, wants_term = -sign if piece.text == "-" else sign, True
        elif piece.text == "=":
            raise CommandError("there is nothing to assign to here", line, piece.start, piece.end)
        elif not wants_term:
            raise CommandError("a + or - is missing before this", line, piece.start, piece.end)
        else:
            total += sign * _term(line, piece, registers, symbols)
            sign, wants_term = 1, False
    if wants_term:
        end = pieces[-1].end if pieces else len(line)
        raise CommandError("a number or register is missing", line, end, end)
    return total


def _term(line: str, piece: Piece, registers: Callable[[], Mapping[str, int]], symbols: Callable[[str], int | None]) -> int:
    name = piece.text.removeprefix("@")
    if name == piece.text:
        number = parse_number(name)
        if number is not None:
            return number
    if name.lower() not in register_names.ALL:
        address = symbols(name) if name == piece.text else None
        if address is not None:
            return address
        raise unknown_register(line, piece, _NOTHING if name == piece.text else "no register")
    return registers()[name.lower()]


def unknown_register(line: str, piece: Piece, what: str = "no register") -> CommandError:
    """The error for a name that no register has."""
    hint = did_you_mean(piece.text.removeprefix("@").lower(), register_names.ALL)
    return CommandError(f"'{piece.text}' is {what}", line, piece.start, piece.end, hint)
