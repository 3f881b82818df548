"""Events on tracepoints, on an instance that is made up: what the kernel is told to filter, and what becomes of its pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.targets.trace_page_maker import READ_MSR, WRITE_MSR, MadeUpInstance, entry, host_data, kvm_data, page
from vmexit.errors import TargetError
from vmexit.events.event import Event
from vmexit.events.filters import ValueFilter
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, RecordFlag, Stage
from vmexit.program import lower
from vmexit.targets import trace_events
from vmexit.targets.trace_events import Tracepoint, TraceRings
from vmexit.targets.trace_instance import Instance
from vmexit.targets.tracefs import _HOST_POINTS, _KVM_POINTS, _HostCores
from vmexit.trap import Trap, traps_of

LATER = 1 << 62
"""A time that has not come yet."""


class Made:
    """Rings on a made-up instance."""

    def __init__(self, points: tuple[Tracepoint, ...], cores: trace_events.Cores | None = None) -> None:
        self.instance = MadeUpInstance()
        self.rings = TraceRings(cast(Instance, self.instance), points, cores or _HostCores())

    def set(self, *events: Event) -> None:
        for number, event in enumerate(events):
            event.number = event.slot = number
        self.rings.set_events([lower(event) for event in events])

    def filters(self, folder: str) -> tuple[str, str]:
        """The filter, and whether the tracepoint is on."""
        return self.instance.files.get(f"{folder}/filter", ""), self.instance.files.get(f"{folder}/enable", "0")

    def take(self, *, final: bool = False) -> list[Trap]:
        return list(traps_of(self.rings.drain(final=final)))


def event(
    *msrs: int,
    access: Access = Access.WRMSR,
    core: int | None = None,
    process: int | None = None,
    enabled: bool = True,
    wanted: ValueFilter | None = None,
) -> Event:
    return Event(
        access=access,
        msrs=MsrSet.of(*msrs) if msrs else MsrSet.of_ranges([(0, 0xFFFF_FFFF)]),
        stage=Stage.POST,
        core=core,
        process=process,
        action=Action.RECORD,
        enabled=enabled,
        filter=wanted,
    )


@pytest.fixture
def host() -> Iterator[Made]:
    made = Made(_HOST_POINTS)
    yield made
    made.rings.close()


@pytest.fixture
def kvm() -> Iterator[Made]:
    class Cores:
        def of(self, cpu: int, threads: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
            return (threads - 100).astype(np.uint16)

        def filter(self, core: int) -> str | None:
            return f"(common_pid == {100 + core})" if core < 4 else None

    made = Made(_KVM_POINTS, Cores())
    yield made
    made.rings.close()


WRITE, READ, KVM = "events/msr/write_msr", "events/msr/read_msr", "events/kvm/kvm_msr"


class TestFilters:
    def test_no_event_no_tracepoint(self, host: Made) -> None:
        host.set()
        assert host.instance.files == {}

    def test_one_msr(self, host: Made) -> None:
        host.set(event(0x1A0))
        assert host.filters(WRITE) == ("(msr == 0x1a0)", "1")
        assert host.filters(READ) == ("", "0")

    def test_cores_ranges_and_events(self, host: Made) -> None:
        several = Event(access=Access.WRMSR, msrs=MsrSet.of_ranges([(0x10, 0x20), (0x30, 0x30)]), stage=Stage.POST)
        host.set(event(0x1A0, core=1), several, event(0x10, access=Access.RDMSR))
        assert host.filters(WRITE)[0] == "(msr == 0x1a0 && CPU == 1) || (((msr >= 0x10 && msr <= 0x20) || msr == 0x30))"
        assert host.filters(READ) == ("(msr == 0x10)", "1")

    def test_all_but_a_few(self, host: Made) -> None:
        host.set(Event(access=Access.WRMSR, msrs=MsrSet.all_but((0x6E0, 0x48, 0x49)), stage=Stage.POST))
        assert host.filters(WRITE)[0] == "((msr < 0x48 || msr > 0x49) && msr != 0x6e0)"

    def test_everything(self, host: Made) -> None:
        host.set(event(0x1A0), event())
        assert host.filters(WRITE) == ("0", "1")

    def test_disabled_and_cleared(self, host: Made) -> None:
        host.set(event(0x1A0), event(0x1B0, enabled=False))
        assert host.filters(WRITE)[0] == "(msr == 0x1a0)"
        host.set(event(0x1A0, enabled=False))
        assert host.filters(WRITE)[1] == "0"

    def test_processes(self, host: Made) -> None:
        host.set(event(0x6E0, process=os.getpid()), event(0x1A0, process=0))
        threads = sorted(int(task.name) for task in Path("/proc/self/task").iterdir())
        mine = " || ".join(f"common_pid == {thread}" for thread in threads)
        assert host.filters(WRITE)[0] == f"(msr == 0x6e0 && ({mine})) || (msr == 0x1a0 && (common_pid == 0))"

    def test_a_process_that_is_not_there(self, host: Made) -> None:
        with pytest.raises(TargetError, match="there is no process 4194305"):
            host.set(event(0x6E0, process=4194305))

    def test_kvm_tells_writes_from_reads(self, kvm: Made) -> None:
        kvm.set(event(0x10), event(0x20, access=Access.RDMSR, core=2))
        assert kvm.filters(KVM)[0] == "(ecx == 0x10 && write != 0) || (ecx == 0x20 && write == 0 && (common_pid == 102))"

    def test_what_the_kernel_cannot_tell_is_left_to_us(self, kvm: Made) -> None:
        kvm.set(event(0x10, core=7))
        assert kvm.filters(KVM)[0] == "(ecx == 0x10 && write != 0)"
        kvm.instance.put(0, [page(entry(kvm_data(1, 0x10, 5, thread=107)), entry(kvm_data(1, 0x10, 6, thread=101)))])
        assert [trap.value for trap in kvm.take(final=True)] == [5]

    def test_a_filter_that_would_be_too_long(self, host: Made) -> None:
        host.set(*(event(0x1000 + 2 * i) for i in range(200)))
        assert host.filters(WRITE) == ("0", "1")

    def test_a_filter_that_the_kernel_refuses(self, host: Made) -> None:
        host.instance.refuses.add("(msr == 0x1a0 && CPU == 1)")
        host.set(event(0x1A0, core=1))
        assert host.filters(WRITE) == ("0", "1")

    def test_a_tracepoint_that_cannot_be_set(self, host: Made) -> None:
        host.instance.refuses.add("1")
        with pytest.raises(TargetError, match="msr:write_msr cannot be set: Invalid argument"):
            host.set(event(0x1A0))


class TestRecords:
    def test_what_a_record_holds(self, host: Made) -> None:
        host.set(event(0x1A0), event(access=Access.RDMSR))
        refused = host_data(READ_MSR, 0xCE, 0, failed=-5 & 0xFFFFFFF)
        host.instance.put(1, [page(entry(host_data(WRITE_MSR, 0x1A0, 1 << 63 | 5), 1), entry(refused, 1))])
        first, second = host.take(final=True)
        assert (first.sequence, first.time_ns, first.msr, first.value, first.core) == (0, 1001, 0x1A0, 1 << 63 | 5, 1)
        assert (first.event, first.access, first.stage, first.action) == (0, Access.WRMSR, Stage.POST, Action.RECORD)
        assert (first.flags, first.rip) == (RecordFlag(0), 0)
        assert (second.sequence, second.event, second.access, second.flags) == (1, 1, Access.RDMSR, RecordFlag.FAULTED)

    def test_kvms(self, kvm: Made) -> None:
        kvm.set(event(), event(access=Access.RDMSR))
        kvm.instance.put(
            0, [page(entry(kvm_data(1, 0x10, 7, thread=103), 1), entry(kvm_data(0, 0x20, 8, thread=100, exception=1)))]
        )
        first, second = kvm.take(final=True)
        assert (first.msr, first.value, first.core, first.access, first.flags) == (0x10, 7, 3, Access.WRMSR, RecordFlag(0))
        assert (second.msr, second.value, second.core, second.access) == (0x20, 8, 0, Access.RDMSR)
        assert second.flags == RecordFlag.FAULTED

    def test_each_event_gets_its_own_in_order(self, host: Made) -> None:
        host.set(event(0x10), event(), event(0x20))
        writes = [entry(host_data(WRITE_MSR, msr, i), 1) for i, msr in enumerate((0x10, 0x20, 0x30))]
        host.instance.put(0, [page(*writes)])
        assert [(trap.value, trap.event) for trap in host.take(final=True)] == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 1)]
        assert [host.rings.hits(slot) for slot in range(3)] == [1, 3, 1]

    def test_values(self, host: Made) -> None:
        host.set(event(0x10, wanted=ValueFilter(1, 3)), event(wanted=ValueFilter(1 << 63)), event(0x10))
        writes = [entry(host_data(WRITE_MSR, 0x10, value), 1) for value in (1, 2, 1 << 63, 5, (1 << 63) | 1)]
        host.instance.put(0, [page(*writes)])
        taken = [(trap.value, trap.event) for trap in host.take(final=True) if trap.event != 2]
        assert taken == [(1, 0), (1 << 63, 1), (5, 0), ((1 << 63) | 1, 0)]
        assert [host.rings.hits(slot) for slot in range(3)] == [3, 1, 5]

    def test_cpus_are_put_in_order(self, host: Made) -> None:
        host.set(event())
        for cpu in range(2):
            writes = [entry(host_data(WRITE_MSR, 0x10, 2 * i + cpu), 10) for i in range(50)]
            host.instance.put(cpu, [page(*writes[:25], time=1000 + 5 * cpu), page(*writes[25:], time=1250 + 5 * cpu)])
        traps = host.take(final=True)
        assert [trap.value for trap in traps] == list(range(100))
        assert [trap.sequence for trap in traps] == list(range(100))

    def test_what_another_cpu_may_still_come_before_waits(self, host: Made) -> None:
        host.set(event())
        host.instance.put(0, [page(entry(host_data(WRITE_MSR, 0x10, 1))), page(entry(host_data(WRITE_MSR, 0x10, 2)), time=LATER)])
        assert [trap.value for trap in host.take()] == [1]
        host.instance.put(1, [page(entry(host_data(WRITE_MSR, 0x10, 3)), time=LATER - 1)])
        assert host.take() == []
        assert [trap.value for trap in host.take(final=True)] == [3, 2]

    def test_a_flood_is_taken_in_pieces(self, host: Made) -> None:
        host.set(event())
        full = [entry(host_data(WRITE_MSR, 0x10, 0))] * 100
        host.instance.put(0, [page(*full, time=1000 + i) for i in range(200)])
        host.instance.put(1, [page(entry(host_data(WRITE_MSR, 0x20, 0)), time=1150)])
        first = host.take()
        assert 0 < len(first) < 20_000
        assert not host.rings.before_sleep()
        assert {trap.msr for trap in first} == {0x10}
        rest = []
        while not host.rings.before_sleep():
            rest += host.take()
        traps = first + rest + host.take(final=True)
        assert [trap.time_ns for trap in traps] == sorted(trap.time_ns for trap in traps)
        assert len(traps) == 20_001

    def test_single_events_are_not_chased(self, host: Made) -> None:
        """The kernel may write as fast as one reads, and a page with an event takes as long as a whole one."""
        host.set(event())
        host.instance.put(0, [page(entry(host_data(WRITE_MSR, 0x10, i)), time=1000 + i) for i in range(10)])
        host.instance.put(1, [page(entry(host_data(WRITE_MSR, 0x20, 0)), time=1005)])
        assert [trap.value for trap in host.take()] == [0, 1]
        assert host.rings.before_sleep()
        assert [trap.value for trap in host.take()] == [2, 3]
        assert [(trap.time_ns, trap.msr) for trap in host.take()] == [(1004, 0x10), (1005, 0x20), (1005, 0x10)]
        host.rings.runs = False
        assert [trap.value for trap in host.take()] == [6, 7, 8, 9]

    def test_all_is_taken_of_one_that_is_halted(self, host: Made) -> None:
        host.set(event())
        host.instance.put(0, [page(entry(host_data(WRITE_MSR, 0x10, i)), time=1000 + i) for i in range(200)])
        host.rings.runs = False
        assert [trap.value for trap in host.take()] == list(range(200))

    def test_what_came_before_a_change_belongs_to_the_old_events(self, host: Made) -> None:
        host.set(event(0x10))
        host.instance.put(0, [page(entry(host_data(WRITE_MSR, 0x10, 1)), entry(host_data(WRITE_MSR, 0x20, 2)))])
        host.set(event(0x20))
        host.instance.put(0, [page(entry(host_data(WRITE_MSR, 0x10, 3)), entry(host_data(WRITE_MSR, 0x20, 4)), time=2000)])
        assert [trap.value for trap in host.take(final=True)] == [1, 4]

    def test_others_entries_are_passed_over(self, host: Made) -> None:
        host.set(event())
        host.instance.put(0, [page(entry(host_data(17, 0x10, 1)), entry(b"\x01" * 8), entry(host_data(WRITE_MSR, 0x10, 2)))])
        assert [trap.value for trap in host.take(final=True)] == [2]

    def test_losses_are_counted(self, host: Made) -> None:
        host.set(event())
        write = entry(host_data(WRITE_MSR, 0x10, 1))
        host.instance.put(0, [page(write, lost=40), page(write, lost=3, told=False)])
        host.instance.put(1, [page(write, size=0xFFFFF)])
        assert len(host.take(final=True)) == 3
        assert host.rings.counters() == (40 + 1 + 1, 0)
