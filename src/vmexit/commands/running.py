"""``g``, ``pause`` and ``sleep``: let the machine run, halt it, wait."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.debugger import State


class Go(Command):
    """Lets the machine run."""

    INFO = Info(
        names=("g",),
        usage=("g",),
        summary="let the machine run",
        text="""Starts a machine that has not run yet, or lets a halted one go on.

Where several vCPUs came to a break at the same moment, 'g' shows the next of them before anything runs.

At the console it returns at once, and the machine can be halted with 'pause' or Ctrl-C. In commands that are not typed (-x,
--script, or read from a pipe) it waits until the machine halts again or ends.""",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        if session.debugger.state is State.RUNNING:
            session.emit("the machine runs already")
        else:
            session.driver.go()


class Pause(Command):
    """Halts the machine."""

    INFO = Info(
        names=("pause",),
        usage=("pause",),
        summary="halt the machine, as Ctrl-C does",
        text="Halts all vCPUs where they are. 'g' lets them go on.",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        if session.debugger.state is State.HALTED:
            session.emit("the machine is halted already")
        else:
            session.driver.pause()


class Sleep(Command):
    """Waits."""

    INFO = Info(
        names=("sleep",),
        usage=("sleep MILLISECONDS",),
        summary="wait before the next command",
        text="Waits; a machine that runs goes on running. Ctrl-C ends it early.",
        parameters=(("MILLISECONDS", "How long, as every number in hexadecimal: 3e8 (or 0n1000) is a second."),),
        examples=(("sleep 0n500", "waits half a second"),),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        if not arguments.tokens:
            raise arguments.missing("'sleep' needs a number of milliseconds")
        arguments.at_most(1)
        session.driver.sleep(arguments.number(arguments.tokens[0], "number of milliseconds") / 1000)
