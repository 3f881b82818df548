"""Reads the agent's C headers with cffi, so that what both halves share is written down once."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import cffi


def _declarations(header: str) -> str:
    """A header without what cffi does not read: include guards and comments that hold no declaration."""
    text = (resources.files("vmexit.agent") / header).read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("#") or re.match(r"#define \w+ \w", line)]
    return "\n".join(lines)


def read_headers(*headers: str) -> tuple[cffi.FFI, Any]:
    """The types and declarations of the headers, and an object with their ``#define NAME number`` as attributes."""
    ffi = cffi.FFI()
    for header in headers:
        ffi.cdef(_declarations(header))
    return ffi, ffi.dlopen(None)
