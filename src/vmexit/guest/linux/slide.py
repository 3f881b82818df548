"""Where a running kernel lies: its slide (KASLR) and its physical address, which is random by itself.

A kernel is only taken for found when its banner can be read at that place by its own page tables, which it builds early in its
boot (init_top_pgt) and keeps from then on. CR3 is of use at one moment only: it may be a program's, and with page-table
isolation it maps hardly anything of the kernel (bit 12 of it then says so; without isolation that bit is an address bit like any
other, so both are tried).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmexit.guest import paging
from vmexit.guest.linux.image import KERNEL_MAP, LINKED_AT
from vmexit.guest.linux.profile import Profile
from vmexit.guest.memory import PhysicalMemory, UnreadableError, VirtualMemory

SLOT = 0x20_0000
"""What a slide is a multiple of (CONFIG_PHYSICAL_ALIGN, and the size of the pages that the image is mapped with)."""
_SLOTS = 512
_ENTRY_SYMBOL = "entry_SYSCALL_64"
_ISOLATION_BIT = 1 << 12


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a kernel lies."""

    slide: int
    """Its addresses are so much above those that it was linked at."""
    physical: int
    """The physical address of _text."""


def roots(registers: Mapping[str, int]) -> list[int]:
    """The page tables that may be the kernel's view of this vCPU's address space."""
    root = registers["cr3"] & paging.ADDRESS
    return [root, root & ~_ISOLATION_BIT] if root & _ISOLATION_BIT else [root]


def mapped_slots(memory: VirtualMemory) -> Iterator[tuple[int, int]]:
    """Address and physical address of each piece of 2 MB that is mapped where kernel images lie."""
    for address in range(KERNEL_MAP, KERNEL_MAP + _SLOTS * SLOT, SLOT):
        try:
            physical = memory.translate(address)
        except UnreadableError:
            continue
        yield address, physical


def lstar_slide(profile: Profile, lstar: int | None) -> int | None:
    """The slide by the address that the kernel has given SYSCALL; None: that is no address of this kernel's."""
    entry = profile.symbols.find(_ENTRY_SYMBOL)
    if lstar is None or entry is None:
        return None
    slide = lstar - entry
    return slide if 0 <= slide < _SLOTS * SLOT and slide % SLOT == 0 else None


def find(
    physical: PhysicalMemory, registers: Mapping[str, int], banner: bytes, banner_at: int, slide: int | None = None
) -> tuple[Placement, VirtualMemory] | None:
    """Where the kernel with that banner lies, and memory by the page tables it was found through; None: it does not run here.

    ``banner_at``: the address that the banner was linked at. ``slide``: what is known of it.
    """
    levels = paging.levels_of(registers["cr4"])
    for root in roots(registers):
        memory = VirtualMemory(physical, root, levels)
        for text in _candidates(memory, slide):
            try:
                if memory.read(banner_at - LINKED_AT + text, len(banner)) != banner:
                    continue
                start = memory.translate(text)
            except UnreadableError:
                continue
            return Placement(text - LINKED_AT, start), memory
    return None


def _candidates(memory: VirtualMemory, slide: int | None) -> Iterator[int]:
    if slide is not None:
        yield LINKED_AT + slide
    yield from (address for address, _ in mapped_slots(memory) if address >= LINKED_AT)


def kernel_memory(physical: PhysicalMemory, profile: Profile, placement: Placement, levels: int) -> VirtualMemory | None:
    """Memory by the kernel's own page tables; None while it has not built them yet, or where they are not its own."""
    root = placement.physical + profile.address("init_top_pgt") - LINKED_AT
    memory = VirtualMemory(physical, root, levels)
    at = profile.address("linux_banner")
    try:
        if memory.translate(at + placement.slide) != placement.physical + at - LINKED_AT:
            return None
        if memory.read(at + placement.slide, len(profile.banner)) != profile.banner:
            return None
    except UnreadableError:
        return None
    return memory


def image_extent(memory: VirtualMemory) -> tuple[int, int] | None:
    """Begin and end of what is mapped in one piece from the first mapped address on; None: nothing is."""
    found: tuple[int, int] | None = None
    first = 0
    for address, where in mapped_slots(memory):
        start, end = found or (address, address)
        if found is None:
            first = where
        if address != end or where != first + address - start:
            break
        found = start, end + SLOT
    return found
