"""The examples in docs/script-language.md: each prints what the page says."""

import re
from pathlib import Path

import pytest

from tests.script.running import machine, output
from vmexit.script.builtins import BUILTINS, How
from vmexit.script.names import PSEUDO, REGISTERS

PAGE = (Path(__file__).parents[2] / "docs" / "script-language.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```script\n(.*?)^```\n\n```output\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("script", "shown"), EXAMPLES)
def test_example(script: str, shown: str) -> None:
    assert output(script, machine(rax=0x8000000000000000)) == shown


def test_every_script_block_is_an_example() -> None:
    assert PAGE.count("```script\n") == len(EXAMPLES) > 5


def test_every_builtin_is_on_the_page() -> None:
    words = set(re.findall(r"\w+", PAGE))
    expected = {name for name, builtin in BUILTINS.items() if builtin.how is not How.REFUSED and not name.endswith("_pa")}
    assert expected - words == set()


def test_every_register_is_on_the_page() -> None:
    words = set(re.findall(r"\w+", PAGE))
    wholes = (
        {register.whole for register in REGISTERS.values()}
        - {f"r{n}" for n in range(9, 15)}
        - {"rbx", "rcx", "rdx", "dr1", "dr2"}
    )
    assert wholes - words == set()
    assert set(PSEUDO) - words == set()
