"""What an event with the user's own machine code does at a trap: the condition decides, the code acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmexit.errors import VmexitError
from vmexit.events.event import Event
from vmexit.link.wire import Action, constant
from vmexit.prints import Printed
from vmexit.trap import LiveTrap
from vmexit.usercode.errors import CodeRunError
from vmexit.usercode.lift import lift
from vmexit.usercode.sandbox import Buffer, Kind, Sandbox, check_buffer

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

_NAMES = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
# The structure's order is also that of the wire's registers.
_GENERAL = len(_NAMES)
_FS_BASE, _GS_BASE = constant("FS_BASE"), constant("GS_BASE")


@dataclass(frozen=True, slots=True)
class UserCode:
    """The machine code of an event."""

    condition: bytes | None = None
    code: bytes | None = None
    buffer: int | None = None
    """Bytes."""

    def check(self) -> None:
        """Raises VmexitError for a buffer of no sound size."""
        if self.buffer is not None:
            check_buffer(self.buffer)


def lift_condition(debugger: Debugger, user_code: UserCode, event: Event) -> bool:
    """Makes a condition a script in the vCPU's own thread, in front of the event's script or break; whether that could be done.

    The event's own script has been compiled by itself before, so that what is wrong with it is known.
    """
    if user_code.condition is None or user_code.code is not None or event.action & ~(Action.SCRIPT | Action.BREAK):
        return False
    lifted = lift(user_code.condition)
    if lifted is None:
        return False
    skip = "event_sc(1); " if event.short_circuit else ""
    if event.script is None:
        source, name = "pause();", "condition"
    else:
        source, name = event.script.source.text, event.script.source.name
    guard = f"{lifted.setup}if (!({lifted.expression})) {{ return; }} {skip}\n"
    event.script = debugger.compiler.compile(guard + source, name)
    event.action = Action.SCRIPT
    event.short_circuit = False
    event.way = "lifted"
    return True


class _TrappedGuest:
    """What a vCPU that was trapped reaches of its guest (sandbox.Guest)."""

    def __init__(self, trap: LiveTrap, debugger: Debugger) -> None:
        self._debugger = debugger
        self.read_memory = trap.read_memory
        self.write_memory = trap.write_memory
        self._core = trap.core

    def segment_bases(self) -> tuple[int, int]:
        values = self._debugger.target.link.registers(self._core)
        return values[_FS_BASE], values[_GS_BASE]


class Coded:
    """The callback of such an event.

    The condition guards all that the event does: its code, its record, its break, its short-circuit. What fails counts as false,
    or as not done, and is told; after so many failures in a row the event is disabled.
    """

    def __init__(self, debugger: Debugger, user_code: UserCode, event: Event, failures: Callable[[], int]) -> None:
        """Takes over what the event does: makes it one that asks. ``failures``: how many disable it, 0 for any number.

        Raises VmexitError for a buffer of no sound size.
        """
        self._debugger = debugger
        self._event = event
        self._failures = failures
        self._in_a_row = 0
        buffer = None if user_code.buffer is None else Buffer(user_code.buffer)
        self._condition = user_code.condition and Sandbox(user_code.condition, Kind.CONDITION)
        self._code = user_code.code and Sandbox(user_code.code, Kind.ACTION, buffer)
        self._breaks = bool(event.action & Action.BREAK) and not self._code
        self._records = bool(event.action & Action.RECORD)
        # Whether the instruction is skipped is the condition's to say.
        self._skips = event.short_circuit and self._condition is not None
        if self._skips:
            event.short_circuit = False
        event.action = Action.ASK
        event.way = "emulated"
        event.callback = self
        event.tells_itself = True

    def __call__(self, trap: LiveTrap) -> None:
        """At a trap."""
        guest = _TrappedGuest(trap, self._debugger)
        try:
            if self._condition and not self._run(self._condition, trap, guest):
                self._in_a_row = 0
                return
            if self._skips:
                trap.skip()
            if self._records or (self._event.outputs and not self._breaks):  # a break is told by its own record
                self._debugger.tell(trap.trap, shown=self._records)
            if self._code:
                self._run(self._code, trap, guest)
        except CodeRunError as error:
            self._failed(trap, str(error))
            return
        self._in_a_row = 0
        if self._breaks:
            trap.halt()

    def _run(self, sandbox: Sandbox, trap: LiveTrap, guest: _TrappedGuest) -> int:
        before = tuple(trap.values[:_GENERAL])
        try:
            result = sandbox.run(before, trap.msr, guest)
        except CodeRunError as error:
            raise CodeRunError(f"{sandbox.kind.value} {error}") from None
        except VmexitError as error:
            raise CodeRunError(f"{sandbox.kind.value}: {error}") from None
        if result.registers != before:
            for name, was, value in zip(_NAMES, before, result.registers, strict=True):
                if was != value:
                    trap.registers[name] = value
        return result.rax

    def _failed(self, trap: LiveTrap, why: str) -> None:
        self._event.faults += 1
        self._in_a_row += 1
        self._tell(trap, f"event {self._event.number:x}, core {trap.core:x}: {why}\n")
        if self._in_a_row == self._failures():
            self._in_a_row = 0
            self._tell(trap, f"event {self._event.number:x} is disabled: {self._failures():,} runs in a row were ended\n")
            self._debugger.enable(self._event, False)

    def _tell(self, trap: LiveTrap, text: str) -> None:
        printed = Printed(self._event.number, trap.core, trap.trap.time_ns, text.encode())
        for listener in list(self._debugger.print_listeners):
            listener(printed)
