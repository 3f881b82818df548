"""``~``: show or choose the core that registers and memory are taken from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.layout import place_text
from vmexit.commands.session import Session
from vmexit.debugger import State


class Core(Command):
    """Chooses the current core."""

    INFO = Info(
        names=("~", "core"),
        usage=("~", "~ CORE"),
        summary="show or change the current core",
        text="""The current core is the one whose registers 'r' shows, whose page tables 'u' and 'db' go by, and that
'events sc' is about. A break makes the core that it happened on the current one.""",
        parameters=(("CORE", "A vCPU, counted from 0."),),
        examples=(("~ 1", "looks at core 1"),),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        debugger = session.debugger
        arguments.at_most(1)
        if not arguments.tokens:
            session.emit(f"current core: {debugger.core:x} (there are {debugger.target.vcpus:x})")
            return
        token = arguments.tokens[0]
        core = arguments.number(token, "core number")
        if core >= debugger.target.vcpus:
            last = debugger.target.vcpus - 1
            hint = f"there are 0 to {last:x}" if last else "there is only core 0"
            raise arguments.error(f"there is no core {core:x}", token, hint=hint)
        debugger.core = core
        text = f"current core: {core:x}"
        if debugger.state is State.HALTED:
            text += "\n" + place_text(debugger, session.settings.syntax)
        session.emit(text)

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return () if before else [f"{core:x}" for core in range(session.debugger.target.vcpus)]
