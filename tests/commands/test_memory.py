"""Tests of db, dc, dw, dd, dq and their physical twins."""

from __future__ import annotations

import pytest

from tests.commands.fakes import Typist

BASE = 0xFFFFF8003AD6F000
DATA = bytes.fromhex("48895C240848896C24104889742418574156415748 83EC3065488B0425200000")


@pytest.fixture
def mapped(typist: Typist) -> Typist:
    """With two pages of memory; DATA is at BASE + 10h, the second page is full of 11h."""
    typist.map(BASE, bytes(0x10) + DATA.ljust(0xFF0, b"\0") + b"\x11" * 0x1000)
    typist.map(0x100000, b"\x22" * 0x1000, physical=True)
    typist.put(rsp=BASE + 0x18)
    return typist


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "db fffff800`3ad6f010 l 20",
            [
                "fffff800`3ad6f010  48 89 5C 24 08 48 89 6C 24 10 48 89 74 24 18 57  H.\\$.H.l$.H.t$.W",
                "fffff800`3ad6f020  41 56 41 57 48 83 EC 30 65 48 8B 04 25 20 00 00  AVAWH..0eH..% ..",
            ],
        ),
        ("db fffff8003ad6f010 l 3", ["fffff800`3ad6f010  48 89 5C                                         H.\\"]),
        (
            "dc fffff8003ad6f010 l 10",
            ["fffff800`3ad6f010  245C8948 6C894808 89481024 57182474  H.\\$.H.l$.H.t$.W"],
        ),
        ("dc fffff8003ad6f010 l 4", ["fffff800`3ad6f010  245C8948                             H.\\$"]),
        ("dd fffff8003ad6f010 l 10", ["fffff800`3ad6f010  245C8948 6C894808 89481024 57182474"]),
        ("dw fffff8003ad6f010 l 0n6", ["fffff800`3ad6f010  8948 245C 4808"]),
        ("dq fffff8003ad6f010 l 10", ["fffff800`3ad6f010  6C894808`245C8948 57182474`89481024"]),
        ("DQ fffff8003ad6f010 L 1", ["fffff800`3ad6f010  6C894808`245C8948"]),  # whole units
        ("dq rsp l 8", ["fffff800`3ad6f018  57182474`89481024"]),
        ("dq @rsp-8 l 8", ["fffff800`3ad6f010  6C894808`245C8948"]),
        ("dq rsp + 8 - 10 l 8", ["fffff800`3ad6f010  6C894808`245C8948"]),
        ("!dd 100ff0 l 8", ["00000000`00100ff0  22222222 22222222"]),
    ],
)
def test_layout(mapped: Typist, line: str, shown: list[str]) -> None:
    assert mapped.types(line).split("\n") == shown


@pytest.mark.parametrize("command", ["db", "dc", "dw", "dd", "dq"])
def test_how_much_is_shown_unless_said_otherwise(mapped: Typist, command: str) -> None:
    lines = mapped.types(f"{command} rsp").split("\n")
    assert len(lines) == 0x80 // 16
    assert lines[-1].startswith("fffff800`3ad6f088  ")


def test_without_an_address_it_goes_on(mapped: Typist) -> None:
    mapped.types(f"db {BASE:x} l 18")
    assert mapped.types("dq l 8") == "fffff800`3ad6f018  57182474`89481024"
    assert mapped.types("dw l 2") == "fffff800`3ad6f020  5641"
    mapped.types("!db 100000 l 10")
    assert mapped.types("!dd l 4") == "00000000`00100010  22222222"
    assert mapped.types("dw l 2") == "fffff800`3ad6f022  5741"


def test_what_is_not_mapped_is_told_exactly(mapped: Typist) -> None:
    end = BASE + 0x2000
    shown = mapped.types(f"db {end - 0x18:x} l 1000").split("\n")
    assert [line.split("  ")[0] for line in shown[:-1]] == ["fffff800`3ad70fe8", "fffff800`3ad70ff8"]
    assert shown[-1] == "nothing is mapped from fffff800`3ad71000 on"
    # A unit that lies across the end is not shown.
    shown = mapped.types(f"dq {end - 0xC:x}").split("\n")
    assert shown == ["fffff800`3ad70ff4  11111111`11111111", "nothing is mapped from fffff800`3ad71000 on"]
    assert mapped.types("!db 100ff8").endswith("\nthere is no memory from 00000000`00101000 on")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("db 1000", "nothing is mapped at 00000000`00001000\ndb 1000\n   ^~~~"),
        ("dq 0 + ff8 + 4", "nothing is mapped at 00000000`00000ffc\ndq 0 + ff8 + 4\n   ^~~~~~~~~~~"),
        (f"dq {BASE + 0x1FFC:x}", "nothing is mapped at fffff800`3ad71000\ndq fffff8003ad70ffc\n   ^~~~~~~~~~~~~~~~"),
        ("!db 0 l 10", "there is no memory at physical address 00000000`00000000\n!db 0 l 10\n    ^"),
    ],
)
def test_nothing_at_all(mapped: Typist, line: str, shown: str) -> None:
    assert mapped.fails(line) == shown


def test_the_end_of_the_address_space(typist: Typist) -> None:
    typist.map(0xFFFFFFFFFFFFF000, b"\x33" * 0x1000)
    assert typist.types("db ffffffff`fffffff8") == "ffffffff`fffffff8  33 33 33 33 33 33 33 33                          33333333"
    assert typist.fails("db").startswith("nothing is mapped at 00000000`00000000")
    assert typist.types("db -8 l 1").startswith("ffffffff`fffffff8  33  ")


@pytest.mark.parametrize(
    ("line", "message", "column", "width"),
    [
        ("db", "'db' needs an address", 2, 1),
        ("db l 10", "'db' needs an address", 7, 1),
        ("db rsp l", "a length is missing (l LENGTH, in bytes)", 8, 1),
        ("db rsp l xyz", "'xyz' is no length in bytes", 9, 3),
        ("db rsp l 0", "a length is 1 or more", 9, 1),
        ("db rsp l 100001", "100001 is too big: the biggest length in bytes is 100000", 9, 6),
        ("db rsp l 10 20", "'20' is one word too many", 12, 2),
        ("db rsp l 10 pid 4", "'pid' is not yet available (addresses are those of the current core)", 12, 3),
        ("db rsp pid 4", "'pid' is not yet available (addresses are those of the current core)", 7, 3),
        ("db rsp 20", "a + or - is missing before this", 7, 2),
        ("db l10", "'l10' is neither a number nor a register, nor a symbol that is known: did you mean 'r10'?", 3, 3),
        ("db nt!x", "'nt!x' is neither a number nor a register, nor a symbol that is known", 3, 4),
        ('db "rsp"', "text in quotes or braces is no number", 3, 5),
        ("db rsp +", "a number or register is missing", 8, 1),
    ],
)
def test_what_is_wrong(mapped: Typist, line: str, message: str, column: int, width: int) -> None:
    first, _, mark = mapped.fails(line).split("\n")
    assert first.startswith(message)
    assert mark == " " * column + "^" + "~" * (width - 1)


def test_it_needs_a_halted_machine(mapped: Typist) -> None:
    mapped.types("g")
    assert mapped.fails("!dq 0").startswith("'!dq' needs a halted machine")
