"""A recording as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmexit.link.wire import Access, Stage
from vmexit.report.digest import OTHERS, Digest, Row
from vmexit.report.facts import Facts, counted, seconds_text

_MOST_ROWS = 40
_MOST_CHANGES = 20
_ACCESSES = {Access.WRMSR: "wrmsr", Access.RDMSR: "rdmsr"}
_STAGES = {Stage.PRE: "pre", Stage.POST: "post"}


def table(digest: Digest, *, everything: bool = False) -> Iterator[str]:
    """The lines; with ``everything`` no row and no change that is kept is left out."""
    facts = Facts(digest)
    yield from _heading(digest, facts)
    if not digest.total:
        return
    yield ""
    yield from _msrs(digest, facts, everything)
    yield ""
    yield from _cores(digest)
    yield ""
    yield from _processes(digest, facts, everything)
    yield ""
    yield from _changes(digest, facts, everything)


def _heading(digest: Digest, facts: Facts) -> Iterator[str]:
    span = digest.end_ns - digest.start_ns
    rate = f" ({digest.total * 1_000_000_000 / span:,.0f} a second)" if span else ""
    msrs = len({series.msr for series in digest.series})
    parts = [f"{counted(digest.total, 'trap')} in {seconds_text(span)}{rate}", counted(len(digest.by_core), "core")]
    parts += [counted(msrs, "MSR"), counted(digest.changes.total, "change"), f"{digest.file.lost:,} lost"]
    yield f"{digest.file.path}: {', '.join(parts)}"
    told = [
        facts.machine,
        facts.recorded and f"recorded {facts.recorded}",
        facts.version and f"vmexit {facts.version}",
        facts.ended,
    ]
    yield "; ".join(filter(None, told))
    for number in facts.events:
        yield f"event {number:x}: {facts.event(number) or 'not known'}"
    for note in digest.file.notes():
        yield f"note: {note}"


def _msrs(digest: Digest, facts: Facts, everything: bool) -> Iterator[str]:
    rows: dict[tuple[int, Access, Stage, int], Row] = {}
    for series, row in zip(digest.series, digest.rows, strict=True):
        rows.setdefault((series.msr, series.access, series.stage, series.event), Row()).add(row)
    order = sorted(rows, key=lambda key: (-rows[key].count, key[0], key))
    several = len({event for _, _, _, event in rows}) > 1
    lines = [("event", "MSR", "name", "", "stage", "traps", "share", "changes", "cores", "first value", "last value", "says")]
    for msr, access, stage, event in order if everything else order[:_MOST_ROWS]:
        row = rows[msr, access, stage, event]
        has_value = msr != OTHERS and not (access == Access.RDMSR and stage == Stage.PRE)
        changes = digest.changes.by_msr.get(msr, 0) if access == Access.WRMSR else None
        lines.append(
            (
                f"{event:x}" if event != OTHERS else "-",
                f"{msr:x}" if msr != OTHERS else "-",
                facts.name(msr),
                _ACCESSES[access],
                _STAGES[stage],
                f"{row.count:,}",
                f"{row.count / digest.total:.1%}",
                "-" if changes is None else f"{changes:,}",
                _cores_text(row.cores),
                f"{row.first:016x}" if has_value else "-",
                f"{row.last:016x}" if has_value else "-",
                facts.says(msr, row.last) if has_value else "",
            )
        )
    yield from _aligned([line if several else line[1:] for line in lines], {"MSR", "traps", "share", "changes"})
    yield from _left_out(len(order), len(lines) - 1, "MSR")


def _cores_text(cores: set[int]) -> str:
    """ "0-3 6"."""
    found: list[list[int]] = []
    for core in sorted(cores):
        if found and core == found[-1][1] + 1:
            found[-1][1] = core
        else:
            found.append([core, core])
    return " ".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in found)


def _cores(digest: Digest) -> Iterator[str]:
    rows = [("core", "traps", "share")]
    rows += [
        (f"{core:x}" if core >= 0 else "others", f"{count:,}", f"{count / digest.total:.1%}")
        for core, count in sorted(digest.by_core.items())
    ]
    yield from _aligned(rows, {"core", "traps", "share"})


def _processes(digest: Digest, facts: Facts, everything: bool) -> Iterator[str]:
    if not digest.has_processes:
        yield "processes unknown: these records do not tell whose traps they are"
        return
    sums: dict[int | None, Row] = {}
    for series, row in zip(digest.series, digest.rows, strict=True):
        sums.setdefault(series.pid, Row()).add(row)
    order = sorted(sums, key=lambda pid: (-sums[pid].count, pid or 0))
    shown = order if everything else order[:_MOST_ROWS]
    rows = [("process", "traps", "share", "cores")]
    rows += [
        (facts.process(pid), f"{sums[pid].count:,}", f"{sums[pid].count / digest.total:.1%}", _cores_text(sums[pid].cores))
        for pid in shown
    ]
    yield from _aligned(rows, {"traps", "share"})
    yield from _left_out(len(order), len(shown), "process")


def _changes(digest: Digest, facts: Facts, everything: bool) -> Iterator[str]:
    rows = digest.changed()
    if not len(rows):
        yield "no MSR was written"
        return
    shown = rows if everything else rows[-_MOST_CHANGES:]
    what = f"{counted(digest.changes.total, 'change')} of MSRs, and first writes"
    more = "" if len(shown) == len(rows) else f"; the last {len(shown)} of {len(rows):,} that can be listed (--all)"
    yield f"{what}{more}:"
    left_out = digest.changes.left_out()
    if everything and left_out:
        names = ", ".join(f"{count:,} of {facts.name(msr) or f'{msr:x}'}" for msr, count in sorted(left_out.items())[:8])
        dots = ", ..." * (len(left_out) > 8)
        yield f"(of MSRs that changed very often the first and the last changes; left out: {names}{dots})"
    yield f"{'seconds':>12}  core  change"
    for time, core, msr, old, new, known in zip(
        *(shown[name].tolist() for name in ("time_ns", "vcpu", "msr", "old", "new", "known")), strict=True
    ):
        seconds = max(0, time - digest.start_ns) / 1e9
        yield f"{seconds:12.6f}  {core:<4x}  {facts.change(msr, old, new, known)}"


def _left_out(count: int, shown: int, what: str) -> Iterator[str]:
    if count > shown:
        yield f"... {count - shown:,} more of {count:,} ({what}s; --all shows them)".replace("processs", "processes")


def _aligned(rows: Sequence[Sequence[str]], right: set[str]) -> Iterator[str]:
    """Columns below each other; those with one of these headings by their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            text.rjust(width) if name in right else text.ljust(width)
            for text, width, name in zip(row, widths, rows[0], strict=True)
        )
        yield "  ".join(cells).rstrip()
