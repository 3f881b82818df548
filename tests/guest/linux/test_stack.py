"""Stacks, by ORC tables and frame pointers that the tests write, and by guessing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest

from tests.guest.linux.fake_linux import FakeLinux
from vmexit.guest.linux.modules import Module
from vmexit.guest.linux.running import Linux
from vmexit.guest.linux.stack import _FUNCTIONS, _KINDS, _NUMBERINGS, Stacks
from vmexit.guest.scan import MOST_FRAMES
from vmexit.guest.symbols import Symbols
from vmexit.guest.system import CodeMap, CodePiece, Frame

Attach = Callable[[FakeLinux], Linux]
BP, SP, R10, BP_INDIRECT, SP_INDIRECT = 4, 5, 6, 8, 9
CALL, REGS, IRET, END = "call", "regs", "iret", "end"
Entry = tuple[int, str, int, int, int, int]
"""Offset of the code, kind, register of RSP and its offset, register of RBP and its offset."""


class Orc:
    """A guest whose kernel has ORC tables."""

    def __init__(self, attach: Attach, entries: Sequence[Entry], *, is_wide: bool = False) -> None:
        self.guest = FakeLinux()
        self.linux = attach(self.guest)
        self.stacks = Stacks(self.linux)
        numbers = {way: {meaning: number for number, meaning in numbering.items()} for way, numbering in _NUMBERINGS.items()}
        places = self.guest.allocate(4 * len(entries))
        table = self.guest.allocate(6 * len(entries))
        for index, (offset, kind, sp, sp_offset, bp, bp_offset) in enumerate(entries):
            at = places + 4 * index
            # The made-up tables are too far from the code for 32 bits, so the code is told to be near them.
            self.guest.write(at, struct.pack("<i", offset - 4 * index))
            number = (END, CALL, REGS, IRET).index(kind) + 1 if is_wide else (CALL, REGS, IRET, END).index(kind)
            bits = number << 8 if is_wide else (1 << 10 if kind == END else number << 8)
            sp, bp = (numbers[3 if is_wide else 5][register] for register in (sp, bp))
            self.guest.write(table + 6 * index, struct.pack("<hhH", sp_offset, bp_offset, sp | bp << 4 | bits))
        self.code = places
        self.stacks._table = (places, table, len(entries))
        self.stacks._kinds = _KINDS[2 if is_wide else 0]
        self.stacks._numbering = _NUMBERINGS[3 if is_wide else 5]
        self.linux._code = [(places, places + 0x10_0000)]
        self.stack = self.guest.allocate(0x8000) + 0x3FFF & ~0x3FFF

    def frames(self, offset: int, words: dict[int, int], **registers: int) -> list[Frame]:
        """From the code at ``offset``, with RSP at the stack's 0x1000th byte and these words on it."""
        for at, value in words.items():
            self.guest.u64(self.stack + at, value)
        self.linux.forget()
        found = {"rip": self.code + offset, "rsp": self.stack + 0x1000, "rbp": 0, "cs": 0x10, **registers}
        return list(self.stacks.frames(found))

    def offsets(self, frames: Sequence[Frame]) -> list[tuple[int, int]]:
        return [(frame.address - self.code, frame.stack - self.stack) for frame in frames]


BASIC: list[Entry] = [
    (0x1000, CALL, SP, 8, 0, 0),
    (0x1010, CALL, SP, 24, 1, -16),
    (0x2000, CALL, BP, 16, 1, -16),
    (0x3000, END, 0, 0, 0, 0),
    (0x4000, REGS, SP, 8, 0, 0),
    (0x5000, IRET, SP, 0, 0, 0),
    (0x6000, CALL, SP_INDIRECT, 8, 0, 0),
    (0x7000, CALL, BP_INDIRECT, -8, 0, 0),
    (0x8000, CALL, R10, 0, 0, 0),
]


