"""Tests of how a command line becomes tokens, numbers and whole commands."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.commands.tokens import (
    Token,
    TokenKind,
    commands_of,
    is_complete,
    parse_number,
    parse_u32,
    tokenize,
)

N, W, S, B = TokenKind.NUMBER, TokenKind.WORD, TokenKind.STRING, TokenKind.BLOCK

# Each rule, with lines that show it and the kinds and texts expected.
RULES: dict[str, list[tuple[str, list[tuple[TokenKind, str]]]]] = {
    "spaces separate words": [
        ("", []),
        ("   ", []),
        ("events", [(W, "events")]),
        ("  !msrwrite   stage  post ", [(W, "!msrwrite"), (W, "stage"), (W, "post")]),
        ("-k1=v1 (p q) [] > ; $p @r", [(W, t) for t in ["-k1=v1", "(p", "q)", "[]", ">", ";", "$p", "@r"]]),
    ],
    "other white space does not separate but is trimmed": [
        ("stage\tpost", [(W, "stage\tpost")]),
        ("stage\npost", [(W, "stage\npost")]),
        ("\n\n events\n\t", [(W, "events")]),
        ("\v\f\r\n\t", []),
        ("a\u00a0 b", [(W, "a\u00a0"), (N, "b")]),
    ],
    "words that are numbers": [
        ("0xc0000082 1b", [(N, "0xc0000082"), (N, "1b")]),
        (
            "add bc e 0n10 n10 x10 0y1",
            [(N, "add"), (N, "bc"), (N, "e"), (N, "0n10"), (N, "n10"), (N, "x10"), (W, "0y1")],
        ),
        ("\\x1B fffff800`12345678", [(N, "\\x1B"), (N, "fffff800`12345678")]),
        ("\t174\n", [(N, "174")]),
        ("99numbers 0n99999999999999999999 0x", [(W, "99numbers"), (W, "0n99999999999999999999"), (W, "0x")]),
        ('1b"x"1b{x}1b', [(N, "1b"), (S, "x"), (N, "1b"), (B, "x"), (N, "1b")]),
    ],
    "quotes make a string": [
        ('log "two words" end', [(W, "log"), (S, "two words"), (W, "end")]),
        ('log" a\tb\n "end', [(W, "log"), (S, " a\tb\n "), (W, "end")]),
        ('"x""y"', [(S, "x"), (S, "y")]),
        ('"1b"', [(S, "1b")]),
        ("log \"\" 'a b'", [(W, "log"), (W, "'a"), (W, "b'")]),
        ('"{a} // b /* c */"', [(S, "{a} // b /* c */")]),
        ('"it\'s"', [(S, "it's")]),
    ],
    "escapes in a string": [
        (r'"say \"hi\"" now', [(S, 'say "hi"'), (W, "now")]),
        (r'"\""', [(S, '"')]),
        (r'"c:\new\{x\}\\y"', [(S, r"c:\new\{x\}\\y")]),
        (r'"c:\dir\" end', [(W, 'c:\\dir" end')]),
        (r'"a\\" end"', [(S, r"a\" end")]),
    ],
    "escaped quote outside a string": [
        (r"say \"hi you", [(W, "say"), (W, '"hi'), (W, "you")]),
        (r'a\"b"c d"', [(W, 'a"b'), (S, "c d")]),
    ],
    "braces make a block": [
        (
            "!msrwrite script { @rax = 1; } core 1",
            [(W, "!msrwrite"), (W, "script"), (B, " @rax = 1; "), (W, "core"), (N, "1")],
        ),
        ("script{\n\tpause();\n}stage", [(W, "script"), (B, "\n\tpause();\n"), (W, "stage")]),
        ("{if (1) { {} } else {2}}", [(B, "if (1) { {} } else {2}")]),
        ("code {90} condition {}", [(W, "code"), (B, "90"), (W, "condition"), (B, "")]),
        ("{}{ }{\n}", [(B, ""), (B, " "), (B, "\n")]),
        ("a} } b", [(W, "a}"), (W, "}"), (N, "b")]),
        ("{a}} b", [(B, "a"), (W, "}"), (N, "b")]),
    ],
    "quotes protect braces in a block": [
        ('{ print("}"); } z', [(B, ' print("}"); '), (W, "z")]),
        ('{ print("{{"); }', [(B, ' print("{{"); ')]),
        (r'{ print("a\"}"); }', [(B, r' print("a\"}"); ')]),
        (r"{ \"} z", [(B, r" \""), (W, "z")]),
        ('{""}', [(B, '""')]),
    ],
    "escaped braces": [
        (r"a\{b\}c", [(W, "a{b}c")]),
        (r"\{ \}", [(W, "{"), (W, "}")]),
        (r"{a \{ b} z", [(B, "a { b"), (W, "z")]),
        (r"{a \} b} z", [(B, "a } b"), (W, "z")]),
        (r'{ "\{\}" }', [(B, r' "\{\}" ')]),
        (r"a\\{b", [(W, r"a\{b")]),
    ],
    "block comments": [
        ("a1 /* no */ b2", [(N, "a1"), (N, "b2")]),
        ('sta/* no { " */ge', [(W, "stage")]),
        ("/**/x1/*/ still */", [(N, "x1")]),
        ("/* two\nlines */ events", [(W, "events")]),
        ("/* a /* b */ c */", [(N, "c"), (W, "*/")]),
        ("{ a /* } */ b } z", [(B, " a /* } */ b "), (W, "z")]),
        ("/* open end", [(W, "/*"), (W, "open"), (W, "end")]),
        ("{/* open} z", [(B, "/* open"), (W, "z")]),
        ("a / * b", [(N, "a"), (W, "/"), (W, "*"), (N, "b")]),
        ("{ 4 / 2 } /", [(B, " 4 / 2 "), (W, "/")]),
    ],
    "line comments": [
        ("events // all of them", [(W, "events")]),
        ("// one\nevents // two\nclear", [(W, "events"), (W, "clear")]),
        ("http://host/x y", [(W, "http:")]),
        ("# kept", [(W, "#"), (W, "kept")]),
        ("events// {\nz", [(W, "events\nz")]),
        ('// "\nz', [(W, "z")]),
        ("x //", [(W, "x")]),
        ("x // no } y", [(W, "x")]),
    ],
    "line comments in a block": [
        ("{ x // no\n y } z", [(B, " x // no\n y "), (W, "z")]),
        ("{ x // no } z", [(B, " x // no "), (W, "z")]),
        ("{ x // a {brace\n y } z", [(B, " x // a {brace\n y "), (W, "z")]),
        (r"{ x // \} y } z", [(B, r" x // \} y "), (W, "z")]),
        (r"{ x // no" + "\n" + r"\} y } z", [(B, " x // no\n} y "), (W, "z")]),
        ('{ x // "}" y } z', [(B, ' x // "}" y '), (W, "z")]),
        # A literal lines away protects this comment's brace, too.
        ('{ x // no }\n print("y"); } z', [(B, ' x // no }\n print("y"); '), (W, "z")]),
        ("{ x // it's }\n y } z", [(B, " x // it's "), (W, "y"), (W, "}"), (W, "z")]),
        ('{ a // 5" or\n // more } z', [(B, ' a // 5" or\n // more '), (W, "z")]),
    ],
    "line comments and newlines written as backslash n": [
        (r"// no\nevents", [(W, "events")]),
        (r"x // no\ny", [(W, "x"), (W, "y")]),
        (r'x // print("\n") y', [(W, "x")]),
        (r"{ x // no\n y } z", [(B, r" x // no\n y "), (W, "z")]),
        (r'{ x // print("\n"); } z', [(B, r' x // print("\n"); '), (W, "z")]),
    ],
    "a backslash before its end makes a line comment swallow everything": [
        ("x // c:\\dir\\\nevents", [(W, "x")]),
        (r"x // a\\n events", [(W, "x")]),
        ("{ x // c:\\\n y } z", [(W, "x // c:\\\n y } z")]),
    ],
    "newline written as backslash n before a token": [
        (r"\nevents\n", [(W, r"events\n")]),
        (r"\n\n events \n{\nx\n}", [(W, "events"), (B, r"x\n")]),
        (r'\n"\nx"', [(S, r"\nx")]),
        (r"\new \\n", [(W, "ew"), (W, r"\\n")]),
    ],
    "unfinished": [
        ("log { @rax ", [(W, "log"), (W, "@rax")]),
        ("log {a {b} ", [(W, "log"), (W, "a {b}")]),
        ('log "no end ', [(W, "log"), (W, "no end")]),
        ('log "', [(W, "log")]),
        ("log {", [(W, "log")]),
        ('{ "} z', [(W, '"} z')]),
        ('"10', [(N, "10")]),
        ("a\\", [(W, "a\\")]),
        ("a/", [(W, "a/")]),
    ],
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [pytest.param(*row, id=f"{rule}: {row[0]!a}") for rule, rows in RULES.items() for row in rows],
)
def test_rules(line: str, expected: list[tuple[TokenKind, str]]) -> None:
    assert [(token.kind, token.text) for token in tokenize(line)] == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  !msrwrite 1b ", ["!msrwrite", "1b"]),
        ('log"two words"{ a }end', ["log", '"two words"', "{ a }", "end"]),
        (r'"a\"b" \{c', [r'"a\"b"', r"\{c"]),
        ("\n\tstage\t ", ["stage"]),
        ("/**/sta/* no */ge /**/ x", ["sta/* no */ge", "x"]),
        (r"\n\nstage // no", ["stage"]),
        ("log { @rax ", ["log", "{ @rax"]),
        ('log " no end ', ["log", '" no end']),
        ('"" {}', ["{}"]),
    ],
)
def test_offsets_cover_what_was_typed(line: str, expected: list[str]) -> None:
    assert [line[token.start : token.end] for token in tokenize(line)] == expected


def test_lower_is_for_ascii_letters_only() -> None:
    # The Kelvin sign must not make a keyword.
    assert Token(W, "STAGE-Post \u212a\u0130", 0, 0).lower == "stage-post \u212a\u0130"


def test_tokens_are_values() -> None:
    assert tokenize("a {b}") == tokenize("a {b}")
    with pytest.raises(AttributeError):
        tokenize("a")[0].text = "b"  # type: ignore[misc]


TRICKY = st.sampled_from(
    [
        '"',
        "{",
        "}",
        "\\",
        "/",
        "//",
        "/*",
        "*/",
        "\\n",
        "\n",
        " ",
        "\t",
        '\\"',
        "\\}",
        "\\{",
        "a",
        "zz",
        "0n10",
        "é",
    ]
)
LINES = st.lists(TRICKY | st.text(max_size=3), max_size=40).map("".join)


@given(LINES)
def test_any_line_gives_sound_tokens(line: str) -> None:
    tokens = tokenize(line)
    assert tokens == tokenize(line)
    assert all(0 <= token.start < token.end <= len(line) for token in tokens)
    assert all(before.end <= after.start for before, after in pairwise(tokens))
    for token in tokens:
        typed = line[token.start : token.end]
        if token.kind is S:
            assert typed[0] == typed[-1] == '"' and len(typed) >= 3 and token.text
        elif token.kind is B:
            assert typed[0] == "{" and typed[-1] == "}"
        else:
            assert token.text and token.text == token.text.strip(" \t\n\v\f\r")
            assert (token.kind is N) == (parse_number(token.text) is not None)
        # Whatever is taken out or undone, the text is what was typed with characters left out.
        rest = iter(typed)
        assert all(char in rest for char in token.text)


@given(LINES)
def test_nothing_typed_is_lost_between_tokens(line: str) -> None:
    tokens = tokenize(line)
    edges = [0, *(edge for token in tokens for edge in (token.start, token.end)), len(line)]
    gaps = [line[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    for gap in gaps:
        if not any(mark in gap for mark in ("//", "/*", "\\n", '"', "{")):
            assert not gap.strip(" \t\n\v\f\r")


WORDS = st.text(st.sampled_from("abgxyz019_!.$@-=:;'()"), min_size=1, max_size=8)
STRINGS = st.text(st.sampled_from("ab {}/*\t\n'\""), min_size=1, max_size=8)
BLOCKS = st.recursive(
    st.text(st.sampled_from("ab ;=\n@("), max_size=6),
    lambda inner: st.builds("{}{{{}}}{}".format, inner, inner, inner) | st.builds('"{}" {}'.format, st.just("}{"), inner),
    max_leaves=6,
)


@st.composite
def typed_tokens(draw: st.DrawFn) -> tuple[str, list[Token]]:
    """A line and the tokens it was made from, with as much or little between them as the rules allow."""
    line = draw(st.sampled_from(["", " ", '/* " { */']))
    tokens: list[Token] = []
    for kind in draw(st.lists(st.sampled_from([W, S, B]), max_size=8)):
        between = [" ", "   ", " /*x*/ ", " // x\n"]
        if not (tokens and kind is W and tokens[-1].kind in (W, N)):  # two words would become one
            between += ["", "/* x */", "\n"]
        if tokens:
            line += draw(st.sampled_from(between))
        if kind is W:
            text = draw(WORDS)
            typed = text
            kind = W if parse_number(text) is None else N
        elif kind is S:
            text = draw(STRINGS)
            typed = '"' + text.replace('"', '\\"') + '"'
        else:
            text = draw(BLOCKS)
            typed = "{" + text + "}"
        tokens.append(Token(kind, text, len(line), len(line) + len(typed)))
        line += typed
    return line + draw(st.sampled_from(["", " ", "\n", " // end"])), tokens


@given(typed_tokens())
def test_simple_tokens_come_back(typed: tuple[str, list[Token]]) -> None:
    line, tokens = typed
    assert tokenize(line) == tokens


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("start", "unit", "count"),
    [
        ("", "ab ", None),
        ("", "a", 1),
        ("", "a/* ", None),
        ("", "/**/", 0),
        ("", "// a\n", 0),
        ("", '// "\n', 0),
        ("", "\\", 1),
        ("", "\\n", 0),
        ("", "\\{", 1),
        ("", "{}", None),
        ("", "{", 1),
        ("", '"', 0),
        ("", '\\"', 1),
        ('"', '\\"', 1),
        ("{", '\\"', 1),
        ("{", "//\n", 1),
        ("{", '// "\n', 1),
        ("{", "// \\}\n", 1),
        ("{", "/* ", 1),
        ("", "{//}", None),
        ("", '{//""}', None),
        ("", '"a"', None),
    ],
)
@pytest.mark.timeout(60)
def test_megabyte_is_read_in_linear_time(start: str, unit: str, count: int | None) -> None:
    # Reading the rest of the line once for each unit would take far longer than the timeout.
    units = MEGABYTE // len(unit)
    assert len(tokenize(start + unit * units)) == (units if count is None else count)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("10", 0x10),
        ("0010", 0x10),
        ("1bC", 0x1BC),
        ("0x1b", 0x1B),
        ("0X1b", 0x1B),
        ("x1b", 0x1B),
        ("X1b", 0x1B),
        ("\\x1b", 0x1B),
        ("\\X1b", 0x1B),
        ("0n10", 10),
        ("0N10", 10),
        ("n10", 10),
        ("N10", 10),
        ("\\n10", 10),
        ("\\N10", 10),
        ("0n010", 10),
        ("fffff800`12345678", 0xFFFFF800_12345678),
        ("0x`1`", 1),
        ("0n1`0", 10),
        ("0b11", 0xB11),
        ("ffffffffffffffff", 2**64 - 1),
        ("00ffffffffffffffff", 2**64 - 1),
        ("10000000000000000", 2**64 - 1),
        ("f" * 100_000, 2**64 - 1),
        ("0" * 100_000 + "1", 1),
        ("0n18446744073709551615", 2**64 - 1),
        ("0n18446744073709551616", None),
        ("0n99999999999999999999", None),
        ("0n" + "9" * 100_000, None),
        ("0n" + "0" * 100_000 + "9", 9),
        ("", None),
        ("0x", None),
        ("x", None),
        ("0n", None),
        ("n", None),
        ("`", None),
        ("0x`", None),
        ("`0x1", None),
        ("0`x1", None),
        ("0x0x1", None),
        ("xx1", None),
        ("0n1f", None),
        ("0o17", None),
        ("1g", None),
        ("-1", None),
        ("+1", None),
        ("1_0", None),
        (" 1", None),
        ("1\n", None),
        ("1.0", None),
        ("\u0661", None),
        ("0n\u0661", None),
        ("\uff11", None),
    ],
)
def test_numbers(text: str, number: int | None) -> None:
    assert parse_number(text) == number
    assert parse_u32(text) == (number if number is not None and number < 2**32 else None)


def test_32_bit_limit() -> None:
    assert parse_u32("ffffffff") == parse_u32("0n4294967295") == 2**32 - 1
    assert parse_u32("100000000") is None
    assert parse_u32("0n4294967296") is None


def model_number(text: str) -> int | None:
    """`parse_number` again, one character at a time."""
    base = 16
    for prefix in ("0x", "\\x", "x", "0n", "\\n", "n"):
        if text[: len(prefix)].lower() == prefix:
            base = 10 if "n" in prefix else 16
            text = text[len(prefix) :]
            break
    value = 0
    seen = False
    for char in text:
        if char == "`":
            continue
        digit = "0123456789abcdef".find(char.lower())
        if not 0 <= digit < base:
            return None
        seen = True
        value = value * base + digit
    if not seen or (base == 10 and value >= 2**64):
        return None
    return min(value, 2**64 - 1)


@given(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "0x", "0X", "\\x", "x", "X", "0n", "0N", "\\n", "\\N", "n", "N", "`", "0", "\\"]),
            st.text(st.sampled_from("0123456789abcdefABCDEF`"), max_size=24)
            | st.text(st.sampled_from("0189`"), max_size=22)
            | st.text(st.sampled_from("019afnxg` -"), max_size=6),
        ),
    )
)
def test_numbers_like_the_model(text: str) -> None:
    assert parse_number(text) == model_number(text)


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(number: int) -> None:
    assert parse_number(f"{number:x}") == parse_number(f"0x{number:016X}") == parse_number(f"0n{number}") == number


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("", True),
        ("events", True),
        ("!msrwrite script {", False),
        ("!msrwrite script {\n if (1) {\n}", False),
        ("!msrwrite script {\n if (1) {\n}\n}", True),
        ("}", True),
        ("} {", False),
        ('log "a', False),
        ('log "a\nb"', True),
        ('"{"', True),
        ('{ "}"', False),
        (r'"a\"', False),
        (r'"a\\"', True),
        (r'"a\\\"', False),
        (r"say \"hi", True),
        (r"\{", False),
        (r"{ \}", True),
        ('"\\\n"', True),
        ("// {", False),
        ('/* " */', False),
        ("// it's", True),
    ],
)
def test_is_complete(text: str, complete: bool) -> None:
    assert is_complete(text) is complete


def model_complete(text: str) -> bool:
    """`is_complete` again, one character at a time."""
    depth, quoted, escaped = 0, False, False
    for char in text:
        if char == '"' and not escaped:
            quoted = not quoted
        if char == "{" and not quoted:
            depth += 1
        if char == "}" and not quoted:
            depth = max(0, depth - 1)
        escaped = char == "\\" and not escaped
    return depth == 0 and not quoted


@given(LINES)
def test_is_complete_like_the_model(text: str) -> None:
    assert is_complete(text) == model_complete(text)


def test_commands_of_a_script() -> None:
    script = """
