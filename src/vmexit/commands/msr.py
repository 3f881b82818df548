"""``!msrwrite`` and ``!msrread``: make an event of the guest's WRMSR or RDMSR instructions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from vmexit.commands import event_options, msr_names, msr_sets
from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.events.event import Event
from vmexit.events.msrs import UNNAMED_READS, UNNAMED_WRITES, MsrSet
from vmexit.link.wire import Access, Action

_VERBS = {
    Action.BREAK: "breaks at",
    Action.RECORD: "prints",
    Action.SCRIPT: "runs a script at",
    Action.SCRIPT | Action.RECORD: "prints and runs a script at",
}


def _coded_verb(options: event_options.EventOptions) -> str:
    """Of an event with machine code of the user's."""
    does = ["prints"] if options.log else []
    blocks = {"a script": options.script, "code": options.machine_code.get("code", (None,))[0]}
    runs = sorted((block.start, name) for name, block in blocks.items() if block is not None)
    if runs:
        does.append(f"runs {' and '.join(name for _, name in runs)} at")
    elif not options.log:
        does.append("breaks at")
    verb = " and ".join(does)
    return f"where its condition holds {verb}" if "condition" in options.machine_code else verb


class _MsrCommand(Command):
    """What both have in common."""

    _ACCESS: ClassVar[Access]
    _UNNAMED: ClassVar[tuple[int, ...]]

    def run(self, session: Session, arguments: Arguments) -> None:
        options = event_options.parse(arguments)
        noise = event_options.fit(session, options)
        msrs = self._msrs(arguments, options)
        if not options.rest:
            msrs = MsrSet.all_but((*(msrs.left_out or ()), *noise))
        if options.unavailable is not None:
            raise options.unavailable
        script = event_options.compiled_script(session, arguments, options)
        event = Event(
            access=self._ACCESS,
            msrs=msrs,
            stage=options.stage,
            core=options.core,
            process=options.process,
            with_process=bool(options.action & (Action.RECORD | Action.BREAK)),
            action=options.action,
            script=script,
            filter=event_options.value_filter(arguments, options),
            short_circuit=options.short_circuit,
            immediate=options.immediate,
            text=arguments.line.strip(),
        )
        if options.rest:
            options.places["msr"] = (options.rest[0], options.rest[-1])
        event_options.make(session, arguments, options, event)
        session.emit(self._success(session, event, options))

    def _msrs(self, arguments: Arguments, options: event_options.EventOptions) -> MsrSet:
        msrs = msr_sets.parse(arguments, options.rest, event_options.ALL)
        return MsrSet.all_but(self._UNNAMED) if msrs is None else msrs

    def _success(self, session: Session, event: Event, options: event_options.EventOptions) -> str:
        instruction = (self._ACCESS.name or "").lower()
        left_out = event.msrs.left_out
        verb = _coded_verb(options) if options.machine_code else _VERBS.get(event.action, "breaks at")
        if session.records:
            verb = verb.replace("prints", "records")
        msrs = "every MSR" if left_out else msr_sets.describe(event.msrs)
        text = f"event {event.number:x} {verb} each {instruction} of {msrs}"
        text += f" ({event_options.description(options)})"
        if left_out:
            text += f"\nleft out, unless an event names them: {' '.join(f'{msr:x}' for msr in left_out)}"
        if left_out is not None and not session.told_untrappable:
            session.told_untrappable = True
            for never in session.debugger.target.untrappable:
                named = f"{never.first:x}" if never.first == never.last else f"{never.first:x} to {never.last:x}"
                text += f"\nnever trapped in this machine: {named} ({never.reason})"
        return text

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return event_options.complete(session, before)

    def complete_word(self, session: Session, before: Sequence[str], word: str) -> Iterable[str]:
        last = before[-1] if before else ""
        if last == "=":  # behind the hyphen of a range
            return msr_names.complete(word)
        offered = self.complete(session, before)
        if last in event_options.TAKE_A_VALUE or (event_options.others(before) and last[-1] not in ",-"):
            return offered
        return [*offered, *msr_names.complete(word)]


_MSRS = (
    "MSRS",
    "The MSRs that are trapped: a number or a name (LSTAR, IA32_LSTAR), a range (200-20f), or a list of these with commas "
    "between them. What can be read as a number is one. Without MSRs every one except those that are {verb} all the time: "
    "{unnamed}.",
)


def _parameters(verb: str, unnamed: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    name, text = _MSRS
    return (
        (name, text.format(verb=verb, unnamed=", ".join(f"{msr:x}" for msr in unnamed))),
        *event_options.PARAMETERS,
    )


class MsrWrite(_MsrCommand):
    """Traps WRMSR."""

    _ACCESS = Access.WRMSR
    _UNNAMED = UNNAMED_WRITES
    INFO = Info(
        names=("!msrwrite",),
        usage=(f"!msrwrite [MSRS] {event_options.USAGE}",),
        summary="trap the guest's writes to MSRs",
        text="""Makes an event that is triggered whenever the guest executes WRMSR. It holds from the next instruction on.

In stage pre, ECX (the MSR) and EDX:EAX (the value) can be changed with 'r', and the changed write is what happens; 'events sc on'
skips it. In stage post the write has been done.""",
        parameters=_parameters("written", UNNAMED_WRITES),
        examples=(
            ("!msrwrite c0000082", "halts the machine before each write to IA32_LSTAR"),
            ("!msrwrite lstar,sysenter_eip", "halts it before writes to either of these"),
            ("!msrwrite log imm no", "prints the writes to all MSRs"),
            ("!msrwrite c0000082 script { print($value); }", "prints what is written to IA32_LSTAR"),
            ("!msrwrite efer changed", "halts it before writes that change IA32_EFER"),
            ("!msrwrite efer mask 1 value 0 log", "prints the writes to IA32_EFER that have SCE (bit 0) clear"),
            ("!msrwrite 277 condition { 488b01 }", "halts it where the guest's RAX is not 0"),
            ("!msrwrite 277 asm code { nop; nop }", "runs machine code at each write to IA32_PAT"),
            ("!msrwrite 1a0 core 1 sc on log", "ignores what core 1 writes to IA32_MISC_ENABLE; prints it"),
        ),
    )


class MsrRead(_MsrCommand):
    """Traps RDMSR."""

    _ACCESS = Access.RDMSR
    _UNNAMED = UNNAMED_READS
    INFO = Info(
        names=("!msrread",),
        usage=(f"!msrread [MSRS] {event_options.USAGE}",),
        summary="trap the guest's reads of MSRs",
        text="""Makes an event that is triggered whenever the guest executes RDMSR. It holds from the next instruction on.

In stage pre, ECX (the MSR) can be changed with 'r'; there is no value yet. In stage post, EDX:EAX holds what was read and can be
changed. A read that is short-circuited leaves EDX:EAX as they are.""",
        parameters=_parameters("read", UNNAMED_READS),
        examples=(
            ("!msrread c0000080 stage post", "halts the machine after each read of IA32_EFER"),
            ("!msrread log stage post", "prints what is read of all MSRs"),
        ),
    )
