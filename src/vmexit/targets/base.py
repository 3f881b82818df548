"""What the debugger needs of a machine, whatever runs it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vmexit.link.client import Link
from vmexit.targets.host_threads import HostThreads


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


@dataclass(frozen=True, slots=True)
class Untrappable:
    """MSRs, both ends included, that never trap in a machine, and why: it goes on "... cannot be trapped here: "."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True, slots=True)
class OnlyLooks:
    """A machine that can be looked at but not touched: events record in stage post, and nothing else can be done."""

    reason: str
    """Why; it goes on "... is not possible here: "."""
    noise: tuple[int, ...]
    """MSRs that are accessed all the time, and are left out where no MSR is named."""
    threads: HostThreads | None = None
    """Those of the host, where it is their accesses that are seen; an event can name the process that it is about then."""

    @property
    def names_processes(self) -> bool:
        """An event can name the process of the host that it looks at."""
        return self.threads is not None


class Target(Protocol):
    """A machine with the agent inside. Its methods are called by one thread at a time."""

    link: Link
    name: str
    """What to call it: "QEMU 7.2.22"."""
    vmm: str
    """What to call its VMM: "QEMU"."""
    untrappable: tuple[Untrappable, ...]
    """Events that name one of these are refused; those for all MSRs do without."""
    found_running: bool | None
    """It had begun before vmexit came: True, it ran; False, it was halted. None: vmexit has started it, and it is halted."""
    wants_halted: bool
    """The machine was halted before its first instruction, and whoever started it wants it to stay so."""

    only_looks: OnlyLooks | None
    """None: it can be halted and changed, as far as the agent's capabilities go. Else halting it means to look no more for a
    while, and it runs on."""

    @property
    def pid(self) -> int:
        """The VMM's process."""

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
        """Of its VMM: 0 to 255, or minus the number of the signal that ended it; None while it lives, or where nobody tells."""

    def detach(self) -> None:
        """Lets go of it; it runs on without vmexit, with nothing of it changed. ``close`` does nothing then."""

    def close(self) -> None:
        """Ends a machine that vmexit has started, with whatever belongs to it; lets go of any other.

        Does nothing the second time.
        """
