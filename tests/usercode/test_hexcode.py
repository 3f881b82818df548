"""Machine code as hexadecimal digits: every form that HyperDbg documents, and what is none."""

import pytest

from vmexit.usercode.errors import CodeError
from vmexit.usercode.hexcode import MAX_CODE, parse

NAME = "65488B042588010000488B80B8000000488B805004000048B9737663686F73742E4839C874054831C0EB0748C7C001000000C3"


@pytest.mark.parametrize(
    "text",
    [
        "488b59",
        "488B59",
        " 48 8b 59 ",
        "48 8b\n\t59",
        "0x488b59",
        "0X48 0x8B 0x59",
        "0x48, 0x8b,0x59",
        r"\x48\x8b\x59",
        r"\x48 \X8B \x59",
        r"\x488b59",
        "x488b59",
        "488b 59",
    ],
)
def test_all_forms_mean_the_same_bytes(text: str) -> None:
    assert parse(text) == b"\x48\x8b\x59"


def test_the_manuals_example_is_read_as_printed() -> None:
    assert parse(NAME) == bytes.fromhex(NAME)


@pytest.mark.parametrize(("text", "code"), [("9", b"\x09"), ("0x123", b"\x01\x23")])
def test_one_word_with_an_odd_number_of_digits_gets_a_zero_in_front(text: str, code: bytes) -> None:
    assert parse(text) == code


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("90 9", "9"),
        ("90 nop", "nop"),
        ("0x", None),
        ("", None),
        ("0x90x90", "0x90x90"),
        ("90; 90", "90;"),
        ("90-90", "90-90"),
        ("٩٠", "٩٠"),
        (",", None),
        ("\\y90", "\\y90"),
    ],
)
def test_what_is_no_code_is_refused_at_its_place(text: str, blamed: str | None) -> None:
    with pytest.raises(CodeError) as refused:
        parse(text)
    if blamed is not None:
        assert text[refused.value.start : refused.value.end] == blamed


def test_the_longest_code_and_one_byte_more() -> None:
    assert len(parse("90" * MAX_CODE)) == MAX_CODE
    with pytest.raises(CodeError, match="too long"):
        parse("90" * (MAX_CODE + 1))
