"""Runs the end-to-end cases of cases/*.txt; case.py says how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.case import Case, read_cases, run_case

CASES = [case for path in sorted(Path(__file__).parent.glob("cases/*.txt")) for case in read_cases(path)]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.file.stem}: {case.name}" for case in CASES])
def test_case(case: Case) -> None:
    run_case(case)


def test_there_are_cases() -> None:
    assert len(CASES) > 20


@pytest.mark.parametrize("text", ["WHAT x", "NAME a\nNAME b", "NAME only a name", "GUEST loop\nEXPECT x"])
def test_a_case_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"bad\.txt:\d"):
        read_cases(path)