@pytest.mark.parametrize("is_wide", [False, True])
def test_calls(attach: Attach, is_wide: bool) -> None:
    orc = Orc(attach, BASIC, is_wide=is_wide)
    code, stack = orc.code, orc.stack
    words = {
        0x1000: stack + 0x1100,  # RBP that 1010 has saved
        0x1010: code + 0x2008,
        0x1100: 0,
        0x1108: code + 0x3008,
    }
    frames = orc.frames(0x1014, words)
    # 1014 has pushed two words; 2008 goes by RBP; 3008 is where the kernel was entered.
    assert orc.offsets(frames)[:2] == [(0x1014, 0x1000), (0x2008, 0x1018)]
    words[0x1008] = stack + 0x1100
    assert orc.offsets(orc.frames(0x1014, words)) == [(0x1014, 0x1000), (0x2008, 0x1018), (0x3008, 0x1110)]
    assert not any(frame.is_guess for frame in orc.frames(0x1014, words))


@pytest.mark.parametrize("is_wide", [False, True])
def test_an_interrupt(attach: Attach, is_wide: bool) -> None:
    orc = Orc(attach, BASIC, is_wide=is_wide)
    code, stack = orc.code, orc.stack
    words = {
        0x1000: code + 0x4008,  # the handler returns into the entry code, whose pt_regs begin 8 bytes on
        0x1010 + 0x20: stack + 0x1300,  # RBP
        0x1010 + 0x80: code + 0x2000,  # an instruction, not where a call returns to
        0x1010 + 0x88: 0x10,
        0x1010 + 0x98: stack + 0x1200,
        0x1308: code + 0x3004,
    }
    assert orc.offsets(orc.frames(0x1004, words)) == [(0x1004, 0x1000), (0x4008, 0x1008), (0x2000, 0x1200), (0x3004, 0x1310)]
    # It has interrupted a program: there is nothing more of the kernel's.
    words[0x1010 + 0x88] = 0x33
    assert orc.offsets(orc.frames(0x1004, words)) == [(0x1004, 0x1000), (0x4008, 0x1008)]


def test_what_the_processor_alone_has_pushed(attach: Attach) -> None:
    orc = Orc(attach, BASIC)
    words = {0x1000: orc.code + 0x1000, 0x1008: 0x10, 0x1018: orc.stack + 0x1400, 0x1400: orc.code + 0x3004}
    assert orc.offsets(orc.frames(0x5000, words)) == [(0x5000, 0x1000), (0x1000, 0x1400), (0x3004, 0x1408)]
    words[0x1008] = 0x33
    assert orc.offsets(orc.frames(0x5000, words)) == [(0x5000, 0x1000)]


def test_stacks_of_interrupts(attach: Attach) -> None:
    """RSP before lies on the stack itself, or where RBP points to; that may be another stack, below this one."""
    orc = Orc(attach, BASIC)
    low = orc.stack - 0x4000 + 0x800
    orc.guest.u64(low, orc.code + 0x3004)
    assert orc.frames(0x6000, {0x1000: low})[1:] == [Frame(orc.code + 0x3004, low + 8)]
    words = {0x1208 - 16: orc.stack + 0x1300, 0x1300 - 8: orc.code + 0x3004}
    assert orc.offsets(orc.frames(0x7000, words, rbp=orc.stack + 0x1200))[1:] == [(0x3004, 0x1300)]


def test_registers_that_only_the_first_frame_has(attach: Attach) -> None:
    orc = Orc(attach, BASIC)
    words = {0x1400 - 8: orc.code + 0x3004}
    assert orc.offsets(orc.frames(0x8000, words, r10=orc.stack + 0x1400))[1:] == [(0x3004, 0x1400)]
    assert orc.offsets(orc.frames(0x8000, words)) == [(0x8000, 0x1000)]


