"""Machine code as text, by capstone."""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import capstone

LONGEST_INSTRUCTION = 15
"""In bytes (Intel SDM volume 2, 2.3.11)."""


class Mode(enum.IntEnum):
    """How wide the code is, in bits."""

    BITS16 = 16
    BITS32 = 32
    BITS64 = 64


class Syntax(enum.Enum):
    """How instructions are written."""

    INTEL = "intel"
    ATT = "att"
    MASM = "masm"


_CAPSTONE_SYNTAX = {
    Syntax.INTEL: capstone.CS_OPT_SYNTAX_INTEL,
    Syntax.ATT: capstone.CS_OPT_SYNTAX_ATT,
    Syntax.MASM: capstone.CS_OPT_SYNTAX_MASM,
}
_CAPSTONE_MODE = {Mode.BITS16: capstone.CS_MODE_16, Mode.BITS32: capstone.CS_MODE_32, Mode.BITS64: capstone.CS_MODE_64}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, or one byte that is none (``text`` is "(bad)" then)."""

    address: int
    code: bytes
    text: str


# A decoder is not to be used by two threads at once.
_lock = threading.Lock()


@functools.cache
def _decoder(mode: Mode, syntax: Syntax) -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, _CAPSTONE_MODE[mode])
    decoder.syntax = _CAPSTONE_SYNTAX[syntax]
    return decoder


def _first(code: bytes, address: int, mode: Mode, syntax: Syntax) -> tuple[int, str] | None:
    """Length and text of the instruction at the start of ``code``."""
    with _lock:
        found = next(_decoder(mode, syntax).disasm_lite(code[:LONGEST_INSTRUCTION], address, 1), None)
    return found and (found[1], f"{found[2]} {found[3]}".strip())


def disassemble(code: bytes, address: int, mode: Mode = Mode.BITS64, syntax: Syntax = Syntax.INTEL) -> Iterator[Instruction]:
    """The instructions that ``code`` holds from its first byte on; a last one that is cut off is left out.

    A byte that begins no instruction is given by itself.
    """
    offset = 0
    while offset < len(code):
        found = _first(code[offset : offset + LONGEST_INSTRUCTION], address + offset, mode, syntax)
        if found is None:
            if len(code) - offset < LONGEST_INSTRUCTION and offset > 0:
                return
            yield Instruction(address + offset, code[offset : offset + 1], "(bad)")
            offset += 1
            continue
        size, text = found
        yield Instruction(address + offset, code[offset : offset + size], text)
        offset += size


def mode_of(cr0: int, efer: int) -> Mode:
    """The mode that ring 0 code executes in (Intel SDM volume 3, 2.2): by CR0.PE and EFER.LMA.

    Neither 16-bit protected code nor the compatibility mode of 32-bit programs is told apart: that takes the descriptor of CS.
    """
    if not cr0 & 1:
        return Mode.BITS16
    return Mode.BITS64 if efer >> 10 & 1 else Mode.BITS32
