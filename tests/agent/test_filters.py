"""Filters by value, mask and change, and MSRs that the debugger reads and writes, in several QEMUs and under sanitizers."""

from __future__ import annotations

import pytest

from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Access, Action, EventFlag, Stage, Status

from .conftest import StartHost
from .host import NOP, RDMSR, FakeHost, Variant, collect, column, event, load_msr, quiet, wrmsr
from .test_traps import VARIANTS, Answers, resume

ALL_BITS = 0xFFFF_FFFF_FFFF_FFFF
STAR, LSTAR, SYSENTER_CS, MTRR = 0xC000_0081, 0xC000_0082, 0x174, 0x200
"""What the fake QEMU keeps where the agent can find it."""
EFER, FS_BASE = 0xC000_0080, 0xC000_0100
UNKNOWN = 0x10
UNKNOWN_LAYOUT = 24
AT = 0x1000


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each test of this file is done in each of these."""
    assert isinstance(request.param, Variant)
    return request.param


@pytest.fixture
def host(variant: Variant, start_host: StartHost) -> FakeHost:
    """Two vCPUs that say what they execute."""
    return start_host(variant, vcpus=2, log=1)


@pytest.fixture
def link(host: FakeHost) -> Link:
    """A debugger's link to that host."""
    return host.connect()


def writes(msr: int, *values: int) -> bytes:
    return b"".join(wrmsr(msr, value) for value in values)


def seen(link: Link, count: int) -> list[int]:
    """The values of so many records, and no more."""
    values = [value for (value,) in column(collect(link, count), "value")]
    assert len(values) == count
    quiet(link)
    return values


# ---- value and mask ----


def test_a_value_in_some_bits(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, value=0x10, mask=0xF0), event(2, value=7, mask=ALL_BITS), event(3, mask=1 << 63)])
    host.run(writes(STAR, 0x10, 0x1F, 0x20, 7, 1 << 63, (1 << 63) | 0x10))
    records = collect(link, 8)
    assert column(records, "event", "value") == [
        (1, 0x10),
        (3, 0x10),
        (1, 0x1F),
        (3, 0x1F),
        (3, 0x20),
        (2, 7),
        (3, 7),
        (1, (1 << 63) | 0x10),
    ]
    assert [link.rings.hits(slot) for slot in range(3)] == [3, 1, 4]
    quiet(link)


def test_events_without_a_filter_are_not_touched_by_those_with_one(host: FakeHost, link: Link) -> None:
    link.set_events([event(1), event(2, value=2, mask=ALL_BITS, flags=EventFlag.SHORT_CIRCUIT)])
    host.run(writes(STAR, 1, 2, 3))
    assert column(collect(link, 4), "event", "value") == [(1, 1), (1, 2), (2, 2), (1, 3)]
    assert [value for _, _, _, value, _ in host.executed()] == [1, 3]


def test_what_a_question_has_changed_is_what_later_filters_see(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, actions=Action.ASK), event(2, value=9, mask=ALL_BITS), event(3, (LSTAR, LSTAR), changes=ALL_BITS)])
    host.load(AT, wrmsr(STAR, 1) + b"\xf4")
    host.start(AT)
    records = collect(link, 3, answer=Answers(rax=9, rcx=LSTAR))
    assert column(records, "event", "msr", "value") == [(1, STAR, 1), (2, LSTAR, 9), (3, LSTAR, 9)]


def test_a_read_has_its_value_afterwards(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, access=Access.RDMSR, stages=Stage.POST, value=1, mask=1)])
    host.run(wrmsr(STAR, 2) + RDMSR + NOP + wrmsr(STAR, 3) + RDMSR + NOP + wrmsr(STAR, 5) + RDMSR)
    assert seen(link, 2) == [3, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": 2, "mask": 1},
        {"value": 1},
        {"mask": 1, "access": Access.RDMSR},
        {"mask": 1, "access": Access.RDMSR, "stages": Stage.ALL},
        {"mask": 1, "access": Access.RDMSR | Access.WRMSR},
        {"changes": 1, "access": Access.RDMSR, "stages": Stage.POST},
    ],
)
def test_filters_that_make_no_sense_are_refused(link: Link, wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError) as error:
        link.set_events([event(1, **wrong)])  # type: ignore[arg-type]
    assert error.value.status == Status.REFUSED
    link.set_events([event(1, mask=1, access=Access.RDMSR, stages=Stage.POST), event(2, changes=1)])


# ---- changes ----


