"""``.exit``, ``detach`` and ``.cls``: end the session, clear the screen."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session


class Exit(Command):
    """Ends the session."""

    INFO = Info(
        names=(".exit", "exit", "quit"),
        usage=(".exit",),
        summary="end the machine and leave, as Ctrl-D does",
        text="""Ends the machine, whatever it does, and vmexit with it. A machine that vmexit was attached to runs on, as with
'detach'. The exit status of vmexit is 0.""",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        session.is_over = True
        session.driver.leave()


class Detach(Command):
    """Lets go of the machine."""

    INFO = Info(
        names=("detach",),
        usage=("detach",),
        summary="let the machine run on without vmexit, and leave",
        text="""Removes all events and lets the machine run on at full speed, as if vmexit had never been there: also one that
'vmexit run' has started, which then belongs to nobody. What it prints from then on is lost, and a VMM that cannot live with that
ends.

'vmexit attach' with the number of the VMM's process comes back to it.""",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        pid = session.debugger.target.pid
        looks = session.debugger.target.only_looks is not None
        session.debugger.detach()
        session.emit("nothing is watched any more" if looks else f"detached; 'vmexit attach {pid}' comes back")
        session.driver.leave()


class Clear(Command):
    """Clears the screen."""

    INFO = Info(names=(".cls", "cls"), usage=(".cls",), summary="clear the screen", text="Clears the screen of a terminal.")

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        session.driver.clear()