def test_stacks_that_lie_end(attach: Attach) -> None:
    loop: list[Entry] = [(0x1000, CALL, SP, 8, 0, 0), (0x2000, CALL, SP, 0, 0, 0), (0x3000, CALL, SP_INDIRECT, 8, 0, 0)]
    orc = Orc(attach, loop)
    # Each call returns to the same place; the stack's end is what ends it.
    words = {0x1000 + 8 * index: orc.code + 0x1004 for index in range(0x600)}
    assert len(orc.frames(0x1004, words)) == MOST_FRAMES + 1
    # A frame that does not go up.
    assert orc.offsets(orc.frames(0x2004, {0xFF8: orc.code + 0x2004}))[0] == (0x2004, 0x1000)
    # Two stacks that point at each other.
    other = orc.stack + 0x4000
    orc.guest.u64(other, orc.stack + 0x1000 - 8)
    assert len(orc.frames(0x3004, {0x1000: other - 8, 0xFF8: orc.code + 0x3004})) <= 2 * MOST_FRAMES + 1


def test_a_program_is_one_frame(attach: Attach) -> None:
    orc = Orc(attach, BASIC)
    assert orc.offsets(orc.frames(0x1004, {}, cs=0x33)) == [(0x1004, 0x1000)]


@pytest.mark.parametrize(("kind", "register", "frames"), [(0, 5, 2), (2, 3, 2), (1, 5, 1), (2, 7, 1), (3, 3, 1)])
def test_how_entries_are_written_is_found_out(
    attach: Attach, monkeypatch: pytest.MonkeyPatch, kind: int, register: int, frames: int
) -> None:
    """By the one of a function's first instruction, which is known to be a call's with RSP and 8."""
    orc = Orc(attach, BASIC[:1])
    assert orc.stacks._table is not None
    # Of the made-up kernel's functions one is where there is an entry.
    place = orc.code + 0x1000 - orc.linux.slide
    known = Symbols.find
    monkeypatch.setattr(Symbols, "find", lambda self, name: place if name == "native_write_msr" else known(self, name))
    orc.guest.write(orc.stacks._table[1], struct.pack("<hhH", 8, 0, register | kind << 8))
    orc.stacks._kinds, orc.stacks._numbering = {}, {}
    found = orc.frames(0x1004, {0x1000: orc.code + 0x1008, 0x1008: 0})
    assert len([frame for frame in found if not frame.is_guess]) == frames


