"""The benchmarks run, count what they should, and sum up right; how fast anything is, is not looked at."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import code, names, worker
from benchmarks.common import BenchmarkError, Case, Sample, Target, child, interleave, results, table
from benchmarks.loop import MSR, Loop

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb here (Debian: apt install gdb)")
needs_unicorn = pytest.mark.skipif(find_spec("unicorn") is None, reason="no unicorn here (pip install '.[bench]')")


def test_the_cheap_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--quick", "--rounds", "1", "--only", "other", "--only", "recorded", "--json", str(file)]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    # The case that the others are compared with comes along.
    assert [case["case"]["key"] for case in figures["cases"]] == ["plain", "other", "recorded"]
    for case in figures["cases"]:
        assert case["case"]["title"] in printed
        assert case["events"] == 1_000_000 and case["seconds"] > 0 and case["ratio"] > 0
        assert case["samples"][0]["vmm_bytes"] > 1 << 20
    assert {target["title"] for target in figures["targets"]} > {"an event on another MSR", "every write recorded"}
    for target in figures["targets"]:
        assert target["title"] in printed


@pytest.mark.parametrize(
    ("case", "count"),
    [("callback", 300), pytest.param("gdb", 40, marks=needs_gdb), pytest.param("unicorn", 300, marks=needs_unicorn)],
)
def test_a_case_sees_every_event(case: str, count: int) -> None:
    sample = child("benchmarks.worker", [case, str(count)], 60)
    assert sample.events == count and sample.seconds > 0


@pytest.mark.parametrize(("condition", "machine_code"), [(code.FALSE, None), (code.FALSE_BY_STACK, None), (None, code.NOPS)])
def test_the_cases_of_machine_code_see_every_event(condition: str | None, machine_code: bytes | None) -> None:
    assert code.with_event(50, lambda debugger: debugger.on_msr_write(MSR, condition=condition, code=machine_code)) > 0


def test_a_condition_that_holds_where_it_should_not_is_noticed() -> None:
    with pytest.raises(BenchmarkError, match="or the condition held"):
        code.with_event(5, lambda debugger: debugger.on_msr_write(MSR, condition="mov eax, 1"))


def test_the_first_use_of_machine_code() -> None:
    assert code.first_use() > 0


def test_every_case_has_a_runner_and_a_base() -> None:
    assert {case.key for case in bench.CASES} == set(worker.RUNNERS)
    assert {case.base for case in bench.CASES} <= {case.key for case in bench.CASES}


def test_named_records() -> None:
    plain, named = names.measure(1, 20_000)
    assert plain > 0 and named > 0


def test_a_run_that_does_not_end_is_ended() -> None:
    with pytest.raises(BenchmarkError, match=r"^recorded 4000000000: .*the time is over$"):
        child("benchmarks.worker", ["recorded", "4000000000"], 2)


def test_a_loop_whose_writes_were_changed_is_noticed() -> None:
    loop = Loop(10)
    loop.check_end(33, f"sum={55:016x} last=5a5a5a5a00000001\n")
    loop.check_seen(10, 55)
    for status, output in (
        (33, f"sum={56:016x} last=5a5a5a5a00000001\n"),
        (35, f"sum={55:016x} last=5a5a5a5a00000001\n"),
        (33, ""),
    ):
        with pytest.raises(BenchmarkError):
            loop.check_end(status, output)
    with pytest.raises(BenchmarkError, match="9 of 10"):
        loop.check_seen(9)
    with pytest.raises(BenchmarkError, match="0x38"):
        loop.check_seen(10, 56)


def test_cases_take_turns() -> None:
    order: list[str] = []

    def measure(case: Case) -> Sample:
        order.append(case.key)
        return Sample(1, 1.0)

    interleave([Case("a", "A", 1), Case("b", "B", 1)], 2, measure, lambda _: None)
    assert order == ["a", "b", "a", "b"]


def test_ratios_are_of_the_same_round_and_by_event() -> None:
    plain, slow, whole = (
        Case("plain", "Plain", 1000, "plain"),
        Case("slow", "Slow", 10, "plain"),
        Case("boot", "Boot", 1, "plain", False),
    )
    samples = {
        "plain": [Sample(1000, 1.0), Sample(1000, 2.0), Sample(1000, 1.0)],
        "slow": [Sample(10, 0.1), Sample(10, 0.4), Sample(10, 0.3)],
        "boot": [Sample(0, 2.0), Sample(0, 2.0), Sample(0, 3.0)],
    }
    _, of_slow, of_boot = results([plain, slow, whole], samples)
    assert of_slow.ratio == pytest.approx(20) and of_slow.spread == pytest.approx((10, 30))
    assert of_slow.seconds == pytest.approx(0.3) and of_slow.rate == pytest.approx(10 / 0.3)
    assert of_boot.ratio == pytest.approx(2) and of_boot.spread == pytest.approx((1, 3))
    lines = table([of_slow, of_boot]).splitlines()
    assert lines[2].split() == ["Slow", "10", "0.300", "33", "20.0", "10.0-30.0"]
    assert lines[3].split() == ["Boot", "2.000", "2.000", "1.000-3.000"]


def test_targets_on_either_side() -> None:
    assert Target("a", 1.05, 1.05, at_most=True).met and not Target("a", 1.06, 1.05, at_most=True).met
    assert Target("b", 30, 30, at_most=False).met and not Target("b", 29, 30, at_most=False).met
    assert str(Target("b", 29, 30, at_most=False, unit="x gdb")) == "MISSED  b: 29.0 x gdb (at least 30)"


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.__main__.shutil.which", lambda _: None)
    monkeypatch.setattr("benchmarks.__main__.importlib.util.find_spec", lambda _: None)
    assert bench.main(["--only", "gdb", "--only", "unicorn"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ("qemu-system-x86", "apt install gdb", "unicorn", "--only"))
