"""Machine code as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.guest.disassembly import Mode, disassemble, mode_of


def test_instructions_with_addresses() -> None:
    code = bytes.fromhex("b9820000c0 0f30 48c1e220 c3")
    listing = [(each.address, each.code.hex(), each.text) for each in disassemble(code, 0xFFFFFFFF81000000)]
    assert listing == [
        (0xFFFFFFFF81000000, "b9820000c0", "mov ecx, 0xc0000082"),
        (0xFFFFFFFF81000005, "0f30", "wrmsr"),
        (0xFFFFFFFF81000007, "48c1e220", "shl rdx, 0x20"),
        (0xFFFFFFFF8100000B, "c3", "ret"),
    ]


def test_a_byte_that_is_no_instruction() -> None:
    listing = list(disassemble(b"\x06" + b"\x90" * 20, 0))
    assert (listing[0].code, listing[0].text) == (b"\x06", "(bad)")
    assert [each.text for each in listing[1:]] == ["nop"] * 20


def test_an_instruction_that_is_cut_off_is_left_out() -> None:
    assert [each.text for each in disassemble(bytes.fromhex("90 b98200"), 0)] == ["nop"]


@pytest.mark.parametrize(("mode", "text"), [(Mode.BITS16, "dec ax"), (Mode.BITS32, "dec eax"), (Mode.BITS64, "xchg eax, ecx")])
def test_modes(mode: Mode, text: str) -> None:
    # 48 is DEC (E)AX, but a REX prefix in 64-bit code.
    first = next(iter(disassemble(b"\x48\x91" + b"\x90" * 15, 0, mode)))
    assert first.text in (text, "xchg rcx, rax", "xchg rax, rcx")


@pytest.mark.parametrize(
    ("cr0", "efer", "mode"), [(0, 0, Mode.BITS16), (1, 0, Mode.BITS32), (0x80000001, 0x500, Mode.BITS64), (1, 0x100, Mode.BITS32)]
)
def test_the_mode_of_a_vcpu(cr0: int, efer: int, mode: Mode) -> None:
    assert mode_of(cr0, efer) == mode


@given(st.binary(max_size=64), st.sampled_from(list(Mode)))
def test_any_bytes(code: bytes, mode: Mode) -> None:
    offset = 0
    for each in disassemble(code, 0x1000, mode):
        assert each.address == 0x1000 + offset
        assert each.code == code[offset : offset + len(each.code)]
        offset += len(each.code)
    assert len(code) - offset < 15
