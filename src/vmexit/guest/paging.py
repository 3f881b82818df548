"""From virtual to physical addresses by a guest's page tables in long mode (Intel SDM volume 3, 4.5)."""

from __future__ import annotations

from collections.abc import Callable

PRESENT = 1
LARGE = 1 << 7
"""PS: in the third and second table from the bottom a page of 1 GB or 2 MB, not another table."""
ADDRESS = 0x000F_FFFF_FFFF_F000
_LA57 = 1 << 12


def levels_of(cr4: int) -> int:
    """How many tables an address goes through in long mode: 4, or 5 with CR4.LA57."""
    return 5 if cr4 & _LA57 else 4


def is_canonical(address: int, levels: int) -> bool:
    """Whether the upper bits are all like the highest that is translated."""
    upper = address >> (12 + 9 * levels - 1)
    return upper == 0 or upper == (1 << (64 - (12 + 9 * levels - 1))) - 1


def is_long_mode(cr0: int, efer: int) -> bool:
    """Whether paging is on and of the kind that is walked here (CR0.PG and EFER.LMA)."""
    return bool(cr0 >> 31 & 1 and efer >> 10 & 1)


def translate(read: Callable[[int], int], root: int, levels: int, address: int) -> int | None:
    """The physical address of a virtual one; None: it is not mapped.

    ``read`` gives 8 bytes of physical memory, or raises. ``root``: CR3 or another root; only its address bits count.
    """
    if not is_canonical(address, levels):
        return None
    table = root & ADDRESS
    for level in range(levels - 1, -1, -1):
        shift = 12 + 9 * level
        entry = read(table + (address >> shift & 0x1FF) * 8)
        if not entry & PRESENT:
            return None
        if level == 0 or (level in (1, 2) and entry & LARGE):
            within = (1 << shift) - 1
            # The lowest address bits of a large page's entry are others (PAT) or reserved.
            return entry & ADDRESS & ~within | address & within
        table = entry & ADDRESS
    return None
