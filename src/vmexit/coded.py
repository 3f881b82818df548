"""What an event with the user's own machine code does at a trap: the condition decides, the code acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vmexit.errors import VmexitError
from vmexit.events.event import Event, EventError
from vmexit.link.wire import Action, RecordFlag, Stage, constant
from vmexit.prints import Printed
from vmexit.script.compile import CompiledScript
from vmexit.script.errors import ScriptError
from vmexit.trap import LiveTrap, record_of
from vmexit.usercode.assemble import assemble
from vmexit.usercode.buffer import Buffer, check_buffer
from vmexit.usercode.errors import CodeRunError
from vmexit.usercode.lift import lift
from vmexit.usercode.sandbox import Kind, Sandbox

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

# The structure's order is also that of the wire's registers.
_GENERAL = 16
_FS_BASE, _GS_BASE = constant("FS_BASE"), constant("GS_BASE")


@dataclass(frozen=True, slots=True)
class UserCode:
    """The machine code of an event."""

    condition: bytes | None = None
    code: bytes | None = None
    buffer: int | None = None
    """Bytes."""
    is_code_first: bool = False
    """Where the event has a script as well: code runs before it."""

    def check(self) -> None:
        """Raises VmexitError for a buffer of no sound size."""
        if self.buffer is not None:
            check_buffer(self.buffer)


def attach(debugger: Debugger, user_code: UserCode, event: Event) -> None:
    """Makes an event that is not in the debugger yet one that has machine code besides whatever else it does.

    Raises EventError for what is not possible, with the option of the command line that is to blame.
    """
    looks = debugger.target.only_looks
    if looks is not None:
        given = {"condition": user_code.condition, "code": user_code.code, "buffer": user_code.buffer}
        option = next(name for name, value in given.items() if value is not None)
        raise EventError(option, f"'{option}' is not possible here: {looks.reason}")
    try:
        user_code.check()
    except VmexitError as error:
        raise EventError("buffer", str(error)) from None
    if lift_condition(debugger, user_code, event):
        return
    lifted = None if user_code.condition is None or user_code.code is None else _lifted(debugger, user_code.condition)
    if lifted is not None:
        event.condition = lifted
        user_code = replace(user_code, condition=None)
    if user_code.buffer is not None and event.buffer is None:
        event.buffer = Buffer(user_code.buffer)
    if user_code.condition is not None or user_code.code is not None:
        Coded(debugger, user_code, event, lambda: debugger.code_failures)
        event.way = "emulated" if lifted is None else "condition lifted, code emulated"


def machine_code(given: bytes | str | None) -> bytes | None:
    """What a program gives: machine code as it is, or assembly, which is assembled (CodeError)."""
    return assemble(given) if isinstance(given, str) else given


def lift_condition(debugger: Debugger, user_code: UserCode, event: Event) -> bool:
    """Has a condition decided in the vCPU's own thread, where that can be; whether it makes a Coded needless, and is done."""
    if user_code.condition is None or user_code.code is not None:
        return False
    lifted = _lifted(debugger, user_code.condition)
    if lifted is None:
        return False
    if user_code.buffer is not None:
        event.buffer = Buffer(user_code.buffer)
    event.condition = lifted
    event.way = "lifted"
    return True


def _lifted(debugger: Debugger, condition: bytes) -> CompiledScript | None:
    """A script that leaves in RAX whether the condition holds; None where it has to be emulated."""
    lifted = lift(condition)
    if lifted is None:
        return None
    text = f"{lifted.setup}if ({lifted.expression}) {{ @rax = 1; }} else {{ @rax = 0; }}"
    try:
        return debugger.compiler.compile(text, "condition")
    except ScriptError:
        return None


