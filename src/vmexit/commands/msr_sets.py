"""Sets of MSRs as they are typed in a command, ``lstar,fmask`` or ``200-20f``, and as they are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vmexit import msr
from vmexit.commands.command import Arguments
from vmexit.commands.msr_names import parse_one
from vmexit.commands.tokens import Token, TokenKind, parse_number
from vmexit.events.msrs import MsrSet

_FEW = 4
"""Ranges of a set that are named."""
_SEPARATOR = re.compile(r"([,-])")


def parse(arguments: Arguments, tokens: Sequence[Token], other: Iterable[str]) -> MsrSet | None:
    """The MSRs that these tokens name, ``lstar,fmask`` or ``200-20f``; None without tokens.

    Blanks may stand beside a comma or a hyphen. ``other``: words that could have been meant where a token is no MSR, for the
    CommandError.
    """
    if not tokens:
        return None
    groups = [[tokens[0]]]
    for token in tokens[1:]:
        before = groups[-1][-1]
        if before.text.endswith((",", "-")) or token.text.startswith((",", "-")):
            groups[-1].append(token)
        else:
            groups.append([token])
    ranges = [_ranges(arguments, [part for token in group for part in _parts(token)], other) for group in groups]
    if len(groups) > 1:
        first, second = groups[:2]
        hint = f"write {first[-1].text},{second[0].text}, or make another event for this one"
        raise arguments.error("an event names its MSRs in one list", second[0], until=second[-1], hint=hint)
    return MsrSet.of_ranges(ranges[0])


def _parts(token: Token) -> list[Token]:
    """A token cut at its commas and hyphens, which are parts too."""
    if token.kind is TokenKind.STRING or token.end - token.start != len(token.text):
        return [token]
    parts, at = [], 0
    for text in _SEPARATOR.split(token.text):
        if text:
            kind = TokenKind.WORD if parse_number(text) is None else TokenKind.NUMBER
            parts.append(Token(kind, text, token.start + at, token.start + at + len(text)))
        at += len(text)
    return parts


def _ranges(arguments: Arguments, parts: Sequence[Token], other: Iterable[str]) -> list[tuple[int, int]]:
    """What a list says, as inclusive ranges."""
    ranges: list[tuple[int, int]] = []
    left = list(parts)

    def next_msr() -> tuple[int, Token]:
        if not left:
            raise arguments.error(f"an MSR is missing behind '{parts[-1].text}'", parts[-1])
        part = left.pop(0)
        if part.kind is not TokenKind.STRING and part.text in (",", "-"):
            raise arguments.error(f"an MSR is missing before '{part.text}'", part)
        return parse_one(arguments, part, other).address, part

    while left:
        first, at = next_msr()
        last, until = first, at
        if left and left[0].text == "-":
            left.pop(0)
            last, until = next_msr()
        if last < first:
            what = f"a range begins with the lower number: {last:x} is less than {first:x}"
            raise arguments.error(what, at, until=until, hint=f"{last:x}-{first:x}")
        ranges.append((first, last))
        if left:
            if left[0].text != ",":
                raise arguments.error("between MSRs stands a comma, or a hyphen for a range", left[0])
            left.pop(0)
            if not left:
                raise arguments.error("an MSR is missing behind ','", parts[-1])
    return ranges


def describe(msrs: MsrSet) -> str:
    """A set with its names: "c0000082 LSTAR, 200-213 MTRR_PHYSBASE0-MTRR_PHYSMASK9"."""
    if msrs.left_out is not None or len(msrs.ranges) > _FEW:
        return str(msrs)
    return ", ".join(_with_names(first, last) for first, last in msrs.ranges)


def _with_names(first: int, last: int) -> str:
    names = [found.name if found else "" for found in (msr.find(first), msr.find(last))]
    if first == last:
        return f"{first:x} {names[0]}".rstrip()
    return f"{first:x}-{last:x}" + (f" {names[0]}-{names[1]}" if all(names) else "")
