"""vmexit: trap the MSR accesses of a whole guest, and look at them, stop on them, change them or block them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmexit.debugger import Debugger, Overflow, State, Stop, StopReason
    from vmexit.errors import VmexitError
    from vmexit.events import Event, MsrSet
    from vmexit.link.wire import Access, Action, Stage
    from vmexit.recording import Recording
    from vmexit.targets.qemu import OutputTo
    from vmexit.trap import LiveTrap, Registers, Trap

    __version__: str

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
    "__version__",
    "attach",
    "launch",
    "launch_vmm",
    "watch",
    "watch_host",
]

# Loaded when they are first asked for, so that "vmexit --version" need not wait for numpy, capstone and QMP.
_MODULES = {
    "vmexit.debugger": ("Debugger", "Overflow", "State", "Stop", "StopReason"),
    "vmexit.errors": ("VmexitError",),
    "vmexit.events": ("Event", "MsrSet"),
    "vmexit.link.wire": ("Access", "Action", "Stage"),
    "vmexit.recording": ("Recording",),
    "vmexit.trap": ("LiveTrap", "Registers", "Trap"),
}


def __getattr__(name: str) -> object:
    import importlib
    from importlib.metadata import version

    value: object
    if name == "__version__":
        value = version("vmexit")
    else:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module 'vmexit' has no attribute '{name}'")
        value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def launch(
    arguments: Sequence[str],
    *,
    qemu: str = "qemu-system-x86_64",
    accelerator: str = "tcg",
    output: OutputTo | None = None,
) -> Debugger:
    """Starts QEMU with these arguments and gives its debugger; the machine is halted before its first instruction.

    ``accelerator``: "tcg", the guest is emulated, or "kvm". ``output(stream, data)`` gets what QEMU writes to "stdout" and
    "stderr", from threads of their own; None: it goes to the caller's own. Raises UsageError or TargetError, with the reason in
    one line, where QEMU cannot be started or be trapped in.
    """
    from vmexit.debugger import Debugger
    from vmexit.targets.qemu import Qemu

    return Debugger(Qemu(arguments, qemu=qemu, accelerator=accelerator, output=output))


def launch_vmm(program: str, arguments: Sequence[str], *, output: OutputTo | None = None) -> Debugger:
    """Starts another VMM that uses KVM, and gives its debugger; as ``launch``. It must be linked dynamically."""
    from vmexit.debugger import Debugger
    from vmexit.targets.kvm import Vmm

    return Debugger(Vmm(program, arguments, output=output))


def attach(pid: int) -> Debugger:
    """The debugger of a machine that runs already, in the VMM with that process number, and that runs on, with and after it.

    ``run()``, ``traps()`` and ``wait_until_halted()`` halt it when they return; ``pump()`` does not. Raises TargetError, with the
    reason and what would help in one line, where there is no getting in.
    """
    from vmexit.debugger import Debugger
    from vmexit.targets.attach import Attached

    return Debugger(Attached(pid))


def watch(pid: int) -> Debugger:
    """The debugger of a virtual machine of KVM's that is only looked at, by the kernel's tracepoints; needs root.

    Events are such that record, in Stage.POST; all else raises VmexitError. Where others halt a machine, this looks no more.
    Raises TargetError, with the reason in one line, where there is nothing to be seen.
    """
    from vmexit.debugger import Debugger
    from vmexit.targets.tracefs import Watched

    return Debugger(Watched(pid))


def watch_host() -> Debugger:
    """The debugger of the Linux host itself, which is only looked at; as ``watch``."""
    from vmexit.debugger import Debugger
    from vmexit.targets.tracefs import Host

    return Debugger(Host())
