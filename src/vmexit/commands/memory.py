"""``db``, ``dc``, ``dw``, ``dd``, ``dq`` and their physical twins ``!db`` ...: show memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.expression import evaluate, pieces_of
from vmexit.commands.layout import LAST_ADDRESS, address_text, dump_lines, read_up_to
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token
from vmexit.errors import CommandError
from vmexit.guest import registers as register_names

MOST = 0x10_0000
"""Bytes that one command shows."""
_LENGTH = 0x80
_UNITS = {"db": 1, "dc": 4, "dw": 2, "dd": 4, "dq": 8}

PLACE_PARAMETERS = (
    (
        "ADDRESS",
        "A hexadecimal number, a register, a symbol of the guest's, or a sum or difference of these: rsp+20, schedule+8.",
    ),
    ("l LENGTH", "So many bytes, hexadecimal; at most 100000."),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What part of memory a command names."""

    address: int | None
    length: int | None
    tokens: Sequence[Token]
    """Those that name the address."""


def parse_place(session: Session, arguments: Arguments) -> Place:
    """Reads ``[ADDRESS] [l LENGTH]``. Raises CommandError."""
    tokens = arguments.tokens
    split = next((i for i, token in enumerate(tokens) if token.lower == "l"), len(tokens))
    length = None
    if split < len(tokens):
        if split + 1 == len(tokens):
            raise arguments.missing("a length is missing", "l LENGTH, in bytes")
        length = arguments.number(tokens[split + 1], "length in bytes", MOST)
        if length == 0:
            raise arguments.error("a length is 1 or more", tokens[split + 1])
        if split + 2 < len(tokens):
            raise _leftover(arguments, tokens[split + 2])
    process = next((token for token in tokens[:split] if token.lower == "pid"), None)
    if process is not None:
        raise _leftover(arguments, process)
    if not split:
        return Place(None, length, ())
    value = evaluate(
        arguments.line, pieces_of(arguments.line, tokens[:split]), session.debugger.registers, session.guest.address_of
    )
    return Place(value & LAST_ADDRESS, length, tokens[:split])


def _leftover(arguments: Arguments, token: Token) -> CommandError:
    if token.lower == "pid":
        return arguments.error("'pid' is not yet available", token, hint="addresses are those of the current core")
    return arguments.error(f"'{token.text}' is one word too many", token)


def not_readable(arguments: Arguments, place: Place, address: int, physical: bool) -> CommandError:
    """The error for memory of which nothing at all can be read."""
    what = "there is no memory at physical address" if physical else "nothing is mapped at"
    if place.tokens:
        return arguments.error(f"{what} {address_text(address)}", place.tokens[0], until=place.tokens[-1])
    return arguments.error(f"{what} {address_text(address)}", arguments.command)


def cut_text(address: int, physical: bool) -> str:
    """What is said where only the first part of memory could be read."""
    return f"{'there is no memory' if physical else 'nothing is mapped'} from {address_text(address)} on"


def complete_place(before: Sequence[str]) -> Iterable[str]:
    """What can come next in ``[ADDRESS] [l LENGTH]``."""
    if "l" in before:
        return ()
    in_a_sum = before and before[-1].endswith(("=", "+", "-"))
    return [*register_names.ALL, "l"] if in_a_sum or not before else ("l",)


class ShowMemory(Command):
    """Shows memory."""

    INFO = Info(
        names=("db", "dc", "dw", "dd", "dq", "!db", "!dc", "!dw", "!dd", "!dq"),
        usage=("db|dc|dw|dd|dq [ADDRESS] [l LENGTH]", "!db|!dc|!dw|!dd|!dq [ADDRESS] [l LENGTH]"),
        summary="show memory",
        text="""Shows memory as bytes and characters (db), as units of 2, 4 or 8 bytes (dw, dd, dq), or as units of 4 bytes and
characters (dc). Addresses are virtual, by the page tables of the current core; with '!' they are physical.

Without an address it goes on where the last one of them ended.""",
        parameters=(*PLACE_PARAMETERS[:1], ("l LENGTH", "So many bytes, hexadecimal: 80 unless said otherwise, at most 100000.")),
        examples=(
            ("db rsp l 20", "the 32 bytes that RSP points at"),
            ("dq gs_base+10", "from 16 bytes behind GS's base on"),
            ("!dd 100000", "physical memory from 1 MB on"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        physical = arguments.name.startswith("!")
        style = arguments.name.removeprefix("!")
        unit = _UNITS[style]
        place = parse_place(session, arguments)
        address = session.next_data.get(physical) if place.address is None else place.address
        if address is None:
            raise arguments.missing(f"'{arguments.name}' needs an address")
        # Whole units, of which the first ends within the address space.
        length = min(-(-(place.length or _LENGTH) // unit) * unit, LAST_ADDRESS + 1 - address)
        data = read_up_to(session.debugger, address, length, physical=physical, guest=session.guest)
        lines = list(dump_lines(data, address, unit, characters=style in ("db", "dc")))
        if not lines:
            raise not_readable(arguments, place, address + len(data), physical)
        if len(data) < length:
            lines.append(cut_text(address + len(data), physical))
        session.next_data[physical] = (address + len(data)) & LAST_ADDRESS
        session.emit("\n".join(lines))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return complete_place(before)
