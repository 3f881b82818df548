"""The compiler against nonsense: it answers with a message or a script, and what it compiles stays in its bounds."""

from __future__ import annotations

import random

import pytest

from tests.script.running import MEMORY, Session, machine
from tests.script.test_errors import ENDED, WRONG
from tests.script.test_table import ROWS
from vmexit.script.builtins import BUILTINS
from vmexit.script.errors import ScriptError, ScriptRunError
from vmexit.script.names import PSEUDO

WORDS = [
    *"+ - * / % & | ^ ~ ! < > = ( ) { } [ ] , ; . -> ++ -- << >> <= >= == != && || += <<= ?".split(),
    *"if else elsif while do for break continue return sizeof struct typedef int char unsigned float double void bool".split(),
    *"x y z my_var fun P .g .h @rax @al rbx cf 0 1 ff 0n10 0x 1.5 $value $msr".split(),
    *(f"${name}" for name in PSEUDO),
    *(f"{name}(" for name in BUILTINS if name != "microsleep"),
    *(
        '"abc"',
        'L"wide"',
        '"%d %s\\n"',
        "int x = 1;",
        "x = 5;",
        "struct P { int x; };",
        "while (x) {",
        "#include",
        "//",
        "/*",
        "\n",
    ),
    *("fffffffffffffff0", "5c01000000000000", "1000", "@", "$", "'", "\\", "é", "\0"),
]
TEXTS = [*(row[0] for row in ROWS), *(row[0] for row in WRONG), *(row[0] for row in ENDED)]


def attempt(session: Session, text: str) -> bool:
    """Whether it compiled; run it if so."""
    try:
        script = session.compiler.compile(text)
    except ScriptError as error:
        shown = error.render()
        return not shown
    on = machine()
    try:
        session.runtime.run(script, on, lambda _: None)
    except ScriptRunError as error:
        shown = error.render()
        return bool(shown)
    assert [start for start, _ in on.memory] == [MEMORY]
    return True


@pytest.mark.parametrize("seed", range(4))
def test_token_soup(seed: int) -> None:
    source = random.Random(seed)
    session = Session(steps=2000)
    for _ in range(400):
        attempt(session, " ".join(source.choices(WORDS, k=source.randint(1, 25))))


@pytest.mark.parametrize("seed", range(4))
def test_random_text(seed: int) -> None:
    source = random.Random(seed)
    session = Session(steps=2000)
    for _ in range(300):
        attempt(
            session, "".join(chr(source.choice([*range(32, 127), 10, 0, 233, 0x1F600])) for _ in range(source.randint(1, 60)))
        )


@pytest.mark.parametrize("seed", range(4))
def test_damaged_scripts(seed: int) -> None:
    source = random.Random(seed)
    session = Session(steps=2000)
    compiled = 0
    for _ in range(400):
        text = source.choice(TEXTS)
        if len(text) > 500 or "microsleep" in text:
            continue
        for _ in range(source.choice([1, 1, 2])):
            at = source.randint(0, len(text))
            match source.randrange(4):
                case 0:
                    text = text[:at] + text[at + source.randint(1, 4) :]
                case 1:
                    text = text[:at] + source.choice(WORDS) + text[at:]
                case 2:
                    text = text[:at] + source.choice(TEXTS)[:200] + text[at:]
                case _:
                    text = text[:at] + chr(source.randrange(32, 127)) + text[at + 1 :]
        if "microsleep" not in text:
            compiled += attempt(session, text)
    assert compiled > 10


@pytest.mark.parametrize(
    "text",
    [
        "print(" + " + ".join(["1"] * 5000) + ");",
        "print(" + " && ".join(["1"] * 3000) + ");",
        "x = 0;" + "x = x + 1;" * 3000,
        "if (0) { }" + " elsif (0) { }" * 1500,
        "print(" + "(" * 5000 + "1" + ")" * 5000 + ");",
        "x = " + "-" * 10000 + "1;",
        "x = " + "!" * 10000 + "1;",
        "while (1) {" * 1000,
        "x" * 100000 + " = 1;",
        "int " + "*" * 5000 + "p = 0; print(" + "*" * 5000 + "p);",
        "x = &x;" * 10 + "print(" + "*" * 50 + "x);",
        'printf("' + "%d" * 1000 + '"' + ", 1" * 1000 + ");",
        "p = 1;" + "print(p" + "[0]" * 1000 + ");",
        "struct P { struct P *n; }; struct P *p = 0; print(p" + "->n" * 1000 + ");",
        "/*" * 100000,
        "((((" * 10000,
        '"' * 9999,
        "x = 1" + "1" * 200000 + ";",
        "int v[2]" + "[2]" * 40 + ";",
        "x=1;" * 100000,
    ],
    ids=range(20),
)
@pytest.mark.timeout(60)
def test_large_and_deep(text: str) -> None:
    attempt(Session(steps=20000), text)
