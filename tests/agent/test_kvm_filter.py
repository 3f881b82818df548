"""Merged MSR filters: whatever either side wants comes out, and as little else as KVM's limits allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.link.header import read_headers

from .build import build_part

ffi, lib_names = read_headers("kvm_filter.h")
READ, WRITE, BOTH = 1, 2, 3
MOST = lib_names.FILTER_RANGE_MSRS
LAST = 0xFFFF_FFFF
X2APIC = range(0x800, 0x900)

library: Any = ffi.dlopen(str(build_part("kvm_filter.c")))


@dataclass(frozen=True)
class Range:
    """Part of a VMM's own filter; ``denied`` of its MSRs are handed to the VMM."""

    flags: int
    first: int
    count: int
    denied: frozenset[int]


@dataclass(frozen=True)
class Own:
    """A VMM's own filter."""

    ranges: tuple[Range, ...] = ()
    denies_others: bool = False

    def pack(self) -> Any:
        filter_: Any = ffi.new("struct filter *")
        filter_.denies_others = self.denies_others
        filter_.count = len(self.ranges)
        for packed, each in zip(filter_.ranges, self.ranges, strict=False):
            packed.flags, packed.first, packed.count = each.flags, each.first, each.count
            for i in range(each.count):
                if each.first + i not in each.denied:
                    packed.allowed[i // 8] |= 1 << i % 8
        return filter_

    def denies(self, msr: int, flag: int) -> bool:
        """What KVM would do (arch/x86/kvm/x86.c, kvm_msr_allowed)."""
        if msr in X2APIC:
            return False
        for each in self.ranges:
            if each.flags & flag and each.first <= msr < each.first + each.count:
                return msr in each.denied
        return self.denies_others


Want = tuple[int, int, int]
"""Flags, first and last MSR."""


def merge(own: Own, wants: Sequence[Want]) -> Any:
    """The merged filter, which KVM would accept."""
    merged: Any = ffi.new("struct filter *")
    packed = ffi.new("struct filter_want[]", [{"flags": flags, "first": first, "last": last} for flags, first, last in wants])
    assert library.filter_merge(own.pack(), packed, len(wants), merged)
    assert merged.count <= 16
    for i in range(merged.count):
        each = merged.ranges[i]
        assert 0 < each.count <= MOST
        assert each.flags in (READ, WRITE, BOTH)
        assert each.first + each.count - 1 <= LAST
    assert merged.count or not merged.denies_others
    return merged


def denied(merged: Any, msr: int, flag: int) -> bool:
    return not library.filter_allows(merged, msr, flag)


def is_wanted(own: Own, wants: Sequence[Want], msr: int, flag: int) -> bool:
    return msr not in X2APIC and (
        own.denies(msr, flag) or any(flags & flag and first <= msr <= last for flags, first, last in wants)
    )


def borders(own: Own, wants: Sequence[Want]) -> set[int]:
    """The MSRs at which anything can change, and their neighbours."""
    at = {0, 0x2FFF, 0x3000, 0x4000_0000, 0xC000_0080, 0xC000_3000, 0xC001_0000, LAST}
    for _, first, last in wants:
        at |= {first, last}
    for each in own.ranges:
        at |= {each.first, each.first + each.count - 1, *each.denied}
    return {msr for border in at for msr in (border - 1, border, border + 1) if 0 <= msr <= LAST}


MSR = st.one_of(
    st.integers(0, 0x3100), st.integers(0x4000_0000, 0x4000_0200), st.integers(0xC000_0000, 0xC001_1100), st.integers(0, LAST)
)
FLAGS = st.sampled_from([READ, WRITE, BOTH])


@st.composite
def own_ranges(draw: st.DrawFn) -> Range:
    count = draw(st.sampled_from([1, 2, 7, 64, 300]))
    first = min(draw(MSR), LAST + 1 - count)
    denied = draw(st.frozensets(st.integers(first, first + count - 1), max_size=5))
    return Range(draw(FLAGS), first, count, denied)


@st.composite
def some_wants(draw: st.DrawFn) -> Want:
    first = draw(MSR)
    last = draw(st.one_of(st.just(first), st.integers(first, min(LAST, first + 0x400)), st.integers(first, LAST)))
    return draw(FLAGS), first, last


OWN = st.builds(Own, st.lists(own_ranges(), max_size=16).map(tuple), st.booleans())


@settings(max_examples=150, deadline=None)
@given(OWN, st.lists(some_wants(), max_size=12))
def test_nothing_that_is_wanted_gets_past(own: Own, wants: list[Want]) -> None:
    merged = merge(own, wants)
    for msr in borders(own, wants):
        for flag in (READ, WRITE):
            if is_wanted(own, wants, msr, flag):
                assert denied(merged, msr, flag), f"{msr:x} {flag}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FLAGS, st.integers(0, 0x2000), st.integers(0, 9)), max_size=8), st.booleans())
def test_it_is_exact_where_processors_have_msrs(found: list[tuple[int, int, int]], high: bool) -> None:
    base = 0xC000_0000 if high else 0
    wants = [(flags, base + first, base + first + more) for flags, first, more in found]
    own = Own((Range(READ, 0x35, 1, frozenset({0x35})),))
    merged = merge(own, wants)
    for msr in borders(own, wants):
        for flag in (READ, WRITE):
            assert denied(merged, msr, flag) == is_wanted(own, wants, msr, flag), f"{msr:x} {flag}"


def test_nothing_wanted_is_the_vmms_own() -> None:
    merged = merge(Own(), [])
    assert (merged.count, merged.denies_others) == (0, False)
    qemus = merge(Own((Range(READ, 0x35, 1, frozenset({0x35})),)), [])
    assert qemus.count == 1
    assert denied(qemus, 0x35, READ) and not denied(qemus, 0x35, WRITE) and not denied(qemus, 0x34, READ)


def test_all_but_a_few_is_exact_where_processors_have_msrs() -> None:
    left_out = (0x48, 0x49, 0xE7, 0xE8, 0xC000_0102)
    wants, first = [], 0
    for msr in (*left_out, LAST + 1):
        wants.append((WRITE, first, msr - 1))
        first = msr + 1
    merged = merge(Own((Range(READ, 0x35, 1, frozenset({0x35})),)), wants)
    assert merged.denies_others
    for msr in left_out:
        assert not denied(merged, msr, WRITE)
        assert not denied(merged, msr, READ)
    for msr in (0, 0x10, 0x1B, 0x35, 0x6E0, 0x2FFF, 0x4000_0070, 0x4B56_4D01, 0xC000_0080, 0xC001_0015, 0x8000_0000):
        assert denied(merged, msr, WRITE)
    assert [denied(merged, msr, READ) for msr in (0x10, 0x35, 0x1B, 0xC000_0080)] == [False, True, False, False]


def test_x2apic_cannot_be_denied() -> None:
    merged = merge(Own((), denies_others=True), [(BOTH, 0, LAST)])
    assert not any(denied(merged, msr, flag) for msr in X2APIC for flag in (READ, WRITE))
    assert denied(merged, 0x7FF, READ) and denied(merged, 0x900, WRITE)


def test_of_ranges_that_overlap_the_first_one_counts() -> None:
    allow, deny = Range(WRITE, 0x100, 8, frozenset()), Range(BOTH, 0x100, 16, frozenset(range(0x100, 0x110)))
    merged = merge(Own((allow, deny)), [(READ, 0x300, 0x300)])
    assert not denied(merged, 0x103, WRITE) and denied(merged, 0x103, READ) and denied(merged, 0x10A, WRITE)


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 200])
def test_many_single_msrs_far_from_each_other(count: int) -> None:
    wants = [(WRITE, 0x1000_0000 + i * 0x10_0000, 0x1000_0000 + i * 0x10_0000) for i in range(count)]
    merged = merge(Own(), wants)
    assert merged.denies_others == (count > 16)
    assert all(denied(merged, first, WRITE) for _, first, _ in wants)
    assert not denied(merged, 0xC000_0080, WRITE)


def test_a_range_too_long_for_a_bitmap() -> None:
    wants = [(WRITE, 0xC000_0000, 0xC000_0000 + MOST)]
    merged = merge(Own(), wants)
    assert denied(merged, 0xC000_0000 + MOST, WRITE)
    assert not denied(merged, 0x10, WRITE) and not denied(merged, 0xC000_0080, READ)
    exact = merge(Own(), [(WRITE, 0xC000_0000, 0xC000_0000 + MOST - 1)])
    assert (exact.count, exact.denies_others) == (1, False)
    assert not denied(exact, 0xC000_0000 + MOST, WRITE)
