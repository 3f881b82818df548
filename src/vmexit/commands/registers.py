"""``r``: show and change registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.expression import Piece, evaluate, pieces_of, unknown_register
from vmexit.commands.session import Session
from vmexit.errors import CommandError
from vmexit.guest import registers as register_names
from vmexit.trap import Registers

_GENERAL = (
    ("rax", "rbx", "rcx"),
    ("rdx", "rsi", "rdi"),
    ("rip", "rsp", "rbp"),
    ("r8", "r9", "r10"),
    ("r11", "r12", "r13"),
)
_FLAGS = ((("OF", "of"), ("DF", "df"), ("IF", "if"), ("SF", "sf")), (("ZF", "zf"), ("PF", "pf"), ("CF", "cf"), ("AXF", "af")))
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_SYSTEM = (("cr0", "cr2", "cr3"), ("cr4", "cr8", "efer"), ("fs_base", "gs_base", "kernel_gs_base"))


class Register(Command):
    """Shows and changes registers."""

    INFO = Info(
        names=("r",),
        usage=("r", "r REGISTER", "r REGISTER = VALUE"),
        summary="show or change registers",
        text="""Shows all registers of the current core ('~' changes it), one of them, or gives one a new value.

In stage pre of a trap, ECX and EDX:EAX are what the instruction will use; in stage post of RDMSR, EDX:EAX are what it read.""",
        parameters=(
            (
                "REGISTER",
                "A register (rax, r8, rip, cr3, gs_base ...), a part of one (eax, ax, al) or a flag (zf). Changing a part leaves "
                "the rest as it is, also for eax and its like.",
            ),
            (
                "VALUE",
                "A hexadecimal number, a register, a symbol of the guest's, or a sum or difference of these. A word that is a "
                "number is one: write @af for the flag.",
            ),
        ),
        examples=(
            ("r", "shows them all"),
            ("r rax", "shows one"),
            ("r rcx = c0000081", "gives RCX another value"),
            ("r rip = rip + 2", "skips two bytes of code"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        pieces = pieces_of(arguments.line, arguments.tokens)
        if not pieces:
            session.emit(_all(session.debugger.registers()))
            return
        name, *rest = pieces
        register = register_names.ALL.get(name.text.removeprefix("@").lower())
        if register is None:
            raise unknown_register(arguments.line, name)
        registers = session.debugger.registers()
        if rest:
            self._assign(arguments.line, registers, register, rest, session.guest.address_of)
        session.emit(f"{register.name}={registers[register.name]:0{_digits(register)}x}")

    def _assign(
        self,
        line: str,
        registers: Registers,
        register: register_names.Register,
        rest: Sequence[Piece],
        symbols: Callable[[str], int | None],
    ) -> None:
        equals = rest[0]
        if equals.text != "=":
            raise _error(line, f"after a register comes '=' or nothing, not '{equals.text}'", rest[:1])
        value = evaluate(line, rest[1:], lambda: registers, symbols)
        try:
            # Counting down from 0 goes round, whatever the register's width.
            registers[register.name] = value if value >= 0 else value & ((1 << register.bits) - 1)
        except ValueError as error:
            raise _error(line, str(error), rest[1:]) from None

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return register_names.ALL if not before or before[-1].endswith(("=", "+", "-")) else ()


def _error(line: str, message: str, pieces: Sequence[Piece]) -> CommandError:
    return CommandError(message, line, pieces[0].start, pieces[-1].end)


def _digits(register: register_names.Register) -> int:
    return max(1, register.bits // 4)


def _all(registers: Mapping[str, int]) -> str:
    """HyperDbg's layout, with what it does not show at the end."""

    def pair(name: str) -> str:
        return f"{name.upper()}={registers[name]:016x}".ljust(20)

    def row(names: Iterable[str]) -> str:
        return " ".join(map(pair, names)).rstrip()

    lines = [row(names) for names in _GENERAL]
    lines.append(f"{pair('r14')} {pair('r15')} IOPL={registers['iopl']:02b}")
    lines += ["  ".join(f"{label:<2} {registers[name]}" for label, name in flags) for flags in _FLAGS]
    lines.append(" ".join(f"{name.upper()}={registers[name]:04x}" for name in _SEGMENTS))
    lines.append(f"RFLAGS={registers['rflags']:016x}")
    lines += [row(names) for names in _SYSTEM]
    return "\n".join(lines)
