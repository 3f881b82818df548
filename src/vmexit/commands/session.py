"""What commands work with: the debugger, the settings, somebody who shows their output and lets the machine run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vmexit.commands.command import Arguments
from vmexit.debugger import Debugger, State
from vmexit.errors import TargetError
from vmexit.guest.disassembly import Syntax
from vmexit.guest_view import GuestView

if TYPE_CHECKING:
    from vmexit.sdk.requests import Requests
    from vmexit.sdk.server import Server


class Driver(Protocol):
    """What is different for commands out of a file and for those that a person types while the machine runs."""

    def go(self) -> None:
        """Lets the machine run; waits for its next stop where nobody can type in the meantime."""

    def pause(self) -> None:
        """Halts the machine."""

    def sleep(self, seconds: float) -> None:
        """Waits; the machine goes on with what it does."""

    def leave(self) -> None:
        """Ends the session, and the machine with it, once the command is done."""

    def clear(self) -> None:
        """Clears the screen."""


@dataclass
class Settings:
    """What ``settings`` shows and changes, except for what the debugger itself keeps."""

    syntax: Syntax = Syntax.INTEL


@dataclass
class Session:
    """Commands are carried out in a session."""

    debugger: Debugger
    emit: Callable[[str], None]
    """Shows a text of one or more lines; no newline at its end."""
    driver: Driver
    settings: Settings = field(default_factory=Settings)
    script_files: int = 0
    """How many files of commands are being carried out, one called by the other."""
    is_over: bool = False
    """The session ends once the command is done."""
    next_data: dict[bool, int] = field(default_factory=dict)
    """Where ``db`` and its kin go on: by whether that is a physical address."""
    next_code: dict[bool, tuple[object, int]] = field(default_factory=dict)
    """Where ``u`` goes on, and what the machine was stopped at when it was there."""

    sdk: Server | None = None
    """Where programs send HyperDbg's structures to."""
    sdk_requests: Requests | None = None
    """What becomes of them."""
    records: bool = False
    """Traps go into a file (vmexit record): an event that has nothing else to do records, where it would break."""
    told_untrappable: bool = False
    """The user knows which MSRs never trap here."""

    @property
    def guest(self) -> GuestView:
        """What the debugger knows of its guest."""
        return self.debugger.guest

    def check_halted(self, arguments: Arguments) -> None:
        """Raises where the command needs a halted machine and has none."""
        if self.debugger.state is State.ENDED:
            raise TargetError("the machine has ended")
        if self.debugger.state is State.RUNNING:
            raise arguments.error(f"'{arguments.name}' needs a halted machine", arguments.command, hint="'pause' halts it")