class _TrappedGuest:
    """What a vCPU that was trapped reaches of its guest (sandbox.Guest)."""

    __slots__ = ("_debugger", "_trap")

    def __init__(self, trap: LiveTrap, debugger: Debugger) -> None:
        self._trap = trap
        self._debugger = debugger

    def read_memory(self, address: int, length: int) -> bytes:
        return self._trap.read_memory(address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        self._trap.write_memory(address, data)

    def segment_bases(self) -> tuple[int, int]:
        values = self._debugger.target.link.registers(self._trap.core)
        return values[_FS_BASE], values[_GS_BASE]


class Coded:
    """The callback of such an event.

    The condition guards all that the event does. What fails counts as false, or as not done, and is told; after so many failures
    in a row the event is disabled.
    """

    def __init__(self, debugger: Debugger, user_code: UserCode, event: Event, failures: Callable[[], int]) -> None:
        """Takes over what the event does: makes it one that asks. ``failures``: how many disable it, 0 for any number.

        Raises VmexitError for a buffer of no sound size.
        """
        self._debugger = debugger
        self._event = event
        self._failures = failures
        self._in_a_row = 0
        if user_code.buffer is not None and event.buffer is None:
            event.buffer = Buffer(user_code.buffer)
        self._condition = user_code.condition and Sandbox(user_code.condition, Kind.CONDITION)
        self._code = user_code.code and Sandbox(user_code.code, Kind.ACTION, event.buffer)
        self._callback = event.callback
        self._breaks = bool(event.action & Action.BREAK) and not self._code
        self._records = bool(event.action & Action.RECORD) and self._condition is not None
        self._has_script = bool(event.action & Action.SCRIPT)
        # Whether the script runs, and the instruction is skipped, is the condition's to say; and code may come first.
        event.asks_first = self._condition is not None or (self._has_script and user_code.is_code_first)
        self._is_code_last = event.asks_first and self._has_script and not user_code.is_code_first and self._code is not None
        event.action = Action.ASK | event.action & (Action.SCRIPT if self._records else Action.SCRIPT | Action.RECORD)
        event.way = "emulated"
        event.callback = self

    def __call__(self, trap: LiveTrap) -> None:
        """At a trap; where the script comes between the condition and the code, for each of them."""
        guest = _TrappedGuest(trap, self._debugger)
        is_second = self._is_code_last and RecordFlag.AGAIN in trap.flags
        if not is_second and not self._begin(trap, guest):
            return
        if trap.asks_again:
            return
        if self._code and self._tried(self._code, trap, guest) is not None:
            self._in_a_row = 0
        if self._breaks:
            trap.halt()
        if self._callback is not None:
            self._callback(trap)

    def _begin(self, trap: LiveTrap, guest: _TrappedGuest) -> bool:
        """What comes before the code; whether the condition holds."""
        if self._condition:
            holds = self._tried(self._condition, trap, guest)
            if holds is not None and (not holds or not self._code):
                self._in_a_row = 0
            if not holds:
                return False
        if self._event.asks_first:
            if trap.stage == Stage.PRE:
                trap.short_circuit = self._event.short_circuit
            trap.runs_script = self._has_script
            trap.asks_again = self._is_code_last
        if self._records:
            flags = trap.flags & ~RecordFlag.SKIPPED | (RecordFlag.SKIPPED if trap.short_circuit else RecordFlag(0))
            self._debugger.tell_records(record_of(trap.trap._replace(action=Action.RECORD, flags=flags)), alike=True)
        return True

    def _tried(self, sandbox: Sandbox, trap: LiveTrap, guest: _TrappedGuest) -> int | None:
        """What a run leaves in RAX; None where it was ended, which has been told."""
        try:
            return self._run(sandbox, trap, guest)
        except CodeRunError as error:
            self._failed(trap, str(error))
            return None

    def _run(self, sandbox: Sandbox, trap: LiveTrap, guest: _TrappedGuest) -> int:
        before = tuple(trap.values[:_GENERAL])
        try:
            result = sandbox.run(before, trap.msr, guest)
        except CodeRunError as error:
            raise CodeRunError(f"{sandbox.kind.value} {error}") from None
        except VmexitError as error:
            raise CodeRunError(f"{sandbox.kind.value}: {error}") from None
        if result.registers != before:
            for number, (was, value) in enumerate(zip(before, result.registers, strict=True)):
                if was != value:
                    trap.change(number, value)
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
