"""Sums, changes and tables of recordings, beside what simple loops come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.report.traps import boot, of_process, record, records_of, trap
from vmexit.console.report import show_traps
from vmexit.link.rings import Records
from vmexit.link.wire import Access, RecordFlag, Stage
from vmexit.report import changes, digest
from vmexit.report.counting import Codes, Tally
from vmexit.report.digest import OTHERS, Digest
from vmexit.report.facts import Facts
from vmexit.report.fileformat import CALLER_GUESSED
from vmexit.report.reader import RecordingFile
from vmexit.report.table import table

Digests = Callable[[Path], Digest]
SKIPPED, FAULTED = int(RecordFlag.SKIPPED), int(RecordFlag.FAULTED)
traps = st.builds(
    trap,
    st.sampled_from([0x10, 0x1A0, 0xC000_0080]),
    st.integers(0, 3),
    vcpu=st.integers(0, 2),
    access=st.sampled_from([1, 2]),
    stage=st.sampled_from([1, 2]),
    event=st.integers(1, 3),
    flags=st.sampled_from([0, 0, SKIPPED, FAULTED]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30, deadline=None)
@given(st.lists(traps, min_size=1, max_size=60), st.integers(1, 60))
def test_sums_and_changes_are_those_of_simple_loops(
    tmp_path: Path, digest_of: Digests, rows: list[dict[str, int]], cut: int
) -> None:
    records = records_of(rows)
    found = digest_of(record(tmp_path / "r", records[:cut], records[cut:]))
    counts = Counter((row["msr"], row["access"], row["stage"], row["event"] - 1, row["flags"]) for row in rows)
    assert counts == {
        (one.msr, one.access, one.stage, one.event, SKIPPED * one.skipped | FAULTED * one.faulted): row.count
        for one, row in zip(found.series, found.rows, strict=True)
    }
    assert found.by_core == Counter(row["vcpu"] for row in rows) and found.total == len(rows)
    for one, row in zip(found.series, found.rows, strict=True):
        mine = [each for each in rows if (each["msr"], each["access"], each["stage"]) == (one.msr, one.access, one.stage)]
        mine = [
            each
            for each in mine
            if (each["event"], each["flags"]) == (one.event + 1, SKIPPED * one.skipped | FAULTED * one.faulted)
        ]
        assert (row.first, row.last, row.cores) == (mine[0]["value"], mine[-1]["value"], {each["vcpu"] for each in mine})

    known: dict[tuple[int, int], int] = {}
    wanted = []
    for place, trapped in enumerate(rows):
        if trapped["flags"] or (trapped["access"] == Access.RDMSR and trapped["stage"] == Stage.PRE):
            continue
        register = trapped["vcpu"], trapped["msr"]
        old, known[register] = known.get(register), trapped["value"]
        if trapped["access"] == Access.WRMSR and old != trapped["value"]:
            wanted.append((place, old or 0, trapped["value"], old is not None))
    shown = found.changed()
    assert [tuple(row) for row in shown[["place", "old", "new", "known"]].tolist()] == wanted
    assert found.changes.total == sum(known for *_, known in wanted) == sum(found.changes.by_msr.values())
    assert not found.changes.left_out()

    groups = found.groups(1000)
    (cells,) = found.cells([groups], 1000)
    series, cores, _, numbers = cells.columns()
    by_cell: Counter[tuple[object, int]] = Counter()
    for place, core, number in zip(series.tolist(), cores.tolist(), numbers.tolist(), strict=True):
        by_cell[groups.kept[place], found.core_of(core)] += number
    assert sum(by_cell.values()) == len(rows)
    for one, row in zip(found.series, found.rows, strict=True):
        assert sum(by_cell[one, core] for core in row.cores) == row.count


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=10), st.integers(1, 45))
def test_codes(batches: list[list[int]], most: int) -> None:
    """Numbers in the order of coming; what comes when there are enough shares the next one."""
    codes, wanted = Codes(most), dict[int, int]()
    for batch in batches:
        # Of a batch, the values that are new are numbered by their first places.
        for value in batch:
            if len(wanted) < most:
                wanted.setdefault(value, len(wanted))
        found = codes.of(np.array(batch, np.uint32))
        assert found.tolist() == [wanted.get(value, most) for value in batch]
    assert codes.values == list(wanted)


def test_codes_of_numbers_that_share_a_place_in_the_cache() -> None:
    codes = Codes(1 << 18)
    values = np.arange(100_000, dtype=np.uint64) * np.uint64(0x1_0001)
    for _ in range(2):
        assert codes.of(values).tolist() == list(range(100_000))


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=6))
def test_tally(batches: list[list[int]]) -> None:
    tally = Tally()
    for batch in batches:
        tally.add(np.array(batch, np.uint64))
    keys, counts = tally.items()
    together = Counter(value for batch in batches for value in batch)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == together
    tally.replace_keys(keys // np.uint64(2))
    assert sum(tally.items()[1].tolist()) == sum(together.values()) and tally.merge() == len({key // 2 for key in together})


def test_an_msr_that_changes_too_often(tmp_path: Path, digest_of: Digests, monkeypatch: pytest.MonkeyPatch) -> None:
    """All changes are counted, the first and the last ones are listed, and how many are not is known."""
    monkeypatch.setattr(changes, "MOST", 40)
    rows = [trap(0x6E0, value) for value in range(1000)] + [trap(0x1A0, value) for value in range(5)]
    found = digest_of(record(tmp_path / "r", *(records_of(rows[i : i + 100], start=i) for i in range(0, len(rows), 100))))
    assert found.changes.total == 999 + 4 and found.changes.by_msr == {0x6E0: 999, 0x1A0: 4}
    shown = found.changed()
    mine = shown[shown["msr"] == 0x6E0]["new"].tolist()
    half = len(mine) // 2
    assert len(shown) <= 40 and half >= 4 and mine == [*range(half), *range(1000 - half, 1000)]
    assert shown[shown["msr"] == 0x1A0]["new"].tolist() == list(range(5))
    assert found.changes.left_out() == {0x6E0: 1000 - len(mine)}


def test_more_registers_than_can_be_followed(tmp_path: Path, digest_of: Digests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_MOST_REGISTERS", 2)
    rows = [trap(msr, value) for value in (1, 2) for msr in (1, 2, 3)]
    found = digest_of(record(tmp_path / "r", records_of(rows)))
    assert not found.changes.followed_all and found.changes.by_msr == {1: 1, 2: 1} and found.total == 6


def test_more_msrs_than_are_told_apart(tmp_path: Path, digest_of: Digests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_MOST_MSRS", 3)
    found = digest_of(record(tmp_path / "r", records_of([trap(msr, 0) for msr in (1, 2, 3, 4, 5, 1)])))
    assert [(one.msr, row.count) for one, row in zip(found.series, found.rows, strict=True)] == [
        (1, 2),
        (2, 1),
        (3, 1),
        (OTHERS, 2),
    ]


def test_more_kinds_than_are_told_apart(tmp_path: Path, digest_of: Digests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_MOST_SERIES", 2)
    found = digest_of(record(tmp_path / "r", records_of([trap(msr, 0) for msr in (1, 2, 3, 4, 1)])))
    assert [(one.msr, row.count) for one, row in zip(found.series, found.rows, strict=True)] == [(1, 2), (2, 1), (OTHERS, 2)]


def test_processes_are_put_together_the_rarest_first(tmp_path: Path, digest_of: Digests) -> None:
    rows = [trap(msr, 0, **of_process(pid)) for pid in range(1, 11) for msr in (1, 2) for _ in range(pid)]
    found = digest_of(record(tmp_path / "r", records_of([*rows, trap(3, 0)])))
    groups = found.groups(9)
    assert groups.processes == 3 and len(groups.kept) <= 9
    assert {group.pid for group in groups.kept} == {10, 9, 8, OTHERS, None}
    assert {group.msr for group in groups.kept if group.pid == OTHERS} == {1, 2}
    (cells, fine) = found.cells([groups, groups.without_processes()], 1000)
    for made in (cells, fine):
        by_msr: Counter[int] = Counter()
        for place, _, _, count in zip(*(column.tolist() for column in made.columns()), strict=True):
            by_msr[groups.kept[place].msr] += count
        assert by_msr == {1: 55, 2: 55, 3: 1}


def test_cells_are_as_few_as_wanted(tmp_path: Path, digest_of: Digests) -> None:
    """Parts of the time become longer until there are no more."""
    found = digest_of(record(tmp_path / "r", records_of(trap(place % 3, 0, vcpu=place % 2) for place in range(5000))))
    for most in (10_000, 300, 6):
        (cells,) = found.cells([found.groups(10)], most)
        assert len(cells.keys) <= most and cells.counts.sum() == 5000
        assert cells.columns()[2].max() * cells.width_ns <= found.end_ns - found.start_ns


@pytest.mark.parametrize("most", [1, 7, 1000, 5000])
def test_samples_are_even(tmp_path: Path, digest_of: Digests, most: int) -> None:
    parts = [records_of((trap(1, value) for value in range(start, start + 500)), start=start) for start in range(0, 2500, 500)]
    found = digest_of(record(tmp_path / "r", *parts))
    values = [value for chunk in found.sample(most) for value in chunk["value"].tolist()]
    stride = found.stride(most)
    assert len(values) <= most and values == list(range(0, 2500, stride)) and (stride == 1) == (most >= 2500)


# ---- the table ----


def lines_of(path: Path, *, everything: bool = False) -> list[str]:
    with RecordingFile(path) as file:
        return list(table(Digest(file), everything=everything))


def test_the_table(tmp_path: Path) -> None:
    lines = lines_of(record(tmp_path / "boot.rec", boot()))
    assert lines[0] == f"{tmp_path}/boot.rec: 9 traps in 8 µs (1,125,000 a second), 2 cores, 3 MSRs, 3 changes, 0 lost"
    assert lines[1:3] == ["QEMU 7.2.22, 2 cores; vmexit 0.1.0; the machine ended", "event 0: !msrwrite"]
    assert [line.split()[:8] for line in lines[4:7]] == [
        ["MSR", "name", "stage", "traps", "share", "changes", "cores", "first"],
        ["c0000080", "EFER", "wrmsr", "pre", "4", "44.4%", "2", "0-1"],
        ["1a0", "MISC_ENABLE", "wrmsr", "pre", "2", "22.2%", "1", "0"],
    ]
    assert lines[5].endswith("0000000000000500  0000000000000d01  SCE LME LMA NXE")
    assert "processes unknown: these records do not tell whose traps they are" in lines
    start = lines.index("3 changes of MSRs, and first writes:")
    assert [line.split(None, 2)[1:] for line in lines[start + 2 :]] == [
        ["0", "EFER = 0x500 LME LMA"],
        ["0", "EFER 0x500 -> 0xd01 +SCE +NXE"],
        ["1", "EFER = 0x500 LME LMA"],
        ["0", "LSTAR = 0xffffffff82000080"],
        ["1", "LSTAR = 0xffffffff82000080"],
        ["0", "MISC_ENABLE 0x1 -> 0x9 +TM1"],
        ["1", "EFER 0x500 -> 0xd01 +SCE +NXE"],
    ]


def test_the_table_of_processes(tmp_path: Path) -> None:
    rows = [trap(0x10, value, **of_process(1)) for value in range(3)] + [trap(0x10, 9, **of_process(77)), trap(0x10, 9)]
    path = record(tmp_path / "r", records_of(rows), name_of=lambda pid, tid: {1: "init"}.get(pid))
    lines = lines_of(path)
    start = next(i for i, line in enumerate(lines) if line.startswith("process "))
    assert [line.split() for line in lines[start : start + 4]] == [
        ["process", "traps", "share", "cores"],
        ["1", "init", "3", "60.0%", "0"],
        ["unknown", "1", "20.0%", "0"],
        ["77", "1", "20.0%", "0"],
    ]


def test_places_are_named_once_they_are_known(tmp_path: Path, digest_of: Digests) -> None:
    asked: list[int] = []

    def place_of(rip: int) -> str:
        asked.append(rip)
        return "" if rip == 0x2000 or len(asked) == 1 else f"function+{rip:#x} [kernel]"

    first = records_of([trap(0x10, 1, rip=0x1000)] * 0x10000)
    later = records_of([trap(0x10, 2, rip=0x1000), trap(0x10, 3, rip=0x2000)] * 2, start=len(first))
    facts = Facts(digest_of(record(tmp_path / "r", first, later, place_of=place_of)))
    assert (facts.place(0x1000), facts.place(0x2000)) == ("function+0x1000 [kernel]", "")
    assert asked[0] == 0x1000 and len(asked) <= 4  # once a block at most, not once a trap


def test_callers_are_recorded_as_addresses_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers mean something in the session alone. What a file says may be anything, but only printable text is shown."""
    here, near, far = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8100_1000, 0xFFFF_FFFF_8200_0000
    names = {here: "wr\u00efte+0x4 [kernel]", near: "near\x1b[31m+0x1 [kernel]"}
    addresses = {1: near, 2: far}
    traps = records_of(
        [
            trap(0x10, 1, caller=1),
            trap(0x10, 2, caller=2, flags=CALLER_GUESSED),
            trap(0x10, 3),
            trap(0x10, 4, caller=2, rip=5),
            trap(0x10, 5, caller=1, **of_process(1, 1)),
        ]
    )

    def callers_of(records: Records) -> npt.NDArray[np.uint64]:
        return np.array([addresses.get(number, 0) for number in records["caller"].tolist()], np.uint64)

    known = record(
        tmp_path / "known",
        traps,
        traps[2:3],
        callers_of=callers_of,
        place_of=lambda rip: names.get(rip, ""),
        name_of=lambda pid, tid: "in\nit",
    )
    with RecordingFile(known) as file:
        (chunk,) = file.chunks()
        assert chunk["called_from"].tolist() == [near, far, 0, far, near, 0] and "caller" not in chunk.columns
        assert chunk.records()["caller"].tolist() == [0] * 6
    show_traps(known)
    lines = capsys.readouterr().out.splitlines()[1:]
    place = "wr?te+0x4 [kernel]"
    ends = [
        *(f"{place} <- near?[31m+0x1 [kernel]", f"{place} <- ? ffffffff82000000", place, "  TSC  <- ffffffff82000000"),
        *(f"{place} <- near?[31m+0x1 [kernel]  pid 1 in?it", place),
    ]
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 6, lines
    # As recordings of before were, and those of machines that tell no callers.
    older = record(tmp_path / "older", traps)
    with RecordingFile(older) as file:
        assert "called_from" not in next(file.chunks()).columns
    show_traps(older)
    assert all("<-" not in line for line in capsys.readouterr().out.splitlines())


