"""A guest that changes its own data at random: whatever is asked of it ends, with an answer or without one."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.windows.conftest import look
from tests.guest.windows.fake_windows import CALLER, DATA, DRIVER, RODATA, TEXT, FakeWindows
from vmexit.errors import VmexitError
from vmexit.guest.memory import LAST_ADDRESS
from vmexit.guest.system import NotRecognisedError
from vmexit.guest.windows.running import Windows

GUEST = FakeWindows()
PLACES = [
    *GUEST.processes.values(),
    *GUEST.threads.values(),
    *GUEST.kpcrs,
    *(process + 0x440 for process in GUEST.processes.values()),
    *(thread + 0x470 for thread in GUEST.threads.values()),
    *(GUEST.address(rva) for rva in (0, 0x100, 0x180, TEXT, CALLER, RODATA, RODATA + 0x8000, RODATA + 0xA000, RODATA + 0xA800)),
    *(GUEST.address(DATA + offset) for offset in (0x100, 0x900)),
    *GUEST.module_entries,
    *(DRIVER + rva for rva in (0, 0x100, 0x2000)),
    GUEST.cores[0]["rsp"],
]
VALUES = st.one_of(
    st.sampled_from([0, 1, LAST_ADDRESS, LAST_ADDRESS - 7, 0x7FFF_FFFF_FFFF, *PLACES, *(place + 0x448 for place in PLACES[:4])]),
    st.integers(0, LAST_ADDRESS),
)
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 0x60), VALUES), min_size=1, max_size=12)
REGISTERS = st.dictionaries(st.sampled_from(["rsp", "rbp", "gs_base", "kernel_gs_base", "rip", "cr3"]), VALUES)


@settings(max_examples=80, deadline=None)
@given(changes=CHANGES, registers=REGISTERS, lstar=st.one_of(st.none(), VALUES))
def test_everything_ends(changes: list[tuple[int, int, int]], registers: dict[str, int], lstar: int | None) -> None:
    guest = copy.deepcopy(GUEST)
    guest.cores[0].update(registers)
    for place, word, value in changes:
        guest.u64(place + 8 * word, value)
    try:
        found = look(guest, lstar=lstar)
    except NotRecognisedError:
        return
    windows = found.system
    assert isinstance(windows, Windows)
    assert windows.describe().startswith("Windows") and windows.built
    task = windows.current(0, guest.registers(0))
    try:
        processes = windows.tasks.processes().tasks
    except VmexitError:
        processes = ()
    assert len(processes) < 100
    for each in (*processes, *((task,) if task else ())):
        assert each.comm.isprintable() or not each.comm
        assert len(windows.tasks.threads(each).tasks) < 100
        windows.tasks.program(each)
        windows.tasks.parent_id(each)
        windows.tasks.state(each)
        windows.tasks.stack(each)
    for module in windows.modules:
        assert len(windows.module_symbols(module)) < 1 << 17
        windows.name_of(module.base + 5)
    for rva in (0, TEXT, CALLER + 3, DATA + 4):
        windows.name_of(guest.address(rva))
    assert len(list(windows.search("*"))) < 1 << 18
    assert len(list(found.stacks.frames(guest.registers(0)))) <= 260
