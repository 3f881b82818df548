"""Tests of MSRs that are named in a command, alone, in lists and in ranges."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands.fakes import Typist
from vmexit import msr
from vmexit.commands import msr_sets
from vmexit.commands.command import Arguments
from vmexit.commands.tokens import parse_number, tokenize
from vmexit.errors import CommandError
from vmexit.events.msrs import MsrSet


def parsed(text: str) -> MsrSet | None:
    """The set that is meant by what stands behind a command."""
    arguments = Arguments(f"! {text}", tokenize(f"! {text}"))
    return msr_sets.parse(arguments, arguments.tokens, ("log",))


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("LSTAR", [(0xC0000082, 0xC0000082)]),
        ("ia32_lstar", [(0xC0000082, 0xC0000082)]),
        ("MSR_LSTAR", [(0xC0000082, 0xC0000082)]),
        ("lstar,fmask", [(0xC0000082, 0xC0000082), (0xC0000084, 0xC0000084)]),
        ("fmask,lstar", [(0xC0000082, 0xC0000082), (0xC0000084, 0xC0000084)]),
        ("lstar,10,0n16", [(0x10, 0x10), (0xC0000082, 0xC0000082)]),
        ("200-20f", [(0x200, 0x20F)]),
        ("0x200-\\x20f", [(0x200, 0x20F)]),
        ("200-200", [(0x200, 0x200)]),
        ("mtrr_physbase0-mtrr_physmask7,pat", [(0x200, 0x20F), (0x277, 0x277)]),
        ("1-3,2-5,7", [(1, 5), (7, 7)]),
        ("lstar, fmask", [(0xC0000082, 0xC0000082), (0xC0000084, 0xC0000084)]),
        ("lstar ,fmask", [(0xC0000082, 0xC0000082), (0xC0000084, 0xC0000084)]),
        ("lstar , fmask", [(0xC0000082, 0xC0000082), (0xC0000084, 0xC0000084)]),
        ("200 - 20f", [(0x200, 0x20F)]),
        ("c000`0082", [(0xC0000082, 0xC0000082)]),
        # What can be read as a number is one: x stands before hexadecimal digits.
        ("xfd", [(0xFD, 0xFD)]),
        ("ia32_xfd", [(0x1C4, 0x1C4)]),
        ("add", [(0xADD, 0xADD)]),
    ],
)
def test_what_is_meant(text: str, ranges: list[tuple[int, int]]) -> None:
    assert parsed(text) == MsrSet(tuple(ranges))


def test_nothing_is_no_set() -> None:
    assert parsed("") is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "!msrwrite lsttar log",
            """
            'lsttar' is neither an MSR nor an option: did you mean LSTAR, STAR, CSTAR?
            !msrwrite lsttar log
                      ^~~~~~
            """,
        ),
        (
            "!msrwrite 10,efre",
            """
            'efre' is neither an MSR nor an option: did you mean EFER?
            !msrwrite 10,efre
                         ^~~~
            """,
        ),
        (
            "!msrwrite 20f-200",
            """
            a range begins with the lower number: 200 is less than 20f (200-20f)
            !msrwrite 20f-200
                      ^~~~~~~
            """,
        ),
        (
            "!msrwrite lstar,,fmask",
            """
            an MSR is missing before ','
            !msrwrite lstar,,fmask
                            ^
            """,
        ),
        (
            "!msrwrite lstar, log",
            """
            an MSR is missing behind ','
            !msrwrite lstar, log
                           ^
            """,
        ),
        (
            "!msrwrite -20f",
            """
            an MSR is missing before '-'
            !msrwrite -20f
                      ^
            """,
        ),
        (
            "!msrwrite 200-",
            """
            an MSR is missing behind '-'
            !msrwrite 200-
                         ^
            """,
        ),
        (
            "!msrwrite 1-2-3",
            """
            between MSRs stands a comma, or a hyphen for a range
            !msrwrite 1-2-3
                         ^
            """,
        ),
        (
            "!msrwrite 1,100000000",
            """
            100000000 is too big: the biggest MSR number is ffffffff
            !msrwrite 1,100000000
                        ^~~~~~~~~
            """,
        ),
        (
            "!msrwrite lstar log fmask",
            """
            an event names its MSRs in one list (write lstar,fmask, or make another event for this one)
            !msrwrite lstar log fmask
                                ^~~~~
            """,
        ),
        (
            '!msrread "efer"',
            """
            the number or name of an MSR is typed without quotes and braces
            !msrread "efer"
                     ^~~~~~
            """,
        ),
    ],
)
def test_what_is_wrong_is_marked(typist: Typist, line: str, shown: str) -> None:
    expected = [text[12:] for text in shown.strip("\n").splitlines()][:-1]
    assert typist.fails(line).splitlines() == expected


def test_too_many_ranges_are_refused(typist: Typist) -> None:
    sixteen = ",".join(f"{msr:x}" for msr in range(0, 32, 2))
    typist.types(f"!msrwrite {sixteen}")
    with pytest.raises(Exception, match="an event can name 16 separate ranges of MSRs, not 17"):
        typist.types(f"!msrwrite {sixteen},100")


_SOME = st.sampled_from([one.name for one in msr.everything()])
_ITEMS = st.one_of(st.integers(0, 0xFFFF_FFFF).map(lambda number: f"{number:x}"), _SOME, _SOME.map(str.lower))


@given(st.lists(_ITEMS, min_size=1, max_size=6))
def test_a_list_is_the_union_of_its_parts(items: list[str]) -> None:
    def address(item: str) -> int:
        number = parse_number(item)
        found = msr.find(item)
        return number if number is not None else found.address if found else -1

    assert parsed(",".join(items)) == MsrSet.of(*map(address, items))


@given(st.text(st.sampled_from(list("lstar,-02f {}\"\\'_"))))
def test_any_text_is_a_set_or_refused(text: str) -> None:
    with contextlib.suppress(CommandError):
        parsed(text)


@pytest.mark.parametrize(
    ("msrs", "text"),
    [
        (MsrSet.of(0xC0000082), "c0000082 LSTAR"),
        (MsrSet.of(0xC0000082, 0x10), "10 TSC, c0000082 LSTAR"),
        (MsrSet.of_ranges([(0x200, 0x20F)]), "200-20f MTRR_PHYSBASE0-MTRR_PHYSMASK7"),
        (MsrSet.of_ranges([(0xC0000000, 0xC0000FFF)]), "c0000000-c0000fff"),
        (MsrSet.of(0xDEAD0), "dead0"),
        (MsrSet.of(0x10, 0x1B, 0x277, 0x2FF, 0x174), "10,1b,174,277,2ff"),
        (MsrSet.all_but(()), "all"),
    ],
)
def test_how_a_set_is_shown(msrs: MsrSet, text: str) -> None:
    assert msr_sets.describe(msrs) == text
