"""Rings between the agent and the debugger: nothing lost silently, one order over all vCPUs, and who is woken when."""

from __future__ import annotations

import os
import select
import time

import numpy as np
import pytest

from vmexit.link import wire
from vmexit.link.client import Link
from vmexit.link.rings import Records
from vmexit.link.wire import Action, EventFlag, Stage

from .conftest import StartHost
from .host import HLT, INC_EAX, WRMSR, FakeHost, Variant, collect, column, event, eventually, load_msr, loop, wrmsr

AT = 0x1000
CAPACITY = 512
"""Records in a ring of a machine that may have MANY vCPUs."""
LAST = wire.MAX_EVENT_ID
MANY = 300


@pytest.fixture(params=[Variant(1), Variant(1, sanitizer="thread")], ids=str)
def host(request: pytest.FixtureRequest, start_host: StartHost) -> FakeHost:
    """Four vCPUs with small rings."""
    return start_host(request.param, vcpus=4, max_vcpus=MANY)


@pytest.fixture
def link(host: FakeHost) -> Link:
    """A debugger's link."""
    return host.connect()


def count_up(host: FakeHost, count: int, *vcpus: int) -> list[str]:
    """Lets vCPUs write 1, 2, 3 ... to MSR 10h and does not wait for it. Gives what they will say at the end."""
    code = load_msr(0x10, 0) + loop(count, INC_EAX + WRMSR)
    host.load(AT, code + HLT)
    for vcpu in vcpus:
        host.start(AT, vcpu)
    return [f"halted {vcpu} {AT + len(code) + 1:x}" for vcpu in vcpus]


def check_order(records: Records, first: int = 0) -> None:
    """No gap in the global sequence; and each vCPU's own records as it made them."""
    assert np.array_equal(records["sequence"], np.arange(first, first + len(records)))
    for vcpu in np.unique(records["vcpu"]):
        own = records[records["vcpu"] == vcpu]
        assert np.array_equal(own["value"], np.arange(1, len(own) + 1))
        assert (np.diff(own["time_ns"].astype(np.int64)) >= 0).all()


def test_a_full_ring_makes_the_vcpu_wait(host: FakeHost, link: Link) -> None:
    count = 5 * CAPACITY
    link.set_events([event(1)])
    count_up(host, count, 0)
    eventually(lambda: link.rings.counters()[1] > 0)
    assert link.rings.hits(0) == CAPACITY + 1
    records = collect(link, count)
    check_order(records)
    assert len(records) == count
    dropped, waits = link.rings.counters()
    assert dropped == 0 and waits >= 1


def test_a_full_ring_drops_and_counts(host: FakeHost, link: Link) -> None:
    count = 5 * CAPACITY
    link.set_overflow(True)
    link.set_events([event(1)])
    (end,) = count_up(host, count, 0)
    host.expect(end)
    records = link.rings.drain()
    assert link.rings.counters() == (count - CAPACITY, 0)
    assert link.rings.hits(0) == count
    assert len(records) == CAPACITY
    check_order(records)
    link.set_overflow(False)
    count_up(host, count, 0)
    again = collect(link, count)
    check_order(again, first=CAPACITY)
    assert link.rings.counters()[0] == count - CAPACITY


def test_drop_while_the_debugger_reads(host: FakeHost, link: Link) -> None:
    count = 15_000
    link.set_overflow(True)
    link.set_events([event(1)])
    ends = count_up(host, count, 0, 1, 2)
    parts = []
    while not all(end in host.said for end in ends):
        parts.append(link.rings.drain())
    parts.append(link.rings.drain())
    records = np.concatenate(parts)
    dropped, waits = link.rings.counters()
    assert len(records) + dropped == 3 * count and waits == 0
    assert np.array_equal(records["sequence"], np.arange(len(records)))


@pytest.mark.parametrize("vcpus", [1, 4])
def test_one_order_over_all_vcpus(host: FakeHost, link: Link, vcpus: int) -> None:
    """Many times around each ring."""
    count = 20_000
    link.set_events([event(1)])
    count_up(host, count, *range(vcpus))
    records = collect(link, vcpus * count, patience=30)
    check_order(records)
    assert np.array_equal(np.bincount(records["vcpu"]), [count] * vcpus)


