"""Scripts that run in the debugger, beside a machine: what ``?`` and ``print`` do, and Debugger.evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmexit.errors import VmexitError
from vmexit.link import wire
from vmexit.link.wire import EventState, Stage
from vmexit.script.compile import CompiledScript
from vmexit.script.errors import ScriptRunError
from vmexit.script.runtime import Machine, Runtime

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

_GENERAL = 16
_FIRST_TAG = wire.constant("FIRST_TAG")


class LiveMachine:
    """The debugger's machine, as the current core sees it (runtime.Live)."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self._core = debugger.core

    def get_register(self, number: int) -> int:
        return self._debugger.target.link.register(self._core, number)

    def set_register(self, number: int, value: int) -> None:
        self._debugger.target.link.set_register(self._core, number, value)

    def read(self, physical: bool, address: int, length: int) -> bytes:
        return self._debugger.read_memory(self._core, address, length, physical=physical)

    def write(self, physical: bool, address: int, data: bytes) -> None:
        self._debugger.write_memory(self._core, address, data, physical=physical)

    def translate(self, address: int, to_virtual: bool) -> int | None:
        return self._debugger.target.link.translate(self._core, address, to_virtual=to_virtual)

    def short_circuit(self, on: bool) -> None:
        self._debugger.decide(on)

    def change_event(self, state: int, event: int) -> None:
        found = self._debugger.events.get(event)
        if found is None:
            raise VmexitError(f"there is no event {event:x}")
        if state == EventState.CLEARED:
            self._debugger.clear(found)
        else:
            self._debugger.enable(found, state == EventState.ENABLED)

    def pause(self) -> None:
        self._debugger.pause()


def evaluate(debugger: Debugger, runtime: Runtime, script: CompiledScript, write: Callable[[bytes], None]) -> None:
    """Runs a script beside the machine; it shares the global variables with those that run at traps.

    ``write`` is given what it prints. Raises ScriptRunError where the run is ended, or where it names a register of a machine
    that runs or has ended.
    """
    runtime.steps, runtime.stack = debugger.script_steps, debugger.script_stack
    runtime.globals = debugger.target.link.rings.globals
    machine = Machine(live=LiveMachine(debugger), values=_values(debugger))
    if script.registers is not None:
        try:
            values = debugger.target.link.registers(debugger.core)
        except VmexitError as error:
            raise ScriptRunError(str(error), script.registers) from None
        machine.registers = dict(enumerate(values[:_GENERAL]))
    runtime.run(script, machine, write)


def _values(debugger: Debugger) -> dict[str, int]:
    """The pseudo-registers that a stop at a trap gives values to."""
    values = {"core": debugger.core}
    trap = debugger.stop.trap if debugger.stop is not None else None
    if trap is not None:
        values |= {
            "context": trap.msr,
            "event_id": trap.event,
            "event_tag": _FIRST_TAG + trap.event,
            "event_stage": int(trap.stage == Stage.POST),
            "rip": trap.rip,
        }
    return values
