"""The events as the agent runs them: from what the user means to what goes over the wire, and what scripts have made of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmexit import callers
from vmexit.errors import LinkError, VmexitError
from vmexit.events.event import Event, EventError
from vmexit.events.table import EventTable
from vmexit.guest.linux.recipe import Recipe
from vmexit.guest.system import CodeMap
from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Action, Capability, EventFlag, EventState, Stage, Status
from vmexit.processes import pack
from vmexit.script.compile import CompiledScript
from vmexit.script.runtime import sealed_file
from vmexit.targets.base import OnlyLooks, Untrappable

if TYPE_CHECKING:
    from vmexit.usercode.buffer import Buffer

_TRIES = 1000
_Key = tuple[CompiledScript, "Buffer | None"]

# What it is called, and the option of a command line that asks for it.
_NEEDS = {
    Capability.POST: ("stage post", "stage"),
    Capability.SKIP: ("short-circuiting", "sc"),
    Capability.BREAK: ("breaking", ""),
    Capability.READ: ("a callback", "script"),
    Capability.MODIFY: ("a script", "script"),
    Capability.MEMORY: ("'pid'", "pid"),
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
    if event.action & Action.ASK or event.condition is not None:
        capabilities |= Capability.READ
    if event.action & Action.SCRIPT:
        capabilities |= Capability.MODIFY
    if event.process is not None:
        capabilities |= Capability.MEMORY
    return capabilities


def check(
    event: Event,
    capabilities: Capability,
    vcpus: int,
    target: str,
    untrappable: Sequence[Untrappable] = (),
    only_looks: OnlyLooks | None = None,
) -> None:
    """Raises VmexitError, with the reason, for an event that this machine cannot run; EventError where one option is to blame."""
    missing = needed(event) & ~capabilities
    if only_looks is not None and only_looks.names_processes:
        missing &= ~Capability.MEMORY
    if only_looks is not None and event.stage & Stage.PRE:
        raise EventError("stage", f"stage pre is not possible here: {only_looks.reason}")
    if event.filter is not None and event.filter.changed and only_looks is not None:
        raise EventError("changed", f"'changed' is not possible here: {only_looks.reason}")
    for capability, (what, option) in _NEEDS.items():
        if missing & capability and only_looks is not None:
            hint = "; 'log' prints each access" if capability == Capability.BREAK else ""
            raise EventError(option, f"{what} is not possible here: {only_looks.reason}{hint}")
        if missing & capability:
            raise EventError(
                option,
                f"{what} is not possible in {target}: its internals cannot be reached by the agent; "
                "Debian's and Ubuntu's qemu-system-x86 export them",
            )
    if event.core is not None and event.core >= vcpus:
        there = "only core 0" if vcpus == 1 else f"cores 0 to {vcpus - 1:x}"
        raise EventError("core", f"there is no core {event.core:x}; this machine has {there}")
    for msrs in () if event.msrs.left_out is not None else untrappable:
        for first, last in event.msrs.ranges:
            if first <= msrs.last and msrs.first <= last:
                named = max(first, msrs.first)
                raise EventError("msr", f"MSR {named:x} cannot be trapped in {target}: {msrs.reason}")
    if len(event.msrs.ranges) > wire.MAX_RANGES:
        raise VmexitError(f"an event can name {wire.MAX_RANGES} separate ranges of MSRs, not {len(event.msrs.ranges)}")


def lower(event: Event, script: int = 0, condition: int = 0) -> bytes:
    """The event's struct vmexit_event; ``script``, ``condition``: the numbers that the agent knows these by, 0 for none."""
    flags = EventFlag(0)
    if event.enabled:
        flags |= EventFlag.ENABLED
    if event.short_circuit:
        flags |= EventFlag.SHORT_CIRCUIT
    if event.immediate:
        flags |= EventFlag.IMMEDIATE
    if event.with_process or (event.script is not None and event.script.asks_process):
        flags |= EventFlag.WITH_PROCESS
    if event.asks_first:
        flags |= EventFlag.ASK_FIRST
    return wire.pack(
        "event",
        id=event.number + 1,  # the wire's 0 means none
        slot=event.slot,
        access=int(event.access),
        stages=int(event.stage),
        actions=int(event.action | event.forwarded),
        flags=int(flags),
        core=wire.ALL_CORES if event.core is None else event.core,
        process=wire.ALL_PROCESSES if event.process is None else event.process,
        script=script,
        condition=condition,
        range_count=len(event.msrs.ranges),
        ranges=[{"first": first, "last": last} for first, last in event.msrs.ranges],
        **(event.filter.wire() if event.filter is not None else {}),
    )


