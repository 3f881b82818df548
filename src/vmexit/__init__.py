"""vmexit: trap the MSR accesses of a whole guest, and look at them, stop on them, change them or block them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from vmexit.debugger import Debugger, Overflow, State, Stop, StopReason
from vmexit.errors import VmexitError
from vmexit.events import Event, MsrSet
from vmexit.link.wire import Access, Action, Stage
from vmexit.recording import Recording
from vmexit.targets.qemu import DEFAULT_QEMU, OutputTo, Qemu
from vmexit.trap import LiveTrap, Registers, Trap

__version__ = version("vmexit")

__all__ = [
    "Access",
    "Action",
    "Debugger",
    "Event",
    "LiveTrap",
    "MsrSet",
    "Overflow",
    "Recording",
    "Registers",
    "Stage",
    "State",
    "Stop",
    "StopReason",
    "Trap",
    "VmexitError",
    "launch",
]


def launch(arguments: Sequence[str], *, qemu: str = DEFAULT_QEMU, output: OutputTo | None = None) -> Debugger:
    """Starts QEMU with these arguments and gives its debugger; the machine is halted before its first instruction.

    ``output(stream, data)`` gets what QEMU writes to "stdout" and "stderr", from threads of their own; None: it goes to the
    caller's own. Raises UsageError or TargetError, with the reason in one line, where QEMU cannot be started or be trapped in.
    """
    return Debugger(Qemu(arguments, qemu=qemu, output=output))
