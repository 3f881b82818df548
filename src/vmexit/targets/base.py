"""What the debugger needs of a machine, whatever runs it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vmexit.link.client import Link


class NoticeKind(enum.Enum):
    """What a machine tells of itself."""

    STOPPED = enum.auto()
    RESUMED = enum.auto()
    RESET = enum.auto()
    SHUTDOWN = enum.auto()
    PANICKED = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened to the machine; ``detail`` is the VMM's own word for why."""

    kind: NoticeKind
    detail: str = ""


class Target(Protocol):
    """A machine with the agent inside. Its methods are called by one thread at a time."""

    link: Link
    name: str
    """What to call it: "QEMU 7.2.22"."""

    @property
    def vcpus(self) -> int:
        """The vCPUs that it has now, numbered from 0."""

    def resume(self) -> None:
        """Lets it run. RESUMED follows. Raises TargetError where it cannot."""

    def halt(self) -> None:
        """Asks it to halt and does not wait; STOPPED follows, unless it is halted already."""

    def filenos(self) -> list[int]:
        """Descriptors that become readable when there are notices."""

    def notices(self) -> list[Notice]:
        """What has happened since the last call, oldest first; nothing is waited for."""

    @property
    def exit_status(self) -> int | None:
        """Of its VMM: 0 to 255, or minus the number of the signal that ended it; None while it lives."""

    def close(self) -> None:
        """Ends the machine and whatever belongs to it. Does nothing the second time."""
