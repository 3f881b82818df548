"""``msr``: what an MSR is, what a value of it says, and what a change means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vmexit import msr
from vmexit.commands import msr_names
from vmexit.commands.command import Arguments, Command, Info
from vmexit.msr import Field, Msr, decode

if TYPE_CHECKING:
    from vmexit.commands.session import Session

_LAST_VALUE = 0xFFFF_FFFF_FFFF_FFFF


class ExplainMsr(Command):
    """Explains MSRs and their values."""

    INFO = Info(
        names=("msr",),
        usage=("msr MSR", "msr MSR VALUE", "msr MSR OLD NEW"),
        summary="explain an MSR, a value of it, or a change",
        text="""Shows what an MSR is and which fields it has, or what a value of it says, or what differs between two values. Only
what the manuals say is shown; the guest is not asked. An address that means different things on different processors is
explained for each of them.""",
        parameters=(
            ("MSR", "A number, or a name in any letter case, with or without IA32_ and MSR_ before it."),
            ("VALUE, OLD, NEW", "Values of 64 bits, hexadecimal."),
        ),
        examples=(
            ("msr c0000080", "what EFER is, and its fields"),
            ("msr efer d01", "EFER = 0xd01 SCE LME LMA NXE, and what these mean"),
            ("msr efer 500 d01", "EFER 0x500 -> 0xd01 +SCE +NXE"),
        ),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        session.emit(explanation(arguments))

    def complete_word(self, session: Session, before: Sequence[str], word: str) -> Iterable[str]:
        return () if before or "," in word else msr_names.complete(word)


def explanation(arguments: Arguments) -> str:
    """What the command shows. Raises CommandError."""
    if not arguments.tokens:
        raise arguments.missing("which MSR?", "msr MSR [VALUE]")
    arguments.at_most(3)
    token, *rest = arguments.tokens
    named = msr_names.parse_one(arguments, token)
    values = [arguments.number(value, "value of an MSR", _LAST_VALUE) for value in rest]
    if not named.meanings:
        raise arguments.error(f"nothing is known of MSR {named.address:x}", token)
    if not values:
        return "\n\n".join(map(_what, named.meanings))
    if len(values) == 1:
        return "\n\n".join(_value(one, values[0]) for one in named.meanings)
    return "\n".join(one.change(*values) for one in named.meanings)


def overview() -> str:
    """A line for each MSR that is known."""
    return "\n".join(f"{one.address:<8x}  {one.name:<28}  {one.vendor:<11}  {one.text}" for one in msr.everything())


def _what(one: Msr) -> str:
    lines = [f"{one.address:x} {one.name} ({one.vendor_text}): {one.text}"]
    if one.aliases:
        lines.append(f"also called {', '.join(one.aliases)}")
    lines += _rows([(field, _values(field)) for field in one.fields])
    lines += [f"source: {source}" for source in one.sources]
    return "\n".join(lines)


def _value(one: Msr, value: int) -> str:
    rows = [
        (field, "" if field.is_flag else field.shown(held))
        for field, held in decode(one.fields, value).fields
        if held or 0 in field.values
    ]
    return "\n".join([one.explain(value), *_rows(rows)])


def _rows(rows: Sequence[tuple[Field, str]]) -> list[str]:
    """Fields with their bits, what is said of each, and what it means."""
    texts = [(field.bits, field.name, "  ".join(filter(None, (said, field.text)))) for field, said in rows]
    width = max((len(name) for _, name, _ in texts), default=0)
    return [f"  {bits:>5}  {name:<{width}}  {text}".rstrip() for bits, name, text in texts]


def _values(field: Field) -> str:
    """The names of a field's values."""
    return ", ".join(f"{value:x} {name}" for value, name in field.values.items())
