"""Lists of a guest's kernel that go on from link to link: bounded, for any link may lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vmexit.errors import VmexitError
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.system import Task, TaskList

MOST_TASKS = 1 << 16
"""Of a list of processes, and threads that are looked at to find one."""

T = TypeVar("T", bound=Task)


class BrokenListError(VmexitError):
    """A list that does not come to its end; the text says why."""


def links(memory: VirtualMemory, start: int, end: int, most: int) -> Iterator[int]:
    """The addresses of the links behind the one at ``start``, up to ``end``; each holds the next one's. Raises BrokenListError.

    ``most``: so many may come before the end.
    """
    seen = {start}
    at = start
    for _ in range(most):
        try:
            at = memory.u64(at)
        except UnreadableError:
            raise BrokenListError("a link of the list leads nowhere") from None
        if at == end:
            return
        if at in seen:
            raise BrokenListError("the list runs in a circle")
        seen.add(at)
        yield at
    raise BrokenListError(f"the list has more than {most} entries")


def walk(memory: VirtualMemory, start: int, end: int, offset: int, read: Callable[[int], T | None], most: int) -> TaskList[T]:
    """The tasks that ``links`` gives, as far as ``read`` takes each for one; a link lies ``offset`` bytes into its structure."""
    tasks: list[T] = []
    try:
        for link in links(memory, start, end, most):
            task = read(link - offset)
            if task is None:
                return TaskList(tuple(tasks), "the list leads to what is no task")
            tasks.append(task)
    except BrokenListError as error:
        return TaskList(tuple(tasks), str(error))
    return TaskList(tuple(tasks))


class TaskLists(ABC, Generic[T]):
    """The lists of a system's processes and threads, and who is found in them. All of them raise VmexitError as the lists do."""

    @abstractmethod
    def processes(self) -> TaskList[T]:
        """All processes."""

    @abstractmethod
    def threads(self, process: T) -> TaskList[T]:
        """All threads of a process."""

    def find(self, pid: int) -> T | None:
        """The process of that number."""
        return next((task for task in self.processes().tasks if task.pid == pid), None)

    def find_thread(self, tid: int) -> T | None:
        """The thread of that number."""
        return next((task for task in self._all_threads() if task.tid == tid), None)

    def _all_threads(self) -> Iterator[T]:
        left = MOST_TASKS
        for process in self.processes().tasks:
            threads = self.threads(process).tasks
            yield from threads
            left -= len(threads)
            if left < 0:
                return
