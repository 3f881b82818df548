"""``dt``: show the guest kernel's types, and memory by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.expression import evaluate, pieces_of
from vmexit.commands.layout import LAST_ADDRESS, address_text
from vmexit.commands.session import Session
from vmexit.commands.tokens import Token
from vmexit.errors import VmexitError
from vmexit.guest.linux.btf import BtfError
from vmexit.guest.linux.types import render

_MOST = 1 << 20
_KEYWORDS = ("struct", "union", "enum")


class ShowType(Command):
    """Shows a type."""

    INFO = Info(
        names=("dt",),
        usage=("dt TYPE[.MEMBER] [ADDRESS]",),
        summary="show a type of the guest's kernel, or memory by it",
        text="""Shows the members of a type with their offsets, or with an address their values, too. The types are the kernel's
own (BTF), of Windows those of its PDB. Addresses are the kernel's, whatever the current core's page tables are.""",
        parameters=(
            ("TYPE", "A struct, union, enum or typedef: task_struct, struct list_head."),
            ("MEMBER", "One member only, whole; with dots between for a member's member."),
            ("ADDRESS", "Where it lies: a hexadecimal number, a register, a symbol, or a sum or difference of these."),
        ),
        examples=(
            ("dt list_head", "shows its two members"),
            ("dt task_struct.pid init_task", "shows one member of a variable"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        tokens = arguments.tokens
        if tokens and tokens[0].lower in _KEYWORDS:
            tokens = tokens[1:]
        if not tokens:
            raise arguments.missing("a type is missing", "dt task_struct")
        system = session.guest.system
        btf = system.types
        name, _, path = tokens[0].text.partition(".")
        found = btf.find(name)
        if found is None:
            raise arguments.error(f"this kernel has no type '{name}'", tokens[0])
        try:
            member = btf.member(found, path) if path else None
        except BtfError as error:
            raise arguments.error(str(error), tokens[0]) from None
        if path and member is None:
            raise arguments.error(f"'{name}' has no member '{path}'", tokens[0])
        address = self._address(session, arguments, tokens[1:])
        size = btf.size(found.number)
        data = None
        if address is not None:
            if size > _MOST:
                raise arguments.error(f"'{name}' has {size:#x} bytes, too many to be shown", tokens[0])
            try:
                data = system.memory.read(address, size)
            except VmexitError:
                message = f"{size:#x} bytes cannot be read at {address_text(address)}"
                raise arguments.error(message, tokens[1], until=tokens[-1]) from None
        session.emit("\n".join(render(btf, found, member, data)))

    def _address(self, session: Session, arguments: Arguments, tokens: Sequence[Token]) -> int | None:
        if not tokens:
            return None
        pieces = pieces_of(arguments.line, tokens)
        return evaluate(arguments.line, pieces, session.debugger.registers, session.guest.address_of) & LAST_ADDRESS

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return _KEYWORDS if not before else ()
