"""Tests of what a user is told when something goes wrong."""

import copy
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.errors import CommandError, LinkError, TargetError, UsageError, VmexitError


def blame(line: str, part: str, message: str = "no", hint: str | None = None) -> CommandError:
    start = line.index(part)
    return CommandError(message, line, start, start + len(part), hint)


@pytest.mark.parametrize("kind", [CommandError, LinkError, TargetError, UsageError])
def test_one_tree(kind: type[VmexitError]) -> None:
    assert issubclass(kind, VmexitError)


def test_the_message_is_always_one_printable_line() -> None:
    assert str(TargetError("bad\nname \x1b[31mé\udc80")) == "bad\\nname \\x1b[31mé\\udc80"
    assert str(CommandError("unknown word 'a\nb'", "a\nb", 0, 3)) == "unknown word 'a\\nb'"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (None, "unknown stage 'past'"),
        ("pre, post or all", "unknown stage 'past' (pre, post or all)"),
        ("did you mean 'post'?", "unknown stage 'past': did you mean 'post'?"),
        ("say post (or pre)", "unknown stage 'past': say post (or pre)"),
    ],
)
def test_hint_follows_the_message(hint: str | None, expected: str) -> None:
    error = blame("!msrwrite stage past", "past", "unknown stage 'past'", hint)
    assert str(error) == expected
    assert error.render() == f"{expected}\n!msrwrite stage past\n                ^~~~"


def test_one_character_gets_a_bare_caret() -> None:
    assert blame("!msrwrite ? on", "?").render() == "no\n!msrwrite ? on\n          ^"


def test_something_missing_is_marked_after_the_end() -> None:
    line = "!msrwrite core"
    assert CommandError("no", line, len(line), len(line)).render() == "no\n!msrwrite core\n              ^"


def test_without_a_line_only_the_message_is_given() -> None:
    assert CommandError("no", "", 0, 0).render() == "no"
    assert CommandError("no", " \n ", 1, 2, "never").render() == "no (never)"


def test_offsets_outside_the_line_are_brought_inside() -> None:
    error = CommandError("no", "abc", -4, 99)
    assert (error.start, error.end) == (0, 3)
    assert error.render() == "no\nabc\n^~~"
    assert CommandError("no", "abc", 2, 1).render() == "no\nabc\n  ^"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("!msrwrite", "no\n!msrwrite script {\n^~~~~~~~~"),
        ("bad", "no\n  x = bad;\n      ^~~"),
        ("stage", "no\n} stage past\n  ^~~~~"),
        ("{\n  x = bad;\n}", "no\n!msrwrite script {\n                 ^"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_of_several_lines_only_the_one_to_blame_is_shown(part: str, expected: str, newline: str) -> None:
    line = "!msrwrite script {\n  x = bad;\n} stage past".replace("\n", newline)
    assert blame(line, part.replace("\n", newline)).render() == expected


def test_a_newline_to_blame_is_marked_at_the_end_of_its_line() -> None:
    assert CommandError("no", "log {\na", 5, 6).render() == "no\nlog {\n     ^"


def test_tab_is_shown_as_spaces() -> None:
    assert blame("ab\tcd\te f", "cd").render() == "no\nab      cd      e f\n        ^~"
    assert blame("a\tb", "\t").render() == "no\na       b\n ^~~~~~~"


def test_wide_and_combining_characters() -> None:
    assert blame("日本 bad", "bad").render() == "no\n日本 bad\n     ^~~"
    assert blame("a 日本", "日本").render() == "no\na 日本\n  ^~~~"
    assert blame("e\u0301 bad", "bad").render() == "no\ne\u0301 bad\n  ^~~"


def test_what_cannot_be_shown_is_escaped() -> None:
    assert blame("a\x1b[0m bad", "bad").render() == "no\na\\x1b[0m bad\n         ^~~"
    assert blame("a \u202eb", "\u202eb").render() == "no\na \\u202eb\n  ^~~~~~~"


def test_long_line_is_cut_around_the_mark() -> None:
    message, shown, marks = blame("x" * 5000 + " bad " + "y" * 5000, "bad").render().split("\n")
    assert message == "no"
    assert shown.startswith("...x") and shown.endswith("y...")
    assert 100 <= len(shown) <= 106
    assert shown[marks.index("^") :].startswith("bad y") and marks.endswith(" ^~~")


def test_long_line_is_cut_on_one_side_when_the_mark_is_at_an_end() -> None:
    shown, marks = blame("bad " + "y" * 5000, "bad").render().split("\n")[1:]
    assert shown == "bad " + "y" * 96 + "..." and marks == "^~~"
    shown, marks = blame("x" * 5000 + " bad", "bad").render().split("\n")[1:]
    assert shown == "..." + "x" * 96 + " bad" and marks == " " * 100 + "^~~"


def test_long_line_is_cut_before_what_is_missing_at_its_end() -> None:
    shown, marks = CommandError("no", "x" * 5000, 5000, 5000).render().split("\n")[1:]
    assert shown == "..." + "x" * 100 and marks == " " * 103 + "^"


def test_mark_that_fits_is_shown_whole() -> None:
    shown, marks = blame("x" * 5000 + "b" * 66 + "y" * 5000, "b" * 66).render().split("\n")[1:]
    assert shown == "..." + "x" * 17 + "b" * 66 + "y" * 17 + "..."
    assert marks == " " * 20 + "^" + "~" * 65


def test_long_mark_without_width_is_cut_too() -> None:
    shown, marks = blame("x" * 200 + "\u0301" * 300 + "y", "\u0301" * 300).render().split("\n")[1:]
    assert shown == "..." + "x" * 100 + "\u0301" * 100 + "..." and marks == " " * 103 + "^"


def test_long_mark_is_cut_where_the_line_is() -> None:
    shown, marks = blame("say " + "b" * 5000 + " end", "b" * 5000).render().split("\n")[1:]
    assert shown.startswith("say bbb") and shown.endswith("b...")
    assert marks.lstrip() == "^" + "~" * (len(shown) - len("say ...") - 1)


def test_error_can_be_copied_and_pickled() -> None:
    error = blame("a bad", "bad", "no", "never")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert again.render() == error.render()
        assert (again.message, again.line, again.start, again.end, again.hint) == (
            "no",
            "a bad",
            2,
            5,
            "never",
        )


def columns(text: str) -> int:
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


@given(
    st.text(st.sampled_from("ab \t\n日\u0301\x00") | st.characters(), max_size=30),
    st.sampled_from(["", "x" * 60, "日" * 300, "\u0301" * 300, "\t" * 40]),
    st.integers(0, 400),
    st.integers(0, 400),
)
def test_any_line_renders(line: str, more: str, start: int, length: int) -> None:
    rendered = CommandError("no", line + more, start, start + length).render().split("\n")
    assert rendered[0] == "no"
    if len(rendered) > 1:
        _, shown, marks = rendered
        assert marks.lstrip(" ").rstrip("~") == "^"
        assert all(char.isprintable() for char in shown)
        # The mark starts on the line or just after its end, and ends on it.
        assert columns(shown) <= 106
        assert len(marks) <= max(columns(shown), marks.index("^") + 1) and marks.index("^") <= columns(shown)
