"""``k``: show who called whom."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.layout import address_text
from vmexit.commands.session import Session


class Stack(Command):
    """Shows the kernel's stack."""

    INFO = Info(
        names=("k",),
        usage=("k",),
        summary="show the kernel's stack of calls",
        text="""Shows which function the current core executes and which functions have called it, the innermost first: RSP, the
address, and its name. It goes by the kernel's own tables (ORC), and where they do not lead on by what on the stack looks like a
return address; such a line has a ? and may be left from a call long ago. It ends where the kernel was entered.""",
        examples=(("k", "shows how the kernel came here"),),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        view = session.guest
        lines = [f"{'stack':<19}{'address':<19}"]
        for frame in view.frames():
            name = view.name_of(frame.address) or ""
            lines.append(f"{address_text(frame.stack)}  {address_text(frame.address)}  {'? ' * frame.is_guess}{name}".rstrip())
        session.emit("\n".join(line.rstrip() for line in lines))
