"""Page walks, by tables that the tests write."""

from __future__ import annotations

import pytest

from vmexit.guest import paging

ROOT, UPPER = 0x1000, 0xFFFF_0000_0000_0000


def walk(tables: dict[int, int], address: int, levels: int = 4, root: int = ROOT) -> int | None:
    """By tables given as {physical address: entry}; anything else reads as 0."""
    return paging.translate(lambda at: tables.get(at, 0), root, levels, address)


def entries(address: int, bottom: int, leaf: int, levels: int = 4) -> dict[int, int]:
    """Tables at 0x1000, 0x2000 ... for one address, down to ``bottom``, where ``leaf`` stands."""
    tables = {}
    for depth, level in enumerate(range(levels - 1, bottom - 1, -1)):
        at = ROOT + depth * 0x1000 + (address >> (12 + 9 * level) & 0x1FF) * 8
        tables[at] = leaf if level == bottom else ROOT + (depth + 1) * 0x1000 | 3
    return tables


@pytest.mark.parametrize(
    ("address", "bottom", "leaf", "wanted"),
    [
        (0xFFFF_FFFF_8123_4567, 0, 0x8000_0000_0ABC_D063, 0xABC_D567),  # no-execute is no address bit
        (0xFFFF_FFFF_8123_4567, 1, 0x0000_0000_4000_01E3, 0x4003_4567),
        (0xFFFF_FFFF_8123_4567, 1, 0x0000_0000_4000_11E3, 0x4003_4567),  # bit 12 of a large page is PAT
        (0xFFFF_8880_8123_4567, 2, 0x0000_0001_0000_00E3, 0x1_0123_4567),
        (0x0000_7FFF_FFFF_F123, 0, 0x5007, 0x5123),
    ],
)
def test_pages_of_each_size(address: int, bottom: int, leaf: int, wanted: int) -> None:
    assert walk(entries(address, bottom, leaf), address) == wanted
    assert walk(entries(address, bottom, leaf), address ^ 1 << 40) is None


def test_five_levels() -> None:
    address = 0xFF11_0000_8123_4567
    assert walk(entries(address, 0, 0x9003, 5), address, 5) == 0x9567
    assert walk(entries(address, 0, 0x9003, 4), address, 4) is None  # no address with four levels
    assert (paging.levels_of(0x20), paging.levels_of(0x1020)) == (4, 5)


def test_only_the_roots_address_bits_count() -> None:
    address = 0xFFFF_8000_0000_0000
    assert walk(entries(address, 0, 0x9003), address, root=ROOT | 0x8000_0000_0000_0018) == 0x9000


def test_what_is_not_present_is_not_there() -> None:
    address = 0xFFFF_8000_0000_0000
    for bottom in range(4):
        assert walk(entries(address, bottom, 0xFFFF_FFFF_FFFF_FFFE), address) is None


def test_a_page_of_512_gb_is_none() -> None:
    """PS is reserved in the highest tables; the walk goes on, as if it were a table."""
    address = 0xFFFF_8000_0000_0000
    assert walk({ROOT + (address >> 39 & 0x1FF) * 8: 0x2083}, address) is None


@pytest.mark.parametrize("address", [0x8000_0000_0000, UPPER, 0x7FFF_FFFF_FFFF_FFFF])
def test_addresses_that_are_none(address: int) -> None:
    assert walk(dict.fromkeys(range(0, 65536, 8), 3), address) is None


@pytest.mark.parametrize(
    ("cr0", "efer", "wanted"), [(0x8000_0011, 0x500, True), (0x11, 0x500, False), (0x8000_0011, 0x100, False), (0x10, 0, False)]
)
def test_long_mode(cr0: int, efer: int, wanted: bool) -> None:
    assert paging.is_long_mode(cr0, efer) is wanted
