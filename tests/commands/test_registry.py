"""Tests of finding and carrying out commands, whatever is typed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands.fakes import Typist
from vmexit.commands import registry
from vmexit.commands.event_options import ALL
from vmexit.errors import CommandError, VmexitError
from vmexit.guest import registers


@pytest.mark.parametrize("line", ["", "   ", "// nothing", "/* nothing */ // at all", "\t\n", "\\n"])
def test_nothing(typist: Typist, line: str) -> None:
    assert typist.types(line) == ""


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("!msrwrit c0", "there is no command '!msrwrit': did you mean '!msrwrite'?\n!msrwrit c0\n^~~~~~~~"),
        ("  foo", "there is no command 'foo' ('help' lists the commands)\n  foo\n  ^~~"),
        ("# comment", "there is no command '#' (a comment begins with //)\n# comment\n^"),
        ("{g}", "a command does not begin with a brace\n{g}\n^~~"),
        ("g\tg", "there is no command 'g\\tg' ('help' lists the commands)\ng       g\n^~~~~~~~~"),
    ],
)
def test_no_such_command(typist: Typist, line: str, shown: str) -> None:
    assert typist.fails(line) == shown


def test_every_name_is_in_lower_case_and_belongs_to_one_command() -> None:
    names = [name for info in registry.infos() for name in info.names]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and " " not in name for name in names)


def test_what_is_said_about_the_commands_is_whole() -> None:
    for info in registry.infos():
        assert info.summary and not info.summary.endswith(".") and info.summary[0].islower()
        assert info.text.endswith(".")
        assert all(re.match(r"\S+", usage) for usage in info.usage)
        assert all(text.lstrip("'")[0].isalpha() and text.endswith(".") for _, text in info.parameters)


_WORDS = st.sampled_from(
    [
        *registry.names(),
        *ALL,
        *(
            "pre",
            "post",
            "all",
            "on",
            "off",
            "yes",
            "no",
            "e",
            "d",
            "c",
            "l",
            "=",
            "+",
            "-",
            "@",
            "0",
            "1",
            "2",
            "80",
            "c0000082",
        ),
        *(
            "fffff800`3ad6f010",
            "ffffffffffffffff",
            "0n10",
            "syntax",
            "overflow",
            "wait",
            "{",
            "}",
            "{ }",
            '"',
            "//",
            "/*",
            "*/",
            "\\",
        ),
        *registers.ALL,
    ]
)
_LINES = st.one_of(
    st.lists(_WORDS, max_size=8).map(" ".join),
    st.lists(st.one_of(_WORDS, st.text(max_size=5)), max_size=8).map(" ".join),
    st.tuples(st.sampled_from(list(registry.names())), st.text(max_size=30)).map(" ".join),
    st.text(max_size=40),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_LINES, max_size=6), st.booleans(), st.booleans())
def test_whatever_is_typed_is_done_or_refused_in_one_line(lines: list[str], is_at_trap: bool, has_memory: bool) -> None:
    typist = Typist()
    typist.target.is_at_trap = is_at_trap
    if has_memory:
        typist.map(0, bytes(range(256)) * 16)
        typist.map(0, bytes(range(256)) * 16, physical=True)
    try:
        for line in lines:
            error: VmexitError | None = None
            try:
                typist.types(line)
            except VmexitError as refusal:
                error = refusal
            assert error is None or str(error).isprintable()
            if isinstance(error, CommandError):
                assert 0 <= error.start <= error.end <= len(line)
                assert error.render()
    finally:
        typist.close()
