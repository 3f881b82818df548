"""Tests of filters by value: what they mean on the wire, and which make no sense."""

from __future__ import annotations

import pytest

from vmexit.events.event import Event, EventError
from vmexit.events.filters import FilterError, ValueFilter
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, Stage

ALL_BITS = (1 << 64) - 1


@pytest.mark.parametrize(
    ("value", "mask", "changed", "expected"),
    [
        (5, None, False, (5, ALL_BITS, 0)),
        (0, None, False, (0, ALL_BITS, 0)),
        (0, 1, False, (0, 1, 0)),
        (None, None, True, (0, 0, ALL_BITS)),
        (None, 0xF0, True, (0, 0, 0xF0)),
        (0x10, 0xF0, True, (0x10, 0xF0, 0xF0)),
    ],
)
def test_what_the_agent_gets(value: int | None, mask: int | None, changed: bool, expected: tuple[int, int, int]) -> None:
    made = ValueFilter.of(value, mask, changed)
    assert made is not None
    assert tuple(made.wire().values()) == expected


def test_none_at_all() -> None:
    assert ValueFilter.of(None, None, False) is None


@pytest.mark.parametrize(
    ("value", "mask", "changed", "option", "message"),
    [
        (None, 1, False, "mask", "neither of them is there"),
        (1, 0, False, "mask", "looks at no bit"),
        (None, 0, True, "mask", "looks at no bit"),
        (2, 1, False, "value", "would never be met"),
        (1 << 64, None, False, "value", "64 bits"),
        (-1, None, False, "value", "64 bits"),
        (1, -1, False, "mask", "64 bits"),
        (1, 1 << 64, True, "mask", "64 bits"),
    ],
)
def test_what_makes_no_sense(value: int | None, mask: int | None, changed: bool, option: str, message: str) -> None:
    with pytest.raises(FilterError, match=message) as error:
        ValueFilter.of(value, mask, changed)
    assert error.value.option == option


@pytest.mark.parametrize(
    ("access", "stage", "given", "option"),
    [
        (Access.RDMSR, Stage.PRE, ValueFilter(value=1), "value"),
        (Access.RDMSR, Stage.ALL, ValueFilter(value=1), "value"),
        (Access.RDMSR, Stage.POST, ValueFilter(changed=True), "changed"),
        (Access.RDMSR | Access.WRMSR, Stage.PRE, ValueFilter(value=1), "value"),
        (Access.WRMSR, Stage.ALL, ValueFilter(value=1, changed=True), None),
        (Access.RDMSR, Stage.POST, ValueFilter(value=1), None),
    ],
)
def test_reads_have_a_value_only_afterwards(access: Access, stage: Stage, given: ValueFilter, option: str | None) -> None:
    event = Event(access=access, msrs=MsrSet.of(1), stage=stage, action=Action.RECORD, filter=given)
    if option is None:
        event.check()
        return
    with pytest.raises(EventError) as error:
        event.check()
    assert error.value.option == option


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (ValueFilter(0, 1), "mask 1 value 0"),
        (ValueFilter(changed=True), "changed"),
        (ValueFilter(2, 3, True), "changed mask 3 value 2"),
    ],
)
def test_as_text(given: ValueFilter, text: str) -> None:
    assert str(given) == text