def test_only_what_changes(host: FakeHost, link: Link) -> None:
    host.run(wrmsr(STAR, 7))
    link.set_events([event(1, changes=ALL_BITS)])
    host.run(writes(STAR, 7, 7, 5, 5, 7))
    # Where the MSR cannot be looked at, the first write that is seen counts.
    expected = [5, 7] if knows_msrs(host, link) else [7, 5, 7]
    assert seen(link, len(expected)) == expected
    host.run(wrmsr(STAR, 7), vcpu=1)
    assert seen(link, 1) == [7]


def knows_msrs(host: FakeHost, link: Link) -> bool:
    """Whether the agent finds MSRs in this QEMU."""
    host.tell("stop")
    host.sync()
    status = status_of(link, 0, STAR)
    resume(host, link)
    host.sync()
    assert status in (Status.OK, Status.NO_MSR)
    return status == Status.OK


def test_an_msr_that_nobody_knows_changes_against_what_was_last_written(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, changes=ALL_BITS)])
    host.run(writes(UNKNOWN, 0, 0, 1, 1) + writes(UNKNOWN + 1, 1, 0))
    assert seen(link, 4) == [0, 1, 1, 0]
    host.run(writes(UNKNOWN, 1, 2), vcpu=1)
    assert seen(link, 2) == [1, 2]
    host.run(writes(UNKNOWN, 1, 3))
    assert seen(link, 1) == [3]
    # Another debugger begins anew.
    link.close()
    again = host.connect()
    again.set_events([event(1, changes=ALL_BITS)])
    host.run(writes(UNKNOWN, 3))
    assert seen(again, 1) == [3]


def test_more_msrs_than_are_kept_change_always(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, changes=ALL_BITS)])
    program = b"".join(wrmsr(0x1000 + number, 1) for number in range(300))
    host.run(program)
    collect(link, 300)
    host.run(program)
    assert len(collect(link, 44)) == 44
    quiet(link)


def test_only_some_bits_have_to_change(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, changes=0xF0), event(2, changes=ALL_BITS, value=1, mask=1)])
    host.run(writes(UNKNOWN, 0, 1, 2, 0x12, 0x12, 0x13))
    assert column(collect(link, 4), "event", "value") == [(1, 0), (2, 1), (1, 0x12), (2, 0x13)]
    quiet(link)


def test_a_write_that_is_skipped_changes_nothing(host: FakeHost, link: Link) -> None:
    for msr in (UNKNOWN, MTRR + 3):
        link.set_events([event(1, (msr, msr), changes=ALL_BITS, flags=EventFlag.SHORT_CIRCUIT)])
        host.run(writes(msr, 5, 5))
        assert seen(link, 2) == [5, 5]


@pytest.mark.parametrize("msr", [STAR, UNKNOWN])
@pytest.mark.parametrize(
    "also", [[], [event(9, actions=Action.ASK)], [event(9, stages=Stage.POST)], [event(9, actions=Action.ASK, stages=Stage.ALL)]]
)
def test_changes_after_the_write(host: FakeHost, link: Link, msr: int, also: list[bytes]) -> None:
    link.set_events([event(1, stages=Stage.POST, changes=ALL_BITS), *also])
    host.load(AT, writes(msr, 5, 5, 6) + NOP + b"\xf4")
    host.start(AT)
    enough = 2 + 3 * (0 if not also else 2 if wire.unpack("event", also[0]).stages == Stage.ALL else 1)
    records = collect(link, enough, answer=Answers())
    mine = records[records["event"] == 1]
    assert column(mine, "value", "stage") == [(5, Stage.POST), (6, Stage.POST)]
    quiet(link)


def test_changes_before_and_after_the_write(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, stages=Stage.ALL, changes=ALL_BITS)])
    host.run(writes(LSTAR, 5, 5, 6))
    records = column(collect(link, 4), "value", "stage")
    assert records == [(5, Stage.PRE), (5, Stage.POST), (6, Stage.PRE), (6, Stage.POST)]
    quiet(link)


def test_a_break_that_waits_for_a_change(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (UNKNOWN, UNKNOWN), changes=ALL_BITS, actions=Action.BREAK)])
    host.load(AT, writes(UNKNOWN, 1, 1, 2) + b"\xf4")
    host.start(AT)
    for count, value in enumerate((1, 2), 1):
        assert column(collect(link, 1), "value") == [(value,)]
        host.expect("STOP", count)
        resume(host, link)
    host.expect(f"halted 0 {AT + 3 * len(wrmsr(0, 0)) + 1:x}")
    assert [value for _, _, _, value, _ in host.executed()] == [1, 1, 2]


