"""Processes and threads of a made-up Windows, among them those of a guest that lies."""

from __future__ import annotations

import struct

import pytest

from tests.guest.windows.conftest import attach
from tests.guest.windows.fake_windows import HEAP, PROCESS_HEAD, PROCESSOR_BLOCK, FakeWindows
from vmexit.guest.linux.recipe import Check, Recipe, Step, follow
from vmexit.guest.windows.processes import Task
from vmexit.guest.windows.running import Windows

LINKS, NAME, CID, OWNER, THREAD_LINKS = 0x448, 0x5A8, 0x478, 0x220, 0x2F8


def current(guest: FakeWindows, windows: Windows, core: int = 0) -> Task | None:
    return windows.current(core, guest.registers(core))


def test_current() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    task = current(guest, windows)
    assert task is not None and task.address == guest.threads[0x123C] and task.process == guest.processes[0x1234]
    assert str(task) == "a-long-program (process 4660, thread 4668)" and not task.is_kernel_thread
    idle = current(guest, windows, 1)
    assert idle is not None and str(idle) == "Idle (process 0, thread 0)" and idle.is_kernel_thread
    guest.switch(1, 0x10)
    windows.forget()
    system = current(guest, windows, 1)
    assert system is not None and (system.pid, system.tid, system.is_kernel_thread) == (4, 0x10, True)


def test_a_thread_that_is_attached_to_another_process_stays_its_own() -> None:
    guest = FakeWindows()
    guest.u64(guest.threads[0x123C] + 0xB8, guest.processes[0x1A4])
    task = current(guest, attach(guest))
    assert task is not None and task.pid == 0x1234


def test_lists() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    found = windows.tasks.processes()
    assert found.broken is None
    assert [(task.pid, task.comm, task.is_kernel_thread) for task in found.tasks] == [
        (4, "System", True),
        (0x1A4, "smss.exe", False),
        (0x1234, "a-long-program", False),
    ]
    assert [str(task) for task in found.tasks][1] == "smss.exe (process 420)"
    for pid, tids in ((4, [8, 0x10]), (0x1A4, [0x1A8]), (0x1234, [0x1238, 0x123C])):
        process = windows.tasks.find(pid)
        assert process is not None and process.address == guest.processes[pid]
        threads = windows.tasks.threads(process)
        assert threads.broken is None and [task.tid for task in threads.tasks] == tids
        assert all(windows.tasks.process_of(task) == process for task in threads.tasks)
    assert windows.tasks.find(0x1238) is windows.tasks.find_thread(0x1234) is None


def test_what_is_known_of_a_process_and_a_thread() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    system, smss, _ = windows.tasks.processes().tasks
    assert windows.tasks.program(smss) == "\\Device\\HarddiskVolume3\\Windows\\System32\\smss.exe"
    assert windows.tasks.program(system) is None
    assert (windows.tasks.parent_id(smss), windows.tasks.parent_id(system)) == (4, 0)
    assert (windows.tasks.state(smss), windows.tasks.stack(smss)) == ("-", None)
    assert windows.tasks.places(smss) == [("physical page tables", guest.root), ("PEB", 0x7FF6_001A_4000)]
    assert windows.tasks.places(system) == [("physical page tables", guest.root)]
    running, waiting = windows.tasks.find_thread(0x123C), windows.tasks.find_thread(0x1238)
    assert running is not None and waiting is not None
    assert (windows.tasks.state(running), windows.tasks.state(waiting)) == ("R", "W")
    stack = windows.tasks.stack(running)
    assert stack is not None and stack[1] == guest.stack_of(0x123C) and stack[1] - stack[0] == 0x6000


def test_a_program_runs() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    guest.enter_program(0)
    task = current(guest, windows)
    assert task is not None and task.tid == 0x123C
    # GS is the program's to choose; a kernel's address in it counts for nothing.
    guest.cores[0]["gs_base"] = guest.kpcrs[1]
    assert current(guest, windows) == task


def test_a_gs_that_is_another_cpus() -> None:
    """In the kernel's entry code, with a program that has given its own GS the address of another CPU's KPCR."""
    guest = FakeWindows()
    windows = attach(guest)
    own, other = guest.kpcrs
    for gs, swapped in ((own, other), (other, own)):
        guest.cores[0] |= {"gs_base": gs, "kernel_gs_base": swapped}
        task = current(guest, windows)
        assert task is not None and task.tid == 0x123C  # RSP is on its stack
    guest.cores[0]["rsp"] = 0x7FFF_0000
    assert current(guest, windows) is None
    guest.cores[0] |= {"gs_base": own, "kernel_gs_base": 0}
    assert current(guest, windows) is not None
    guest.cores[0] |= {"gs_base": other, "kernel_gs_base": 0}
    assert current(guest, windows) is None  # it was seen to be another


def test_a_kpcr_that_is_none_of_the_kernels() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    fake = guest.allocate(0x1000)
    guest.u64(fake + 0x18, fake)
    guest.u64(fake + 0x20, fake + 0x180)
    guest.u64(fake + 0x188, guest.threads[8])
    guest.cores[0]["gs_base"] = fake
    assert current(guest, windows) is None
    guest.cores[0] |= {"gs_base": guest.kpcrs[0], "kernel_gs_base": fake}
    assert attach(guest).known.bases == tuple(guest.kpcrs)


def test_a_processor_that_comes_later() -> None:
    guest = FakeWindows()
    guest.u64(guest.address(PROCESSOR_BLOCK) + 8, 0)
    windows = attach(guest)
    assert windows.recipe.bases == (guest.kpcrs[0],) and current(guest, windows, 1) is None
    guest.u64(guest.address(PROCESSOR_BLOCK) + 8, guest.kpcrs[1] + 0x180)
    windows.forget()
    assert windows.recipe.bases == tuple(guest.kpcrs) and current(guest, windows, 1) is not None


def test_the_recipe_is_plain_data() -> None:
    guest = FakeWindows()
    recipe = attach(guest).recipe
    assert recipe == Recipe(
        tuple(guest.kpcrs),
        (
            Step("self", "cpu", 0x18, 8, Check.SELF),
            Step("task", "cpu", 0x188, 8, Check.KERNEL_POINTER),
            Step("tid", "task", 0x480, 4, Check.PID),
            Step("leader", "task", 0x220, 8, Check.KERNEL_POINTER),
            Step("pid", "leader", 0x440, 4, Check.PID),
            Step("comm", "leader", 0x5A8, 15),
            Step("stack", "task", 0x30, 8, Check.KERNEL_POINTER_OR_NULL),
            Step("teb", "task", 0xF0, 8),
            Step("peb", "leader", 0x550, 8),
        ),
        guest.root,
        4,
        0x6000,
    )
    found = follow(recipe, guest.kpcrs[0], guest.read)
    assert found is not None and (found["pid"], found["tid"], found["comm"]) == (0x1234, 0x123C, b"a-long-program\0")


@pytest.mark.parametrize("thread", [0, 8, 0x1000, HEAP + 1, HEAP + 0x7000_0000, (1 << 64) - 8])
def test_a_current_thread_that_is_none(thread: int) -> None:
    guest = FakeWindows()
    windows = attach(guest)
    guest.u64(guest.kpcrs[0] + 0x188, thread)
    windows.memory.forget()
    assert current(guest, windows) is None
    assert current(guest, windows, 1) is not None


@pytest.mark.parametrize(
    ("target", "reason", "count"),
    [
        (0, "leads to what is no task", 2),
        (0x1234, "leads to what is no task", 2),
        (0xFFFF_B50F_7000_0000, "leads to what is no task", 2),
        ("itself", "runs in a circle", 2),
        ("first", "runs in a circle", 2),
    ],
)
def test_lists_that_lie(target: int | str, reason: str, count: int) -> None:
    guest = FakeWindows()
    windows = attach(guest)
    link, first = guest.processes[0x1A4] + LINKS, guest.processes[4] + LINKS
    guest.u64(link, target if isinstance(target, int) else {"itself": link, "first": first}[target])
    windows.memory.forget()
    found = windows.tasks.processes()
    assert len(found.tasks) == count and found.broken is not None and reason in found.broken


def test_threads_of_another_process_are_not_listed() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    guest.u64(guest.threads[0x1238] + OWNER, guest.processes[4])
    windows.memory.forget()
    process = windows.tasks.find(0x1234)
    assert process is not None
    found = windows.tasks.threads(process)
    assert (found.tasks, found.broken) == ((), "the list leads to what is no task")


