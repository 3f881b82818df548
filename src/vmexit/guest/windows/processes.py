"""Processes and threads of a running Windows, and which of them a vCPU executes.

A thread's process is the one that has made it. While it is attached to another process (KeStackAttachProcess) it uses that one's
address space, and stays what it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmexit.guest import paging
from vmexit.guest.linux import recipe as recipes
from vmexit.guest.linux.recipe import CPU, HIGHEST_PID, Check, Recipe, Step, is_kernel_pointer
from vmexit.guest.lists import MOST_TASKS, TaskLists, walk
from vmexit.guest.memory import UnreadableError, VirtualMemory, printable
from vmexit.guest.percpu import Areas
from vmexit.guest.system import TaskList
from vmexit.guest.windows import layout
from vmexit.guest.windows.layout import Offsets
from vmexit.guest.windows.locate import KPCR_SELF, KPRCB

NAME_LENGTH = 15
"""Of EPROCESS.ImageFileName."""
SYSTEM_PID = 4
STACK_BYTES = 0x6000
"""Of a thread's kernel stack; those of threads with windows are longer, and only their lower part is told to be theirs."""
_MOST_THREADS = 1 << 16
_LONGEST_PATH = 4096

# KTHREAD_STATE.
_STATES = {0: "i", 1: "r", 2: "R", 3: "s", 4: "X", 5: "W", 6: "t", 7: "d", 8: "g", 9: "w"}


@dataclass(frozen=True, slots=True)
class Task:
    """A thread, or in a list of processes a process."""

    address: int
    """Of its ETHREAD; of a process its EPROCESS."""
    pid: int
    """0: one of the kernel's idle threads."""
    tid: int
    """Of a process its pid."""
    comm: str
    """What the process is called: the program's file, at most 14 or 15 bytes of it."""
    process: int
    """Its EPROCESS."""
    is_kernel_thread: bool

    def __str__(self) -> str:
        thread = f", thread {self.tid}" if self.address != self.process else ""
        return f"{self.comm} (process {self.pid}{thread})"


@dataclass(frozen=True, slots=True)
class Known:
    """What it takes to look at the processes of one boot."""

    offsets: Offsets
    system: int
    """The EPROCESS of the process System."""
    bases: tuple[int, ...]
    """The KPCRs."""


