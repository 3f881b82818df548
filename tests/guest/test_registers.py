"""Register names and the parts that they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.guest import registers
from vmexit.guest.registers import ALL, FLAGS, WHOLE
from vmexit.link.wire import REGISTERS
from vmexit.trap import Registers

names = st.sampled_from(sorted(ALL))
words = st.integers(0, (1 << 64) - 1)


def test_every_register_of_the_wire_has_one_whole_name() -> None:
    assert sorted(register.number for register in WHOLE) == list(range(REGISTERS))
    assert all(ALL[register.whole].number == register.number for register in ALL.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("rax", 0x1122334455667788), ("eax", 0x55667788), ("ax", 0x7788), ("ah", 0x77), ("al", 0x88)],
)
def test_parts_of_a_register(name: str, value: int) -> None:
    assert registers.find(name).extract(0x1122334455667788) == value


@pytest.mark.parametrize(("name", "bit"), [("cf", 0), ("pf", 2), ("zf", 6), ("if", 9), ("of", 11), ("id", 21)])
def test_flags(name: str, bit: int) -> None:
    assert FLAGS[name] == (bit, 1)
    assert registers.find(name.upper()).extract(1 << bit) == 1


@given(names, words, words)
def test_writing_a_part_leaves_the_rest(name: str, whole: int, value: int) -> None:
    register = registers.find(name)
    value &= (1 << register.bits) - 1
    changed = register.insert(whole, value)
    assert register.extract(changed) == value
    mask = ((1 << register.bits) - 1) << register.shift
    assert changed & ~mask == whole & ~mask


@given(names)
def test_what_does_not_fit_is_refused(name: str) -> None:
    register = registers.find(name)
    with pytest.raises(ValueError, match="does not fit"):
        register.insert(0, 1 << register.bits)
    with pytest.raises(ValueError, match="does not fit"):
        register.insert(0, -1)


def test_as_a_mapping() -> None:
    written: list[tuple[int, int]] = []
    mapping = Registers([0xFF, *[0] * 16, 0x246], lambda number, value: written.append((number, value)))
    assert {name: value for name, value in mapping.items() if value} == {"rax": 0xFF, "rflags": 0x246}
    assert len(mapping) == 18
    mapping["ah"] = 0x12
    mapping["CF"] = 1
    assert written == [(0, 0x12FF), (17, 0x247)]
    assert mapping["eax"] == 0x12FF
    for name in ("cr0", "xmm0", ""):
        with pytest.raises(KeyError):
            mapping[name]
    with pytest.raises(TypeError):
        del mapping["rax"]
