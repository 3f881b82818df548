"""Many names in one text: found again whatever they are, and an index of another text refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.guest.nametable import NameTable

names_of_any_kind = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8))


@given(names_of_any_kind)
def test_every_name_is_there_and_found(names: list[str]) -> None:
    table = NameTable.of(names)
    assert len(table) == len(names) and table.split() == names
    assert [table[number] for number in range(len(names))] == names
    for name in names:
        assert table.find(name) == names.index(name)
    again = NameTable(table.text, table.index)
    assert [again.find(name) for name in names] == [table.find(name) for name in names]


@given(names_of_any_kind, st.text(max_size=8))
def test_what_is_not_there_is_not_found(names: list[str], other: str) -> None:
    assert NameTable.of(names).find(other) == (names.index(other) if other in names else None)


def test_what_no_text_can_hold() -> None:
    table = NameTable.of(["a\0b", "\ud800", ""])
    assert table.split() == ["a\ufffdb", "\\ud800", ""] and len(table) == 3
    assert table.find("\ud800") is None and table.find("") == 2


@pytest.mark.parametrize("text", [b"a", b"a\0b", b"\xff\0", b"\0a"])
def test_texts_that_are_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"no end|invalid"):
        NameTable(text)


def test_no_names() -> None:
    table = NameTable(b"")
    assert len(table) == 0 and table.split() == [] and table.find("") is None
    assert NameTable(b"", table.index).find("a") is None


@pytest.mark.parametrize(
    ("hashes", "order"), [([1, 2], [0, 1]), ([1, 2, 3], [0, 1]), ([1, 2, 3], [0, 1, 3]), ([1, 2, 3], [0, 1, 0xFFFF_FFFF])]
)
def test_an_index_of_another_text(hashes: list[int], order: list[int]) -> None:
    with pytest.raises(ValueError, match="index"):
        NameTable(b"a\0b\0c\0", (np.array(hashes, np.uint32), np.array(order, np.uint32)))


def test_an_index_that_lies_finds_nothing_that_is_not_so() -> None:
    hashes = np.sort(np.array([zlib.crc32(name) for name in (b"a", b"b", b"c")], np.uint32))
    table = NameTable(b"a\0b\0c\0", (hashes, np.array([1, 1, 1], np.uint32)))
    assert {name: table.find(name) for name in "abc"} == {"a": None, "b": 1, "c": None}


def test_names_that_were_made_to_have_one_hash() -> None:
    """They cost no more than others: after a few no more are looked at."""
    names = [f"{number:x}" for number in range(1000)]
    same = np.full(1000, zlib.crc32(b"wanted"), np.uint32)
    table = NameTable(NameTable.of([*names[1:], "wanted"]).text, (same, np.arange(1000, dtype=np.uint32)))
    looked: list[int] = []

    class Counted(NameTable):
        def __getitem__(self, number: int) -> str:
            looked.append(number)
            return super().__getitem__(number)

    assert Counted(table.text, table.index).find("wanted") is None and len(looked) == 64