# ---- reading and writing MSRs ----


@pytest.fixture
def stopped(host: FakeHost, link: Link) -> FakeHost:
    """That host, whose machine stands still."""
    host.run(writes(STAR, 0x1122_3344_5566_7788) + writes(SYSENTER_CS, 0x33) + writes(MTRR + 5, 0x600))
    host.tell("stop")
    host.sync()
    return host


def status_of(link: Link, vcpu: int, msr: int, value: int | None = None) -> Status:
    try:
        if value is None:
            link.read_msr(vcpu, msr)
        else:
            link.write_msr(vcpu, msr, value)
    except RequestError as error:
        return error.status
    return Status.OK


def test_msrs_of_a_stopped_machine(variant: Variant, stopped: FakeHost, link: Link) -> None:
    if variant.layout == UNKNOWN_LAYOUT:
        assert status_of(link, 0, STAR) == status_of(link, 0, STAR, 1) == Status.NO_MSR
        return
    assert [link.read_msr(0, msr) for msr in (STAR, SYSENTER_CS, MTRR + 5)] == [0x1122_3344_5566_7788, 0x33, 0x600]
    assert link.read_msr(1, STAR) == 0
    link.write_msr(1, STAR, ALL_BITS)
    link.write_msr(0, MTRR + 15, 1 << 63)
    link.write_msr(0, SYSENTER_CS, 0xABCD_1234_5678)
    assert [link.read_msr(0, STAR), link.read_msr(1, STAR)] == [0x1122_3344_5566_7788, ALL_BITS]
    assert [link.read_msr(0, MTRR + 15), link.read_msr(0, SYSENTER_CS)] == [1 << 63, 0x5678]
    resume(stopped, link)
    stopped.run(load_msr(STAR) + RDMSR + NOP, vcpu=1)
    assert stopped.executed()[-1][:4] == ("rdmsr", 1, STAR, ALL_BITS)


def test_registers_that_are_msrs(stopped: FakeHost, link: Link) -> None:
    assert link.read_msr(0, EFER) == 0x500
    link.write_msr(0, EFER, 0xD01)
    link.write_msr(0, FS_BASE, 0xFFFF_8000_0000_1000)
    assert (link.read_msr(0, EFER), link.read_msr(0, FS_BASE)) == (0xD01, 0xFFFF_8000_0000_1000)
    assert status_of(link, 0, EFER, 0x1) == Status.NO_VALUE  # paging is on
    assert status_of(link, 0, EFER, 0x10D01) == Status.NO_VALUE
    assert status_of(link, 0, FS_BASE, 1 << 60) == Status.NO_VALUE
    assert link.read_msr(0, EFER) == 0xD01


def test_msrs_that_there_are_not(stopped: FakeHost, link: Link) -> None:
    for msr in (UNKNOWN, 0x174 + 1, 0x400, 0x17B, 0x1B, 0xFFFF_FFFF):
        assert status_of(link, 0, msr) == Status.NO_MSR
        assert status_of(link, 0, msr, 0) == Status.NO_MSR
    assert status_of(link, 2, STAR) == status_of(link, ALL_BITS & 0xFFFF_FFFF, STAR, 1) == Status.REFUSED


def test_a_running_machine_has_none(host: FakeHost, link: Link) -> None:
    assert status_of(link, 0, STAR) == status_of(link, 0, STAR, 1) == Status.RUNNING


def test_a_vcpu_that_asks_can_be_read(variant: Variant, host: FakeHost, link: Link) -> None:
    told: list[tuple[Status, ...]] = []

    def answer(link: Link, record: object) -> None:
        told.append((status_of(link, 0, EFER), status_of(link, 0, EFER, 0x500), status_of(link, 1, EFER)))
        Answers()(link, record)  # type: ignore[arg-type]

    link.set_events([event(1, actions=Action.ASK)])
    host.load(AT, wrmsr(STAR, 1) + b"\xf4")
    host.start(AT)
    collect(link, 1, answer=answer)
    assert told == [(Status.OK, Status.RUNNING, Status.RUNNING)]


def test_a_qemu_without_internals_lets_nothing_be_reached(start_host: StartHost) -> None:
    host = start_host(Variant(6, internals=False), vcpus=1, log=1)
    link = host.connect()
    assert status_of(link, 0, STAR) == status_of(link, 0, STAR, 1) == Status.UNAVAILABLE
    link.set_events([event(1, changes=ALL_BITS)])
    host.run(writes(STAR, 1, 1, 2))
    assert seen(link, 2) == [1, 2]
