"""The events that there are, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterator

from vmexit.errors import VmexitError
from vmexit.events.event import Event
from vmexit.link.wire import MAX_EVENT_ID, MAX_EVENTS


class EventTable:
    """Events by number. Numbers rise from 0 and are never given twice; an event is looked at before those with higher numbers."""

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}
        self._next = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events.values()))

    def __len__(self) -> int:
        return len(self._events)

    def __contains__(self, number: int) -> bool:
        return number in self._events

    def get(self, number: int) -> Event | None:
        """The event with this number, if there is one."""
        return self._events.get(number)

    def add(self, event: Event) -> Event:
        """Takes an event in and numbers it. Raises VmexitError when there is no room for another."""
        taken = {other.slot for other in self._events.values()}
        slot = next((slot for slot in range(MAX_EVENTS) if slot not in taken), None)
        if slot is None:
            raise VmexitError(f"there are {MAX_EVENTS} events already; clear some first (events c)")
        if self._next >= MAX_EVENT_ID:
            raise VmexitError(f"this session has had {MAX_EVENT_ID:,} events, and no number is left for another")
        event.number, event.slot = self._next, slot
        self._next += 1
        self._events[event.number] = event
        return event

    def remove(self, event: Event) -> None:
        """Takes an event out for good."""
        del self._events[event.number]
