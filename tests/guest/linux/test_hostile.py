"""A guest that changes its own data at random: whatever is asked of it ends, with an answer or without one."""

from __future__ import annotations

import copy
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.guest.linux.fake_linux import DATA, KALLSYMS, RODATA, TABLES, FakeLinux
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.recognise import recognise
from vmexit.guest.linux.stack import Stacks
from vmexit.guest.memory import LAST_ADDRESS
from vmexit.guest.system import NotRecognisedError


def original() -> FakeLinux:
    guest = FakeLinux()
    guest.add_module(b"msr", ["msr_open", "msr_write"])
    return guest


GUEST = original()
HEAP_END = GUEST.allocate(64) - 64
PLACES = [
    *(GUEST.tasks[tid] for tid in (0, 1, 2, 94, 95)),
    *GUEST.areas,
    *(GUEST.address(offset) for offset in (RODATA, RODATA + 0x1000, RODATA + 0x2000, KALLSYMS, DATA + 0x1000)),
    *(GUEST.address(TABLES + 0x1000 * index) for index in range(4)),
    HEAP_END - 0x400,
]
VALUES = st.one_of(
    st.sampled_from([0, 1, LAST_ADDRESS, LAST_ADDRESS - 7, 0x7FFF_FFFF_FFFF, *PLACES, *(place + 0x48 for place in PLACES)]),
    st.integers(0, LAST_ADDRESS),
)
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 0x80), VALUES), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    changes=CHANGES, registers=st.dictionaries(st.sampled_from(["rsp", "rbp", "gs_base", "kernel_gs_base", "rip", "cr3"]), VALUES)
)
def test_everything_ends(profiles: Cache, changes: list[tuple[int, int, int]], registers: dict[str, int]) -> None:
    guest = copy.deepcopy(GUEST)
    guest.cores[0].update(registers)
    for place, word, value in changes:
        guest.u64(place + 8 * word, value)
    try:
        linux = recognise(guest, 0, cache=profiles).linux
    except NotRecognisedError:
        return
    assert linux.describe().startswith("Linux 6.1.0-fake-amd64")
    task = linux.current(0, guest.registers(0))
    found = linux.tasks.processes()
    assert len(found.tasks) < 100
    for each in (*found.tasks, *((task,) if task else ())):
        assert each.comm.isprintable()
        assert len(linux.tasks.threads(each).tasks) < 100
        linux.tasks.program(each)
        linux.tasks.parent(each)
        linux.tasks.state(each)
    for module in linux.modules:
        assert len(linux.module_symbols(module)) < 1 << 18
        linux.name_of(module.base + 5)
    assert len(list(Stacks(linux).frames(guest.registers(0)))) <= 300


@settings(max_examples=15, deadline=None)
@given(changes=CHANGES)
def test_memory_alone_is_read_or_refused(changes: list[tuple[int, int, int]]) -> None:
    guest = copy.deepcopy(GUEST)
    for place, word, value in changes:
        guest.u64(place + 8 * word, value)
    try:
        linux = recognise(guest, 0, cache=Cache(Path("/dev/null/nowhere"))).linux
    except NotRecognisedError:
        return
    assert linux.slide == GUEST.slide
