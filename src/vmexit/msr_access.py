"""MSRs of a halted machine, read and written by the debugger as RDMSR and WRMSR would."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmexit.errors import TargetError, VmexitError
from vmexit.link.client import RequestError
from vmexit.link.wire import Status
from vmexit.msr import address_of

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

_LAST_MSR, _LAST_VALUE = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


class MsrError(VmexitError):
    """An MSR that cannot be read or written on this machine."""


def read_msr(debugger: Debugger, msr: int | str, core: int) -> int:
    """As Debugger.read_msr; ``core`` is one that there is."""
    address = _address(msr)
    with debugger.lock:
        _check(debugger)
        try:
            return debugger.target.link.read_msr(core, address)
        except RequestError as error:
            raise _explained(debugger, error, address, core, "read") from None


def write_msr(debugger: Debugger, msr: int | str, value: int, core: int) -> None:
    """As Debugger.write_msr; ``core`` is one that there is."""
    address = _address(msr)
    if not 0 <= value <= _LAST_VALUE:
        raise MsrError(f"an MSR holds 64 bits; {value:#x} is no such value")
    with debugger.lock:
        _check(debugger)
        try:
            debugger.target.link.write_msr(core, address, value)
        except RequestError as error:
            raise _explained(debugger, error, address, core, "written", value) from None


def _address(msr: int | str) -> int:
    address = address_of(msr) if isinstance(msr, str) else msr
    if not 0 <= address <= _LAST_MSR:
        raise MsrError(f"an MSR is a number from 0 to {_LAST_MSR:x}h, not {address:#x}")
    return address


def _check(debugger: Debugger) -> None:
    from vmexit.debugger import State

    if debugger.state == State.ENDED:
        raise TargetError("the machine has ended")
    if debugger.target.only_looks is not None:
        raise MsrError(f"MSRs cannot be read or written here: {debugger.target.only_looks.reason}")


def _explained(debugger: Debugger, error: RequestError, msr: int, core: int, done: str, value: int = 0) -> VmexitError:
    """What an agent's refusal means for who asked."""
    if error.status == Status.NO_VALUE:
        return MsrError(f"MSR {msr:x} on core {core:x} does not take {value:x}: a WRMSR of it would be #GP")
    if error.status == Status.UNAVAILABLE:
        return MsrError(f"this machine does not let MSRs be {done}: its internals cannot be reached by the agent")
    if error.status != Status.NO_MSR:
        return error
    if debugger.target.link.door == "tcg":
        return MsrError(
            f"MSR {msr:x} cannot be {done} on core {core:x}: QEMU's emulation has none, or has it where the agent does not reach"
        )
    return MsrError(f"core {core:x} has no MSR {msr:x} that can be {done}: it would be #GP, or the VMM keeps it to itself")
