"""The kernel's symbol table, made up in each layout that is known, and damaged."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.linux.fake_linux import BTF, KALLSYMS, SLIDE, make_btf, make_image, make_kallsyms, symbols
from vmexit.guest.linux.image import LINKED_AT, Image, Part
from vmexit.guest.linux.kallsyms import KallsymsError, read_symbols

LAYOUTS = ("6.1", "6.12", "7.3")
ROWS = symbols(len(make_btf()))
IMAGES = {layout: bytes(make_image(0, layout)) for layout in LAYOUTS}


def image_of(data: bytes, slide: int = 0) -> Image:
    return Image(data, [Part(LINKED_AT + slide, 0, len(data))])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slide", [0, SLIDE])
def test_every_symbol_in_every_layout(layout: str, slide: int) -> None:
    found = read_symbols(image_of(bytes(make_image(slide, layout)), slide))
    rows = [row for row in ROWS if layout != "7.3" or row[0] >= LINKED_AT]
    wanted = [(address + (slide if address >= LINKED_AT else 0), kind, name) for address, kind, name in rows]
    assert sorted((symbol.address, symbol.kind, symbol.name) for symbol in found) == sorted(wanted)


def test_what_looks_like_tokens_elsewhere_does_not_matter() -> None:
    data = bytearray(IMAGES["6.1"])
    data[0x1000:0x1015] = b"\0" + b"".join(b"%d\0" % digit for digit in range(10))
    assert len(read_symbols(image_of(bytes(data)))) == len(ROWS)


def test_names_of_more_than_127_tokens() -> None:
    """From Linux 6.1 on the length then has a second byte."""
    image = make_image()
    rows = [*ROWS, (LINKED_AT + 0x9000, "t", "A" * 0x90)]
    tables = make_kallsyms(sorted(rows), LINKED_AT, LINKED_AT + KALLSYMS)
    image[KALLSYMS : KALLSYMS + len(tables)] = tables
    assert read_symbols(image_of(bytes(image))).find("A" * 0x90) == LINKED_AT + 0x9000


@pytest.mark.parametrize("data", [b"", bytes(100), b"\0" + b"".join(b"%d\0" % digit for digit in range(10)), b"0" * 100_000])
def test_no_table(data: bytes) -> None:
    with pytest.raises(KallsymsError, match="no symbol table"):
        read_symbols(image_of(data))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_that_is_cut_off(layout: str) -> None:
    data = IMAGES[layout]
    end = len(data[:BTF].rstrip(b"\0"))
    for length in range(KALLSYMS, end - 0x1000, 0x7FF):
        with pytest.raises(KallsymsError):
            read_symbols(image_of(data[:length]))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    changes=st.lists(st.tuples(st.integers(0, 0x7800), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_damaged_tables_are_refused_or_read(layout: str, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(IMAGES[layout][: KALLSYMS + 0xA000])
    for at, noise in changes:
        data[KALLSYMS + at : KALLSYMS + at + len(noise)] = noise
    try:
        found = read_symbols(image_of(bytes(data)))
    except KallsymsError:
        return
    assert len(found) <= len(ROWS) + 255
    assert found.find("_text") == LINKED_AT
