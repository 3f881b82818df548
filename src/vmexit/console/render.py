"""How stops and sums are shown."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from vmexit import msr
from vmexit.commands.layout import address_text, code_place, instruction_at, instruction_text
from vmexit.debugger import Debugger, Stop, StopReason
from vmexit.errors import VmexitError
from vmexit.guest.disassembly import Syntax
from vmexit.lines import ACCESSES, STAGES, value_text
from vmexit.link.wire import RecordFlag, Stage
from vmexit.meaning import Meanings, has_value
from vmexit.recording import MsrSummary
from vmexit.targets.base import Notice, NoticeKind
from vmexit.trap import Trap

_BOLD, _RED, _PLAIN = "\033[1m", "\033[31m", "\033[0m"


def stop_text(debugger: Debugger, stop: Stop, syntax: Syntax, *, colour: bool = False) -> str:
    """Why the machine does not run any more and where it stands; called while it is halted at that stop."""
    bold, plain = (_BOLD, _PLAIN) if colour else ("", "")
    if stop.trap is not None:
        parts = (
            _break_heading(stop.trap),
            _break_meaning(stop.trap),
            _break_place(debugger, stop.trap, syntax),
            _break_names(debugger, stop.trap),
        )
        return "\n".join((f"{bold}{parts[0]}{plain}", *filter(None, parts[1:])))
    if stop.reason is StopReason.ENDED:
        return f"{bold}{exit_text(stop.exit_status, debugger.target.vmm)}{plain}"
    if stop.reason is StopReason.PAUSED and debugger.target.only_looks:
        return f"{bold}paused: nothing is watched until 'g'; what was watched runs on{plain}"
    if stop.reason is StopReason.PAUSED:
        heading = f"{bold}halted, core {debugger.core:x}{plain}"
        try:
            return f"{heading}\n{_rip_line(debugger, syntax)}"
        except VmexitError:
            return heading
    return f"{bold}halted: {stop.reason.value}{plain}"


def _break_heading(trap: Trap) -> str:
    mark = ", short-circuited" if trap.skipped else ""
    return (
        f"event {trap.event:x} triggered ({STAGES[trap.stage]}) on core {trap.core:x}: "
        f"{ACCESSES[trap.access]}, MSR {trap.msr:x}, value {value_text(trap).strip()}{mark}"
    )


def _break_meaning(trap: Trap) -> str:
    """Which MSR it is, and what its value says; "" where nothing is known of it."""
    found = msr.find(trap.msr)
    if found is None:
        return ""
    return f"MSR   {found.explain(trap.value) if has_value(trap.access, trap.stage) else found.name}"


def _break_place(debugger: Debugger, trap: Trap, syntax: Syntax) -> str:
    """The trapped instruction and, where that is another place, the one that comes next."""
    try:
        _, mode = code_place(debugger.registers(trap.core))
        instruction = instruction_at(debugger, trap.rip, mode, syntax)
        text = instruction_text(instruction) if instruction else address_text(trap.rip)
        if trap.stage == Stage.PRE:
            return f"RIP   {text}"
        after = (
            "an interrupt came first; RIP is at its handler"
            if trap.flags & RecordFlag.INTERRUPTED
            else "the guest goes on at RIP"
        )
        return f"done  {text}\n{_rip_line(debugger, syntax)}   <- {after}"
    except VmexitError:  # somebody has let it run on
        return f"{'RIP ' if trap.stage == Stage.PRE else 'done'}  {address_text(trap.rip)}"


def _break_names(debugger: Debugger, trap: Trap) -> str:
    """Which function that is, what called it, and which thread executes it, as far as it is known."""
    guest = debugger.guest
    if not guest.is_known:
        return ""
    try:
        place, caller, task = guest.name_of(trap.rip), guest.caller(trap.core), guest.current(trap.core)
    except VmexitError:  # as above
        return ""
    lines = [f"in    {place}{f' <- {caller}' if caller else ''}"] if place else []
    return "\n".join((*lines, f"by    {task}") if task else lines)


def _rip_line(debugger: Debugger, syntax: Syntax) -> str:
    address, mode = code_place(debugger.registers())
    instruction = instruction_at(debugger, address, mode, syntax)
    return f"RIP   {instruction_text(instruction) if instruction else address_text(address)}"


def exit_text(status: int | None, vmm: str = "QEMU") -> str:
    """How the VMM of that name ended; ``status`` is None where nobody can tell."""
    if status is None:
        return f"{vmm} has ended"
    if status >= 0:
        return f"{vmm} ended with status {status}"
    try:
        name = f" ({signal.Signals(-status).name})"
    except ValueError:
        name = ""
    return f"{vmm} was ended by signal {-status}{name}"


_NOTICES = {
    NoticeKind.RESET: "the machine was reset",
    NoticeKind.SHUTDOWN: "the guest has shut down",
    NoticeKind.PANICKED: "the guest has panicked",
}


def notice_text(notice: Notice) -> str:
    """What the machine told of itself."""
    text = _NOTICES.get(notice.kind, notice.kind.name.lower())
    return f"{text} ({notice.detail})" if notice.detail else text


def error_text(error: VmexitError, place: str = "", *, colour: bool = False) -> str:
    """What is wrong and, for a command, where in it; ``place`` stands before it: "boot.hds:3"."""
    render = getattr(error, "render", None)
    text: str = render() if render else str(error)
    if place:
        text = f"{place}: {text}"
    if not colour:
        return text
    first, newline, rest = text.partition("\n")
    return f"{_RED}{first}{_PLAIN}{newline}{rest}"


def summary_table(rows: Sequence[MsrSummary], counted: str = "count") -> str:
    """A row for each event and MSR: how often, by which cores, first and last value. If all are of one event it is not named.

    ``counted``: what stands above the numbers.
    """
    first = 0 if len({row.event for row in rows}) > 1 else 1
    table = [("event", "MSR", "name", "", "stage", counted, "cores", "first value", "last value")[first:]]
    meanings = Meanings()
    for row in rows:
        cores = " ".join(f"{core:x}" for core in sorted(row.cores))
        values = (f"{row.first:016x}", f"{row.last:016x}") if has_value(row.access, row.stage) else ("-", "-")
        what = (f"{row.msr:x}", meanings.name(row.msr), ACCESSES[row.access], STAGES[row.stage])
        table.append((f"{row.event:x}", *what, f"{row.count:,}", cores, *values)[first:])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = {"MSR", counted}
    names = table[0]
    return "\n".join(
        "  ".join(
            text.rjust(width) if name in right else text.ljust(width)
            for text, width, name in zip(row, widths, names, strict=True)
        ).rstrip()
        for row in table
    )
