"""disassemble_len's own decoder, against capstone."""

import random

import capstone
import pytest

from vmexit.script.runtime import instruction_length

MODES = {64: capstone.CS_MODE_64, 32: capstone.CS_MODE_32}


def _disassembler(bits: int) -> capstone.Cs:
    return capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])


@pytest.mark.parametrize(
    ("code", "bits", "length"),
    [
        ("0f30", 64, 2),
        ("90", 64, 1),
        ("48b88877665544332211", 64, 10),
        ("c3", 64, 1),
        ("488b05 11223344", 64, 7),
        ("a1 1122334455667788", 64, 9),
        ("a1 11223344", 32, 5),
        ("67a1 1122", 32, 4),
        ("66b81122", 64, 4),
        ("f6c001", 64, 3),
        ("f6d0", 64, 2),
        ("f7c011223344", 64, 6),
        ("c4e2 7918 00", 64, 5),
        ("c5f877", 64, 3),
        ("62f17c481000", 64, 6),
        ("62f3ad48 0fd001", 64, 7),
        ("9a112233445566", 32, 7),
        ("c5 00", 32, 2),
        ("c8112233", 64, 4),
        ("e811223344", 64, 5),
        ("0f84 11223344", 64, 6),
        ("0f3a0fc105", 64, 5),
        ("06", 64, 0),
        ("48", 64, 0),
        ("e81122", 64, 0),
        ("", 64, 0),
        ("66" * 15, 64, 0),
    ],
)
def test_known_lengths(code: str, bits: int, length: int) -> None:
    assert instruction_length(bytes.fromhex(code.replace(" ", "")), bits) == length


@pytest.mark.parametrize("bits", [64, 32])
def test_as_capstone(bits: int) -> None:
    """Random bytes that capstone takes for an instruction. Of UD0 and UD1 it does not know that they have operands."""
    disassembler = _disassembler(bits)
    source = random.Random(bits)
    seen = 0
    for _ in range(20000):
        code = source.randbytes(16)
        found = next(disassembler.disasm_lite(code, 0, 1), None)
        if found is None or found[2] in ("ud0", "ud1"):
            continue
        seen += 1
        assert instruction_length(code, bits) == found[1], (code.hex(), found)
    assert seen > 10000
