"""Processes and threads of a running kernel, and which of them a vCPU executes.

Linux calls both tasks. A process (thread group) is what has a ``pid`` of its own in user space; its threads have the same ``pid``
here, which the kernel calls tgid, and each a ``tid``, which the kernel calls pid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmexit.guest.linux import recipe as recipes
from vmexit.guest.linux.profile import Profile
from vmexit.guest.linux.recipe import COMM_LENGTH, HIGHEST_PID, THREAD_SIZE, Recipe, is_kernel_pointer
from vmexit.guest.lists import MOST_TASKS, TaskLists, walk
from vmexit.guest.memory import UnreadableError, VirtualMemory, printable
from vmexit.guest.percpu import Areas
from vmexit.guest.system import TaskList

_MOST_THREADS = 1 << 14
_DEEPEST_PATH = 64
_LONGEST_NAME = 255

# task_struct.__state and exit_state (include/linux/sched.h) and the letters of /proc/PID/stat.
_STATES = ((0x402, "I"), (1, "S"), (2, "D"), (4, "T"), (8, "t"), (0x40, "P"))
_EXIT_STATES = {0x10: "X", 0x20: "Z", 0x30: "X"}


@dataclass(frozen=True, slots=True)
class Task:
    """A thread of the guest's."""

    address: int
    """Of its task_struct."""
    pid: int
    """Of its process; 0: one of the kernel's idle threads."""
    tid: int
    comm: str
    """At most 15 bytes: the program's name, or what the thread calls itself."""
    mm: int
    """Its address space (mm_struct); 0: it is a thread of the kernel's."""

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it never runs a program's code."""
        return self.mm == 0

    def __str__(self) -> str:
        thread = f", thread {self.tid}" if self.tid != self.pid else ""
        return f"{self.comm} (process {self.pid}{thread})"


