"""``lm`` and ``x``: modules and symbols of the guest's kernel."""

from __future__ import annotations

from itertools import islice

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.layout import address_text
from vmexit.commands.session import Session

_MOST = 1000


class Modules(Command):
    """Lists modules."""

    INFO = Info(
        names=("lm",),
        usage=("lm",),
        summary="list the guest's kernel and its modules",
        text="""Lists the guest's kernel and the modules that it has loaded: where each begins and ends, how many symbols of it
are known, and its name.""",
        examples=(("lm", "lists them"),),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        system = session.guest.system
        rows = [(*system.extent, system.symbol_count, system.kernel_name)]
        rows += [(m.base, m.base + m.size, len(system.module_symbols(m)), m.name) for m in system.modules]
        lines = [f"{'begin':<19}{'end':<19}{'symbols':>8}  module"]
        lines += [f"{address_text(start)}  {address_text(end)}  {count:>8}  {name}" for start, end, count, name in rows]
        session.emit("\n".join(lines))


class Examine(Command):
    """Finds symbols."""

    INFO = Info(
        names=("x",),
        usage=("x PATTERN",),
        summary="find symbols of the guest's kernel",
        text=f"""Lists symbols with their addresses, the lowest first; at most 0n{_MOST} of them. What is found can be typed
wherever an address is wanted. Variables of which each CPU has its own are offsets into the CPU's area, which gs_base points
to.""",
        parameters=(
            (
                "PATTERN",
                "A name, with * for any characters, ? for one, [...] for one of several; in any letter case. MODULE! before it "
                "looks in one module only; the kernel's own is 'kernel' (or 'nt').",
            ),
        ),
        examples=(("x *write_msr*", "finds all that write an MSR"), ("x msr!*", "lists the symbols of the module msr")),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(1)
        if not arguments.tokens:
            raise arguments.missing("a pattern is missing", "x *msr*")
        token = arguments.tokens[0]
        found = list(islice(session.guest.system.search(token.text), _MOST + 1))
        if not found:
            raise arguments.error(f"no symbol matches '{token.text}'", token)
        lines = [f"{address_text(symbol.address)}  {symbol.kind}  {module}!{symbol.name}" for symbol, module in found[:_MOST]]
        if len(found) > _MOST:
            lines.append(f"there are more than {_MOST}; name more of it")
        session.emit("\n".join(lines))
