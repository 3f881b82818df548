"""Sets of MSRs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.events.msrs import LAST_MSR, UNNAMED_READS, UNNAMED_WRITES, MsrSet

small = st.integers(0, 60)


def test_what_is_left_out_where_nothing_is_named() -> None:
    assert set(UNNAMED_WRITES) == {0xC0000102, 0xE7, 0xE8, 0x48, 0x49}
    assert set(UNNAMED_READS) == {0xC0000102, 0xE7, 0xE8}


@given(st.sets(small))
def test_all_but_is_the_complement(left_out: set[int]) -> None:
    msrs = MsrSet.all_but(left_out)
    assert {msr for msr in range(62) if msr not in msrs} == left_out
    assert LAST_MSR in msrs


@given(st.lists(st.tuples(small, small).map(lambda pair: (min(pair), max(pair)))))
def test_a_union_of_ranges(ranges: list[tuple[int, int]]) -> None:
    msrs = MsrSet.of_ranges(ranges)
    for msr in range(62):
        assert (msr in msrs) == any(first <= msr <= last for first, last in ranges)
    # Sorted, disjoint, and nothing left that could be one range.
    assert all(a[1] + 1 < b[0] for a, b in zip(msrs.ranges, msrs.ranges[1:], strict=False))


@pytest.mark.parametrize("bad", [(-1, 0), (5, 4), (0, 1 << 32)])
def test_what_is_no_range(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="an MSR is a number"):
        MsrSet.of_ranges([bad])


@pytest.mark.parametrize(
    ("msrs", "text"),
    [
        (MsrSet.of(0xC0000082), "c0000082"),
        (MsrSet.of(1, 2, 3, 9), "1-3,9"),
        (MsrSet.all_but(()), "all"),
        (MsrSet.all_but(UNNAMED_WRITES), "all but 48 49 e7 e8 c0000102"),
    ],
)
def test_as_text(msrs: MsrSet, text: str) -> None:
    assert str(msrs) == text


def test_only_a_set_with_both_ends_leaves_something_out() -> None:
    assert MsrSet.of(5).left_out is None
    assert MsrSet.of_ranges([(0, LAST_MSR)]).left_out == ()
