"""Lists of links in made-up memory, and tasks in them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from vmexit.guest.lists import BrokenListError, TaskLists, links, walk
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.system import TaskList

HEAD = 0x1000


class Words(VirtualMemory):
    """Memory of so many words, and nothing else."""

    def __init__(self, words: dict[int, int]) -> None:
        self.words_at = words

    def u64(self, address: int) -> int:
        if address not in self.words_at:
            raise UnreadableError(address)
        return self.words_at[address]


@pytest.mark.parametrize(
    ("words", "found", "reason"),
    [
        ({HEAD: HEAD}, [], None),
        ({HEAD: 8, 8: 16, 16: HEAD}, [8, 16], None),
        ({HEAD: 8}, [8], "a link of the list leads nowhere"),
        ({}, [], "a link of the list leads nowhere"),
        ({HEAD: 8, 8: 16, 16: 8}, [8, 16], "the list runs in a circle"),
        ({HEAD: 8, 8: 8}, [8], "the list runs in a circle"),
        ({HEAD: 8, 8: 16, 16: 24, 24: 32}, [8, 16, 24], "the list has more than 3 entries"),
    ],
)
def test_links(words: dict[int, int], found: list[int], reason: str | None) -> None:
    seen: list[int] = []
    with pytest.raises(BrokenListError, match=reason) if reason else nullcontext():
        for link in links(Words(words), HEAD, HEAD, 3):
            seen.append(link)
    assert seen == found


@dataclass(frozen=True)
class Task:
    address: int
    pid: int
    tid: int
    comm: str = ""
    is_kernel_thread: bool = False


class Made(TaskLists[Task]):
    """Two processes with three threads each, and one whose list of threads is broken."""

    def processes(self) -> TaskList[Task]:
        return TaskList(tuple(Task(pid, pid, pid) for pid in (1, 10, 20)))

    def threads(self, process: Task) -> TaskList[Task]:
        if process.pid == 1:
            return TaskList((), "it is broken")
        return TaskList(tuple(Task(tid, process.pid, tid) for tid in range(process.pid, process.pid + 3)))


def test_tasks_of_a_list() -> None:
    memory = Words({HEAD: 0x2008, 0x2008: 0x3008, 0x3008: HEAD})
    found = walk(memory, HEAD, HEAD, 8, lambda address: Task(address, 1, 1), 5)
    assert [task.address for task in found.tasks] == [0x2000, 0x3000] and found.broken is None
    found = walk(memory, HEAD, HEAD, 8, lambda address: Task(address, 1, 1) if address == 0x2000 else None, 5)
    assert len(found.tasks) == 1 and found.broken == "the list leads to what is no task"
    found = walk(memory, HEAD, HEAD, 8, lambda address: Task(address, 1, 1), 1)
    assert len(found.tasks) == 1 and found.broken == "the list has more than 1 entries"


def test_who_is_found() -> None:
    made = Made()
    process, thread = made.find(20), made.find_thread(22)
    assert process is not None and (process.pid, process.tid) == (20, 20)
    assert thread is not None and (thread.pid, thread.tid) == (20, 22)
    assert made.find(22) is made.find_thread(23) is made.find_thread(1) is None


def test_a_search_for_a_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmexit.guest.lists.MOST_TASKS", 2)
    assert Made().find_thread(12) is not None and Made().find_thread(22) is None
