"""``rdmsr`` and ``wrmsr``: read and write MSRs of a halted machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit import msr
from vmexit.commands import msr_names
from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.expression import evaluate, pieces_of
from vmexit.commands.session import Session
from vmexit.commands.tokens import U64_MAX, Token
from vmexit.errors import CommandError
from vmexit.msr_access import MsrError

_CORE = ("core CORE", "Only this vCPU, counted from 0; else all of them.")
_MSR = ("MSR", "A number, or a name in any letter case, with or without IA32_ and MSR_ before it.")


class ReadMsr(Command):
    """Reads an MSR."""

    INFO = Info(
        names=("rdmsr",),
        usage=("rdmsr MSR [core CORE]",),
        summary="read an MSR of a halted machine",
        text="""Shows what the guest's RDMSR would give, on all cores or on one, and what it says. No event is triggered.

Not every MSR can be read: one that the processor does not have, one that the VMM keeps to itself. QEMU's emulation (TCG) has few;
those that it has can be read where they are kept, which is most of them.""",
        parameters=(_MSR, _CORE),
        examples=(
            ("rdmsr c0000082", "where system calls enter the kernel, on every core"),
            ("rdmsr efer core 1", "EFER of core 1, explained"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        tokens, cores = _cores(session, arguments)
        if not tokens:
            raise arguments.missing("which MSR?", "rdmsr MSR [core CORE]")
        if len(tokens) > 1:
            raise arguments.error("behind the MSR stands 'core CORE' or nothing", tokens[1], until=tokens[-1])
        address = msr_names.parse_one(arguments, tokens[0]).address
        for core in cores:
            value = session.debugger.read_msr(address, core)
            session.emit(f"core : {core:#x} - msr[{address:x}] = {value:016x}{_meaning(address, value)}")

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        if before and before[-1] == "core":
            return [f"{core:x}" for core in range(session.debugger.target.vcpus)]
        return ("core",) if before and "core" not in before else ()

    def complete_word(self, session: Session, before: Sequence[str], word: str) -> Iterable[str]:
        return msr_names.complete(word) if not before and "," not in word else self.complete(session, before)


class WriteMsr(Command):
    """Writes an MSR."""

    INFO = Info(
        names=("wrmsr",),
        usage=("wrmsr MSR VALUE [core CORE]",),
        summary="write an MSR of a halted machine",
        text="""Does what the guest's WRMSR would do, on all cores or on one, and shows what that has changed. No event is
triggered. What would be #GP is refused. The guest finds the value when it goes on.

What can be read cannot always be written from outside, and the other way round (rdmsr).""",
        parameters=(
            _MSR,
            (
                "VALUE",
                "A hexadecimal number, a register, a symbol of the guest's, or a sum or difference of these, as for 'r'.",
            ),
            _CORE,
        ),
        examples=(
            ("wrmsr c0000082 fffff80773553180", "every core enters the kernel elsewhere"),
            ("wrmsr tsc_aux 5 core 0", "what RDTSCP gives on core 0"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        tokens, cores = _cores(session, arguments)
        if len(tokens) < 2:
            what = "a value is missing" if tokens else "which MSR?"
            raise arguments.missing(what, "wrmsr MSR VALUE [core CORE]")
        address = msr_names.parse_one(arguments, tokens[0]).address
        value = _value(session, arguments, tokens[1:])
        for core in cores:
            session.emit(_write(session, address, value, core))

    complete = ReadMsr.complete
    complete_word = ReadMsr.complete_word


def _cores(session: Session, arguments: Arguments) -> tuple[list[Token], Iterable[int]]:
    """The tokens without ``core CORE``, and the cores that it says."""
    tokens, vcpus = list(arguments.tokens), session.debugger.target.vcpus
    place = next((i for i, token in enumerate(tokens) if token.lower == "core"), None)
    if place is None:
        return tokens, range(vcpus)
    if place + 1 == len(tokens):
        raise arguments.missing("a value for 'core' is missing", "core CORE")
    named = tokens[place + 1]
    core = arguments.number(named, "core number")
    if core >= vcpus:
        there = "there is only core 0" if vcpus == 1 else f"there are 0 to {vcpus - 1:x}"
        raise arguments.error(f"there is no core {core:x}", named, hint=there)
    del tokens[place : place + 2]
    return tokens, [core]


def _value(session: Session, arguments: Arguments, tokens: Sequence[Token]) -> int:
    pieces = pieces_of(arguments.line, tokens)
    value = evaluate(arguments.line, pieces, session.debugger.registers, session.guest.address_of)
    if not -(U64_MAX + 1) // 2 <= value <= U64_MAX:
        start, end = tokens[0].start, tokens[-1].end
        raise CommandError("an MSR holds 64 bits; this value has more", arguments.line, start, end)
    return value & U64_MAX


def _write(session: Session, address: int, value: int, core: int) -> str:
    """Writes it on one core; what that has changed."""
    debugger = session.debugger
    before = _readable(session, address, core)
    debugger.write_msr(address, value, core)
    now = _readable(session, address, core)
    text = f"core : {core:#x} - msr[{address:x}] = {value if now is None else now:016x}"
    if before is None or now is None:
        return text + "  (it can only be written)"
    known = msr.find(address)
    return f"{text}  {known.change(before, now) if known is not None else f'{before:#x} -> {now:#x}'}"


def _readable(session: Session, address: int, core: int) -> int | None:
    try:
        return session.debugger.read_msr(address, core)
    except MsrError:
        return None


def _meaning(address: int, value: int) -> str:
    known = msr.find(address)
    return "" if known is None else "  " + " ".join((known.name, *(known.words(value) if known.fields else ())))
