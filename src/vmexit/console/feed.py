"""Shows what the machine does by itself: logged traps, what the guest prints, stops, notices, and records that were lost."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from vmexit.commands.session import Session
from vmexit.console.guest_output import GuestOutput
from vmexit.console.render import notice_text, stop_text
from vmexit.console.screen import Screen
from vmexit.debugger import State, Stop, StopReason
from vmexit.lines import Columns
from vmexit.link.rings import Records, joined
from vmexit.link.wire import RECORD
from vmexit.prints import Printed
from vmexit.script.errors import Place, ScriptRunError
from vmexit.targets.base import Notice, NoticeKind

_AT_ONCE = 16384
"""Records that are written at once into a file."""
_WRITE_S = 0.05
"""How long one write to a terminal should take, so that keys are heeded in between."""
_LEAST, _MOST = 16, 2048
_GUEST_AT_ONCE = 2048
"""Bytes of the guest's output that are written at once to a terminal, to the next end of a line."""
_LAST = 100
"""Records of a backlog that are still shown when somebody has pressed Ctrl-C."""
_LOSS_S = 1.0
_LINE_S = 0.3
"""How long what a script has printed waits for the end of its line."""
_FOR_EVER = 1 << 63


class Feed:
    """Lets the debugger work, gathers what happens meanwhile, and shows it when that is done.

    Showing may take as long as a slow terminal takes: the debugger takes no more records meanwhile, so that the guest waits
    too and what is still to be shown stays bounded. Its methods, but for ``hurry``, are called by one thread at a time.
    """

    def __init__(self, session: Session, screen: Screen, output: GuestOutput, *, shows_records: bool = True) -> None:
        """``shows_records``: else somebody else deals with them, and with those that are lost."""
        self._session = session
        self._debugger = session.debugger
        self._screen = screen
        self._output = output
        self._columns: Columns | None = None
        self._items: deque[Records | Printed | Stop | Notice | str] = deque()
        """What is to be shown, in its order; a text is what was found out about the guest."""
        self._line = b""
        """What scripts have printed of a line that is not at its end."""
        self._line_when = 0.0
        self._held_lines: list[bytes] = []
        self._lines_passed_over = 0
        self._told_faults: set[tuple[int, Place]] = set()
        self.is_busy = False
        """Whether something is being shown right now."""
        self._at_once = 256
        self._hurried = False
        self._held: Records = np.empty(0, RECORD)
        self._passed_over = 0
        self._guest_passed_over = 0
        self._lost_told = 0
        self._lost_when = 0.0
        self._shows_records = shows_records
        if shows_records:
            self._debugger.record_listeners.append(self._take_records)
        self._debugger.print_listeners.append(self._take_printed)
        self._debugger.on_stop = self._items.append
        self._debugger.on_notice = self._items.append
        self._debugger.recognition.on_line = self._items.append

    def _take_records(self, records: Records) -> None:
        """Those that do not go elsewhere."""
        records = self._debugger.outputs.unclaimed(records)
        if len(records):
            self._items.append(records)

    def _take_printed(self, printed: Printed) -> None:
        """The same; mistakes are shown all the same."""
        if not printed.parts or not self._debugger.outputs.has_route(printed.event):
            self._items.append(printed)

    def hurry(self) -> None:
        """Somebody does not want to wait for a long backlog on a terminal: only its end will be shown, and how much was not."""
        self._hurried = self._screen.is_terminal

    def work(self, timeout: float = 0.0) -> None:
        """Lets the debugger work (Debugger.pump) and shows what came of it. Raises OutputGoneError."""
        # Output that is here by now comes after all traps of before it, if the records that there are now are taken first.
        until = time.monotonic_ns()
        self._debugger.pump(timeout if self._output.first_time() is None else 0.0)
        self.flush(until)

    def finish(self) -> None:
        """Shows what is still there, when the session is over. Raises OutputGoneError."""
        self.flush()
        self._end_line()
        self._catch_up()
        self._tell_losses(True)

    def flush(self, until_ns: int | None = None) -> None:
        """Shows all that has been gathered; of what the guest printed only what came before that time. Raises OutputGoneError."""
        self.is_busy = True
        try:
            self._flush(_FOR_EVER if until_ns is None else until_ns)
        finally:
            self.is_busy = False
        self._screen.check()

    def _flush(self, until_ns: int) -> None:
        if any(map(_comes_last, self._items)):
            until_ns = _FOR_EVER
        stopped = False
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Printed):
                self._show_output(min(until_ns, item.time_ns))
                self._show_printed(item)
                continue
            self._end_line()
            if isinstance(item, Stop):
                stopped = True
                self._catch_up()
                self._show_output(until_ns)
                self._show_stop(item)
            elif isinstance(item, str):
                self._screen.write(item)
            elif isinstance(item, Notice):
                self._catch_up()
                self._show_output(until_ns)
                self._screen.write(notice_text(item))
            else:
                self._show_in_order(self._with_followers(item), until_ns)
        self._show_output(until_ns)
        if self._line and time.monotonic() - self._line_when > _LINE_S:
            self._end_line()
        if self._hurried and self._debugger.state is not State.RUNNING:
            self._catch_up()
        self._tell_losses(stopped)

    def _with_followers(self, records: Records) -> Records:
        """Puts batches together that follow upon each other."""
        batches = [records]
        while self._items and isinstance(self._items[0], np.ndarray):
            batches.append(self._items.popleft())  # type: ignore[arg-type]
        return joined(batches)

    def _show_output(self, until_ns: int) -> None:
        """What the guest printed up to then."""
        while (came := self._output.first_time()) is not None and came <= until_ns:
            self._show_guest(*self._output.take())

    def _show_in_order(self, records: Records, until_ns: int) -> None:
        """Records, and between them what the guest printed."""
        while (came := self._output.first_time()) is not None and came <= until_ns:
            before = int(np.searchsorted(records["time_ns"], np.uint64(came)))
            self._show_records(records[:before])
            records = records[before:]
            self._show_guest(*self._output.take())
        self._show_records(records)

    def _show_guest(self, stream: str, data: bytes) -> None:
        """What the guest printed, unless nobody wants to wait for it."""
        while data:
            if self._hurried:
                self._guest_passed_over += len(data)
                return
            end = data.find(b"\n", _GUEST_AT_ONCE) + 1 if self._screen.is_terminal else 0
            part, data = (data[:end], data[end:]) if end else (data, b"")
            self._screen.guest(stream, part)

    def _show_printed(self, printed: Printed) -> None:
        """What a script has printed: whole lines; the rest once its line has an end, or something else is to be shown."""
        if printed.fault is not None:
            self._end_line()
            self._show_fault(printed, printed.fault)
            return
        text = self._line + printed.text
        end = text.rfind(b"\n") + 1
        self._line, self._line_when = text[end:], time.monotonic()
        self._show_lines(text[:end])

    def _end_line(self) -> None:
        line, self._line = self._line, b""
        self._show_lines(line)

    def _show_lines(self, text: bytes) -> None:
        """Lines that scripts have printed, unless nobody wants to wait for them."""
        while text:
            if self._hurried:
                lines = text.splitlines(keepends=True)
                self._held_lines = (self._held_lines + lines)[-_LAST:]
                self._lines_passed_over += len(lines)
                return
            end = text.find(b"\n", _GUEST_AT_ONCE) + 1 if self._screen.is_terminal else 0
            part, text = (text[:end], text[end:]) if end else (text, b"")
            self._screen.write(part.decode("utf-8", "replace"))

    def _show_fault(self, printed: Printed, fault: ScriptRunError) -> None:
        """The first at a place with the line that is to blame, the others there without."""
        key = (printed.event, fault.place)
        text = str(fault) if key in self._told_faults else fault.render()
        self._told_faults.add(key)
        self._screen.write(f"event {printed.event:x}, core {printed.core:x}: {text}")

    def _show_records(self, records: Records) -> None:
        if not len(records):
            return
        if self._columns is None:
            self._columns = Columns(self._debugger.started_ns, colour=self._screen.colour, names=self._debugger.names)
            self._screen.write(self._columns.heading())
        self._columns.width = self._screen.width
        start = 0
        while start < len(records):
            if self._hurried:
                self._hold(records[start:])
                return
            size = self._at_once if self._screen.is_terminal else _AT_ONCE
            before = time.monotonic()
            self._screen.write(self._columns.lines(records[start : start + size]))
            start += size
            took = time.monotonic() - before
            if self._screen.is_terminal and start < len(records):
                time.sleep(took)  # or a prompt could hardly be seen among all that
            self._at_once = max(_LEAST, min(_MOST, size * 2 if took < _WRITE_S / 2 else size // 2 if took > _WRITE_S else size))

    def _hold(self, records: Records) -> None:
        """Keeps the newest of a backlog, for when the machine has halted."""
        held = joined((self._held, records[-_LAST:]))
        self._passed_over += len(self._held) + len(records) - len(held[-_LAST:])
        self._held = held[-_LAST:]

    def _catch_up(self) -> None:
        """Shows what was held back, if anything."""
        held, passed_over, guest_passed_over = self._held, self._passed_over, self._guest_passed_over
        self._hurried, self._held, self._passed_over, self._guest_passed_over = False, held[:0], 0, 0
        if guest_passed_over:
            self._screen.write(f"... {guest_passed_over:,} bytes that the guest printed are not shown")
        if passed_over:
            self._screen.write(f"... {passed_over:,} traps were recorded that are not shown here; the last {len(held)} are:")
        if len(held) and self._columns is not None:
            self._screen.write(self._columns.lines(held))
        lines, count = self._held_lines, self._lines_passed_over
        self._held_lines, self._lines_passed_over = [], 0
        if count > len(lines):
            what = f"{count - len(lines):,} lines that scripts printed are not shown here"
            self._screen.write(f"... {what}; the last {len(lines)} are:")
        if lines:
            self._screen.write(b"".join(lines).decode("utf-8", "replace"))

    def _show_stop(self, stop: Stop) -> None:
        self._debugger.recognition.at_stop()
        while self._items and isinstance(self._items[0], str):
            self._screen.write(str(self._items.popleft()))
        if stop.reason is not StopReason.ENDED:  # which is told when vmexit ends too
            self._screen.write(stop_text(self._debugger, stop, self._session.settings.syntax, colour=self._screen.colour))

    def _tell_losses(self, stopped: bool) -> None:
        """As soon as there are any, and then not too often."""
        for line in self._debugger.outputs.news():
            self._screen.write(line)
        lost = self._debugger.dropped() if self._shows_records else 0
        if lost == self._lost_told or not (stopped or time.monotonic() - self._lost_when >= _LOSS_S):
            return
        self._lost_told, self._lost_when = lost, time.monotonic()
        hint = "" if self._debugger.target.only_looks else " ('settings overflow wait' loses none)"
        self._screen.write(f"{lost:,} record{'s' * (lost != 1)} dropped so far: they came faster than they were taken{hint}")


def _comes_last(item: Records | Printed | Stop | Notice | str) -> bool:
    """Whether all that the guest printed and all traps of before it are known when it comes."""
    return isinstance(item, Stop) or (isinstance(item, Notice) and item.kind is NoticeKind.SHUTDOWN)
