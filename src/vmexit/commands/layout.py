"""How addresses, instructions and memory are laid out, after HyperDbg's manual."""

from __future__ import annotations

from collections.abc import Iterator

from vmexit.debugger import Debugger
from vmexit.errors import VmexitError
from vmexit.guest.disassembly import LONGEST_INSTRUCTION, Instruction, Mode, Syntax, disassemble, mode_of
from vmexit.guest_view import GuestView
from vmexit.link.client import RequestError
from vmexit.link.wire import Status
from vmexit.trap import Registers

PAGE = 0x1000
_BYTES_IN_LINE = 16
LAST_ADDRESS = 0xFFFF_FFFF_FFFF_FFFF


def address_text(address: int) -> str:
    """Both halves of 64 bits, with a backtick between them."""
    return f"{address >> 32:08x}`{address & 0xFFFF_FFFF:08x}"


def instruction_text(instruction: Instruction) -> str:
    """Address, bytes, assembly."""
    return f"{address_text(instruction.address)} {instruction.code.hex(' ').upper():<35} {instruction.text}"


def dump_lines(data: bytes, address: int, unit: int, *, characters: bool) -> Iterator[str]:
    """Memory in units of 1, 2, 4 or 8 bytes (little-endian), 16 bytes a line. What does not fill a unit is left out."""
    data = data[: len(data) // unit * unit]
    width = _BYTES_IN_LINE // unit * (unit * 2 + (unit == 8) + 1) - 1
    for offset in range(0, len(data), _BYTES_IN_LINE):
        part = data[offset : offset + _BYTES_IN_LINE]
        values = [int.from_bytes(part[i : i + unit], "little") for i in range(0, len(part), unit)]
        units = " ".join(_unit_text(value, unit) for value in values)
        line = f"{address_text(address + offset)}  {units}"
        if characters:
            line += " " * (width - len(units) + 2) + "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in part)
        yield line


def _unit_text(value: int, unit: int) -> str:
    text = f"{value:0{unit * 2}X}"
    return f"{text[:8]}`{text[8:]}" if unit == 8 else text


def code_place(registers: Registers) -> tuple[int, Mode]:
    """The linear address of what a vCPU executes next, and how wide that code is."""
    mode = mode_of(registers["cr0"], registers["efer"])
    if mode == Mode.BITS16:
        return (registers["cs"] << 4) + registers["ip"], mode
    return registers["rip"], mode


def read_up_to(debugger: Debugger, address: int, length: int, *, physical: bool = False, guest: GuestView | None = None) -> bytes:
    """What can be read of so many bytes: all of it, or what lies before the first page that is not there.

    ``guest``: what is not mapped on the current core is looked for in the address space of the guest's kernel. Raises
    VmexitErrors other than that a page is not there.
    """
    length = min(length, LAST_ADDRESS + 1 - address)
    data = b""
    while len(data) < length:
        start = address + len(data)
        size = min(length - len(data), PAGE - start % PAGE)
        try:
            data += debugger.read_memory(None, start, size, physical=physical)
        except RequestError as error:
            if error.status != Status.UNREADABLE:
                raise
            found = guest.read_kernel(start, size) if guest is not None and not physical else None
            if found is None:
                break
            data += found
    return data


def instruction_at(debugger: Debugger, address: int, mode: Mode, syntax: Syntax) -> Instruction | None:
    """The instruction there, on the current core; None where it cannot be read."""
    try:
        code = read_up_to(debugger, address, LONGEST_INSTRUCTION)
    except VmexitError:
        return None
    return next(disassemble(code, address, mode, syntax), None)


def place_text(debugger: Debugger, syntax: Syntax, address: int | None = None) -> str:
    """Where the current core is, with the instruction there; or that of another address, in code of the same width."""
    here, mode = code_place(debugger.registers())
    address = here if address is None else address
    instruction = instruction_at(debugger, address, mode, syntax)
    return instruction_text(instruction) if instruction else f"{address_text(address)} (cannot be read)"
