"""What a Python program asks to be trapped: the options of Debugger.on_msr_write, and the event that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from vmexit.events.event import Callback, Event
from vmexit.events.filters import ValueFilter
from vmexit.events.msrs import UNNAMED_READS, UNNAMED_WRITES, MsrSet
from vmexit.link.wire import Access, Action, Stage
from vmexit.msr import address_of
from vmexit.recording import Recording
from vmexit.script.compile import CompiledScript

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

Msr = int | str | range | None
"""One address, a name ("LSTAR"), a range of addresses, or None for all but those that are accessed all the time (events.msrs)."""
_KEPT = 200_000


class HookOptions(TypedDict, total=False):
    """When a hook triggers, and what it does then. What is left out is as it says first."""

    core: int | None
    """All vCPUs; or the index of the only one."""
    pid: int | Literal["all"] | None
    """The attached process of the guest where there is one, else all; or the only one; or all ("all")."""
    stage: Stage
    """Stage.PRE."""
    value: int | None
    """Any; or the only one, in the bits of ``mask``."""
    mask: int | None
    """All; or the bits of the value that count."""
    changed: bool
    """False; True: only writes of something else, in these bits, than what the MSR holds. Not for reads."""
    script: str | CompiledScript | None
    """None; or text of the script language. It runs in the vCPU's thread, before the callback; what it prints goes to
    Debugger.print_listeners."""
    condition: bytes | str | None
    """None; or x86-64 machine code, or assembly (str), that decides whether the event does anything."""
    code: bytes | str | None
    """None; or the same that runs behind the script and before the callback."""
    buffer: int | None
    """None; or so many bytes for both and for ``$buffer`` (Event.buffer)."""
    short_circuit: bool
    """False; True: the access is not carried out."""
    immediate: bool
    """False: records may be gathered, which costs a trap less."""
    with_process: bool
    """False; True: records tell process, thread (Trap.pid, Trap.tid) and caller (Debugger.callers)."""
    outputs: Sequence[str]
    """None; or names of outputs (Debugger.outputs) that what the script prints, or each trap, goes to."""
    keep: int
    """200,000: so many of the newest records stay in Event.recording; none with a callback, script or code."""


def make_event(debugger: Debugger, access: Access, msr: Msr, callback: Callback | None, options: HookOptions) -> Event:
    """The event that these make. Raises VmexitError for what makes no sense, TypeError for an option that there is not."""
    if unknown := options.keys() - HookOptions.__annotations__.keys():
        raise TypeError(f"there is no option {min(unknown)!r}; there are {', '.join(HookOptions.__annotations__)}")
    script = options.get("script")
    if isinstance(script, str):
        script = debugger.compiler.compile(script)
    action = (Action.ASK if callback else Action(0)) | (Action.SCRIPT if script else Action(0))
    msrs = _msrs_of(debugger, access, msr)
    pid = options.get("pid")
    is_recorded = not action and options.get("code") is None
    event = Event(
        access=access,
        msrs=msrs,
        stage=options.get("stage", Stage.PRE),
        core=options.get("core"),
        process=debugger.attached if pid is None else None if pid == "all" else pid,
        with_process=options.get("with_process", False),
        action=Action.RECORD if is_recorded else action,
        callback=callback,
        script=script,
        filter=ValueFilter.of(options.get("value"), options.get("mask"), options.get("changed", False)),
        short_circuit=options.get("short_circuit", False),
        immediate=options.get("immediate", False),
        text=f"on_msr_{'write' if access == Access.WRMSR else 'read'}({msrs})",
        recording=Recording(options.get("keep", _KEPT)) if is_recorded else None,
        outputs=tuple(options.get("outputs", ())),
    )
    event.check()
    _attach_code(debugger, event, options)
    return event


def _attach_code(debugger: Debugger, event: Event, options: HookOptions) -> None:
    condition, code, buffer = options.get("condition"), options.get("code"), options.get("buffer")
    if condition is None and code is None and buffer is None:
        return
    # Unicorn takes a moment to load, which a debugger without machine code does not need.
    from vmexit.coded import UserCode, attach, machine_code

    attach(debugger, UserCode(machine_code(condition), machine_code(code), buffer), event)


def _msrs_of(debugger: Debugger, access: Access, msr: Msr) -> MsrSet:
    if msr is None:
        noise = debugger.target.only_looks.noise if debugger.target.only_looks else ()
        return MsrSet.all_but((*(UNNAMED_WRITES if access == Access.WRMSR else UNNAMED_READS), *noise))
    if isinstance(msr, int | str):
        return MsrSet.of(msr if isinstance(msr, int) else address_of(msr))
    return MsrSet.of_ranges([(msr.start, msr.stop - 1)]) if msr.step == 1 else MsrSet.of(*msr)