def test_long_tables_are_cut(tmp_path: Path) -> None:
    path = record(tmp_path / "r", records_of(trap(msr, 0) for msr in range(100)))
    lines = lines_of(path)
    assert "... 60 more of 100 (MSRs; --all shows them)" in lines
    assert any(line.endswith("the last 20 of 100 that can be listed (--all):") for line in lines)
    assert len(lines_of(path, everything=True)) == len(lines) + 60 + 80 - 1


def test_what_is_lost_or_missing_is_said_first(tmp_path: Path) -> None:
    lines = lines_of(record(tmp_path / "r", boot(), lost=1234, end=None))
    notes = [line for line in lines[:6] if line.startswith("note: ")]
    assert notes == [
        "note: it was cut off, or its recorder was killed; all that is whole of it is here",
        "note: 1,234 records lost: they came faster than they were taken",
    ]
    assert "1,234 lost" in lines[0]


def test_an_empty_recording(tmp_path: Path) -> None:
    lines = lines_of(record(tmp_path / "r"))
    assert lines[0].endswith(": 0 traps in 0 ns, 0 cores, 0 MSRs, 0 changes, 0 lost") and len(lines) == 3


def test_a_file_that_says_strange_things_of_itself(tmp_path: Path) -> None:
    info = {
        "machine": 5,
        "clock": {"realtime_ns": "now", "started_ns": [1]},
        "events": {"x": 1, "0": None},
        "vmexit": {},
        "processes": [],
    }
    lines = lines_of(record(tmp_path / "r", boot(), info=info, end={"reason": 7}))
    assert lines[1] == "an unknown machine" and lines[2] == "event 0: not known"
