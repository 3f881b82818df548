"""What every benchmark needs: cases that run in child processes, interleaved; ratios, a table, targets."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_GRACE_S = 20.0


class BenchmarkError(Exception):
    """A case cannot be measured, or went wrong; the message says which and why, in one line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one case."""

    events: int
    """The accesses that the case was about, all of which the guest made and the tool saw; 0: nobody counted."""
    seconds: float
    """From the machine's resume until it has ended and everything is counted."""
    vmm_bytes: int | None = None
    """The most memory (resident) that the process with the guest had."""
    tool_bytes: int | None = None
    """The most memory (resident) that the process with the debugger had."""
    vmm_cpu_seconds: float | None = None
    """Processor time, from the start of the process to its end."""
    tool_cpu_seconds: float | None = None
    """Processor time of the debugger while the machine ran."""


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure."""

    key: str
    title: str
    count: int
    """How many events a run has, where the case can choose that. Cases that are compared may differ."""
    base: str | None = None
    """The key of the case that this one is compared with."""
    by_event: bool = True
    """Compared by the time that an event takes; False: by the time of a whole run."""
    limit_s: float = 120.0
    """A run that takes longer has failed."""


Measure = Callable[[Case], Sample]


def child(module: str, arguments: Sequence[str], limit_s: float) -> Sample:
    """Runs `python -m MODULE ARGUMENTS` and reads the sample that it prints as JSON in its last line.

    The child is told (`--limit`) to end itself after `limit_s` seconds, so that it can clean up; where it does not it is killed.
    Raises BenchmarkError where there is no sample, with the last line of what the child complained.
    """
    command = [sys.executable, "-m", module, "--limit", f"{limit_s:g}", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit_s + _GRACE_S)
        except BaseException as error:
            # Its own handler of SIGTERM ends the machines that it has started.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE_S)
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchmarkError(f"{' '.join(arguments)}: no end after {limit_s:g} s") from None
            raise
    if process.returncode:
        reason = [line for line in errors.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
        raise BenchmarkError(f"{' '.join(arguments)}: {reason[-1]}")
    return Sample(**json.loads(output.splitlines()[-1]))


def interleave(cases: Sequence[Case], rounds: int, measure: Measure, progress: Callable[[str], None]) -> dict[str, list[Sample]]:
    """Measures every case once a round, so that whatever else the machine does hits all of them alike."""
    samples: dict[str, list[Sample]] = {case.key: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            progress(f"round {number + 1} of {rounds}: {case.title}")
            samples[case.key].append(measure(case))
    return samples


@dataclass(frozen=True, slots=True)
class Result:
    """What the runs of a case come to."""

    case: Case
    samples: list[Sample]
    events: int
    seconds: float
    """The median."""
    rate: float
    """Events a second, the median."""
    ratio: float | None
    """Time an event takes, as a multiple of the base's in the same round; the median over the rounds."""
    spread: tuple[float, float] | None
    """The least and the greatest of these ratios."""


def results(cases: Sequence[Case], samples: dict[str, list[Sample]]) -> list[Result]:
    """Sums up, in the order of the cases."""
    summed = []
    for case in cases:
        mine = samples[case.key]
        ratios = [
            sample.seconds / base.seconds * (base.events / sample.events if case.by_event else 1)
            for sample, base in zip(mine, samples.get(case.base or "", []), strict=False)
        ]
        summed.append(
            Result(
                case=case,
                samples=mine,
                events=mine[0].events,
                seconds=statistics.median(sample.seconds for sample in mine),
                rate=statistics.median(sample.events / sample.seconds for sample in mine),
                ratio=statistics.median(ratios) if ratios else None,
                spread=(min(ratios), max(ratios)) if ratios else None,
            )
        )
    return summed


def table(summed: Iterable[Result]) -> str:
    """The results as lines of text, a row a case."""
    rows = [("case", "events", "seconds", "events/s", "ratio", "least-most")]
    for result in summed:
        ratio = "" if result.ratio is None else _short(result.ratio)
        spread = "" if result.spread is None else "-".join(map(_short, result.spread))
        events, rate = (f"{result.events:,}", f"{result.rate:,.0f}") if result.events else ("", "")
        rows.append((result.case.title, events, f"{result.seconds:.3f}", rate, ratio, spread))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:,.1f}" if ratio < 1000 else f"{ratio:,.0f}"


@dataclass(frozen=True, slots=True)
class Target:
    """Something that a figure should reach."""

    title: str
    value: float
    bound: float
    at_most: bool
    unit: str = "x"
    met: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "met", self.value <= self.bound if self.at_most else self.value >= self.bound)

    def __str__(self) -> str:
        relation = "at most" if self.at_most else "at least"
        return (
            f"{'met   ' if self.met else 'MISSED'}  {self.title}: {_short(self.value)} {self.unit} ({relation} {self.bound:,g})"
        )


def report(summed: Sequence[Result], targets: Sequence[Target], surroundings: dict[str, str]) -> dict[str, object]:
    """All of it as what JSON can hold."""
    return {
        "surroundings": surroundings,
        "cases": [{**asdict(result), "spread": list(result.spread) if result.spread else None} for result in summed],
        "targets": [asdict(target) for target in targets],
    }