def test_guesses(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    registers = guest.registers(0)
    frames = list(Stacks(linux).frames(registers))
    # Without ORC tables; the made-up task has one word on its stack that points behind a call.
    assert [(frame.address, frame.is_guess) for frame in frames] == [
        (guest.address(0x2002), False),
        (guest.address(0x3005), True),
    ]
    assert frames[1].stack == registers["rsp"] + 0x48
    guest.write(guest.address(0x3010), b"\xff\xd0\xff\x14\x25\0\0\0\0\x41\xff\x52\x08\x90")
    for offset, target in ((0x3F48, 0x3012), (0x3F50, 0x3019), (0x3F58, 0x301D), (0x3F68, 0x3500)):
        guest.u64(registers["rsp"] - 0x3F00 + offset, guest.address(target))
    linux.forget()
    found = [frame.address for frame in Stacks(linux).frames(registers)][2:]
    assert found == [guest.address(0x3012), guest.address(0x3019), guest.address(0x301D)]


PROLOGUES = [
    "55 48 89 e5",
    "f3 0f 1e fa 55 48 89 e5",
    "e8 00 00 00 00 55 48 89 e5",
    "f3 0f 1e fa 0f 1f 44 00 00 55 48 89 e5",
]


class Framed:
    """A guest whose kernel has no tables but keeps frame pointers, and whose first task has two callers."""

    def __init__(self, attach: Attach, prologue: str = PROLOGUES[0]) -> None:
        self.guest = FakeLinux()
        self.linux = attach(self.guest)
        self.stacks = Stacks(self.linux)
        for name in _FUNCTIONS:
            place = self.linux.profile.symbols.find(name)
            if place is not None:
                self.guest.write(place + self.linux.slide, bytes.fromhex(prologue))
        self.guest.write(self.guest.address(0x3010), b"\xff\xd0")
        registers = self.guest.registers(0)
        self.rsp = registers["rsp"] & ~0x3FFF | 0x1000
        self.registers = {**registers, "rsp": self.rsp, "rbp": self.rsp + 0x10}
        for offset, word in (
            (0x10, self.rsp + 0x30),
            (0x18, self.guest.address(0x3005)),
            (0x30, 0),
            (0x38, self.guest.address(0x3012)),
        ):
            self.guest.u64(self.rsp + offset, word)

    def frames(self) -> list[Frame]:
        self.linux.forget()
        return list(self.stacks.frames(self.registers))[1:]


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_frame_pointers(attach: Attach, prologue: str) -> None:
    framed = Framed(attach, prologue)
    address, rsp = framed.guest.address, framed.rsp
    assert framed.frames() == [Frame(address(0x3005), rsp + 0x20), Frame(address(0x3012), rsp + 0x40)]
    assert framed.stacks.code_map().keeps_frame_pointers


@pytest.mark.parametrize("prologue", ["55 48 89 e6", "48 89 e5 90", "90 55 48 89 e5"])
def test_functions_that_keep_none(attach: Attach, prologue: str) -> None:
    framed = Framed(attach, prologue)
    assert framed.frames() and all(frame.is_guess for frame in framed.frames())
    assert not framed.stacks.code_map().keeps_frame_pointers


@pytest.mark.parametrize(
    ("offset", "word", "count"),
    [
        (0x18, 0x3006, 0),  # behind no call
        (0x18, None, 0),  # no code
        (0x10, -8, 1),  # downwards
        (0x10, 0x10, 1),  # to itself
        (0x10, 0x34, 1),  # no place for a word
        (0x10, 0x4000, 1),  # on another stack
    ],
)
def test_frame_pointers_that_lie(attach: Attach, offset: int, word: int | None, count: int) -> None:
    framed = Framed(attach)
    lie = 0 if word is None else framed.guest.address(word) if offset == 0x18 else framed.rsp + word
    framed.guest.u64(framed.rsp + offset, lie)
    exact = [frame for frame in framed.frames() if not frame.is_guess]
    assert len(exact) == count
    assert count or any(frame.is_guess for frame in framed.frames())


@pytest.mark.parametrize("rsp", [0, 8, 0x7FFF_FFFF_FFF8, 0xFFFF_8880_7000_0000, (1 << 64) - 8, 0xFFFF_8880_0060_0001])
def test_a_stack_that_is_nowhere(attach: Attach, rsp: int) -> None:
    guest = FakeLinux()
    registers = {**guest.registers(0), "rsp": rsp}
    assert list(Stacks(attach(guest)).frames(registers)) == [Frame(registers["rip"], rsp)]


@pytest.mark.parametrize(("is_wide", "numbers"), [(False, (5, 4, 0)), (True, (3, 4, 2))])
def test_what_is_told_of_the_code(
    attach: Attach, is_wide: bool, numbers: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    orc = Orc(attach, BASIC, is_wide=is_wide)
    assert orc.stacks._table is not None
    # The table of a module whose structure cannot be read is none.
    module = Module("m", orc.code + 0x1000_0000, 0x1000, 0x10)
    monkeypatch.setattr(orc.linux, "_read_modules", lambda: [module])
    end = module.base + module.size - 1
    assert orc.stacks.code_map() == CodeMap(
        (CodePiece(orc.code, orc.code + 0xF_FFFF, *orc.stacks._table), CodePiece(module.base, end)), *numbers
    )
    # A table whose form is not known is none.
    orc.stacks._kinds, orc.stacks._numbering = {}, {}
    assert all(piece.count == 0 for piece in orc.stacks.code_map().pieces)
    orc.stacks._table = None
    assert orc.stacks.code_map().pieces == (CodePiece(orc.code, orc.code + 0xF_FFFF), CodePiece(module.base, end))
