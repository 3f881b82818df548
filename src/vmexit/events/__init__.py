"""What to trap and what to do then."""

from vmexit.events.event import Event
from vmexit.events.msrs import MsrSet
from vmexit.events.table import EventTable

__all__ = ["Event", "EventTable", "MsrSet"]
