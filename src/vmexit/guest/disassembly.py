"""Machine code as text, by capstone."""

from __future__ import annotations

import enum
import functools
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


_CAPSTONE_MODE = {Mode.BITS16: capstone.CS_MODE_16, Mode.BITS32: capstone.CS_MODE_32, Mode.BITS64: capstone.CS_MODE_64}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, or one byte that is none (``text`` is "(bad)" then)."""

    address: int
    code: bytes
    text: str


@functools.cache
def _decoder(mode: Mode) -> capstone.Cs:
    return capstone.Cs(capstone.CS_ARCH_X86, _CAPSTONE_MODE[mode])


def disassemble(code: bytes, address: int, mode: Mode = Mode.BITS64) -> Iterator[Instruction]:
    """The instructions that ``code`` holds from its first byte on, in Intel syntax; a last one that is cut off is left out.

    A byte that begins no instruction is given by itself.
    """
    offset = 0
    while offset < len(code):
        found = next(_decoder(mode).disasm_lite(code[offset : offset + LONGEST_INSTRUCTION], address + offset, 1), None)
        if found is None:
            if len(code) - offset < LONGEST_INSTRUCTION and offset > 0:
                return
            yield Instruction(address + offset, code[offset : offset + 1], "(bad)")
            offset += 1
            continue
        _, size, mnemonic, operands = found
        yield Instruction(address + offset, code[offset : offset + size], f"{mnemonic} {operands}".strip())
        offset += size


def mode_of(cr0: int, efer: int) -> Mode:
    """The mode that ring 0 code executes in (Intel SDM volume 3, 2.2): by CR0.PE and EFER.LMA.

    Neither 16-bit protected code nor the compatibility mode of 32-bit programs is told apart: that takes the descriptor of CS.
    """
    if not cr0 & 1:
        return Mode.BITS16
    return Mode.BITS64 if efer >> 10 & 1 else Mode.BITS32