class Tasks(TaskLists[Task]):
    """The tasks of one running kernel."""

    def __init__(self, profile: Profile, slide: int, memory: VirtualMemory) -> None:
        self._profile = profile
        self._slide = slide
        self._memory = memory
        self._areas = Areas()
        self._recipe: Recipe | None = None

    @property
    def recipe(self) -> Recipe:
        """The way to the current task. Raises ProfileError where it is not known (yet)."""
        if self._recipe is None:
            self._recipe = recipes.make_recipe(self._profile, self._slide, self._memory)
        return self._recipe

    def forget(self) -> None:
        """The machine has run: a kernel that has begun anew has made its per-CPU areas anew, too."""
        self._recipe = None

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The task that a vCPU executes; None: not known. Raises ProfileError where the kernel has not come so far."""
        base = self.percpu_base(core, registers)
        return None if base is None else self._at(base)

    def percpu_base(self, core: int, registers: Mapping[str, int]) -> int | None:
        """The per-CPU area of the kernel on a vCPU; None: its registers do not say."""
        rsp = registers["rsp"]
        return self._areas.base(core, registers, self.recipe.bases, lambda base: self._owns_stack(base, rsp))

    def _owns_stack(self, base: int, rsp: int) -> bool:
        task = self._at(base)
        stack = self.stack(task) if task else None
        return stack is not None and stack[0] <= rsp < stack[1]

    def _at(self, base: int) -> Task | None:
        """The task of a per-CPU area."""
        found = recipes.follow(self.recipe, base, self._memory.read)
        if found is None:
            return None
        return Task(_int(found["task"]), _int(found["pid"]), _int(found["tid"]), _comm(found["comm"]), _int(found["mm"]))

    def read(self, address: int) -> Task | None:
        """The task whose task_struct is there; None where none can be."""
        if not is_kernel_pointer(address):
            return None
        memory, offset = self._memory, self._profile.offset
        try:
            tid, pid = (memory.u32(address + offset(f"task_struct.{name}")) for name in ("pid", "tgid"))
            comm = memory.read(address + offset("task_struct.comm"), COMM_LENGTH)
            mm = memory.u64(address + offset("task_struct.mm"))
        except UnreadableError:
            return None
        if pid > HIGHEST_PID or tid > HIGHEST_PID or (mm and not is_kernel_pointer(mm)):
            return None
        return Task(address, pid, tid, _comm(comm), mm)

    def processes(self) -> TaskList[Task]:
        """The first thread of each process, the oldest first. Raises ProfileError where the lists cannot be found."""
        offset = self._profile.offset("task_struct.tasks")
        head = self._profile.address("init_task") + self._slide + offset
        return walk(self._memory, head, head, offset, self.read, MOST_TASKS)

    def threads(self, process: Task) -> TaskList[Task]:
        """All threads of a process, its first among them. Raises ProfileError."""
        try:
            signal = self._memory.u64(process.address + self._profile.offset("task_struct.signal"))
        except UnreadableError:
            return TaskList((), "its task_struct cannot be read")
        if not is_kernel_pointer(signal):
            return TaskList((), "its list of threads is nowhere")
        head = signal + self._profile.offset("signal_struct.thread_head")
        return walk(self._memory, head, head, self._profile.offset("task_struct.thread_node"), self.read, _MOST_THREADS)

    def find_thread(self, tid: int) -> Task | None:
        """The thread of that number. Raises ProfileError."""
        # Many are the first of their process, which has the same number.
        found = next((task for task in self.processes().tasks if task.tid == tid), None)
        return found or super().find_thread(tid)

    def parent(self, task: Task) -> Task | None:
        """The process that it is a child of."""
        try:
            return self.read(self._memory.u64(task.address + self._profile.offset("task_struct.real_parent")))
        except UnreadableError:
            return None

    def parent_id(self, task: Task) -> int | None:
        """The number of that process."""
        parent = self.parent(task)
        return parent.pid if parent else None

    def process_of(self, task: Task) -> Task | None:
        """The first thread of a thread's process. Raises ProfileError."""
        return task if task.tid == task.pid else self.find(task.pid)

    def state(self, task: Task) -> str:
        """One letter, as /proc/PID/stat has it; "?" where it is not known."""
        try:
            state = self._memory.u32(task.address + self._profile.offset("task_struct.__state"))
            ended = self._memory.u32(task.address + self._profile.offset("task_struct.exit_state"))
        except UnreadableError:
            return "?"
        if ended:
            return _EXIT_STATES.get(ended, "?")
        return "R" if state == 0 else next((letter for bits, letter in _STATES if state & bits == bits), "?")

    def stack(self, task: Task) -> tuple[int, int] | None:
        """Begin and end of its kernel stack."""
        try:
            start = self._memory.u64(task.address + self._profile.offset("task_struct.stack"))
        except UnreadableError:
            return None
        return (start, start + THREAD_SIZE) if is_kernel_pointer(start) else None

    def page_tables(self, task: Task) -> int | None:
        """The virtual address of its address space's highest page table."""
        try:
            pgd = self._memory.u64(task.mm + self._profile.offset("mm_struct.pgd")) if task.mm else 0
        except UnreadableError:
            return None
        return pgd if is_kernel_pointer(pgd) else None

    def places(self, task: Task) -> list[tuple[str, int]]:
        """Where its address space is described."""
        tables = self.page_tables(task)
        return [] if tables is None else [("page tables", tables), ("mm_struct", task.mm)]

    def program(self, task: Task) -> str | None:
        """The path of the file that it executes, within that file's own file system; None: not known, or there is none."""
        offset, memory = self._profile.offset, self._memory
        if not task.mm:
            return None
        names: list[str] = []
        try:
            file = memory.u64(task.mm + offset("mm_struct.exe_file"))
            dentry = memory.u64(file + offset("file.f_path.dentry"))
            for _ in range(_DEEPEST_PATH):
                parent = memory.u64(dentry + offset("dentry.d_parent"))
                if parent == dentry:
                    return "/" + "/".join(reversed(names))
                names.append(memory.text(memory.u64(dentry + offset("dentry.d_name.name")), _LONGEST_NAME))
                dentry = parent
        except UnreadableError:
            pass
        return None


def _comm(data: int | bytes) -> str:
    assert isinstance(data, bytes)
    return printable(data.partition(b"\0")[0])


def _int(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value
