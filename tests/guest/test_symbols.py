"""Tables of symbols."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.guest.nametable import NameTable
from vmexit.guest.symbols import Place, Symbol, Symbols

ROWS = [
    (0x1000, "T", "start"),
    (0x1000, "t", "alias"),
    (0x1010, "t", "sys_read"),
    (0x1040, "D", "Sys_table"),
    (0x2000, "t", "alias"),
]


def table(rows: list[tuple[int, str, str]]) -> Symbols:
    return Symbols.of(np.array([row[0] for row in rows], np.uint64), [row[2] for row in rows], "".join(row[1] for row in rows))


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        (0xFFF, None),
        (0x1000, ("start", 0)),
        (0x100F, ("start", 0xF)),
        (0x1010, ("sys_read", 0)),
        (0x5000, ("alias", 0x3000)),
        ((1 << 64) - 1, ("alias", (1 << 64) - 1 - 0x2000)),
    ],
)
def test_what_lies_at_an_address(address: int, wanted: tuple[str, int] | None) -> None:
    place = table(ROWS).place(address, "kernel")
    assert place == (None if wanted is None else Place(*wanted, "kernel"))


@given(st.lists(st.integers(0, (1 << 64) - 1) | st.integers(1 << 63, (1 << 63) + (1 << 30)), min_size=1), st.data())
def test_addresses_far_and_near(addresses: list[int], data: st.DataObject) -> None:
    symbols = table([(address, "t", str(address)) for address in addresses])
    near = st.sampled_from(addresses).flatmap(lambda address: st.integers(max(0, address - 0x2000), address + 0x2000))
    for address in data.draw(st.lists(near | st.integers(0, (1 << 64) - 1))):
        below = [other for other in addresses if other <= address]
        wanted = Place(str(max(below)), address - max(below), "kernel") if below else None
        assert symbols.place(address, "kernel") == wanted


def test_symbols_in_any_order() -> None:
    symbols = table(ROWS[::-1])
    assert [symbol.address for symbol in symbols] == sorted(row[0] for row in ROWS)
    assert symbols.place(0x1020, "msr") == Place("sys_read", 0x10, "msr")
    assert list(symbols)[2] == Symbol("sys_read", 0x1010, "t")


def test_names() -> None:
    symbols = table(ROWS)
    assert symbols.find("sys_read") == 0x1010
    assert symbols.find("alias") == 0x1000  # the lowest of several
    assert symbols.find("read") is None
    assert "start" in symbols and "end" not in symbols and len(symbols) == 5


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("sys*", ["sys_read", "Sys_table"]),
        ("s??_r*", ["sys_read"]),
        ("[as]*", ["start", "alias", "sys_read", "Sys_table", "alias"]),
        ("alias", ["alias", "alias"]),
        ("sys", []),
        ("", []),
    ],
)
def test_patterns(pattern: str, wanted: list[str]) -> None:
    assert [symbol.name for symbol in table(ROWS).search(pattern)] == wanted


def test_no_symbols_at_all() -> None:
    assert Symbols.none().place(5, "kernel") is None and Symbols.none().find("x") is None and not list(Symbols.none().search("*"))


def test_a_place_reads_as_people_write_it() -> None:
    assert str(Place("schedule", 0x14, "kernel")) == "schedule+0x14 [kernel]"
    assert str(Place("msr_open", 0, "msr")) == "msr_open [msr]"


def test_the_first_of_many_at_one_address() -> None:
    symbols = table([(0x1000, "t", f"name{index}") for index in range(200_000)])
    assert all(symbols.place(0x1001, "kernel") == Place("name0", 1, "kernel") for _ in range(3000))


def test_what_has_no_name_is_not_called_by_the_symbol_before() -> None:
    symbols = table([(0x1000, "t", "first"), (0x1100, "t", "second"), (0x9000, "t", "last")])
    symbols.nameless = np.array([0x800, 0x1080, 0x1100, 0xA000], np.uint64)
    wanted = {
        0xFFF: None,
        0x1000: ("first", 0),
        0x107F: ("first", 0x7F),
        0x1080: ("", 0),
        0x10FF: ("", 0x7F),
        0x1100: ("second", 0),
        0x8FFF: ("second", 0x7EFF),
        0x9FFF: ("last", 0xFFF),
        0xA004: ("", 4),
    }
    places = {address: symbols.place(address, "nt") for address in wanted}
    assert {address: place and (place.name, place.offset) for address, place in places.items()} == wanted


def test_moved_symbols() -> None:
    symbols = table(ROWS)
    assert symbols.moved(0) is symbols
    moved = symbols.moved(0x10_0000, 0x1040)
    assert [(symbol.address, symbol.name) for symbol in moved] == [
        (0x1000, "start"),
        (0x1000, "alias"),
        (0x1010, "sys_read"),
        (0x10_1040, "Sys_table"),
        (0x10_2000, "alias"),
    ]
    assert moved.find("Sys_table") == 0x10_1040 and moved.place(0x10_1044, "kernel") == Place("Sys_table", 4, "kernel")
    assert list(moved.moved(-0x10_0000, 0x10_0000)) == list(symbols)
    # Past the end of all addresses they are the first.
    assert [symbol.name for symbol in symbols.moved(-0x1008)] == ["sys_read", "Sys_table", "alias", "start", "alias"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_names_without_addresses(count: int) -> None:
    with pytest.raises(ValueError, match="as many"):
        Symbols(np.zeros(count, np.uint64), NameTable.of(["a", "b"]), "tt")
    with pytest.raises(ValueError, match="as many"):
        Symbols(np.zeros(2, np.uint64), NameTable.of(["a", "b"]), "t" * count)
