"""Guest memory as those read it who look at the guest's own data: checked, bounded, a page at a time.

Every address comes from the guest and may lie. What cannot be read is an UnreadableError, which ends as "unknown" further up.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Protocol

from vmexit.errors import VmexitError
from vmexit.guest import paging

PAGE = 0x1000
LAST_ADDRESS = 0xFFFF_FFFF_FFFF_FFFF
_MOST_PAGES = 0x8000
"""That are kept: 128 MB."""
_MOST_TEXT = 4096


class UnreadableError(VmexitError):
    """Memory that is not there."""

    def __init__(self, address: int) -> None:
        super().__init__(f"nothing is mapped at {address:#x}")


class Machine(Protocol):
    """A halted machine: all that is needed of one to look at its guest."""

    @property
    def vcpus(self) -> int:
        """How many vCPUs there are, numbered from 0."""

    def registers(self, core: int) -> Mapping[str, int]:
        """A vCPU's registers by the names of guest.registers."""

    def read_physical(self, address: int, length: int) -> bytes:
        """Physical memory, within one page. Raises UnreadableError where there is none."""


class PhysicalMemory:
    """A halted machine's memory, each page read once."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pages: dict[int, bytes | None] = {}
        """None: there is no such page."""

    def forget(self) -> None:
        """The machine has run: nothing that was read is true any more."""
        self._pages.clear()

    def page(self, number: int) -> bytes:
        """The page of that number. Raises UnreadableError."""
        page = self._pages.get(number, b"")
        if page == b"":
            if len(self._pages) >= _MOST_PAGES:
                self._pages.clear()
            page = self._pages[number] = self._read(number)
        if page is None:
            raise UnreadableError(number * PAGE)
        return page

    def _read(self, number: int) -> bytes | None:
        try:
            page = self._machine.read_physical(number * PAGE, PAGE)
        except UnreadableError:
            return None
        return page if len(page) == PAGE else None

    def read(self, address: int, length: int) -> bytes:
        """So many bytes. Raises UnreadableError."""
        data = b""
        while len(data) < length:
            number, start = divmod(address + len(data), PAGE)
            data += self.page(number)[start : start + length - len(data)]
        return data

    def u64(self, address: int) -> int:
        """8 bytes that do not cross a page, as page table entries do not."""
        number, start = divmod(address, PAGE)
        return int.from_bytes(self.page(number)[start : start + 8], "little")


class VirtualMemory:
    """Memory by one set of page tables, whatever the vCPUs' own are at the moment."""

    def __init__(self, physical: PhysicalMemory, root: int, levels: int) -> None:
        """``root``: the physical address of the highest table; ``levels``: 4, or 5 with CR4.LA57."""
        self.physical = physical
        self.root = root
        self.levels = levels
        self._translations: dict[int, int] = {}

    def forget(self) -> None:
        """The machine has run."""
        self.physical.forget()
        self._translations.clear()

    def translate(self, address: int) -> int:
        """The physical address. Raises UnreadableError."""
        number, start = divmod(address, PAGE)
        found = self._translations.get(number)
        if found is None:
            physical = paging.translate(self.physical.u64, self.root, self.levels, number * PAGE)
            if physical is None:
                raise UnreadableError(address)
            if len(self._translations) >= _MOST_PAGES:
                self._translations.clear()
            found = self._translations[number] = physical
        return found + start

    def read(self, address: int, length: int) -> bytes:
        """So many bytes, all of them. Raises UnreadableError."""
        data = b""
        while len(data) < length:
            at = address + len(data)
            if not 0 <= at <= LAST_ADDRESS:
                raise UnreadableError(address)
            number, start = divmod(self.translate(at), PAGE)
            data += self.physical.page(number)[start : start + length - len(data)]
        return data

    def u8(self, address: int) -> int:
        """One byte. Raises UnreadableError, as all of these do."""
        return self.read(address, 1)[0]

    def u32(self, address: int) -> int:
        """4 bytes."""
        return int.from_bytes(self.read(address, 4), "little")

    def u64(self, address: int) -> int:
        """8 bytes."""
        return int.from_bytes(self.read(address, 8), "little")

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """So many times 8 bytes."""
        return struct.unpack(f"<{count}Q", self.read(address, 8 * count))

    def text(self, address: int, most: int = _MOST_TEXT) -> str:
        """What stands there up to a zero byte, ``most`` bytes at most; unprintable bytes are escaped."""
        data = b""
        while len(data) < most:
            at = address + len(data)
            piece = self.read(at, min(most - len(data), PAGE - at % PAGE))
            end = piece.find(b"\0")
            if end >= 0:
                data += piece[:end]
                break
            data += piece
        return printable(data)


def printable(data: bytes) -> str:
    """Text of the guest's, fit for a terminal: UTF-8 where it is that, anything else escaped."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
