"""A made-up guest's memory and registers, as vmexit.guest.memory.Machine has them."""

from __future__ import annotations

from collections.abc import Mapping

from vmexit.guest.memory import PAGE, UnreadableError


class Pages:
    """A machine of these pages, by number, and of these registers."""

    pages: dict[int, bytearray]
    cores: list[dict[str, int]]

    def registers(self, core: int) -> Mapping[str, int]:
        """A vCPU's registers."""
        return self.cores[core]

    def read_physical(self, address: int, length: int) -> bytes:
        """Physical memory, also of more than one page. Raises UnreadableError."""
        data = b""
        while len(data) < length:
            number, start = divmod(address + len(data), PAGE)
            if number not in self.pages:
                raise UnreadableError(address)
            data += bytes(self.pages[number][start : start + length - len(data)])
        return data
