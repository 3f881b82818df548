"""``u`` and its kin: show memory as instructions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.layout import LAST_ADDRESS, code_place, instruction_text, read_up_to
from vmexit.commands.memory import PLACE_PARAMETERS, complete_place, cut_text, not_readable, parse_place
from vmexit.commands.session import Session
from vmexit.guest.disassembly import LONGEST_INSTRUCTION, Mode, disassemble

_LENGTH = 0x40
_MODES = {"u": None, "u64": Mode.BITS64, "u32": Mode.BITS32, "u2": Mode.BITS32, "u16": Mode.BITS16}


class Disassemble(Command):
    """Shows instructions."""

    INFO = Info(
        names=("u", "u64", "u2", "u32", "u16", "!u", "!u64", "!u2", "!u32", "!u16"),
        usage=("u|u64|u2|u32|u16 [ADDRESS] [l LENGTH]", "!u|!u64|!u2|!u32|!u16 [ADDRESS] [l LENGTH]"),
        summary="disassemble memory",
        text="""Shows memory as instructions: 64-bit code (u64), 32-bit code (u2, u32), 16-bit code (u16), or code of the
width that the current core executes (u), which is 64 bits in every current system once it has booted. Addresses are
virtual, by the page tables of the current core; with '!' they are physical.

Without an address it begins at RIP, and goes on from there when it is repeated. 'settings syntax' chooses how it is written.""",
        parameters=(*PLACE_PARAMETERS[:1], ("l LENGTH", "So many bytes, hexadecimal: 40 unless said otherwise, at most 100000.")),
        examples=(
            ("u", "what comes next"),
            ("u rsp l 20", "32 bytes where RSP points"),
            ("u native_write_msr", "a function of the guest's kernel"),
            ("!u16 ffff0", "physical memory as 16-bit code"),
        ),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        physical = arguments.name.startswith("!")
        place = parse_place(session, arguments)
        here, width = code_place(session.debugger.registers())
        mode = _MODES[arguments.name.removeprefix("!")] or width
        # Another stop, another core, another RIP: begin there anew.
        stopped_at = (session.debugger.stop, session.debugger.core, here)
        address = place.address
        if address is None:
            known, address = session.next_code.get(physical, (None, here))
            if known != stopped_at:
                if physical:
                    raise arguments.missing(f"'{arguments.name}' needs an address")
                address = here
        length = min(place.length or _LENGTH, LAST_ADDRESS + 1 - address)
        data = read_up_to(session.debugger, address, length + LONGEST_INSTRUCTION - 1, physical=physical, guest=session.guest)
        if not data:
            raise not_readable(arguments, place, address, physical)
        label = None if physical else session.guest.label(address)
        lines, next_address = [f"{label}:"] if label else [], address
        for instruction in disassemble(data, address, mode, session.settings.syntax):
            if instruction.address >= address + length:
                break
            lines.append(instruction_text(instruction))
            next_address = instruction.address + len(instruction.code)
        if len(data) < length:
            lines.append(cut_text(address + len(data), physical))
        session.next_code[physical] = (stopped_at, next_address & LAST_ADDRESS)
        session.emit("\n".join(lines))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return complete_place(before)
