"""Page walks: against page tables built here, in every mode of the processor, and back from physical addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.link.header import read_headers

from .build import build_part

PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
PRESENT, WRITABLE, USER, LARGE, NX = 1, 2, 4, 1 << 7, 1 << 63
KB4, MB2, MB4, GB1 = 1 << 12, 1 << 21, 1 << 22, 1 << 30
ROOT = 0x10_0000
MANY = 10_000

ffi, _ = read_headers("paging.h")


def _new(kind: str) -> Any:
    """Something of that C type."""
    return ffi.new(kind)


@pytest.fixture(scope="module")
def library() -> Any:
    return ffi.dlopen(str(build_part("paging.c")))


@dataclass(frozen=True)
class Mode:
    """One way in which a processor translates."""

    name: str
    shifts: tuple[int, ...]
    """Where each level's index begins in a virtual address, topmost level first."""
    index_bits: int
    entry_bytes: int
    pages: tuple[int, ...]
    bits: int
    """Of a virtual address."""
    cr4: int
    efer: int = 0
    physical_bits: int = 52

    def canonical(self, address: int) -> int:
        """The address with its upper bits as the processor wants them."""
        address &= (1 << self.bits) - 1
        if self.bits > 32 and address >> (self.bits - 1):
            address |= (1 << 64) - (1 << self.bits)
        return address


MODES = [
    Mode("32-bit", (22, 12), 10, 4, (KB4,), 32, 0, physical_bits=32),
    Mode("32-bit PSE", (22, 12), 10, 4, (KB4, MB4), 32, PSE, physical_bits=32),
    Mode("PAE", (30, 21, 12), 9, 8, (KB4, MB2), 32, PAE),
    Mode("4-level", (39, 30, 21, 12), 9, 8, (KB4, MB2, GB1), 48, PAE, LMA),
    Mode("5-level", (48, 39, 30, 21, 12), 9, 8, (KB4, MB2, GB1), 57, PAE | LA57, LMA),
]
EACH_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
LONG = MODES[3]


