"""Where the Windows kernel lies, and through which page tables: from an address in it downwards to its first page.

Such an address is what the kernel gives LSTAR, and what its interrupt table holds, which the KPCR leads to. The image that
is found has to call itself ntoskrnl.exe.

With KVA shadow CR3 is, while a program runs, a table that maps only the kernel's entry code. The kernel's own is then taken from
where the entry code takes it: the KPRCB, at a place that differs by build and that each such table maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmexit.guest import paging
from vmexit.guest.linux.recipe import is_kernel_pointer
from vmexit.guest.memory import PAGE, PhysicalMemory, UnreadableError, VirtualMemory
from vmexit.guest.windows.pe import Image, PeError

KERNEL_NAMES = frozenset({"ntoskrnl.exe", "ntkrnlmp.exe"})
KPCR_SELF, KPCR_PRCB, KPCR_IDT, KPRCB = 0x18, 0x20, 0x38, 0x180
"""Offsets in the KPCR, in every Windows for x86-64: its own address, that of the KPRCB in it, that of the interrupt table."""
_FURTHEST = 32 << 20
"""The kernel's image is smaller: 10 to 22 MB up to Windows 11 24H2."""
_LARGE_PAGE = 2 << 20
_MOST_PAGES_READ = 8192
_GATES = (0, 14)
# KPRCB.KernelDirectoryTableBase and the KPRCB's own offset: 17763, then 19041 and later, then seen in later builds.
_SHADOWED_TABLES = (0x9000, 0x7000, 0xA000, 0xB000)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel that was found, and memory by the page tables it was found through."""

    image: Image
    memory: VirtualMemory


def kpcr_of(memory: VirtualMemory, registers: Mapping[str, int]) -> list[int]:
    """The addresses in GS that are a KPCR's: it holds its own address, and that of the KPRCB within."""
    bases = (registers["kernel_gs_base"],) if registers["cs"] & 3 else (registers["gs_base"], registers["kernel_gs_base"])
    return [base for base in dict.fromkeys(bases) if is_kpcr(memory, base)]


def is_kpcr(memory: VirtualMemory, base: int) -> bool:
    """Whether a KPCR is there."""
    if not is_kernel_pointer(base):
        return False
    try:
        return memory.u64(base + KPCR_SELF) == base and memory.u64(base + KPCR_PRCB) == base + KPRCB
    except UnreadableError:
        return False


def find_kernel(physical: PhysicalMemory, registers: Mapping[str, int], lstar: int | None = None) -> Kernel | None:
    """The kernel that runs on a vCPU in long mode; None: it is no Windows, or its page tables are out of reach."""
    levels = paging.levels_of(registers["cr4"])
    first = VirtualMemory(physical, registers["cr3"], levels)
    for memory in (first, *_shadowed(first, registers)):
        searched: set[int] = set()
        for start in _starts(memory, registers, lstar):
            # What lies so near to each other is of one image, or of none.
            if start & -_LARGE_PAGE not in searched:
                searched.add(start & -_LARGE_PAGE)
                image = search_down(memory, start)
                if image is not None:
                    return Kernel(image, memory)
    return None


def _shadowed(memory: VirtualMemory, registers: Mapping[str, int]) -> Iterator[VirtualMemory]:
    """Memory by the kernel's own tables, as a program's tables lead to them."""
    for base in (registers["kernel_gs_base"], registers["gs_base"]):
        for offset in _SHADOWED_TABLES if is_kernel_pointer(base) else ():
            try:
                root = memory.u64(base + offset) & paging.ADDRESS
            except UnreadableError:
                continue
            if root and root != memory.root & paging.ADDRESS:
                yield VirtualMemory(memory.physical, root, memory.levels)


def _starts(memory: VirtualMemory, registers: Mapping[str, int], lstar: int | None) -> Iterator[int]:
    if lstar is not None and is_kernel_pointer(lstar & ~7):
        yield lstar
    for base in kpcr_of(memory, registers):
        for gate in _GATES:
            try:
                table = memory.u64(base + KPCR_IDT)
                low, high = memory.words(table + 16 * gate, 2) if is_kernel_pointer(table) else (0, 0)
            except UnreadableError:
                continue
            # Intel SDM volume 3, 6.14.1: the handler's address is in three pieces.
            handler = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | (high & 0xFFFF_FFFF) << 32
            if is_kernel_pointer(handler & ~7):
                yield handler


def search_down(memory: VirtualMemory, start: int) -> Image | None:
    """The kernel's image that an address is in: its first page is at or below it, with gaps between that are not mapped."""
    top = start & -PAGE
    bottom = max(top - _FURTHEST, 0)
    # Windows puts it on large pages where there is memory enough; there it is found at once.
    places = [*range(start & -_LARGE_PAGE, bottom, -_LARGE_PAGE), *range(top, bottom, -PAGE)]
    left = _MOST_PAGES_READ
    for place in places:
        try:
            memory.translate(place)
            left -= 1
            if memory.read(place, 2) == b"MZ":
                image = Image(memory, place)
                if image.name.lower() in KERNEL_NAMES and place <= start < place + image.size:
                    return image
        except (UnreadableError, PeError):
            continue
        if left <= 0:
            break
    return None
