"""Tests of showing what the machine does: in order, with nothing lost in silence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.commands.fakes import Typist, linux_guest, record
from vmexit.console.feed import Feed
from vmexit.console.guest_output import GuestOutput
from vmexit.console.screen import Screen
from vmexit.link.rings import Records, joined
from vmexit.link.wire import Action
from vmexit.targets.base import Notice, NoticeKind

HEADING = "     seconds  core  stage        MSR       value             RIP"


class ListScreen(Screen):
    """Keeps what is shown."""

    def __init__(self, is_terminal: bool = False) -> None:
        super().__init__()
        self.is_terminal, self.colour = is_terminal, False
        self.texts: list[str] = []
        self.on_write: Callable[[], None] = lambda: None

    def _put(self, fd: int, data: bytes) -> None:
        self.texts.append(data.decode())
        self.on_write()

    @property
    def lines(self) -> list[str]:
        return "".join(self.texts).splitlines()


class Machine:
    """A running fake machine and its feed."""

    def __init__(self, is_terminal: bool = False) -> None:
        self.typist = Typist()
        self.screen = ListScreen(is_terminal)
        self.output = GuestOutput()
        self.feed = Feed(self.typist.session, self.screen, self.output)
        self.typist.types("!msrwrite log")
        self.typist.types("!msrwrite")
        self.typist.types("g")

    def put(self, *records: Records) -> None:
        self.typist.link.rings.records += records


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.typist.close()


@pytest.fixture
def terminal() -> Iterator[Machine]:
    machine = Machine(is_terminal=True)
    yield machine
    machine.typist.close()


def values(lines: list[str]) -> list[int]:
    """The values in the lines that are records."""
    return [int(line.split()[5], 16) for line in lines if " wrmsr  " in line]


def test_what_is_found_out_about_the_guest_is_a_line_among_the_records(machine: Machine) -> None:
    machine.put(record(0, value=1), record(1, event=-1, action=Action.ASK, value=5), record(2, value=2))
    machine.feed.work()
    lines = machine.screen.lines
    assert values(lines) == [1, 2] and lines[2].startswith("the guest is not known: ") and len(lines) == 4


def test_a_kernel_that_is_first_seen_at_a_stop(machine: Machine) -> None:
    machine.typist.boot(linux_guest())
    machine.typist.types("pause")
    machine.feed.work()
    assert machine.screen.lines[0].startswith("Linux 6.1.0-fake-amd64 x86_64, slide ")
    assert machine.screen.lines[1] == "halted, core 0"


def test_records_are_shown_in_one_piece_below_a_heading(machine: Machine) -> None:
    machine.put(*(record(i, value=i) for i in range(300)))
    machine.feed.work()
    assert machine.screen.lines[0] == HEADING
    assert values(machine.screen.lines) == list(range(300))
    assert len(machine.screen.texts) == 2
    machine.put(record(300))
    machine.feed.work()
    assert machine.screen.lines.count(HEADING) == 1


def test_time_is_counted_from_when_the_machine_first_ran(machine: Machine) -> None:
    started = machine.typist.debugger.started_ns
    assert started is not None
    machine.put(record(time_ns=started + 1_500_000))
    machine.feed.work()
    assert machine.screen.lines[1].startswith("    0.001500  0     pre   wrmsr")


def test_a_break_comes_after_the_records_of_before_it(machine: Machine) -> None:
    machine.put(record(0, value=1), record(1, event=1, action=Action.BREAK, value=2))
    machine.typist.target.stopped()
    machine.feed.work()
    assert values(machine.screen.lines) == [1]
    assert machine.screen.lines[2] == "event 1 triggered (pre) on core 0: wrmsr, MSR c0000082, value 0000000000000002"


def test_what_the_guest_prints_stands_where_it_was_printed(machine: Machine) -> None:
    before, now = time.monotonic_ns(), 0
    machine.output("stdout", b"hello\n")
    now = time.monotonic_ns()
    machine.put(record(0, time_ns=before, value=1), record(1, time_ns=now, value=2))
    machine.output("stderr", b"oops\n")
    machine.feed.work()
    assert [line.split()[0] for line in machine.screen.lines] == ["seconds", "0.000000", "hello", "0.000000", "oops"] or (
        values(machine.screen.lines) == [1, 2] and machine.screen.lines[2] == "hello" and machine.screen.lines[-1] == "oops"
    )


def test_output_waits_for_the_records_that_may_be_of_before_it(machine: Machine) -> None:
    """Output that comes while the debugger works is shown the next time, when the records have been taken."""
    debugger = machine.typist.debugger
    pump = debugger.pump

    def pump_while_the_guest_prints(timeout: float = 0.0) -> None:
        machine.output("stdout", b"hello\n")
        pump(timeout)

    debugger.pump = pump_while_the_guest_prints  # type: ignore[method-assign]
    machine.feed.work()
    assert not machine.screen.lines
    debugger.pump = pump  # type: ignore[method-assign]
    machine.put(record(value=1))
    machine.feed.work(10)  # does not wait
    assert values(machine.screen.lines[:2]) == [1]
    assert machine.screen.lines[2] == "hello"


def test_notices(machine: Machine) -> None:
    machine.typist.target.pending.append(Notice(NoticeKind.RESET))
    machine.feed.work()
    assert machine.screen.lines == ["the machine was reset"]


def test_a_shutdown_comes_after_all_that_was_before_it(machine: Machine) -> None:
    """Where the guest prints, is trapped and shuts down while the debugger works, that is shown in this order."""
    debugger = machine.typist.debugger
    pump = debugger.pump

    def pump_while_the_guest_ends(timeout: float = 0.0) -> None:
        machine.output("stdout", b"hello\n")
        machine.put(record(time_ns=time.monotonic_ns(), value=1))
        machine.output("stdout", b"bye\n")
        machine.typist.target.pending.append(Notice(NoticeKind.SHUTDOWN, "guest-shutdown"))
        pump(timeout)

    debugger.pump = pump_while_the_guest_ends  # type: ignore[method-assign]
    machine.feed.work()
    lines = machine.screen.lines
    assert [*lines[:2], *lines[3:]] == ["hello", HEADING, "bye", "the guest has shut down (guest-shutdown)"]
    assert values(lines) == [1]


def test_that_the_machine_has_ended_is_left_to_the_end(machine: Machine) -> None:
    machine.output("stdout", b"bye")
    machine.typist.target.ended(0)
    machine.feed.work()
    machine.feed.finish()
    assert machine.screen.lines == ["bye"]


def test_losses_are_told_as_soon_as_there_are_any_and_at_the_end(machine: Machine) -> None:
    rings = machine.typist.link.rings
    machine.feed.work()
    assert not machine.screen.lines
    rings.dropped = 1
    machine.feed.work()
    assert len(machine.screen.lines) == 1
    assert machine.screen.lines[0].startswith("1 record dropped so far")
    rings.dropped = 12345
    machine.feed.work()
    assert len(machine.screen.lines) == 1  # not over and over
    machine.feed.finish()
    assert machine.screen.lines[1].startswith("12,345 records dropped so far")
    machine.feed.finish()
    assert len(machine.screen.lines) == 2


def test_losses_are_told_at_every_stop(machine: Machine) -> None:
    for dropped in (1, 2):
        machine.typist.link.rings.dropped = dropped
        machine.typist.target.stopped()
        machine.feed.work()
        assert machine.screen.lines[-1].startswith(f"{dropped} record")
        machine.typist.types("g")


def backlog(count: int) -> Records:
    return joined([record(i, value=i) for i in range(count)])


def test_ctrl_c_cuts_a_backlog_short_and_says_so(terminal: Machine) -> None:
    def press() -> None:
        if len(terminal.screen.texts) == 3:  # the heading and two pieces of it
            terminal.feed.hurry()

    terminal.screen.on_write = press
    terminal.put(backlog(3000))
    terminal.feed.work()
    shown = len(values(terminal.screen.lines))
    assert shown < 3000
    terminal.put(*(record(3000 + i, value=3000 + i) for i in range(10)))
    terminal.feed.work()
    assert len(values(terminal.screen.lines)) == shown
    terminal.output("stdout", b"x" * 5000)
    terminal.feed.work()
    terminal.typist.target.stopped()
    terminal.feed.work()
    lines = terminal.screen.lines[shown + 1 :]
    assert lines[0] == "... 5,000 bytes that the guest printed are not shown"
    assert lines[1] == f"... {3010 - shown - 100:,} traps were recorded that are not shown here; the last 100 are:"
    assert values(lines[2:102]) == list(range(2910, 3010))
    assert lines[102] == "halted, core 0"
    # Then everything is shown again.
    terminal.typist.types("g")
    terminal.put(*(record(i, value=i) for i in range(200)))
    terminal.feed.work()
    assert len(values(terminal.screen.lines)) == shown + 300


def test_a_file_gets_everything_all_the_same(machine: Machine) -> None:
    machine.screen.on_write = machine.feed.hurry
    machine.put(backlog(20_000))
    machine.feed.work()
    machine.typist.target.stopped()
    machine.feed.work()
    assert values(machine.screen.lines) == list(range(20_000))


def test_nothing_to_hurry_with(terminal: Machine) -> None:
    terminal.feed.hurry()
    terminal.typist.target.stopped()
    terminal.feed.work()
    assert terminal.screen.lines[0] == "halted, core 0"
    terminal.feed.hurry()
    terminal.feed.work()
    terminal.typist.types("g")
    terminal.put(record(value=7))
    terminal.feed.work()
    assert values(terminal.screen.lines) == [7]


def test_a_slow_terminal_gets_little_at_a_time(terminal: Machine) -> None:
    sizes: list[int] = []

    def write() -> None:
        sizes.append(terminal.screen.texts[-1].count("\n"))
        time.sleep(0.06)

    terminal.screen.on_write = write
    terminal.put(backlog(600))
    terminal.feed.work()
    assert sum(sizes) == 601
    assert sizes[-2] <= 64
    assert values(terminal.screen.lines) == list(range(600))


def test_a_file_is_written_to_as_fast_as_records_come(tmp_path: os.PathLike[str]) -> None:
    """Loosely: 200,000 lines a second on a machine that is not busy; here only that it is nowhere near one by one."""
    machine = Machine()
    machine.put(backlog(1000))
    records = joined([backlog(1000)] * 100)
    machine.typist.link.rings.records = [records]
    started = time.thread_time()
    machine.feed.work()
    took = time.thread_time() - started
    assert len(machine.screen.lines) == 100_001
    assert took < 3
    machine.typist.close()
