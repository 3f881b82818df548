"""The table of events."""

from __future__ import annotations

import pytest

from vmexit.errors import VmexitError
from vmexit.events import Event, EventTable, MsrSet
from vmexit.link.wire import MAX_EVENT_ID, MAX_EVENTS, Access


def event() -> Event:
    return Event(access=Access.WRMSR, msrs=MsrSet.of(1))


def test_numbers_rise_and_slots_are_taken_again() -> None:
    table = EventTable()
    first, second = table.add(event()), table.add(event())
    assert (first.number, second.number) == (0, 1)
    table.remove(first)
    third = table.add(event())
    assert third.number == 2
    assert third.slot == first.slot != second.slot
    assert [each.number for each in table] == [1, 2]
    assert 0 not in table and table.get(0) is None and table.get(2) is third


def test_a_full_table_says_so() -> None:
    table = EventTable()
    for _ in range(MAX_EVENTS):
        table.add(event())
    assert {each.slot for each in table} == set(range(MAX_EVENTS))
    with pytest.raises(VmexitError, match=f"{MAX_EVENTS} events"):
        table.add(event())
    assert len(table) == MAX_EVENTS


def test_numbers_come_to_an_end() -> None:
    """On the wire they have 16 bits, and 0 is the debugger's own."""
    table = EventTable()
    for _ in range(MAX_EVENT_ID):
        table.remove(table.add(event()))
    with pytest.raises(VmexitError, match="65,535 events, and no number is left"):
        table.add(event())


def test_events_may_be_removed_while_looking_at_them() -> None:
    table = EventTable()
    for _ in range(3):
        table.add(event())
    for each in table:
        table.remove(each)
    assert not len(table)
