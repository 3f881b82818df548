"""What compiled scripts and the C half share, read from the agent's own headers (agent/wire.h, agent/script.h)."""

from __future__ import annotations

from typing import Any

from vmexit.link.header import read_headers

ffi, _constants = read_headers("wire.h", "script.h")


def constant(name: str) -> int:
    """The value of ``VMEXIT_<name>``."""
    return int(getattr(_constants, f"VMEXIT_{name}"))


def context_offset(field: str) -> int:
    """Of a field from the start of ``struct vmexit_script_context``, in bytes."""
    return int(ffi.offsetof("struct vmexit_script_context", field))


def value_offset(name: str) -> int:
    """Of one of the context's numbered values (``VMEXIT_VALUE_<name>``)."""
    return context_offset("values") + 8 * constant(f"VALUE_{name}")


def address(segment: int, offset: int = 0) -> int:
    """The script address of a byte in a segment of the arena."""
    return constant("ARENA_TAG") << 56 | segment << 48 | offset


def new(kind: str, *start: object) -> Any:
    """A C object (``ffi.new``)."""
    return ffi.new(kind, *start)