def test_questions_and_breaks_are_never_dropped(host: FakeHost, link: Link) -> None:
    link.set_overflow(True)
    link.set_events([event(1), event(2, (0x20, 0x20), actions=Action.ASK), event(3, (0x20, 0x20), actions=Action.BREAK)])
    host.load(AT, loop(CAPACITY + 10, wrmsr(0x10, 1)) + wrmsr(0x20, 2) + HLT)
    host.start(AT)
    eventually(lambda: link.rings.counters()[1] == 1)
    asked: list[int] = []

    def answer(link: Link, record: np.void) -> None:
        asked.append(int(record["event"]))
        link.rings.answer(0, int(record["sequence"]), [], 0, False)

    records = collect(link, CAPACITY + 2, answer=answer)
    host.expect("STOP")
    assert column(records[-2:], "event", "action") == [(2, Action.ASK), (3, Action.BREAK)]
    # The eleventh is event 1's record of the write to 20h.
    assert asked == [2] and link.rings.counters()[0] == 11
    link.hold(False)
    host.tell("cont")
    host.expect(f"halted 0 {AT + 5 + 17 + 4 + 17 + 1:x}")


def test_an_immediate_record_wakes_the_debugger(host: FakeHost, link: Link) -> None:
    link.set_events([event(1), event(2, (0x20, 0x20), flags=EventFlag.IMMEDIATE)])
    assert link.rings.before_sleep()
    host.run(loop(10, wrmsr(0x10, 1)))
    assert select.select([link.rings.wake_fd], [], [], 0.05)[0] == []
    host.run(wrmsr(0x20, 1))
    assert select.select([link.rings.wake_fd], [], [], 5)[0]
    assert not link.rings.before_sleep()  # there is something to be seen at once
    link.rings.after_sleep()
    assert len(link.rings.drain()) == 12
    assert link.rings.before_sleep()
    link.rings.after_sleep()


def test_a_ring_that_fills_up_wakes_the_debugger(host: FakeHost, link: Link) -> None:
    link.set_events([event(1)])
    assert link.rings.before_sleep()
    host.run(loop(CAPACITY // 2 - 1, wrmsr(0x10, 1)))
    assert select.select([link.rings.wake_fd], [], [], 0.05)[0] == []
    assert link.rings.before_sleep()
    host.run(wrmsr(0x10, 1))
    assert select.select([link.rings.wake_fd], [], [], 5)[0]
    assert not link.rings.before_sleep()
    link.rings.after_sleep()


def test_a_debugger_that_does_not_sleep_is_not_woken(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, flags=EventFlag.IMMEDIATE)])
    host.run(loop(100, wrmsr(0x10, 1)))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(link.rings.wake_fd)
    assert len(link.rings.drain()) == 100


@pytest.mark.parametrize(("sanitizer", "membarrier"), [("", 1), ("thread", 1), ("address", 1), ("thread", 0), ("address", 0)])
def test_events_are_replaced_while_they_act(start_host: StartHost, sanitizer: str, membarrier: int) -> None:
    """Each record is of one of the tables that were in force, and a table that is out of force stays out; also where the kernel
    has no membarrier(2)."""
    host = start_host(Variant(1, sanitizer=sanitizer), vcpus=4, max_vcpus=MANY, **({} if membarrier else {"membarrier": 0}))
    link = host.connect()
    ends = count_up(host, 10_000 if sanitizer else 60_000, 0, 1, 2, 3)
    seen: list[Records] = []
    tables = 0
    while not all(end in host.said for end in ends):
        tables += 1
        others = [event(LAST, slot=0, stages=Stage.POST, core=9)] if tables % 2 else []
        link.set_events([event(min(tables, LAST - 1), slot=tables % 256), *others])
        seen.append(link.rings.drain())
        if tables % 3 == 0:
            link.set_events([])
            seen.append(link.rings.drain())
    seen.append(link.rings.drain())
    records = np.concatenate(seen)
    assert tables > 3 and len(records) > 0
    for vcpu in range(4):
        own = records[records["vcpu"] == vcpu]
        assert (np.diff(own["event"].astype(np.int64)) >= 0).all()
        assert (np.diff(own["value"].astype(np.int64)) > 0).all()
    assert int(records["event"].max()) <= tables


def test_waiting_vcpus_take_new_events(host: FakeHost, link: Link) -> None:
    """A vCPU that waits for room keeps the table alive that it acts on."""
    link.set_events([event(1)])
    count_up(host, CAPACITY + 5, 0)
    eventually(lambda: link.rings.counters()[1] == 1)
    for number in range(2, 30):
        link.set_events([event(number)])
    time.sleep(0.01)
    records = collect(link, CAPACITY + 5)
    assert np.array_equal(records["event"], [1] * (CAPACITY + 1) + [29] * 4)
