"""Checked reads of guest memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from vmexit.guest.memory import PAGE, PhysicalMemory, UnreadableError, VirtualMemory, printable

BASE = 0xFFFF_8000_0000_0000
TABLES = 0x10_0000


class Machine:
    """Four pages at 0, and tables that map the first three of them at BASE."""

    vcpus = 1

    def __init__(self) -> None:
        self.reads = 0
        self.data = bytearray(bytes(range(256)) * (4 * PAGE // 256))
        self.tables = {0: TABLES + PAGE, PAGE: TABLES + 2 * PAGE, 2 * PAGE: TABLES + 3 * PAGE}

    def registers(self, core: int) -> Mapping[str, int]:
        raise AssertionError("nobody asks for them")

    def read_physical(self, address: int, length: int) -> bytes:
        self.reads += 1
        if address + length <= len(self.data):
            return bytes(self.data[address : address + length])
        page = bytearray(PAGE)
        if address in (TABLES, TABLES + PAGE, TABLES + 2 * PAGE):
            index = 256 if address == TABLES else 0
            page[index * 8 : index * 8 + 8] = (address + PAGE | 3).to_bytes(8, "little")
        elif address == TABLES + 3 * PAGE:
            for index in range(3):
                page[index * 8 : index * 8 + 8] = (index * PAGE | 3).to_bytes(8, "little")
        else:
            raise UnreadableError(address)
        return bytes(page)


def test_reads_cross_pages_and_each_page_is_read_once() -> None:
    machine = Machine()
    memory = PhysicalMemory(machine)
    assert memory.read(PAGE - 2, PAGE + 4) == bytes(machine.data[PAGE - 2 : 2 * PAGE + 2])
    assert machine.reads == 3
    memory.read(0, 3 * PAGE)
    assert machine.reads == 3
    memory.forget()
    machine.data[5] = 0xEE
    assert memory.read(5, 1) == b"\xee"


def test_what_is_not_there_is_asked_for_once() -> None:
    machine = Machine()
    memory = PhysicalMemory(machine)
    for _ in range(3):
        with pytest.raises(UnreadableError, match="nothing is mapped at 0x4000"):
            memory.read(3 * PAGE, 2 * PAGE)
    assert machine.reads == 2


def test_virtual_memory() -> None:
    memory = VirtualMemory(PhysicalMemory(Machine()), TABLES, 4)
    assert memory.translate(BASE + 0x1234) == 0x1234
    assert memory.u8(BASE + 7) == 7
    assert memory.u32(BASE + PAGE - 2) == 0x0100FFFE
    assert memory.u64(BASE + 8) == 0x0F0E0D0C0B0A0908
    assert memory.words(BASE, 2) == (0x0706050403020100, 0x0F0E0D0C0B0A0908)
    with pytest.raises(UnreadableError):
        memory.read(BASE + 3 * PAGE - 4, 8)
    for address in (0, BASE + 3 * PAGE, (1 << 64) - 4, 1 << 64, -8, 1 << 70):
        with pytest.raises(UnreadableError):
            memory.read(address, 8)


def test_text_is_bounded_and_printable() -> None:
    machine = Machine()
    machine.data[: 3 * PAGE] = b"x" * (3 * PAGE)
    memory = VirtualMemory(PhysicalMemory(machine), TABLES, 4)
    assert memory.text(BASE + PAGE - 3, 6) == "xxxxxx"
    assert len(memory.text(BASE, 2 * PAGE)) == 2 * PAGE
    machine.data[:9] = b"a\x1b[0m\xff\xc3\xa4\0"
    memory.forget()
    assert memory.text(BASE) == "a\\x1b[0m\\xffä"
    assert printable("ä\u202e".encode()) == "ä\\u202e"
