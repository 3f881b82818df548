"""``.attach`` and ``.detach``: choose the process that events are about which name none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.debugger import State
from vmexit.guest.linux.recipe import HIGHEST_PID


class Attach(Command):
    """Chooses the process that events are about."""

    INFO = Info(
        names=(".attach",),
        usage=(".attach", ".attach PID", ".attach pid PID"),
        summary="choose the process that events are about",
        text="""Events that are made from now on, and do not say 'pid' themselves, are triggered by this process of the guest's
alone (of the host's with 'vmexit host'). Events that there are already stay as they are, and the process goes on as before.
Without a number it shows which process is attached.

Numbers are hexadecimal like all others; 0n before one makes it decimal.""",
        parameters=(("PID", "A process; what the guest calls its PID."),),
        examples=(
            (".attach 5e", "events are about process 5e"),
            ("!msrwrite lstar pid all", "this one is about all of them all the same"),
        ),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        tokens = list(arguments.tokens)
        if not tokens:
            session.emit(_attached(session))
            return
        if tokens[0].lower == "pid":
            tokens.pop(0)
            if not tokens:
                raise arguments.missing("a process number is missing")
        if len(tokens) > 1:
            raise arguments.error("one process can be attached at a time", tokens[1])
        pid = arguments.number(tokens[0], "process number", HIGHEST_PID)
        looks = session.debugger.target.only_looks
        if looks is not None and not looks.names_processes:
            raise arguments.error(f"'.attach' is not possible here: {looks.reason}", arguments.command)
        name = _name(session, arguments, pid)
        session.debugger.attached = pid
        waits = "" if session.debugger.knows_processes else "; they wait until the guest's processes are known"
        session.emit(f"events that do not say 'pid' are about process {pid:x} (0n{pid}{name}) from now on{waits}")

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return () if before else ("pid",)


class DetachProcess(Command):
    """Makes events be about all processes again."""

    INFO = Info(
        names=(".detach",),
        usage=(".detach",),
        summary="make events be about all processes again",
        text="""Events that are made from now on are triggered by all processes, unless they say 'pid'. Events that there are
already stay as they are. 'detach', without the dot, is another command: it lets go of the machine.""",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        pid = session.debugger.attached
        if pid is None:
            hint = "'.attach PID' attaches one; 'detach' lets go of the machine"
            raise arguments.error("no process is attached", arguments.command, hint=hint)
        session.debugger.attached = None
        session.emit(f"process {pid:x} is detached: events are about all processes")


def _attached(session: Session) -> str:
    pid = session.debugger.attached
    return "no process is attached: events are about all of them" if pid is None else f"process {pid:x} (0n{pid}) is attached"


def _name(session: Session, arguments: Arguments, pid: int) -> str:
    """What the process calls itself, where that can be found out now. Raises CommandError where there is none of that number."""
    if session.debugger.state is not State.HALTED or session.debugger.target.only_looks is not None:
        return ""
    linux = session.guest.known
    if linux is None:
        return ""
    task = linux.tasks.find(pid)
    if task is None:
        raise arguments.error(f"there is no process {pid:x} (0n{pid})", arguments.tokens[-1])
    return f", {task.comm}"