class Tasks(TaskLists[Task]):
    """The processes and threads of one running kernel."""

    def __init__(self, memory: Callable[[], VirtualMemory], known: Callable[[], Known]) -> None:
        """``known`` raises VmexitError where the offsets are not known, or not yet."""
        self._get_memory = memory
        self._get_known = known
        self._areas = Areas()

    @property
    def _memory(self) -> VirtualMemory:
        return self._get_memory()

    @property
    def recipe(self) -> Recipe:
        """The way to a vCPU's thread. Raises VmexitError."""
        known = self._get_known()
        return make_recipe(known, self._memory)

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The thread that a vCPU executes; None: not known. Raises VmexitError."""
        recipe = self.recipe
        rsp = registers["rsp"]

        def owns_stack(base: int) -> bool:
            task = self._at(recipe, base)
            stack = self.stack(task) if task else None
            return stack is not None and stack[0] <= rsp < stack[1]

        base = self._areas.base(core, registers, recipe.bases, owns_stack)
        return None if base is None else self._at(recipe, base)

    def _at(self, recipe: Recipe, base: int) -> Task | None:
        """The thread that a KPCR names."""
        found = recipes.follow(recipe, base, self._memory.read)
        if found is None:
            return None
        thread, process, pid, tid, name = (found[step] for step in ("task", "leader", "pid", "tid", "comm"))
        assert isinstance(thread, int) and isinstance(process, int) and isinstance(pid, int) and isinstance(tid, int)
        assert isinstance(name, bytes)
        return Task(thread, pid, tid, _name(name), process, self._is_kernels(process, pid))

    def _is_kernels(self, process: int, pid: int) -> bool:
        """Whether a process never runs a program: it has no PEB."""
        offset = self._get_known().offsets.get(layout.PEB)
        if offset is None:
            return pid in (0, SYSTEM_PID)
        try:
            return self._memory.u64(process + offset) == 0
        except UnreadableError:
            return False

    def read_process(self, address: int) -> Task | None:
        """The process whose EPROCESS is there; None where none can be."""
        offsets, memory = self._get_known().offsets, self._memory
        if not is_kernel_pointer(address):
            return None
        try:
            pid = memory.u64(address + offsets[layout.PROCESS_ID])
            name = memory.read(address + offsets[layout.PROCESS_NAME], NAME_LENGTH)
        except UnreadableError:
            return None
        if pid > HIGHEST_PID:
            return None
        return Task(address, pid, pid, _name(name), address, self._is_kernels(address, pid))

    def read_thread(self, address: int) -> Task | None:
        """The thread whose ETHREAD is there; None where none can be."""
        offsets, memory = self._get_known().offsets, self._memory
        if not is_kernel_pointer(address):
            return None
        try:
            tid = memory.u64(address + offsets[layout.CLIENT_ID] + 8)
            process = self.read_process(memory.u64(address + offsets[layout.THREAD_PROCESS]))
        except UnreadableError:
            return None
        if tid > HIGHEST_PID or process is None:
            return None
        return Task(address, process.pid, tid, process.comm, process.address, process.is_kernel_thread)

    def processes(self) -> TaskList[Task]:
        """All that are alive, System first. Raises VmexitError."""
        known = self._get_known()
        links = known.offsets[layout.PROCESS_LINKS]
        system = self.read_process(known.system)
        if system is None:
            return TaskList((), "the process System cannot be read")
        # The list's head is somewhere in the kernel's data, with no process around it, and System is the first behind it.
        try:
            head = self._memory.u64(known.system + links + 8)
        except UnreadableError:
            head = 0
        found = walk(self._memory, known.system + links, head, links, self.read_process, MOST_TASKS)
        return TaskList((system, *found.tasks), found.broken)

    def threads(self, process: Task) -> TaskList[Task]:
        """All threads of a process. Raises VmexitError."""
        offsets = self._get_known().offsets
        if layout.THREAD_LINKS not in offsets:
            return TaskList((), "it is not known where this build keeps it")
        head = process.process + offsets[layout.PROCESS_THREADS]

        def read(address: int) -> Task | None:
            task = self.read_thread(address)
            return task if task and task.process == process.process else None

        return walk(self._memory, head, head, offsets[layout.THREAD_LINKS], read, _MOST_THREADS)

    def process_of(self, task: Task) -> Task | None:
        """A thread's process."""
        return self.read_process(task.process)

    def parent_id(self, task: Task) -> int | None:
        """The number of the process that has made it; another one may have it by now."""
        parent = self._word(task.process, layout.PARENT_ID)
        return parent if parent is not None and parent <= HIGHEST_PID else None

    def state(self, task: Task) -> str:
        """A letter for a thread (see ``ps``); "-" for a process, "?" where it is not known."""
        if task.address == task.process:
            return "-"
        offset = self._get_known().offsets.get(layout.THREAD_STATE)
        if offset is None:
            return "?"
        try:
            return _STATES.get(self._memory.u8(task.address + offset), "?")
        except UnreadableError:
            return "?"

    def stack(self, task: Task) -> tuple[int, int] | None:
        """Lowest and highest address of a thread's kernel stack."""
        if task.address == task.process:
            return None
        limit, base = (self._word(task.address, member) for member in (layout.STACK_LIMIT, layout.STACK_BASE))
        if limit is None or base is None or not is_kernel_pointer(limit) or not limit < base <= limit + (1 << 20):
            return None
        return limit, base

    def places(self, task: Task) -> list[tuple[str, int]]:
        """Where its address space is described."""
        tables, peb = (self._word(task.process, member) for member in (layout.PAGE_TABLES, layout.PEB))
        found = (("physical page tables", (tables or 0) & paging.ADDRESS), ("PEB", peb or 0))
        return [(what, address) for what, address in found if address]

    def program(self, task: Task) -> str | None:
        """The path of its program, from the root of NT's object names; None: not known, or it has none."""
        memory = self._memory
        name = self._word(task.process, layout.PROCESS_PATH)
        if name is None or not is_kernel_pointer(name):
            return None
        try:
            # OBJECT_NAME_INFORMATION is a UNICODE_STRING.
            path = read_unicode_string(memory, name, _LONGEST_PATH)
        except UnreadableError:
            return None
        # The offset is believed where what is found there fits the name that the kernel cut off it.
        file = path.rpartition("\\")[2]
        return path if file and file[: NAME_LENGTH - 1].lower() == task.comm[: NAME_LENGTH - 1].lower() else None

    def _word(self, address: int, member: str) -> int | None:
        offset = self._get_known().offsets.get(member)
        if offset is None:
            return None
        try:
            return self._memory.u64(address + offset)
        except UnreadableError:
            return None


def make_recipe(known: Known, memory: VirtualMemory) -> Recipe:
    """The way from a KPCR to the thread that its CPU executes."""
    offsets = known.offsets
    steps = [
        Step("self", CPU, KPCR_SELF, 8, Check.SELF),
        Step("task", CPU, KPRCB + offsets[layout.CURRENT_THREAD], 8, Check.KERNEL_POINTER),
        Step("tid", "task", offsets[layout.CLIENT_ID] + 8, 4, Check.PID),
        Step("leader", "task", offsets[layout.THREAD_PROCESS], 8, Check.KERNEL_POINTER),
        Step("pid", "leader", offsets[layout.PROCESS_ID], 4, Check.PID),
        Step("comm", "leader", offsets[layout.PROCESS_NAME], NAME_LENGTH),
    ]
    if layout.STACK_LIMIT in offsets:
        steps.append(Step("stack", "task", offsets[layout.STACK_LIMIT], 8, Check.KERNEL_POINTER_OR_NULL))
    # Both are a program's addresses, or 0.
    for result, source, member in (("teb", "task", layout.TEB), ("peb", "leader", layout.PEB)):
        if member in offsets:
            steps.append(Step(result, source, offsets[member], 8))
    return Recipe(known.bases, tuple(steps), memory.root & paging.ADDRESS, memory.levels, STACK_BYTES)


def read_unicode_string(memory: VirtualMemory, address: int, most: int) -> str:
    """The text of a UNICODE_STRING; empty where it is none. Raises UnreadableError."""
    length, capacity = (int.from_bytes(memory.read(address + at, 2), "little") for at in (0, 2))
    buffer = memory.u64(address + 8)
    if length % 2 or not 0 < length <= min(capacity, most) or not is_kernel_pointer(buffer & ~7):
        return ""
    return printable(memory.read(buffer, length).decode("utf-16-le", "replace").encode())


def _name(data: bytes) -> str:
    return printable(data.partition(b"\0")[0])