class Program:
    """The events and their scripts on the agent's side of a link."""

    def __init__(self, link: Link, events: EventTable) -> None:
        self.scripts: dict[int, CompiledScript] = {}
        """All that the agent ever had, by the number that it knows them by."""
        self.own: Event | None = None
        """The debugger's own event, number -1, which is none of the table's and acts before them. The agent may not take it."""
        self._link = link
        self._events = events
        self._numbers: dict[_Key, int] = {}
        self._buffers: dict[int, Buffer | None] = {}
        self._there: set[int] = set()
        self._changes = 0
        self._recipe = b""
        self._code = b""

    @property
    def knows_processes(self) -> bool:
        """Whether the agent can find out which process runs."""
        return bool(self._recipe)

    def set_recipe(self, recipe: Recipe | None) -> None:
        """Gives the agent the way to the current thread, or takes it back. Raises VmexitError where it does not take it."""
        packed = pack(recipe) if recipe is not None else b""
        if packed != self._recipe:
            self._link.set_recipe(packed)
            self._recipe = packed

    def set_code(self, code: CodeMap | None) -> None:
        """Tells the agent how to find callers, or that this is not known any more. Raises VmexitError if it does not take it."""
        packed = callers.pack(code) if code is not None else b""
        if packed != self._code:
            self._link.set_code(packed)
            self._code = packed

    def push(self) -> None:
        """Makes the agent's events those of the table, from the next instruction on. Raises LinkError."""
        for _ in range(_TRIES):
            self.sync()
            events = [*self._own_events(), *self._events]
            numbers = [(self._number(event.script, event.buffer), self._number(event.condition)) for event in events]
            wanted = {number for pair in numbers for number in pair} - {0}
            for number in wanted - self._there:
                self._add_script(number)
            try:
                lowered = [lower(event, *pair) for event, pair in zip(events, numbers, strict=True)]
                self._link.set_events(lowered, self._changes)
            except RequestError as error:
                if error.status == Status.STALE:
                    continue
                if self.own is None:
                    raise
                self.own = None
            else:
                self._there = wanted
                self._drop_buffers(wanted)
                return
        raise LinkError("scripts change events all the time; halt the machine first (pause)")

    def _own_events(self) -> list[Event]:
        """The debugger's own event, if there is one and it has room."""
        if self.own is None:
            return []
        taken = {event.slot for event in self._events}
        self.own.slot = next((slot for slot in reversed(range(wire.MAX_EVENTS)) if slot not in taken), -1)
        return [self.own] if self.own.slot >= 0 else []

    def sync(self) -> list[Event]:
        """Takes over what scripts have made of the events; those that they have changed, a cleared one included."""
        changed: list[Event] = []
        rings = self._link.rings
        if self._changes == (changes := rings.changes):
            return changed
        self._changes = changes
        for event in self._events:
            state = rings.state(event.slot)
            if state is EventState.CLEARED:
                self._events.remove(event)
            elif state is None or event.enabled == (state is EventState.ENABLED):
                continue
            event.enabled = state is EventState.ENABLED
            changed.append(event)
        return changed

    def _number(self, script: CompiledScript | None, buffer: Buffer | None = None) -> int:
        if script is None:
            return 0
        key = script, buffer
        if key not in self._numbers:
            number = self._numbers[key] = len(self._numbers) + 1
            self.scripts[number] = script
            self._buffers[number] = buffer
        return self._numbers[key]

    def _drop_buffers(self, wanted: set[int]) -> None:
        """Lets go of the buffers of events that are no more: they may be large."""
        for key, number in list(self._numbers.items()):
            if key[1] is not None and number not in wanted:
                del self._numbers[key], self._buffers[number]

    def _add_script(self, number: int) -> None:
        script, buffer = self.scripts[number], self._buffers[number]
        file = sealed_file(script.code, script.constants)
        with_buffer = None if buffer is None else (buffer.fileno(), buffer.size)
        try:
            self._link.add_script(number, file, script.entry, len(script.code), len(script.constants), with_buffer)
        finally:
            os.close(file)
        self._there.add(number)