events

!msrwrite 1b script {
  x = "two

lines {";

} stage post
\t
 log end
output "a
"""
    assert list(commands_of(script.splitlines(keepends=True))) == [
        (2, "events"),
        (4, '!msrwrite 1b script {\n  x = "two\n\nlines {";\n\n} stage post'),
        (11, " log end"),
        (12, 'output "a'),
    ]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_commands_of_takes_line_ends_off(ending: str) -> None:
    assert list(commands_of(line + ending for line in ["a {", "", "}", "", "b"])) == [
        (1, "a {\n\n}"),
        (5, "b"),
    ]


def test_commands_are_given_as_soon_as_they_are_whole() -> None:
    lines = iter(["a {", "}", "b"])
    assert next(commands_of(lines)) == (1, "a {\n}")
    assert next(lines) == "b"


@given(st.lists(st.lists(TRICKY, max_size=6).map("".join).map(lambda line: line.replace("\n", "")), max_size=12))
def test_commands_of_loses_no_line(lines: list[str]) -> None:
    commands = list(commands_of(lines))
    for position, (first, command) in enumerate(commands):
        own = command.split("\n")
        assert lines[first - 1 : first - 1 + len(own)] == own
        assert all(not is_complete("\n".join(own[:count])) for count in range(1, len(own)))
        assert is_complete(command) or position == len(commands) - 1
    taken = {first + offset for first, command in commands for offset in range(command.count("\n") + 1)}
    assert all(number in taken or not line.strip() for number, line in enumerate(lines, start=1))
    assert len(taken) == sum(command.count("\n") + 1 for _, command in commands)


@pytest.mark.timeout(60)
def test_script_of_one_huge_command_is_read_in_linear_time() -> None:
    lines = ["{", *["x = 1;"] * 200_000, "}"]
    [(first, command)] = commands_of(lines)
    assert first == 1 and command.count("\n") == 200_001
