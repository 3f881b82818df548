"""An event as the agent runs it: from what the user means to what goes over the wire."""

from __future__ import annotations

from vmexit.errors import VmexitError
from vmexit.events.event import Event, EventError
from vmexit.link import wire
from vmexit.link.wire import Action, Capability, EventFlag, Stage

# What it is called, and the option of a command line that asks for it.
_NEEDS = {
    Capability.POST: ("stage post", "stage"),
    Capability.SKIP: ("short-circuiting", "sc"),
    Capability.BREAK: ("breaking", ""),
    Capability.READ: ("callbacks", "script"),
}


def needed(event: Event) -> Capability:
    """What the agent must be able to do for this event."""
    capabilities = Capability.RECORD
    if event.stage & Stage.POST:
        capabilities |= Capability.POST
    if event.short_circuit:
        capabilities |= Capability.SKIP
    if event.action & Action.BREAK:
        capabilities |= Capability.BREAK
    if event.action & Action.ASK:
        capabilities |= Capability.READ
    return capabilities


def check(event: Event, capabilities: Capability, vcpus: int, target: str) -> None:
    """Raises VmexitError, with the reason, for an event that this machine cannot run; EventError where one option is to blame."""
    missing = needed(event) & ~capabilities
    for capability, (what, option) in _NEEDS.items():
        if missing & capability:
            raise EventError(
                option,
                f"{what} is not possible in {target}: its internals cannot be reached by the agent; "
                "Debian's and Ubuntu's qemu-system-x86 export them",
            )
    if event.core is not None and event.core >= vcpus:
        there = "only core 0" if vcpus == 1 else f"cores 0 to {vcpus - 1:x}"
        raise EventError("core", f"there is no core {event.core:x}; this machine has {there}")
    if len(event.msrs.ranges) > wire.MAX_RANGES:
        raise VmexitError(f"an event can name {wire.MAX_RANGES} separate ranges of MSRs, not {len(event.msrs.ranges)}")


def lower(event: Event) -> bytes:
    """The event's struct vmexit_event."""
    flags = EventFlag(0)
    if event.enabled:
        flags |= EventFlag.ENABLED
    if event.short_circuit:
        flags |= EventFlag.SHORT_CIRCUIT
    if event.immediate:
        flags |= EventFlag.IMMEDIATE
    return wire.pack(
        "event",
        id=event.number + 1,  # the wire's 0 means none
        slot=event.slot,
        access=int(event.access),
        stages=int(event.stage),
        actions=int(event.action),
        flags=int(flags),
        core=wire.ALL_CORES if event.core is None else event.core,
        range_count=len(event.msrs.ranges),
        ranges=[{"first": first, "last": last} for first, last in event.msrs.ranges],
    )
