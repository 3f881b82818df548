"""Records as they come out of the rings: who is told of each, and the answers that the agent's questions get."""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vmexit.callers import Callers
from vmexit.link.rings import Records, Rings, are_alike
from vmexit.link.wire import RECORD, Action, RecordFlag, offset
from vmexit.prints import Printed, printed
from vmexit.processes import ThreadNames
from vmexit.recognition import OWN
from vmexit.recording import Summary
from vmexit.trap import LiveTrap, Trap, first_questions, trap_of, traps_of

if TYPE_CHECKING:
    from vmexit.debugger import Debugger
    from vmexit.program import Program

_RECORD = int(Action.RECORD)  # an operation on plain numbers takes a tenth of the time
_ASK = int(Action.ASK)
_TEXT = int(Action.PRINT | Action.FAULT)
_CALLER = int(Action.CALLER)
_AGAIN = int(RecordFlag.AGAIN)
_SEQUENCE, _EVENT = struct.Struct("<Q"), struct.Struct("<H")
_SEQUENCE_AT, _EVENT_AT, _FLAGS_AT = (offset("record", name) for name in ("sequence", "event", "flags"))
_LEAVES_TEXT = _TEXT | int(Action.NAME)

Listener = Callable[[list[Trap]], None]
"""Gets the records of events, oldest first."""
RecordListener = Callable[[Records], None]
"""Gets the same as the wire has them (link.wire.RECORD), which is much cheaper."""
PrintListener = Callable[[Printed], None]
"""Gets what scripts print, and why a run of one was ended."""


