"""A thread for a bare-metal guest, which has none: what a recipe finds, put into its memory from outside."""

from __future__ import annotations

import struct

from vmexit import Debugger
from vmexit.guest.linux.recipe import CPU, Check, Recipe, Step
from vmexit.guest.system import CodeMap, CodePiece

KERNEL = 0xFFFF_8880_0000_0000
PID, TID, NAME = 0x5E, 0x5F, "bare"
_AT = 0x200_0000
"""A physical address beyond all that the guests use: page tables, and behind them the area and the thread of each vCPU."""
_SELF, _CURRENT, _IDS, _NAME, _LEADER, _STACK = 0x100, 0x108, 0x80, 0xC0, 0x98, 0x18
_THREADS = 0x4000
_RBP = 4
_STEPS = (
    Step("self", CPU, _SELF, 8, Check.SELF),
    Step("task", CPU, _CURRENT, 8, Check.KERNEL_POINTER),
    Step("tid", "task", _IDS, 4, Check.PID),
    Step("pid", "task", _IDS + 4, 4, Check.PID),
    Step("comm", "task", _NAME, 16),
    Step("mm", "task", 0x60, 8, Check.KERNEL_POINTER_OR_NULL),
    Step("leader", "task", _LEADER, 8, Check.KERNEL_POINTER),
    Step("stack", "task", _STACK, 8),
)


def _word(debugger: Debugger, physical: int, value: int) -> None:
    debugger.write_memory(None, physical, struct.pack("<Q", value), physical=True)


def lay_out(debugger: Debugger) -> Recipe:
    """Gives each vCPU of a halted machine a thread, and its GS the way there; the n-th is thread TID + n of process PID + n."""
    for level, shift in enumerate((39, 30, 21)):
        _word(debugger, _AT + 0x1000 * level + (KERNEL >> shift & 511) * 8, _AT + 0x1000 * (level + 1) | 1)
    vcpus = debugger.target.vcpus
    for page in range(2 * vcpus):
        _word(debugger, _AT + 0x3000 + page * 8, _AT + _THREADS + 0x1000 * page | 1)
    areas = []
    for core in range(vcpus):
        area, at = KERNEL + 0x2000 * core, _AT + _THREADS + 0x2000 * core
        thread = area + 0x1000
        _word(debugger, at + _SELF, area)
        _word(debugger, at + _CURRENT, thread)
        _word(debugger, at + 0x1000 + _IDS, (PID + core) << 32 | TID + core)
        _word(debugger, at + 0x1000 + _LEADER, thread)
        debugger.write_memory(None, at + 0x1000 + _NAME, NAME.encode(), physical=True)
        debugger.registers(core)["gs_base"] = area
        areas.append(area)
    return Recipe(tuple(areas), _STEPS, _AT, 4, 0x4000)


CALLER = KERNEL + 0x100
"""What the guest's code returns to, as its first thread's page says, which RBP points into."""


def lay_out_caller(debugger: Debugger) -> CodeMap:
    """Gives vCPU 0 of a machine with a thread a caller, too, and a table that tells where it is: behind RBP."""
    places, entries, stack = 0x1800, 0x1900, 0x1A00
    # Below the kernel, too, there are these pages, so that the table is near the guest's code.
    _word(debugger, _AT, _AT + 0x1000 | 1)
    thread = _AT + _THREADS
    debugger.write_memory(None, thread + places, struct.pack("<i", 0x1000 - places), physical=True)
    debugger.write_memory(None, thread + entries, struct.pack("<hhH", 16, 0, _RBP), physical=True)
    _word(debugger, thread + stack + 8, CALLER)
    debugger.registers(0)["rbp"] = KERNEL + stack
    return CodeMap((CodePiece(0, 0xFFFF_FFFF, places, entries, 1), CodePiece(KERNEL, KERNEL + 0xFFF)), _RBP + 1, _RBP, 0)
