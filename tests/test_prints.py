"""What scripts print: many at once are the same texts as one by one."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmexit.prints import _plain
from vmexit.script.printf import parse_format, render

_U64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x8000, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
_CONVERSION = st.builds(
    "%{}{}{}{}{}".format,
    st.sets(st.sampled_from("-+ 0#")).map(lambda flags: "".join(sorted(flags))),
    st.one_of(st.just(""), st.integers(1, 30).map(str)),
    st.one_of(st.just(""), st.integers(0, 25).map(".{}".format)),
    st.sampled_from(["", "l", "ll", "h", "hh", "I64"]),
    st.sampled_from("diuxXo"),
)
_LITERAL = st.text(st.characters(codec="ascii", exclude_characters="%"), max_size=5) | st.just("%%")


@given(st.lists(_CONVERSION, max_size=4), st.lists(_LITERAL, min_size=5, max_size=5), st.data())
def test_many_at_once(conversions: list[str], literals: list[str], data: Any) -> None:
    text = "".join(a + b for a, b in zip(literals, [*conversions, ""], strict=False))
    format_ = parse_format(text.encode(), len(conversions))
    assert format_ is not None
    quick = _plain(format_)
    if quick is None:
        return
    rows = data.draw(st.lists(st.lists(_U64, min_size=len(conversions), max_size=len(conversions)), min_size=1, max_size=5))
    made = quick.render(np.array(rows, np.uint64).reshape(len(rows), len(conversions)))
    assert made == [render(format_, struct.pack(f"<{len(row)}Q", *row)) for row in rows]


def test_the_common_formats_are_quick() -> None:
    for text, count in ((b"%llx %llx\n", 2), (b"%d\n", 1), (b"100%%\n", 0), (b"[%08llx] %-6d %5u\n", 3)):
        format_ = parse_format(text, count)
        assert format_ is not None and _plain(format_) is not None


def test_what_has_strings_or_floats_is_not() -> None:
    for text, count in ((b"%s", 1), (b"%f", 1), (b"%c", 1), (b"%*d", 2), (b"%#x", 1), (b"%p", 1)):
        format_ = parse_format(text, count)
        assert format_ is not None and _plain(format_) is None