class Dispatch:
    """Deals with records, for a debugger that holds its lock meanwhile."""

    def __init__(self, debugger: Debugger, program: Program, rings: Rings) -> None:
        self.listeners: list[Listener] = []
        self.record_listeners: list[RecordListener] = []
        self.print_listeners: list[PrintListener] = []
        self.summary = Summary()
        looks = debugger.target.only_looks
        self.thread_names = ThreadNames(looks.threads if looks else None)
        self.callers = Callers()
        self.breaks: deque[Trap] = deque()
        """What has broken, and has not been shown yet."""
        self.answered = False
        """A question has been, since somebody has set this to False."""
        self._debugger = debugger
        self._program = program
        self._rings = rings
        self._own_asked = 0
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """An exception is raised once the work is done (raise_error); of several the first."""
        try:
            yield
        except BaseException as error:
            self._error = self._error or error

    def raise_error(self) -> None:
        """Raises the exception that was kept, if there is one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take(self, records: Records) -> int:
        """Deals with records in their order; their actions (Action), all together."""
        if self._program.own is None and not self._own_asked:
            return self._take_theirs(records)
        actions = 0
        for part in self._between_own(records):
            actions |= self._take_theirs(part)
        return actions

    def take_question(self, record: bytearray) -> int:
        """The same for a question that comes alone, as most do (Rings.drain_question)."""
        (event,) = _EVENT.unpack_from(record, _EVENT_AT)
        if event == OWN or self._debugger.outputs.has_route(event - 1):
            return self.take(np.frombuffer(record, RECORD))
        if self._own_asked:
            _SEQUENCE.pack_into(record, _SEQUENCE_AT, _SEQUENCE.unpack_from(record, _SEQUENCE_AT)[0] - self._own_asked)
        if not record[_FLAGS_AT] & _AGAIN:
            self.summary.add(np.frombuffer(record, RECORD), alike=True)
        self._ask(trap_of(record))
        return _ASK

    def tell_records(self, records: Records, *, alike: bool) -> None:
        """Keeps records of events, and hands them to all who listen; ``alike``: they are known to be (are_alike)."""
        self._keep(records, alike=alike)
        for listener in list(self.record_listeners):
            with self.keeping_errors():
                listener(records)
        if self.listeners:
            self._tell(list(traps_of(records)))

    def _between_own(self, records: Records) -> Iterator[Records]:
        """Answers the debugger's own questions, which nobody else sees nor counts; gives what comes between them."""
        start = 0
        for place in (*np.flatnonzero(records["event"] == OWN).tolist(), len(records)):
            if place > start:
                part = records[start:place]
                if self._own_asked:
                    part["sequence"] -= np.uint64(self._own_asked)
                yield part
            if place < len(records):
                self._ask_itself(records[place])
            start = place + 1

    def _take_theirs(self, records: Records) -> int:
        # A question mostly comes alone, and for one record numpy is slow.
        alike = len(records) == 1 or are_alike(records)
        actions = int(records["action"][0] if alike else np.bitwise_or.reduce(records["action"]))
        if actions & _CALLER:
            self.callers.learn(records[records["action"] == _CALLER])
        rest = self._forward(records)
        if alike and rest is records:
            self._take_action(records, actions, alike=True)
        elif len(rest):
            for part in _runs(rest):
                self._take_action(part, int(part["action"][0]), alike=False)
        if actions & _LEAVES_TEXT:
            self._rings.release_text(records[(records["action"] & _LEAVES_TEXT) != 0])
        return actions

    def _forward(self, records: Records) -> Records:
        """Deals with what goes to outputs, all at once; gives what is left: questions and stops, and what does not go there."""
        mine = self._debugger.outputs.claimed(records)
        if mine is None:
            return records
        actions = records["action"]
        told = records[mine & ((actions & _TEXT) != 0)]
        texts = list(printed(told, self._rings, self._program.scripts)) if len(told) else []
        self._debugger.outputs.take(records[mine], texts)
        recorded = records[mine & (actions == _RECORD)]
        if len(recorded):
            self._take_action(recorded, _RECORD, alike=False)
        self._tell_printed(texts)
        rest: Records = records[~(mine & ((actions & (_TEXT | _RECORD)) != 0))]
        return rest

    def _ask_itself(self, record: np.void) -> None:
        core, sequence, value = (int(record[name]) for name in ("vcpu", "sequence", "value"))
        try:
            with self.keeping_errors():
                self._debugger.recognition.at_lstar(core, value)
        finally:
            self._debugger.guest.after_trap()
            self._rings.answer(core, sequence, self._rings.question_registers(core), 0, False)
            self.answered = True
        self._own_asked += 1

    def _take_action(self, records: Records, action: int, *, alike: bool) -> None:
        """Deals with records of one action; ``alike``: they are known to be (are_alike)."""
        if action & _TEXT:
            self._tell_printed(printed(records, self._rings, self._program.scripts))
            return
        if action == Action.NAME:
            self.thread_names.learn(records, self._rings)
        if action in (Action.NAME, Action.CALLER):
            return
        counted = first_questions(records) if action == _ASK else records
        if len(counted):
            self.summary.add(counted, alike=alike)
        if action == _RECORD:
            self.tell_records(records, alike=alike)
            return
        for trap in traps_of(records):
            if action == Action.ASK:
                self._ask(trap)
            else:
                self.breaks.append(trap)

    def _tell_printed(self, texts: Iterable[Printed]) -> None:
        for text in texts:
            if text.fault is not None and (event := self._debugger.events.get(text.event)) is not None:
                event.faults += 1
            for listener in list(self.print_listeners):
                with self.keeping_errors():
                    listener(text)

    def _keep(self, records: Records, *, alike: bool) -> None:
        if alike:
            event = self._debugger.events.get(int(records["event"][0]) - 1)
            if event is not None and event.recording is not None:
                event.recording.add(records)
            return
        for event in self._debugger.events:
            if event.recording is not None:
                mine = records["event"] == event.number + 1
                event.recording.add(records if mine.all() else records[mine])

    def _tell(self, batch: list[Trap]) -> None:
        if batch:
            for listener in list(self.listeners):
                with self.keeping_errors():
                    listener(batch)

    def _ask(self, trap: Trap) -> None:
        values = self._rings.question_registers(trap.core)
        live = LiveTrap(trap, values.copy(), self._debugger, self._debugger.guest)
        event = self._debugger.events.get(trap.event)
        changed, skip, halt, script, again = 0, trap.skipped, False, False, False
        # After an exception the rest of the batch is answered without asking: the vCPUs wait.
        if event is not None and event.callback is not None and self._error is None:
            self._debugger.guest.at_trap(trap.core)
            try:
                event.callback(live)
                changed, skip, halt, values = live.changed, live.short_circuit, live.halting, live.values
                script, again = live.runs_script, live.asks_again
            except BaseException as error:
                self._error, halt = error, True
            self._debugger.guest.after_trap()
        self._rings.answer(trap.core, trap.sequence + self._own_asked, values, changed, skip, halt, script, again)
        self.answered = True


def _runs(records: Records) -> Iterator[Records]:
    """The records in pieces, each of records in a row that have the same action."""
    ends = np.flatnonzero(records["action"][1:] != records["action"][:-1]) + 1
    yield from np.split(records, ends)
