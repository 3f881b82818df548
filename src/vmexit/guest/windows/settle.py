"""Which offsets hold for the Windows that runs: candidates from several sources, each checked against the guest itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from vmexit.errors import NotKnownError
from vmexit.guest import paging
from vmexit.guest.linux.recipe import follow, is_kernel_pointer
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.windows import layout
from vmexit.guest.windows.layout import Offsets
from vmexit.guest.windows.pe import Image
from vmexit.guest.windows.processes import SYSTEM_PID, Known, Task, Tasks, make_recipe

_MOST_THREAD_OFFSET = 0x1000


class ProcessesUnknownError(NotKnownError):
    """Nothing is known of processes; the text says why, and what helps."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Offsets, and where they come from."""

    source: str
    offsets: Offsets


def system_process(memory: VirtualMemory, at: int | None) -> int:
    """The EPROCESS of System. ``at``: of PsInitialSystemProcess. Raises ProcessesUnknownError while there is none."""
    try:
        system = memory.u64(at) if at is not None else 0
    except UnreadableError:
        system = 0
    if not is_kernel_pointer(system):
        raise ProcessesUnknownError("Windows has not made its first process yet")
    return system


def settle(
    memory: VirtualMemory, image: Image, system: int, bases: Sequence[int], candidates: Iterable[Candidate]
) -> tuple[Candidate, Known] | None:
    """The first candidate that fits the guest, with what could be found out beyond it; None: none does."""
    for candidate in candidates:
        offsets: Offsets = {**layout.UNCHANGING, **candidate.offsets}
        if any(member not in offsets for member in layout.NEEDED):
            continue
        if any(not 0 <= offset < layout.HIGHEST_OFFSET for offset in offsets.values()):
            continue
        known = Known(offsets, system, tuple(bases))
        if not _is_system(memory, image, known):
            continue
        offsets = _with_threads(memory, known)
        known = Known(offsets, system, tuple(bases))
        if _has_threads(memory, known):
            return Candidate(candidate.source, offsets), known
    return None


def _tasks(memory: VirtualMemory, known: Known) -> Tasks:
    return Tasks(lambda: memory, lambda: known)


def _is_system(memory: VirtualMemory, image: Image, known: Known) -> bool:
    """Whether the process System is what it has to be: number, name, links of the list both ways, page tables of the kernel."""
    offsets, system = known.offsets, known.system
    task = _tasks(memory, known).read_process(system)
    if task is None or task.pid != SYSTEM_PID or task.comm != "System":
        return False
    links = system + offsets[layout.PROCESS_LINKS]
    try:
        after, before = memory.words(links, 2)
        if not is_kernel_pointer(after) or not is_kernel_pointer(before):
            return False
        if memory.u64(after + 8) != links or memory.u64(before) != links:
            return False
        root = memory.u64(system + offsets[layout.PAGE_TABLES]) & paging.ADDRESS
        own = VirtualMemory(memory.physical, root, memory.levels)
        return own.translate(image.base) == memory.translate(image.base)
    except UnreadableError:
        return False


def _with_threads(memory: VirtualMemory, known: Known) -> Offsets:
    """The offsets with that of a thread's links, if need be found by trying: a thread of System's lies around the first link."""
    offsets = known.offsets
    tasks = _tasks(memory, known)
    try:
        head = known.system + offsets[layout.PROCESS_THREADS]
        first = memory.u64(head)
    except UnreadableError:
        return _without(offsets, layout.THREAD_LINKS)
    tried = offsets.get(layout.THREAD_LINKS)
    places = chain([] if tried is None else [tried], range(0, _MOST_THREAD_OFFSET, 8))
    for place in places if first != head and is_kernel_pointer(first) else ():
        if _is_thread_of(memory, tasks, known, first - place):
            return {**offsets, layout.THREAD_LINKS: place}
    return _without(offsets, layout.THREAD_LINKS)


def _is_thread_of(memory: VirtualMemory, tasks: Tasks, known: Known, address: int) -> bool:
    """Whether a thread of System's is there."""
    task = tasks.read_thread(address)
    if task is None or task.process != known.system or not task.tid:
        return False
    return _owner_is(memory, known, task)


def _owner_is(memory: VirtualMemory, known: Known, task: Task) -> bool:
    """Whether a thread names the same process by number, in its Cid, as by address."""
    try:
        return memory.u64(task.address + known.offsets[layout.CLIENT_ID]) == task.pid
    except UnreadableError:
        return False


def _has_threads(memory: VirtualMemory, known: Known) -> bool:
    """Whether threads are what they have to be: one of System's, or where its list is not known those that the CPUs execute."""
    if layout.THREAD_LINKS in known.offsets:
        return True
    tasks = _tasks(memory, known)
    recipe = make_recipe(known, memory)
    seen = False
    for base in known.bases:
        found = follow(recipe, base, memory.read)
        thread = found.get("task") if found else None
        task = tasks.read_thread(thread) if isinstance(thread, int) else None
        # An idle thread tells nothing: all that there is to compare is 0.
        if task is not None and task.pid:
            if not _owner_is(memory, known, task):
                return False
            seen = True
    return seen


def _without(offsets: Offsets, member: str) -> Offsets:
    return {name: offset for name, offset in offsets.items() if name != member}
