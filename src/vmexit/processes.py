"""The guest's processes at traps: the way to the current thread as the agent gets it, and the names that it tells of threads."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vmexit.errors import VmexitError
from vmexit.guest.linux.recipe import CPU, HIGHEST_PID, Check, Recipe, Step
from vmexit.guest.memory import printable
from vmexit.link import wire
from vmexit.link.rings import Records, Rings
from vmexit.targets.host_threads import HostThreads

# What the agent calls what the steps find; it need not know any other, but may have to go on from it.
_FOUND: Mapping[str, int] = {
    CPU: wire.constant("FOUND_BASE"),
    "task": wire.constant("FOUND_THREAD"),
    "leader": wire.constant("FOUND_PROCESS"),
    "tid": wire.constant("FOUND_TID"),
    "pid": wire.constant("FOUND_PID"),
    "comm": wire.constant("FOUND_NAME"),
    "stack": wire.constant("FOUND_STACK"),
    "peb": wire.constant("FOUND_PEB"),
    "teb": wire.constant("FOUND_TEB"),
}
_OTHERS = range(wire.constant("FOUND_OTHER"), wire.constant("FOUNDS"))
_CHECKS: Mapping[Check, tuple[int, int]] = {
    Check.NONE: (wire.constant("CHECK_NONE"), 0),
    Check.KERNEL_POINTER: (wire.constant("CHECK_POINTER"), 0),
    Check.KERNEL_POINTER_OR_NULL: (wire.constant("CHECK_POINTER_OR_NULL"), 0),
    Check.PID: (wire.constant("CHECK_MOST"), HIGHEST_PID),
    Check.SELF: (wire.constant("CHECK_SAME"), 0),
}
_MOST_STEPS, _MOST_BASES = wire.constant("MAX_STEPS"), wire.constant("MAX_BASES")
_NAME_WORDS = wire.constant("NAME_BYTES") // 8
_MOST_NAMES = 1 << 16


def pack(recipe: Recipe) -> bytes:
    """The struct vmexit_recipe and its bases. Raises VmexitError where it is more than the agent takes."""
    bases = sorted({base for base in recipe.bases if base})
    if len(recipe.steps) > _MOST_STEPS or len(bases) > _MOST_BASES:
        raise VmexitError(f"{len(bases)} CPUs and {len(recipe.steps)} steps are more than the agent can follow")
    others = iter(_OTHERS)
    numbers = dict(_FOUND)
    steps = []
    for step in recipe.steps:
        if step.result not in numbers:
            number = next(others, None)
            if number is None:
                raise VmexitError("the agent cannot remember so much on the way to the current thread")
            numbers[step.result] = number
        steps.append(_step(step, numbers))
    head = wire.pack(
        "recipe",
        root=recipe.root,
        levels=recipe.levels,
        stack_bytes=recipe.stack_bytes,
        step_count=len(steps),
        base_count=len(bases),
        steps=steps,
    )
    return head + struct.pack(f"<{len(bases)}Q", *bases)


def _step(step: Step, numbers: Mapping[str, int]) -> dict[str, int]:
    check, operand = _CHECKS[step.check]
    return {
        "offset": step.offset & 0xFFFF_FFFF_FFFF_FFFF,
        "operand": operand,
        "result": numbers[step.result],
        "source": numbers[step.source],
        "size": step.size,
        "check": check,
    }


class ThreadNames:
    """The names of threads: of the guest's as the agent has told them, always before the first trap that carries their number."""

    def __init__(self, host: HostThreads | None = None) -> None:
        """``host``: traps are those of the host's threads, of which the agent tells nothing."""
        self._names: dict[tuple[int, int], str] = {}
        self._host = host

    def learn(self, records: Records, rings: Rings) -> None:
        """Takes in records of Action.NAME, oldest first; their text is not needed behind that."""
        rows = rings.text(records, 1, _NAME_WORDS)
        for value, row in zip(records["value"].tolist(), rows, strict=True):
            name = printable(row.tobytes().partition(b"\0")[0])
            key = value >> 32, value & 0xFFFF_FFFF
            self._names.pop(key, None)
            self._names[key] = name
            if len(self._names) > _MOST_NAMES:
                del self._names[next(iter(self._names))]

    def get(self, pid: int, tid: int) -> str | None:
        """What the thread calls itself, when it was last heard of; None: nothing was."""
        return self._host.name(pid, tid) if self._host else self._names.get((pid, tid))
