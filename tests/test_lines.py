"""Tests of how traps look as lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands.fakes import SKIPPED, Typist, linux_guest, record
from vmexit.lines import Columns
from vmexit.link.rings import Records, joined
from vmexit.link.wire import Access, RecordFlag, Stage
from vmexit.trap import Trap, traps_of

S = 1_000_000_000


def trap(**fields: int) -> Trap:
    """One trap; the fields are those of fakes.record."""
    return next(traps_of(record(**fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "line"),
    [
        (
            trap(time_ns=12 * S + 345_678_900),
            "    2.345678  0     pre   wrmsr  c0000082  ffffffff81a00080  0000000000101506  LSTAR",
        ),
        (
            trap(time_ns=10 * S, core=0x1F, stage=Stage.POST, access=Access.RDMSR, msr=0x10, value=5),
            "    0.000000  1f    post  rdmsr  00000010  0000000000000005  0000000000101506  TSC",
        ),
        (
            trap(time_ns=10 * S, access=Access.RDMSR, value=0xDEAD),
            "    0.000000  0     pre   rdmsr  c0000082  -                 0000000000101506  LSTAR",
        ),
        (
            trap(time_ns=10 * S, stage=Stage.POST, msr=0x5, value=0, rip=0, length=0, flags=int(RecordFlag.FAULTED)),
            "    0.000000  0     post  wrmsr  00000005  0000000000000000  -                 #GP",
        ),
        (
            trap(time_ns=9 * S, flags=SKIPPED, rip=0xFFFFFFFF8103F2B7),
            "    0.000000  0     pre   wrmsr  c0000082  ffffffff81a00080  ffffffff8103f2b7  short-circuited  LSTAR",
        ),
        (
            trap(time_ns=1_234_567 * S),
            "1234557.000000  0     pre   wrmsr  c0000082  ffffffff81a00080  0000000000101506  LSTAR",
        ),
    ],
)
def test_a_trap_in_a_line(one: Trap, line: str) -> None:
    assert Columns(10 * S).line(one) == line


def test_the_heading_stands_above_the_columns() -> None:
    heading, line = Columns(0).heading(), Columns(0).line(trap())
    for name, text in (
        ("core", "0   "),
        ("stage", "pre"),
        ("MSR", "c0000082"),
        ("value", "ffffffff81a00080"),
        ("RIP", "0000000000101506"),
    ):
        assert heading.index(name) == line.index(f" {text}") + 1
    assert heading.index("seconds") + len("seconds") == line.index("0.000000") + len("0.000000")


def test_time_is_counted_from_the_first_trap_where_nothing_is_said() -> None:
    columns = Columns()
    assert columns.line(trap(time_ns=5 * S)).startswith("    0.000000 ")
    assert columns.line(trap(time_ns=6 * S)).startswith("    1.000000 ")
    assert Columns().lines(record(time_ns=5 * S)).startswith("    0.000000 ")


_RECORDS = st.lists(
    st.builds(
        record,
        time_ns=st.one_of(st.integers(0, 1 << 40), st.integers(0, 99_999 * S)),
        core=st.integers(0, 0xFFFF),
        access=st.sampled_from([Access.WRMSR, Access.RDMSR]),
        stage=st.sampled_from([Stage.PRE, Stage.POST]),
        msr=st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0xC0000080, 0xC0000082, 0x277, 0x830, 0x10])),
        value=st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 0xD01])),
        rip=st.one_of(st.just(0), st.integers(0, (1 << 64) - 1)),
        flags=st.one_of(st.just(0), st.integers(0, 7)),
        length=st.sampled_from([0, 2]),
    ),
    min_size=1,
    max_size=30,
)


@given(_RECORDS, st.integers(0, 1 << 50), st.booleans(), st.integers(1, 8))
def test_many_at_once_look_like_one_after_another(records: list[Records], started: int, colour: bool, times: int) -> None:
    """However many there are; above a certain number they are formatted all together."""
    together = joined(records * times)
    columns = Columns(started, colour=colour)
    assert columns.lines(together).splitlines() == [columns.line(one) for one in traps_of(together)]


def test_the_column_of_seconds_is_as_wide_as_the_longest_needs() -> None:
    lines = Columns(0).lines(joined([record(time_ns=S)] * 60 + [record(time_ns=1_234_567 * S)])).splitlines()
    assert lines[0].startswith("      1.000000  0 ")
    assert lines[-1].startswith("1234567.000000  0 ")


WRMSR_AT = linux_guest().address(0x2002)
FIXED = f"    0.000000  0     pre   wrmsr  c0000082  ffffffff81a00080  {WRMSR_AT:016x}"


def test_the_place_is_named_behind_what_the_value_means(booted: Typist) -> None:
    columns = Columns(names=booted.debugger.names)
    assert columns.line(trap(rip=WRMSR_AT)) == f"{FIXED}  LSTAR  native_write_msr+0x2 [kernel]"
    assert columns.line(trap(rip=0x1000)).endswith("  0000000000001000  LSTAR")
    booted.debugger.guest.reset()
    assert columns.line(trap(rip=WRMSR_AT)) == f"{FIXED}  LSTAR"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, [f"{FIXED}  short-circuited  LSTAR  native_write_msr+0x2 [kernel]"]),
        (132, [f"{FIXED}  short-circuited  LSTAR  native_write_msr+0x2 [kernel]"]),
        (131, [f"{FIXED}  short-circuited  LSTAR", "              native_write_msr+0x2 [kernel]"]),
        (80, [FIXED, "              short-circuited  LSTAR  native_write_msr+0x2 [kernel]"]),
        (50, [FIXED, "              short-circuited  LSTAR", "              native_write_msr+0x2 [kernel]"]),
    ],
)
@pytest.mark.parametrize("times", [1, 80])
def test_what_does_not_fit_goes_into_another_line(booted: Typist, width: int | None, lines: list[str], times: int) -> None:
    columns = Columns(0, names=booted.debugger.names)
    columns.width = width
    assert columns.lines(joined([record(flags=SKIPPED, rip=WRMSR_AT)] * times)).splitlines() == lines * times


def of_thread(pid: int, tid: int, *, known: bool = True, rip: int = WRMSR_AT) -> Records:
    """A record that tells its thread."""
    made = record(rip=rip, flags=int(RecordFlag.PROCESS_KNOWN) if known else 0)
    made["process"], made["thread"] = pid, tid
    return made


def test_the_thread_is_named_where_the_record_tells_it(booted: Typist, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {(0x5E, 0x5F): "w\u00f6rker", (0, 0): "swapper/0"}
    monkeypatch.setattr(booted.debugger.thread_names, "get", lambda pid, tid: named.get((pid, tid)))
    columns = Columns(0, names=booted.debugger.names)
    records = [of_thread(0x5E, 0x5F), of_thread(0x5E, 0x5E, rip=0x1000), of_thread(0, 0), of_thread(0, 0, known=False)]
    ends = ["  pid 5e tid 5f w\\xf6rker", "  LSTAR  pid 5e", "  pid 0 swapper/0", "  native_write_msr+0x2 [kernel]"]
    for count in (1, 20):
        lines = columns.lines(joined(records * count)).splitlines()
        assert len(lines) == 4 * count
        assert all(line.endswith(end) for line, end in zip(lines, ends * count, strict=True))
    columns.width = 80
    assert columns.lines(joined(records * 20)) == "".join(f"{columns.line(one)}\n" for one in traps_of(joined(records * 20)))
    assert (
        columns.lines(records[0]).splitlines()[1]
        == "              LSTAR  native_write_msr+0x2 [kernel]  pid 5e tid 5f w\\xf6rker"
    )


def called(number: int, *, guessed: bool = False, rip: int = WRMSR_AT, core: int = 0) -> Records:
    """A record that tells its caller."""
    made = record(rip=rip, core=core, flags=int(RecordFlag.CALLER_GUESSED) if guessed else 0)
    made["caller"] = number
    return made


def test_the_caller_is_named_where_the_record_tells_it(booted: Typist) -> None:
    told = joined([called(number, core=core) for core in (0, 3) for number in (1, 2)])
    told["value"] = [linux_guest().address(0x3005), 0xFFFF_FFFF_A123_4567, linux_guest().address(0x2002), 0]
    booted.debugger.callers.learn(told)
    columns = Columns(0, names=booted.debugger.names)
    here, far = "native_write_msr+0x2 [kernel]", booted.debugger.names.of(linux_guest().address(0x3005))
    assert far.endswith(" [kernel]")
    records = [
        *(called(1), called(1, guessed=True), called(2), called(1, core=3), called(2, core=3), called(3), called(1, core=9)),
        *(called(0), called(1, rip=0x1000), called(65535, core=0xFFFF)),
    ]
    ends = [
        *(f"{here} <- {far}", f"{here} <- ? {far}", f"{here} <- ffffffffa1234567", f"{here} <- {here}", here, here, here),
        *(here, f"LSTAR  <- {far}", here),
    ]
    for count in (1, 20):
        lines = columns.lines(joined(records * count)).splitlines()
        assert [line.endswith(f"  {end}") for line, end in zip(lines, ends * count, strict=True)] == [True] * len(lines)
    columns.width = 90
    assert columns.lines(joined(records * 20)) == "".join(f"{columns.line(one)}\n" for one in traps_of(joined(records * 20)))


def test_many_places_at_once(booted: Typist) -> None:
    columns = Columns(0, colour=True, names=booted.debugger.names)
    columns.width = 100
    rips = [WRMSR_AT, 0, WRMSR_AT + 0x40, 0x1000]
    together = joined([record(rip=rip, msr=msr, flags=flags) for rip in rips for msr in (0x10, 0xC0000080) for flags in range(8)])
    assert len(together) > 50
    assert columns.lines(together) == "".join(f"{columns.line(one)}\n" for one in traps_of(together))
    assert "\n              native_write_msr_safe+0x2 [kernel]\n" in columns.lines(together)


def test_no_records_no_lines() -> None:
    assert Columns(0).lines(record()[:0]) == ""


def test_colour_is_put_around_what_stands_there_anyway() -> None:
    records = joined([record(flags=SKIPPED), record()] * 40)
    plain, coloured = Columns(0).lines(records), Columns(0, colour=True).lines(records)
    assert "\033[33m  short-circuited\033[0m  LSTAR\n" in coloured
    for code in ("\033[2m", "\033[33m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain
