"""Tasks of a made-up Linux, among them those of a guest that lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.linux.fake_linux import CURRENT_TASK, RODATA, THIS_CPU_OFF, FakeLinux, member
from vmexit.guest.linux.processes import Task
from vmexit.guest.linux.profile import ProfileError
from vmexit.guest.linux.recipe import Check, Recipe, Step, follow
from vmexit.guest.linux.running import Linux
from vmexit.guest.memory import UnreadableError

Attach = Callable[[FakeLinux], Linux]


def current(guest: FakeLinux, linux: Linux, core: int = 0) -> Task | None:
    return linux.current(core, guest.registers(core))


def test_current(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    task = current(guest, linux)
    assert task is not None
    assert (task.pid, task.tid, task.comm, task.address) == (94, 95, "worker", guest.tasks[95])
    assert str(task) == "worker (process 94, thread 95)" and not task.is_kernel_thread
    idle = current(guest, linux, 1)
    assert idle is not None and (idle.pid, idle.comm, idle.is_kernel_thread) == (0, "swapper/0", True)


def test_lists(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    found = linux.tasks.processes()
    assert found.broken is None
    assert [(task.pid, task.comm, task.is_kernel_thread) for task in found.tasks] == [
        (1, "init", False),
        (2, "kthreadd", True),
        (94, "dd", False),
    ]
    dd = linux.tasks.find(94)
    assert dd is not None
    assert [task.tid for task in linux.tasks.threads(dd).tasks] == [94, 95]
    thread = linux.tasks.find_thread(95)
    assert thread is not None and thread.pid == 94
    assert linux.tasks.find(95) is linux.tasks.find_thread(96) is None
    assert linux.tasks.program(dd) == "/bin/dd" and linux.tasks.program(found.tasks[1]) is None
    parent = linux.tasks.parent(dd)
    assert parent is not None and parent.pid == 0
    stack = linux.tasks.stack(dd)
    assert stack is not None and stack[1] - stack[0] == 0x4000
    assert linux.tasks.page_tables(dd) is not None and linux.tasks.page_tables(found.tasks[1]) is None


@pytest.mark.parametrize(
    ("state", "ended", "letter"),
    [
        (0, 0, "R"),
        (1, 0, "S"),
        (2, 0, "D"),
        (0x402, 0, "I"),
        (4, 0, "T"),
        (8, 0, "t"),
        (0, 0x20, "Z"),
        (0, 0x10, "X"),
        (1 << 20, 0, "?"),
    ],
)
def test_states(attach: Attach, state: int, ended: int, letter: str) -> None:
    guest = FakeLinux()
    guest.u32(guest.tasks[94] + member("task_struct.__state"), state)
    guest.u32(guest.tasks[94] + member("task_struct.exit_state"), ended)
    linux = attach(guest)
    task = linux.tasks.find(94)
    assert task is not None and linux.tasks.state(task) == letter


def test_a_program_runs(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    guest.cores[0].update(cs=0x33, gs_base=0, kernel_gs_base=guest.areas[0], rsp=0x7FFF_0000)
    task = current(guest, linux)
    assert task is not None and task.tid == 95
    # GS is the program's to choose; a kernel's address in it counts for nothing.
    guest.cores[0].update(gs_base=guest.areas[1])
    assert current(guest, linux) == task


def test_entry_code_has_not_changed_gs_yet(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    guest.cores[0].update(cs=0x10, gs_base=0x7F00_0000_0000, kernel_gs_base=guest.areas[0])
    task = current(guest, linux)
    assert task is not None and task.tid == 95


@pytest.mark.parametrize("is_swapped", [True, False])
def test_a_gs_that_is_another_cpus(attach: Attach, is_swapped: bool) -> None:
    """A program has given its own GS the address of another CPU's area."""
    guest = FakeLinux()
    linux = attach(guest)
    own, other = guest.areas
    guest.cores[0].update(gs_base=own if is_swapped else other, kernel_gs_base=other if is_swapped else own)
    task = current(guest, linux)
    assert task is not None and task.tid == 95  # RSP is on its stack
    # Nothing tells them apart: not known, rather than wrong.
    guest.cores[0].update(rsp=0x7FFF_0000)
    assert current(guest, linux) is None
    # Once there was no doubt it stays known.
    guest.cores[0].update(gs_base=own, kernel_gs_base=0)
    assert current(guest, linux) == task
    guest.cores[0].update(gs_base=other, kernel_gs_base=own)
    assert current(guest, linux) == task
    guest.cores[0].update(gs_base=other, kernel_gs_base=0)
    assert current(guest, linux) is None


def test_what_is_no_kernels_gs(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    fake = guest.allocate(0x1000)
    guest.u64(fake + THIS_CPU_OFF, fake)
    guest.u64(fake + CURRENT_TASK, guest.tasks[1])
    guest.cores[0].update(gs_base=fake)
    assert current(guest, linux) is None
    guest.cores[0].update(gs_base=guest.areas[0], cr0=0x11)
    assert current(guest, linux) is None


@pytest.mark.parametrize("task", [0, 1, 0x1000, 0xFFFF_8880_0000_0001, 0xFFFF_8880_7000_0000, (1 << 64) - 8])
def test_a_current_task_that_is_none(attach: Attach, task: int) -> None:
    guest = FakeLinux()
    guest.u64(guest.areas[0] + CURRENT_TASK, task)
    linux = attach(guest)
    assert current(guest, linux) is None
    assert current(guest, linux, 1) is not None


def test_a_kernel_that_has_not_made_its_areas_yet(attach: Attach) -> None:
    for table in ([0, 0], [0xFFFF_FFFF_9600_0000] * 2, [None, 0xFFFF_FFFF_9600_0000], [None, 0]):
        guest = FakeLinux()
        for cpu, base in enumerate(table):
            if base is not None:
                guest.u64(guest.address(RODATA + 0x1000) + 8 * cpu, base)
        linux = attach(guest)
        if table[1] != 0 or table[0] == 0:
            with pytest.raises(ProfileError, match="has not set up its per-CPU areas yet"):
                print(linux.recipe)
            assert current(guest, linux) is None
        # It is looked at anew once it has.
        for cpu, area in enumerate(guest.areas):
            guest.u64(guest.address(RODATA + 0x1000) + 8 * cpu, area)
        linux.forget()
        assert current(guest, linux) is not None


def test_a_kernel_that_has_begun_anew(attach: Attach) -> None:
    """At the same place, with its per-CPU areas elsewhere."""
    guest = FakeLinux()
    linux = attach(guest)
    assert current(guest, linux) is not None
    moved = guest.allocate(0x1000)
    guest.write(moved, guest.read(guest.areas[0], 0x200))
    guest.u64(moved + THIS_CPU_OFF, moved)
    guest.u64(guest.address(RODATA + 0x1000), moved)
    guest.cores[0].update(gs_base=moved)
    assert current(guest, linux) is None  # nobody has said that the machine has run
    linux.forget()
    task = current(guest, linux)
    assert task is not None and task.tid == 95


def test_the_recipe_is_plain_data(attach: Attach) -> None:
    guest = FakeLinux()
    recipe = attach(guest).recipe
    assert recipe.bases == tuple(guest.areas)
    assert recipe.steps == (
        Step("self", "cpu", THIS_CPU_OFF, 8, Check.SELF),
        Step("task", "cpu", CURRENT_TASK, 8, Check.KERNEL_POINTER),
        Step("tid", "task", 0x80, 4, Check.PID),
        Step("pid", "task", 0x84, 4, Check.PID),
        Step("comm", "task", 0xC0, 16, Check.NONE),
        Step("mm", "task", 0x60, 8, Check.KERNEL_POINTER_OR_NULL),
        Step("leader", "task", member("task_struct.group_leader"), 8, Check.KERNEL_POINTER_OR_NULL),
        Step("stack", "task", member("task_struct.stack"), 8, Check.KERNEL_POINTER_OR_NULL),
    )
    found = follow(recipe, guest.areas[0], lambda address, length: guest.read(address, length))
    assert found is not None and (found["pid"], found["tid"], found["comm"]) == (94, 95, b"worker".ljust(16, b"\0"))


@pytest.mark.parametrize(
    ("check", "value", "holds"),
    [
        (Check.NONE, 5, True),
        (Check.KERNEL_POINTER, 0xFFFF_8880_0000_0008, True),
        (Check.KERNEL_POINTER, 0xFF11_0000_0000_0008, True),
        (Check.KERNEL_POINTER, 0, False),
        (Check.KERNEL_POINTER, 0xFFFF_8880_0000_0004, False),
        (Check.KERNEL_POINTER, 0x7FFF_FFFF_FFF8, False),
        (Check.KERNEL_POINTER, (1 << 64) - 8, False),
        (Check.KERNEL_POINTER_OR_NULL, 0, True),
        (Check.KERNEL_POINTER_OR_NULL, 8, False),
        (Check.PID, 4 << 20, True),
        (Check.PID, (4 << 20) + 1, False),
        (Check.SELF, 0x1000, True),
        (Check.SELF, 0x1008, False),
    ],
)
def test_checks(check: Check, value: int, holds: bool) -> None:
    recipe = Recipe((0x1000,), (Step("x", "cpu", -0x2000, 8, check),))

    def read(address: int, length: int) -> bytes:
        assert address == (1 << 64) - 0x1000  # modulo 2^64
        return value.to_bytes(length, "little")

    assert (follow(recipe, 0x1000, read) == {"x": value}) is holds
    assert (follow(recipe, 0x1000, read) is None) is not holds


def test_a_recipe_that_leads_nowhere() -> None:
    def read(address: int, length: int) -> bytes:
        raise UnreadableError(address)

    assert follow(Recipe((0x1000,), (Step("x", "cpu", 0, 8),)), 0x1000, read) is None


@pytest.mark.parametrize(
    ("target", "reason", "count"),
    [
        (0, "leads to what is no task", 2),
        (0x1234, "leads to what is no task", 2),
        (0xFFFF_8880_7000_0000, "leads to what is no task", 2),
        ("itself", "runs in a circle", 2),
        ("first", "runs in a circle", 2),
    ],
)
def test_lists_that_lie(attach: Attach, target: int | str, reason: str, count: int) -> None:
    guest = FakeLinux()
    link = guest.tasks[2] + member("task_struct.tasks")
    first = guest.tasks[1] + member("task_struct.tasks")
    guest.u64(link, {"itself": link, "first": first}.get(str(target), target if isinstance(target, int) else 0))
    found = attach(guest).tasks.processes()
    assert len(found.tasks) == count
    assert found.broken is not None and reason in found.broken


def test_a_list_that_is_too_long(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeLinux()
    for pid in range(200, 220):
        guest.add_process(pid, b"many")
    linux = attach(guest)
    assert len(linux.tasks.processes().tasks) == 23
    monkeypatch.setattr("vmexit.guest.linux.processes.MOST_TASKS", 10)
    found = linux.tasks.processes()
    assert (len(found.tasks), found.broken) == (10, "the list has more than 10 entries")


def test_names_that_would_harm_a_terminal(attach: Attach) -> None:
    guest = FakeLinux()
    guest.write(guest.tasks[94] + member("task_struct.comm"), b"\x1b[2J\xff\n".ljust(16, b"x"))
    task = attach(guest).tasks.find(94)
    assert task is not None and task.comm == "\\x1b[2J\\xff\\nxxxxxxxxxx"


def test_paths_that_lie(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    task = linux.tasks.find(94)
    assert task is not None
    file = int.from_bytes(guest.read(task.mm + member("mm_struct.exe_file"), 8), "little")
    dentry = int.from_bytes(guest.read(file + member("file.f_path.dentry"), 8), "little")
    parent = int.from_bytes(guest.read(dentry + member("dentry.d_parent"), 8), "little")
    guest.u64(parent + member("dentry.d_parent"), dentry)  # a circle
    linux.forget()
    assert linux.tasks.program(task) is None
    guest.u64(dentry + member("dentry.d_name.name"), 0x1000)
    linux.forget()
    assert linux.tasks.program(task) is None