@dataclass
class Machine:
    """Physical memory with page tables in it."""

    library: Any
    mode: Mode
    memory: dict[int, bytearray] = field(default_factory=dict)
    """By physical page."""
    accesses: int = 0

    def __post_init__(self) -> None:
        self._next = ROOT
        self.root = self.new_table()
        self._callback = ffi.callback("bool(void *, uint64_t, void *, uint32_t, bool)", self._access)
        self.paging = _new("struct paging *")
        self.paging.cr0, self.paging.cr3 = PG | 1, self.root | 0x18  # PWT and PCD are no part of the address
        self.paging.cr4, self.paging.efer = self.mode.cr4, self.mode.efer
        self.paging.access = self._callback

    def _access(self, _: object, physical: int, data: Any, length: int, write: bool) -> bool:
        self.accesses += 1
        for i in range(length):
            page, offset = divmod(physical + i, KB4)
            if page not in self.memory:
                return False
            view = ffi.buffer(data, length)
            if write:
                self.memory[page][offset] = view[i][0]
            else:
                view[i] = bytes([self.memory[page][offset]])
        return True

    def new_table(self) -> int:
        self._next += KB4
        self.memory[self._next // KB4] = bytearray(KB4)
        return self._next

    def _read(self, at: int) -> int:
        page, offset = divmod(at, KB4)
        return int.from_bytes(self.memory[page][offset : offset + self.mode.entry_bytes], "little")

    def write_entry(self, at: int, entry: int) -> None:
        page, offset = divmod(at, KB4)
        self.memory[page][offset : offset + self.mode.entry_bytes] = entry.to_bytes(self.mode.entry_bytes, "little")

    def entry_address(self, virtual: int, shift: int) -> int:
        """Where the entry of that level is for a virtual address; tables that are missing are made."""
        table = self.root
        for level in self.mode.shifts:
            index = virtual >> level & ((1 << min(self.mode.index_bits, self.mode.bits - level)) - 1)
            at = table + index * self.mode.entry_bytes
            if level == shift:
                return at
            if not self._read(at) & PRESENT:
                # PAE's topmost entries have no such bits.
                flags = 0 if self.mode.name == "PAE" and level == 30 else WRITABLE | USER
                self.write_entry(at, self.new_table() | PRESENT | flags)
            table = self._read(at) & 0xF_FFFF_FFFF_F000
        raise AssertionError("no such level")

    def map(self, virtual: int, physical: int, page: int = KB4, flags: int = 0) -> None:
        shift = page.bit_length() - 1
        entry = physical | PRESENT | flags | (LARGE if page > KB4 else 0)
        self.write_entry(self.entry_address(virtual, shift), entry)

    def translate(self, virtual: int) -> tuple[int, int] | None:
        """Physical address and size of the page."""
        physical, page = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        found = self.library.paging_translate(self.paging, virtual, physical, page)
        return (physical[0], page[0]) if found else None

    def find(self, physical: int, tables: int = MANY) -> int | None:
        virtual = ffi.new("uint64_t *")
        return virtual[0] if self.library.paging_find(self.paging, physical, tables, virtual) else None

    def access(self, virtual: int, data: bytes | int) -> bytes | None:
        """Writes, or reads so many bytes; None where that fails."""
        write = isinstance(data, bytes)
        buffer = ffi.new("char[]", data)
        length = len(data) if isinstance(data, bytes) else data
        done = self.library.paging_access(self.paging, virtual, buffer, length, write)
        return bytes(ffi.buffer(buffer, length)) if done else None


def pages_of(mode: Mode) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Mappings (virtual, physical, size) that do not overlap: each in a part of the address space of its own."""
    part = 1 << min(mode.shifts[0], 30)

    def mapping(number: int) -> st.SearchStrategy[tuple[int, int, int]]:
        def at(page: int) -> st.SearchStrategy[tuple[int, int, int]]:
            top = number * part
            return st.tuples(
                st.integers(0, part // page - 1).map(lambda i: mode.canonical(top + i * page)),
                st.integers(0, (1 << mode.physical_bits) // page - 1).map(lambda i: i * page),
                st.just(page),
            )

        return st.sampled_from([page for page in mode.pages if page <= part]).flatmap(at)

    numbers = st.lists(st.integers(0, (1 << mode.bits) // part - 1), min_size=1, max_size=6, unique=True)
    return numbers.flatmap(lambda chosen: st.tuples(*map(mapping, chosen)).map(list))


@EACH_MODE
def test_what_is_mapped_is_found_and_nothing_else(mode: Mode, library: Any) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        machine = Machine(library, mode)
        mappings = data.draw(pages_of(mode))
        for virtual, physical, page in mappings:
            machine.map(virtual, physical, page, data.draw(st.sampled_from([0, WRITABLE, USER, WRITABLE | USER | 0x60])))
        for virtual, physical, page in mappings:
            offset = data.draw(st.integers(0, page - 1))
            assert machine.translate(virtual + offset) == (physical + offset, page)
            back = machine.find(physical + offset)
            assert back is not None
            assert machine.translate(back) is not None and machine.translate(back)[0] == physical + offset  # type: ignore[index]
        elsewhere = data.draw(st.integers(0, (1 << 64) - 1))
        mapped = any(virtual <= elsewhere < virtual + page for virtual, _, page in mappings)
        assert (machine.translate(elsewhere) is not None) == mapped

    check()


@EACH_MODE
def test_bits_of_an_entry_that_are_no_address(mode: Mode, library: Any) -> None:
    machine = Machine(library, mode)
    extra = NX | 0x7FF << 52 if mode.entry_bytes == 8 else 0
    machine.map(0x40_0000, 0x7000, KB4, extra | 0xE60 | 0x80)  # among them PAT, where a large page has its mark
    assert machine.translate(0x40_0123) == (0x7123, KB4)
    if len(mode.pages) > 1:
        page = mode.pages[1]
        machine.map(page * 8, page * 3, page, extra | 0x1000)  # PAT of a large page
        assert machine.translate(page * 8 + 5) == (page * 3 + 5, page)


def test_pse_36(library: Any) -> None:
    machine = Machine(library, MODES[1])
    machine.write_entry(machine.entry_address(0x8000_0000, 22), 0x0040_0000 | 0xAB << 13 | LARGE | PRESENT)
    assert machine.translate(0x8012_3456) == (0xAB_0052_3456, MB4)
    assert machine.find(0xAB_0052_3456) == 0x8012_3456


def test_without_pse_the_bit_means_nothing(library: Any) -> None:
    machine = Machine(library, MODES[0])
    machine.map(0x40_0000, 0x9000)
    at = machine.entry_address(0x40_0000, 22)
    page, offset = divmod(at, KB4)
    machine.memory[page][offset] |= LARGE
    assert machine.translate(0x40_0001) == (0x9001, KB4)


@pytest.mark.parametrize(("mode", "shift"), [(MODES[2], 30), (MODES[3], 39), (MODES[4], 39), (MODES[4], 48)], ids=str)
def test_a_large_page_where_there_is_none(mode: Mode, shift: int, library: Any) -> None:
    machine = Machine(library, mode)
    machine.write_entry(machine.entry_address(0, shift), PRESENT | LARGE | MB2)
    assert machine.translate(0) is None
    assert machine.find(MB2) is None


@pytest.mark.parametrize("mode", MODES[3:], ids=lambda mode: mode.name)
def test_an_address_that_is_not_canonical(mode: Mode, library: Any) -> None:
    machine = Machine(library, mode)
    highest = (1 << 64) - KB4
    machine.map(highest, 0x5000)
    assert machine.translate(highest + 1) == (0x5001, KB4)
    assert machine.translate(highest & ~(1 << 63)) is None
    assert machine.translate(highest & ((1 << mode.bits) - 1)) is None


def test_four_levels_where_the_fifth_is_off(library: Any) -> None:
    machine = Machine(library, LONG)
    machine.map(0xFFFF_8000_0000_0000, 0x6000)
    assert machine.translate(0xFFFF_8000_0000_0007) == (0x6007, KB4)
    machine.paging.cr4 |= LA57
    assert machine.translate(0xFFFF_8000_0000_0007) is None


def test_32_bit_modes_end_at_4_gb(library: Any) -> None:
    for mode in MODES[:3]:
        machine = Machine(library, mode)
        machine.map(0, 0x7000)
        assert machine.translate(0) == (0x7000, KB4)
        assert machine.translate(1 << 32) is None


def test_paes_root_need_not_be_a_page(library: Any) -> None:
    machine = Machine(library, MODES[2])
    machine.map(0xC000_0000, 0x7000)
    page = machine.memory[machine.root // KB4]
    page[0x7E0:0x800] = page[0:0x20]
    page[0:0x20] = bytes(0x20)
    machine.paging.cr3 = machine.root + 0x7E0
    assert machine.translate(0xC000_0010) == (0x7010, KB4)
    assert machine.find(0x7010) == 0xC000_0010


def test_without_paging(library: Any) -> None:
    machine = Machine(library, LONG)
    machine.paging.cr0 = 1
    assert machine.translate(0x1234_5678) == (0x1234_5678, 1 << 32)
    assert machine.translate(1 << 32) is None
    assert (machine.find(0x1234), machine.find(1 << 32)) == (0x1234, None)
    machine.memory[0x20] = bytearray(b"memory" + bytes(KB4 - 6))
    assert machine.access(0x20_000, 6) == b"memory"


def test_tables_outside_of_memory(library: Any) -> None:
    machine = Machine(library, LONG)
    machine.map(0x1000, 0x5000)
    machine.map(0x40_0000, 0x6000)
    machine.write_entry(machine.entry_address(0x1000, 21), PRESENT | 0xDEAD_0000_0000)
    assert machine.translate(0x1000) is None
    assert machine.find(0x6000) == 0x40_0000  # what else there is is found all the same
    machine.paging.cr3 = 0xDEAD_0000_0000
    assert machine.translate(0x40_0000) is None
    assert machine.find(0x6000) is None


class TestFind:
    """From physical to virtual."""

    @pytest.mark.parametrize("mode", MODES[2:], ids=lambda mode: mode.name)
    def test_the_upper_half_comes_first_and_the_lowest_of_it(self, mode: Mode, library: Any) -> None:
        machine = Machine(library, mode)
        kernel = mode.canonical(1 << (mode.bits - 1))
        for virtual in (0x1000, 0x7000_0000, kernel + 0x3000_0000, kernel + 0x5000):
            machine.map(virtual, 0x9000)
        assert machine.find(0x9ABC) == kernel + 0x5ABC

    def test_what_is_not_mapped(self, library: Any) -> None:
        machine = Machine(library, LONG)
        machine.map(0x1000, 0x9000)
        machine.map(0x4000_0000, 4 * GB1, GB1)
        assert machine.find(0xA000) is None
        assert machine.find(0x8FFF) is None
        assert machine.find(5 * GB1) is None
        assert machine.find(5 * GB1 - 1) == 0x7FFF_FFFF

    def test_a_table_that_leads_to_itself_costs_nothing(self, library: Any) -> None:
        machine = Machine(library, LONG)
        machine.write_entry(machine.root + 0x1ED * 8, machine.root | PRESENT)
        machine.map(0x1000, 0x9000)
        assert machine.find(0x9000, tables=4) == 0x1000

    def test_it_gives_up_after_so_many_tables(self, library: Any) -> None:
        machine = Machine(library, LONG)
        table = machine.new_table()
        for index in range(512):  # each leads to tables that lead to the same tables
            machine.write_entry(machine.root + index * 8, table | PRESENT)
            machine.write_entry(table + index * 8, table + KB4 | PRESENT)
        machine.new_table()
        for index in range(512):
            machine.write_entry(table + KB4 + index * 8, table + 2 * KB4 | PRESENT)
        machine.new_table()
        assert machine.find(0x9000, tables=500) is None
        assert machine.accesses <= 500 * 8


class TestAccess:
    """Virtual memory that lies scattered in physical memory."""

    @pytest.fixture
    def machine(self, library: Any) -> Machine:
        machine = Machine(library, LONG)
        for page, frame in ((0x7000, 0x3000), (0x8000, 0x1000), (0x9000, 0x2000)):
            machine.memory[frame // KB4] = bytearray(KB4)
            machine.map(page, frame)
        return machine

    def test_over_page_borders(self, machine: Machine) -> None:
        data = bytes(range(256)) * 24
        assert machine.access(0x7800, data) == data
        assert machine.access(0x7800, len(data)) == data
        assert machine.memory[3][0x800:] == data[:0x800]
        assert machine.memory[1] == data[0x800:0x1800]

    def test_up_to_what_is_not_mapped(self, machine: Machine) -> None:
        assert machine.access(0x9FFE, b"abcd") is None
        assert machine.memory[2][0xFFE:] == b"ab"
        assert machine.access(0x6FFF, 2) is None