def test_a_list_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeWindows()
    for pid in range(0x2000, 0x2040, 4):
        guest.add_process(pid, "many.exe", parent=4)
    guest.relink()
    windows = attach(guest)
    assert len(windows.tasks.processes().tasks) == 19
    monkeypatch.setattr("vmexit.guest.windows.processes.MOST_TASKS", 10)
    found = windows.tasks.processes()
    assert (len(found.tasks), found.broken) == (11, "the list has more than 10 entries")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda guest: guest.u64(guest.processes[4] + 0x440, 8),
        lambda guest: guest.write(guest.processes[4] + NAME, b"Sysiphus"),
        lambda guest: guest.u64(guest.processes[4] + LINKS, guest.address(PROCESS_HEAD)),
        lambda guest: guest.u64(guest.processes[4] + LINKS + 8, 0x1000),
        lambda guest: guest.u64(guest.processes[4] + 0x28, 0x1000),
    ],
    ids=["number", "name", "list", "list backwards", "page tables"],
)
def test_what_does_not_fit_is_not_believed(spoil: object) -> None:
    guest = FakeWindows()
    assert callable(spoil)
    spoil(guest)
    windows = attach(guest)
    assert current(guest, windows) is None and current(guest, windows, 1) is None


@pytest.mark.parametrize(
    ("spoil", "is_known"),
    [
        (lambda guest: None, True),
        (lambda guest: guest.u64(guest.threads[0x123C] + CID, 4), False),
        (lambda guest: guest.u64(guest.threads[0x123C] + OWNER, 0), False),
        (lambda guest: guest.u64(guest.threads[0x123C] + CID + 8, 1 << 40), False),
        (lambda guest: guest.switch(0, 0), False),
    ],
    ids=["nothing", "owner's number", "owner", "thread's number", "all idle"],
)
@pytest.mark.parametrize("head", [0, 0x1000, "itself"])
def test_without_systems_threads_those_that_run_have_to_fit(spoil: object, is_known: bool, head: int | str) -> None:
    guest = FakeWindows()
    own = guest.processes[4] + 0x30
    guest.u64(own, own if head == "itself" else int(head))
    assert callable(spoil)
    spoil(guest)
    windows = attach(guest)
    assert (current(guest, windows) is not None) is is_known
    if is_known:
        process = windows.tasks.find(0x1234)
        assert process is not None
        found = windows.tasks.threads(process)
        assert (found.tasks, found.broken) == ((), "it is not known where this build keeps it")


def test_an_idle_thread_without_numbers() -> None:
    """It may be less than an ETHREAD, with anything behind it; the others are known all the same."""
    guest = FakeWindows()
    guest.u64(guest.threads[-1] + CID, 0x1234_5678_9ABC)
    guest.u64(guest.threads[-1] + CID + 8, 0x1234_5678_9ABC)
    windows = attach(guest)
    assert current(guest, windows) is not None and current(guest, windows, 1) is None


def test_names_that_would_harm_a_terminal() -> None:
    guest = FakeWindows()
    guest.write(guest.processes[0x1A4] + NAME, b"\x1b[2J\xff\n".ljust(15, b"x"))
    process = attach(guest).tasks.find(0x1A4)
    assert process is not None and process.comm == "\\x1b[2J\\xff\\nxxxxxxxxx"


def test_paths_that_lie() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    process = windows.tasks.find(0x1A4)
    assert process is not None
    (text,) = struct.unpack("<Q", guest.read(process.address + 0x5C0, 8))
    for content in (
        struct.pack("<HHIQ", 0xFFFE, 0xFFFE, 0, 0xFFFF_B50F_1A00_0000),
        struct.pack("<HHIQ", 7, 8, 0, 0xFFFF_B50F_1A00_0000),
        struct.pack("<HHIQ", 8, 4, 0, 0xFFFF_B50F_1A00_0000),
        struct.pack("<HHIQ", 8, 8, 0, 0x1000),
        struct.pack("<HHIQ", 8, 8, 0, 0xFFFF_B50F_7000_0000),
        struct.pack("<HHIQ", 8, 8, 0, 0xFFFF_B50F_1A00_0000),  # another text
    ):
        guest.write(text, content)
        windows.memory.forget()
        assert windows.tasks.program(process) is None
    guest.u64(process.address + 0x5C0, 5)
    windows.memory.forget()
    assert windows.tasks.program(process) is None
