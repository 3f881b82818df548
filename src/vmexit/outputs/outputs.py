"""All outputs of a debugger, and which events go to which of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmexit.events.event import Event, EventError
from vmexit.link.rings import Records
from vmexit.link.wire import Action
from vmexit.outputs.kinds import KINDS, Machine
from vmexit.outputs.output import Output, OutputState
from vmexit.outputs.rows import Item
from vmexit.outputs.sink import OutputError
from vmexit.prints import Printed

MOST = 5
"""Outputs of one event."""
_FLUSH_S = 5.0
"""How long one may take nothing of what is waiting, when the debugger lets go of its machine."""
_TELL_S = 1.0
_STALL_S = 2.0
_TELLING = int(Action.PRINT | Action.FAULT)
"""Records that tell of a trap's script."""


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the results of one event go."""

    outputs: tuple[Output, ...]
    lines: Action
    """Records of which a line of text is made."""
    rows: Action
    """Records that tell structured outputs of a trap."""
    waits: bool
    """Several records may be of one trap."""


@dataclass(slots=True)
class _Told:
    """What the user knows of an output."""

    trouble: str | None = None
    dropped: int = 0
    when: float = 0.0
    stalled: bool = False


def _texts(records: Records, printed: Sequence[Printed]) -> tuple[list[bytes], dict[int, str]]:
    """The text of each record, empty where it has none; and the faults, by their places."""
    texts = [b""] * len(records)
    faults = {}
    places = iter(np.flatnonzero((records["action"] & _TELLING) != 0).tolist())
    for one in printed:
        if one.fault is not None:
            faults[next(places)] = str(one.fault)
        for part in one.parts:
            texts[next(places)] = part
    return texts, faults


def _item(
    records: Records,
    texts: list[bytes] | None,
    faults: dict[int, str],
    wanted: npt.NDArray[np.bool_],
    structured: bool,
    together: bool,
) -> Item:
    """What one output gets of the records."""
    if not wanted.all():
        places = np.flatnonzero(wanted).tolist()
        records = records[wanted]
        texts = None if texts is None else [texts[place] for place in places]
        faults = {new: faults[old] for new, old in enumerate(places) if old in faults} if faults else faults
    traps = int(np.count_nonzero((records["action"] & _TELLING) == 0)) if structured else len(records)
    return Item(records, texts, faults, traps, together)


class Outputs:
    """The outputs by name, in the order in which they were created. Thread-safe, as far as its debugger is."""

    def __init__(self, machine: Callable[[], Machine], waits: Callable[[], bool]) -> None:
        """``machine``: what outputs tell of; ``waits``: whether the guest waits where there is no room, and loses nothing."""
        self._machine = machine
        self._waits = waits
        self._outputs: dict[str, Output] = {}
        self._routes: dict[int, _Route] = {}
        self._ids = np.empty(0, np.uint32)
        """Of the events that have a route, as records have them."""
        self._told: dict[str, _Told] = {}

    def __iter__(self) -> Iterator[Output]:
        return iter(list(self._outputs.values()))

    def __len__(self) -> int:
        return len(self._outputs)

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    def __getitem__(self, name: str) -> Output:
        """Raises OutputError where there is none of that name."""
        if name not in self._outputs:
            raise OutputError(f"there is no output '{name}'")
        return self._outputs[name]

    # ---- what a user does ----

    def create(self, name: str, kind: str, *address: str) -> Output:
        """Makes an output of a kind ("file", "namedpipe", "tcp", "module", "unix", "jsonl", "perfetto", "nats").

        ``address``: a path, HOST:PORT, or for "nats" the server's URL and a subject. It is checked, and nothing is opened. Raises
        OutputError.
        """
        if not name or not name.isprintable() or any(char in name for char in ' ,{}"'):
            raise OutputError(f"'{name}' is no name for an output: no blanks, commas, quotes and braces")
        if name in self._outputs:
            state = self._outputs[name].state
            more = ": choose another name, also for the same address" if state is OutputState.CLOSED else ""
            raise OutputError(f"there is an output '{name}' already, which is {state.value}{more}")
        if kind not in KINDS:
            raise OutputError(f"there are no outputs of kind '{kind}'", None, f"there are {', '.join(KINDS)}")
        words = KINDS[kind].address
        if len(address) != len(words):
            raise OutputError(f"an output of kind '{kind}' takes {' and '.join(words)}")
        sink, encoder = KINDS[kind].make(address, self._machine())
        output = self._outputs[name] = Output(name, kind, address, sink, encoder)
        self._told[name] = _Told()
        return output

    def open(self, name: str) -> Output:
        """Opens it. Raises OutputError where that cannot be; ``trouble`` tells of a destination that is still waited for."""
        output = self[name]
        output.open()
        self._told[name].trouble = output.trouble
        return output

    def close(self, name: str, seconds: float = _FLUSH_S) -> Output:
        """Delivers what is waiting, and closes it for good (Output.close). What is left counts as dropped."""
        output = self[name]
        if output.state is OutputState.CLOSED:
            raise OutputError(f"the output '{name}' is closed already")
        output.close(seconds)
        return output

    # ---- what the debugger does ----

    def join(self, event: Event) -> None:
        """Takes note of where the results of a new event go. Raises EventError for outputs that it cannot have."""
        if not event.outputs:
            return
        if len(event.outputs) > MOST:
            raise EventError("output", f"an event has {MOST} outputs at most, not {len(event.outputs)}")
        for name in event.outputs:
            try:
                output = self[name]
            except OutputError as error:
                raise EventError("output", f"{error}; 'output create' makes one") from None
            if output.state is OutputState.CLOSED:
                raise EventError("output", f"the output '{name}' is closed, and cannot be used any more")
        outputs = tuple(self[name] for name in dict.fromkeys(event.outputs))
        tells = any(output.structured for output in outputs)
        action = event.action
        by_agent = tells and action & Action.SCRIPT and not event.tells_itself
        event.forwarded = Action.RECORD if by_agent else Action(0)
        shown = action & Action.RECORD
        if not shown and not action & Action.SCRIPT:
            shown = action & (Action.ASK | Action.BREAK)
        if event.tells_itself:
            shown = Action.RECORD | Action.BREAK
        elif event.way:  # a script stands for its condition, and breaks
            shown |= Action.BREAK
        rows = Action.RECORD | Action.BREAK | (Action(0) if event.tells_itself else Action.ASK)
        together = action | event.forwarded
        self._routes[event.number] = _Route(outputs, shown, rows, together.bit_count() > 1)
        self._ids = np.array([number + 1 for number in self._routes], np.uint32)

    def leave(self, event: Event) -> None:
        """The event could not be made after all. (One that is cleared keeps its route: some of its records are still to come.)"""
        self._routes.pop(event.number, None)
        self._ids = np.array([number + 1 for number in self._routes], np.uint32)

    def has_route(self, event: int) -> bool:
        """Whether the results of the event with that number go to outputs, and not to the screen."""
        return event in self._routes

    def claimed(self, records: Records) -> npt.NDArray[np.bool_] | None:
        """Which of the records are of events with outputs; None where none is."""
        if not len(self._ids):
            return None
        claimed = np.isin(records["event"], self._ids)
        return claimed if claimed.any() else None

    def unclaimed(self, records: Records) -> Records:
        """Those of events without outputs."""
        claimed = self.claimed(records)
        return records if claimed is None else records[~claimed]

    def take(self, records: Records, printed: Sequence[Printed]) -> None:
        """Records of events with outputs, of every kind, as they came. ``printed``: what those of PRINT and FAULT tell."""
        texts, faults = _texts(records, printed) if printed else (None, {})
        numbers = [int(number) - 1 for number in np.unique(records["event"])]
        routes = [(number, self._routes[number]) for number in numbers if number in self._routes]
        waits = self._waits()
        for output in dict.fromkeys(output for _, route in routes for output in route.outputs):
            wanted = np.zeros(len(records), np.bool_)
            for number, route in routes:
                if output in route.outputs:
                    actions = (route.rows | _TELLING) if output.structured else (route.lines | Action.PRINT)
                    wanted |= (records["event"] == number + 1) & ((records["action"] & int(actions)) != 0)
            if wanted.any():
                together = any(route.waits for _, route in routes if output in route.outputs)
                output.put(_item(records, texts, faults, wanted, output.structured, together), waits=waits)

    def hold_back(self) -> bool:
        """Whether nothing more should be taken from the machine for now, so that it waits."""
        if not self._outputs or not self._waits():
            return False
        held = False
        for output in self._outputs.values():
            held |= output.holds_back
        return held

    def wait_for_room(self, seconds: float) -> None:
        """Waits until the machine's records can be taken again, for so long at most."""
        full = next((output for output in self._outputs.values() if output.holds_back), None)
        if full is not None:
            full.wait_for_room(seconds)

    def finish(self, seconds: float = _FLUSH_S) -> None:
        """Closes all of them, at the same time; each has so many seconds to take something of what is waiting (Output.close)."""
        outputs = [output for output in self if output.state is OutputState.OPENED]
        for output in outputs:
            output.begin_closing(seconds)
        for output in outputs:
            output.close(seconds)

    # ---- what a user is told ----

    def news(self) -> list[str]:
        """What a user should know and was not told yet, a line each: destinations that are away or back, what was lost."""
        return [line for output in self._outputs.values() for line in self._news_of(output)]

    def _news_of(self, output: Output) -> Iterator[str]:
        told = self._told[output.name]
        now = time.monotonic()
        if output.state is OutputState.OPENED:
            if output.held_back_s > _STALL_S and not told.stalled and self._waits():
                told.stalled = True
                yield f"{_called(output)}: the guest waits for it ('settings overflow drop' or 'output close' let it go on)"
            if now - told.when < _TELL_S:
                return
            trouble = output.trouble
            if trouble != told.trouble:
                told.trouble, told.when = trouble, now
                yield f"{_called(output)}: {trouble}; it is tried again" if trouble else f"{_called(output)} takes again"
            told.stalled &= output.is_full
        if (dropped := output.dropped) != told.dropped:
            told.dropped, told.when = dropped, now
            yield f"{_called(output)}: {dropped:,} message{'s' * (dropped != 1)} not delivered so far"


def _called(output: Output) -> str:
    return f"output '{output.name}' ({output.kind} {' '.join(output.address)})"
