"""Tests of the command events."""

from __future__ import annotations

import pytest

from tests.commands.fakes import Typist


@pytest.fixture
def three(typist: Typist) -> Typist:
    """With three events."""
    for line in ("!msrwrite c0000082", "!msrread  log\n", "!MSRWRITE 10 core 1"):
        typist.types(line)
    return typist


def enabled(typist: Typist) -> list[int]:
    return [event.number for event in typist.debugger.events if event.enabled]


def test_the_list(three: Typist) -> None:
    three.link.rings.hits_of = {0: 1, 1: 12345}
    three.types("events d 2")
    assert three.types("events").split("\n") == [
        "0    (enabled)        1 hit   !msrwrite c0000082  // c0000082 LSTAR",
        "1    (enabled)   12,345 hits  !msrread log",
        "2    (disabled)       0 hits  !MSRWRITE 10 core 1  // 10 TSC",
    ]


def test_an_empty_list(typist: Typist) -> None:
    assert typist.types("events") == "no events"


def test_disable_enable_clear(three: Typist) -> None:
    three.types("events d 1")
    assert enabled(three) == [0, 2]
    three.types("events D All")
    assert enabled(three) == []
    three.types("events e 0x2")
    assert enabled(three) == [2]
    three.types("events e all")
    assert enabled(three) == [0, 1, 2]
    three.types("events c 1")
    assert enabled(three) == [0, 2]
    assert len(three.link.events) == 2
    three.types("events c all")
    assert not three.link.events
    three.types("events c all")
    three.types("!msrwrite 10")
    assert enabled(three) == [3]  # a number is never given twice


def test_while_the_machine_runs(three: Typist) -> None:
    three.types("g")
    three.types("events d 0")
    assert enabled(three) == [1, 2]


@pytest.mark.parametrize(("word", "skip"), [("on", True), ("OFF", False)])
def test_sc_is_about_the_current_core(typist: Typist, word: str, skip: bool) -> None:
    typist.target.is_at_trap = True
    typist.types("~ 1")
    what = "skipped" if skip else "executed"
    assert typist.types(f"events sc {word}") == f"the instruction that core 1 is stopped before will be {what}"
    assert typist.link.decided == [(1, skip)]


@pytest.mark.parametrize(
    ("line", "message", "column", "width"),
    [
        ("events x", "'x' is nothing that can be done to events", 7, 1),
        ("events clear 1", "'clear' is nothing that can be done to events", 7, 5),
        ("events e", "'events e' needs an event number or all", 8, 1),
        ("events sc", "'events sc' needs on or off", 9, 1),
        ("events sc maybe", "'maybe' is no value of 'sc' (it is on or off)", 10, 5),
        ("events d 7", "there is no event 7 (there are: 0 1 2)", 9, 1),
        ("events d g", "'g' is no event number", 9, 1),
        ("events d 1 2 3", "'events' takes 2 arguments at most", 11, 3),
        ("events d {1}", "'1' is no event number", 9, 3),
    ],
)
def test_what_is_wrong(three: Typist, line: str, message: str, column: int, width: int) -> None:
    first, _, mark = three.fails(line).split("\n")
    assert first.startswith(message)
    assert mark == " " * column + "^" + "~" * (width - 1)
    assert enabled(three) == [0, 1, 2]


def test_no_events_to_choose_from(typist: Typist) -> None:
    assert typist.fails("events c 0").startswith("there is no event 0 (there are none)")


def test_sc_needs_a_halted_machine(typist: Typist) -> None:
    typist.types("g")
    assert typist.fails("events sc on").split("\n")[0] == "'events' needs a halted machine ('pause' halts it)"
