"""The way to the task that a vCPU executes, as plain data: which words to read, one from the other, and what each has to be.

It is numbers only, so that whoever is at the trap itself can follow it without knowing Linux; ``follow`` is how. The way begins
at the per-CPU area of the kernel's, which GS points to: GS_BASE in the kernel, KERNEL_GS_BASE while a program runs, and
either in the few instructions between. A program may give its own GS any value, so a base counts only if it is one of
those that the kernel itself has handed out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmexit.guest.linux.image import KERNEL_MAP
from vmexit.guest.linux.profile import Profile, ProfileError
from vmexit.guest.memory import UnreadableError, VirtualMemory

KERNEL_HALF = 0xFF00_0000_0000_0000
"""Where kernel addresses begin with five levels of page tables, and so with four."""
LAST_KERNEL_ADDRESS = 0xFFFF_FFFF_FFFF_F000
"""Above it are the kernel's error values."""
HIGHEST_PID = 4 << 20
"""PID_MAX_LIMIT."""
COMM_LENGTH = 16
"""TASK_COMM_LEN."""
THREAD_SIZE = 0x4000
"""A task's kernel stack (x86-64 without KASAN)."""
_IMAGE_SPACE = 1 << 30
_MOST_CPUS = 8192
_MASK64 = (1 << 64) - 1
CPU = "cpu"
"""The value that a recipe begins with: the base of the vCPU's per-CPU area."""


class Check(enum.IntEnum):
    """What a value has to be; where it is not, the task is not known."""

    NONE = 0
    KERNEL_POINTER = 1
    """In the upper half, and a multiple of 8."""
    KERNEL_POINTER_OR_NULL = 2
    PID = 3
    """0 to HIGHEST_PID."""
    SELF = 4
    """The same as what it was found through: per-CPU areas hold their own base."""


@dataclass(frozen=True, slots=True)
class Step:
    """Reads ``size`` bytes at the value named ``source`` plus ``offset`` (modulo 2^64); little-endian, unless more than 8.

    What a thread is known by has the same names for every system: ``task`` and ``leader`` (the addresses of thread and process),
    ``tid``, ``pid``, ``comm`` (its name), ``stack`` (where its kernel stack begins), ``peb`` and ``teb``.
    """

    result: str
    source: str
    offset: int
    size: int
    check: Check = Check.NONE


@dataclass(frozen=True, slots=True)
class Recipe:
    """From a vCPU's registers to its task."""

    bases: tuple[int, ...]
    """Of the per-CPU areas, by the number that Linux gives a CPU (which need not be the vCPU's); 0: there is no such CPU."""
    steps: tuple[Step, ...]
    root: int = 0
    """The physical address of the kernel's own page tables, which map all of it."""
    levels: int = 4
    """Of these tables; 5 with CR4.LA57."""
    stack_bytes: int = 0
    """How long a kernel stack is, where a step finds one."""


def is_kernel_pointer(value: int) -> bool:
    """Whether it can be the address of something of the kernel's."""
    return KERNEL_HALF <= value < LAST_KERNEL_ADDRESS and value % 8 == 0


def make_recipe(profile: Profile, slide: int, memory: VirtualMemory) -> Recipe:
    """The recipe for a running kernel. Raises ProfileError where too little is known of it, or it has not come so far yet."""

    def in_cpu(symbol: str) -> int:
        # Per-CPU variables are linked at 0 up to Linux 6.14; later at addresses of the image, which move with it.
        address = profile.address(symbol)
        return address + slide if address >= KERNEL_MAP else address

    if "current_task" in profile.symbols:
        current = in_cpu("current_task")
    else:
        current = in_cpu("pcpu_hot") + profile.offset("pcpu_hot.current_task")
    steps = [
        Step("self", CPU, in_cpu("this_cpu_off"), 8, Check.SELF),
        Step("task", CPU, current, 8, Check.KERNEL_POINTER),
        Step("tid", "task", profile.offset("task_struct.pid"), 4, Check.PID),
        Step("pid", "task", profile.offset("task_struct.tgid"), 4, Check.PID),
        Step("comm", "task", profile.offset("task_struct.comm"), COMM_LENGTH),
        Step("mm", "task", profile.offset("task_struct.mm"), 8, Check.KERNEL_POINTER_OR_NULL),
        Step("leader", "task", profile.offset("task_struct.group_leader"), 8, Check.KERNEL_POINTER_OR_NULL),
        Step("stack", "task", profile.offset("task_struct.stack"), 8, Check.KERNEL_POINTER_OR_NULL),
    ]
    bases = _bases(profile, slide, memory, steps[0].offset)
    return Recipe(bases, tuple(steps), memory.root, memory.levels, THREAD_SIZE)


def _bases(profile: Profile, slide: int, memory: VirtualMemory, self_at: int) -> tuple[int, ...]:
    """The kernel's own table of per-CPU areas; 0 for a CPU that there cannot be.

    While it boots the kernel begins with one area that is part of its image, or at 0, and then makes them one after the other:
    all of them have to be there, each with its own base in it.
    """
    image = range(KERNEL_MAP, KERNEL_MAP + _IMAGE_SPACE)
    try:
        count = min(memory.u32(profile.address("nr_cpu_ids") + slide), _MOST_CPUS)
        table = memory.words(profile.address("__per_cpu_offset") + slide, count)
        mask = memory.words(profile.address("__cpu_possible_mask") + slide, -(-count // 64))
        bases = tuple(base if mask[cpu // 64] >> cpu % 64 & 1 else 0 for cpu, base in enumerate(table))
        ready = all(base not in image and memory.u64(base + self_at & _MASK64) == base for base in bases if base)
    except UnreadableError:
        ready, bases = False, ()
    if not ready or not any(bases):
        raise ProfileError("the kernel has not set up its per-CPU areas yet")
    return bases


def follow(recipe: Recipe, base: int, read: Callable[[int, int], bytes]) -> Mapping[str, int | bytes] | None:
    """The values that the steps give, by name; None where one of them cannot be read or is not what it has to be.

    ``base`` is one of the recipe's; ``read`` gives so many bytes at an address, or raises UnreadableError.
    """
    numbers = {CPU: base}
    found: dict[str, int | bytes] = {}
    for step in recipe.steps:
        try:
            data = read(numbers[step.source] + step.offset & _MASK64, step.size)
        except UnreadableError:
            return None
        if step.size > 8:
            found[step.result] = data
            continue
        value = int.from_bytes(data, "little")
        if not _holds(step.check, value, numbers[step.source]):
            return None
        found[step.result] = numbers[step.result] = value
    return found


def _holds(check: Check, value: int, source: int) -> bool:
    match check:
        case Check.KERNEL_POINTER:
            return is_kernel_pointer(value)
        case Check.KERNEL_POINTER_OR_NULL:
            return value == 0 or is_kernel_pointer(value)
        case Check.PID:
            return value <= HIGHEST_PID
        case Check.SELF:
            return value == source
    return True
