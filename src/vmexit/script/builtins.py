"""The built-in functions: one table of their names, what they take and give, and how they are carried out."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


class Take(enum.Enum):
    """What an argument may be."""

    NUMBER = "a number"
    """An integer or pointer; a string stands for its address."""
    TEXT = "a string or an address"
    WIDE = "a wide string or an address"
    ATOMIC = "the address of a variable"
    """A bare variable stands for its address, unless it holds a script address itself (HyperDbg's manual omits the &)."""


class How(enum.Enum):
    """How a built-in is carried out."""

    CALL = "call"
    """A function of the runtime (script.h: VMEXIT_CALL_...)."""
    INLINE = "inline"
    """Made of other operations; lower.py knows each by name."""
    PRINT = "print"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Builtin:
    """A built-in function."""

    name: str
    takes: tuple[Take, ...]
    gives: bool
    """Whether it has a value, an unsigned long long."""
    how: How
    call: str = ""
    """The runtime's function, without VMEXIT_CALL_."""
    extra: tuple[int, ...] = ()
    """Further arguments of the runtime's function."""
    spends: bool = False
    """It takes steps from the budget by itself."""
    needs: str = ""
    """Of a refused one: what it would need."""


_N, _T, _W, _A = Take.NUMBER, Take.TEXT, Take.WIDE, Take.ATOMIC
_ALL = (1 << 64) - 1


def _table() -> dict[str, Builtin]:
    found: dict[str, Builtin] = {}

    def add(name: str, takes: tuple[Take, ...], gives: bool, call: str, *extra: int, spends: bool = False) -> None:
        found[name] = Builtin(name, takes, gives, How.CALL, call, extra, spends)

    def inline(name: str, takes: tuple[Take, ...], gives: bool = True) -> None:
        found[name] = Builtin(name, takes, gives, How.INLINE)

    def refuse(name: str, count: int, needs: str) -> None:
        found[name] = Builtin(name, (_N,) * count, True, How.REFUSED, needs=needs)

    for name, size in (("db", 1), ("dw", 2), ("dd", 4), ("dq", 8), ("poi", 8)):
        add(name, (_N,), True, "LOAD", size)
        add(f"{name}_pa", (_N,), True, "LOAD_PHYSICAL", size)
    for name, size in (("eb", 1), ("ed", 4), ("eq", 8)):
        add(name, (_N, _N), True, "EDIT", size)
        add(f"{name}_pa", (_N, _N), True, "EDIT_PHYSICAL", size)
    for name in ("hi", "low", "hi_pa", "low_pa", "neg", "not"):
        inline(name, (_N,))
    inline("reference", (_N,))
    add("check_address", (_N,), True, "CHECK")
    add("virtual_to_physical", (_N,), True, "TO_PHYSICAL")
    add("physical_to_virtual", (_N,), True, "TO_VIRTUAL")
    add("memcpy", (_N, _N, _N), False, "COPY", spends=True)
    add("memcpy_pa", (_N, _N, _N), False, "COPY_PHYSICAL", spends=True)
    add("memcmp", (_T, _T, _N), True, "COMPARE", spends=True)
    add("strlen", (_T,), True, "LENGTH", 1, spends=True)
    add("wcslen", (_W,), True, "LENGTH", 2, spends=True)
    add("strcmp", (_T, _T), True, "COMPARE_TEXT", _ALL, 1, spends=True)
    add("wcscmp", (_W, _W), True, "COMPARE_TEXT", _ALL, 2, spends=True)
    add("strncmp", (_T, _T, _N), True, "COMPARE_TEXT", 1, spends=True)
    add("wcsncmp", (_W, _W, _N), True, "COMPARE_TEXT", 2, spends=True)
    add("disassemble_len", (_N,), True, "INSTRUCTION", 64)
    add("disassemble_len64", (_N,), True, "INSTRUCTION", 64)
    add("disassemble_len32", (_N,), True, "INSTRUCTION", 32)
    inline("interlocked_increment", (_A,))
    inline("interlocked_decrement", (_A,))
    add("interlocked_exchange_add", (_A, _N), True, "ADD")
    add("interlocked_exchange", (_A, _N), True, "EXCHANGE")
    add("interlocked_compare_exchange", (_A, _N, _N), True, "COMPARE_EXCHANGE")
    add("spinlock_lock", (_A,), False, "LOCK", 65536)
    add("spinlock_lock_custom_wait", (_A, _N), False, "LOCK")
    add("spinlock_unlock", (_A,), False, "UNLOCK")
    add("event_sc", (_N,), False, "EVENT_SC")
    add("event_enable", (_N,), False, "EVENT_ENABLE")
    add("event_disable", (_N,), False, "EVENT_DISABLE")
    add("event_clear", (_N,), False, "EVENT_CLEAR")
    add("pause", (), False, "PAUSE")
    add("flush", (), False, "FLUSH")
    add("rdtsc", (), True, "RDTSC")
    add("rdtscp", (), True, "RDTSCP")
    add("microsleep", (_N,), False, "SLEEP")
    inline("test_statement", (_N,), gives=False)
    for name in ("print", "formats", "printf"):
        found[name] = Builtin(name, (_N,), False, How.PRINT)

    inject = "a target that can inject interrupts"
    refuse("event_inject", 2, inject)
    refuse("event_inject_error_code", 3, inject)
    step = "a target that can trap every instruction"
    for name in ("step", "step_in", "step_out", "instrumentation_step", "instrumentation_step_in"):
        refuse(f"event_trace_{name}", 0, step)
    branches = "a target that records branches (LBR)"
    for name in ("lbr_save", "lbr_dump", "lbr_print", "lbr_restore", "lbr_check"):
        refuse(name, 0, branches)
    refuse("lbr_restore_by_filter", 1, branches)
    return found


BUILTINS: Mapping[str, Builtin] = MappingProxyType(_table())
"""By name."""
