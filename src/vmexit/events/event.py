"""An event: which WRMSR or RDMSR, when, and what then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmexit.errors import VmexitError
from vmexit.events.filters import FilterError, ValueFilter
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, Stage

if TYPE_CHECKING:
    from vmexit.recording import Recording
    from vmexit.script.compile import CompiledScript
    from vmexit.trap import LiveTrap
    from vmexit.usercode.buffer import Buffer

Callback = Callable[["LiveTrap"], None]


class EventError(VmexitError):
    """An event that makes no sense; ``option`` is the option of the command line that is to blame."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(slots=True, kw_only=True, eq=False)
class Event:
    """One event. What it is does not change once it is made; whether it is enabled does."""

    access: Access
    msrs: MsrSet
    stage: Stage = Stage.PRE
    core: int | None = None
    """The index of the only vCPU that it looks at; None: all."""
    process: int | None = None
    """The number of the only process that it looks at: one of the guest's, or of the host where that is looked at; None: all."""
    with_process: bool = False
    """Its records tell process and thread of the guest (Trap.pid, Trap.tid) and the caller, where these are known."""
    action: Action = Action.BREAK
    callback: Callback | None = None
    """What Action.ASK calls."""
    script: CompiledScript | None = field(default=None, repr=False)
    """What Action.SCRIPT runs, in the vCPU's thread."""
    filter: ValueFilter | None = None
    """Which values it is triggered by; None: any."""
    condition: CompiledScript | None = field(default=None, repr=False)
    """What decides, there too, whether the event does anything: whether it leaves RAX other than 0."""
    buffer: Buffer | None = field(default=None, repr=False)
    """The script's ``$buffer``, which code shares."""
    asks_first: bool = False
    """Action.ASK comes before the script; that and the short-circuit are for the callback to say (LiveTrap)."""
    short_circuit: bool = False
    immediate: bool = True
    """Records are wanted at once; else they may be gathered, which costs a trap less."""
    text: str = ""
    """The command line, or what stands for it in a list of events."""
    enabled: bool = True
    number: int = -1
    """The event's number, from 0; given by the table that takes it in."""
    slot: int = -1
    """Where the agent counts its hits; given by the table."""
    faults: int = 0
    """Runs of its script that were ended."""
    way: str = ""
    """How its machine code runs, for a list of events; empty: it has none."""
    outputs: tuple[str, ...] = ()
    """The names of the outputs that its results go to; none: to the screen."""
    forwarded: Action = field(default=Action(0), repr=False)
    """What the agent does besides, for the sake of its outputs; set when they are known."""
    tells_itself: bool = False
    """Its callback decides which of its traps are told to outputs (Debugger.tell)."""
    recording: Recording | None = field(default=None, repr=False)
    """Where its records are kept; None: they are only counted and passed on."""

    def check(self) -> None:
        """Raises EventError for options that contradict each other."""
        if self.short_circuit and self.stage & Stage.POST:
            raise EventError("sc", "'sc on' needs 'stage pre': what has been executed cannot be short-circuited any more")
        if self.filter is not None:
            try:
                self.filter.check(self.access, self.stage)
            except FilterError as error:
                raise EventError(error.option, str(error)) from None
        if bool(self.action & Action.ASK) != (self.callback is not None):
            raise EventError("script", "a callback and the action that calls it go together")
        if bool(self.action & Action.SCRIPT) != (self.script is not None):
            raise EventError("script", "a script and the action that runs it go together")
