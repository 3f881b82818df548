"""``.exit`` and ``.cls``: end the session, clear the screen."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session


class Exit(Command):
    """Ends the session."""

    INFO = Info(
        names=(".exit", "exit", "quit"),
        usage=(".exit",),
        summary="end the machine and leave, as Ctrl-D does",
        text="Ends the machine, whatever it does, and vmexit with it. The exit status of vmexit is 0.",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        session.is_over = True
        session.driver.leave()


class Clear(Command):
    """Clears the screen."""

    INFO = Info(names=(".cls", "cls"), usage=(".cls",), summary="clear the screen", text="Clears the screen of a terminal.")

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        session.driver.clear()
