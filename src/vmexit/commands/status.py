"""``.status``: what machine this is, what it does, and how much was trapped."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.debugger import State
from vmexit.link.wire import Capability


class Status(Command):
    """Shows the state of everything."""

    INFO = Info(
        names=(".status", "status"),
        usage=(".status",),
        summary="show the state of the machine, the agent and the events",
        text="""Shows the machine, whether it runs, what the agent in it can do, how many events there are, how many records
came of them, how many were dropped for want of room, and how often a vCPU had to wait for room.""",
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        debugger = session.debugger
        link, events = debugger.target.link, list(debugger.events)
        cores = debugger.target.vcpus
        # How the machine is halted is no matter to the user.
        told = link.capabilities & ~Capability.HALT
        can = [(capability.name or "").lower().replace("_", " ") for capability in Capability if capability in told]
        plugin = f", QEMU plugin interface {link.plugin_api}" if link.plugin_api else ""
        enabled = sum(event.enabled for event in events)
        session.emit(
            "\n".join(
                (
                    f"machine  {debugger.target.name}, {cores:x} core{'s' * (cores > 1)}",
                    f"state    {_state(session)}",
                    f"agent    through {link.door}{plugin}; can {', '.join(can)}",
                    f"process  {_process(session)}",
                    f"events   {len(events)}, of which {enabled} enabled",
                    f"records  {debugger.summary.total:,}; {debugger.dropped():,} dropped, {debugger.waits():,} waits for room "
                    f"(overflow {debugger.overflow.value})",
                )
            )
        )


def _process(session: Session) -> str:
    debugger = session.debugger
    attached = "none is attached" if debugger.attached is None else f"{debugger.attached:x} is attached"
    return attached if debugger.knows_processes else f"{attached}; those that run here are not known"


def _state(session: Session) -> str:
    debugger = session.debugger
    if debugger.state is State.HALTED and debugger.stop is not None:
        return f"halted: {debugger.stop.reason.value}; current core {debugger.core:x}"
    return debugger.state.value
