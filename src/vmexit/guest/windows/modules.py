"""The drivers that a running Windows has loaded, and what they export."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

import numpy as np

from vmexit.guest.linux.recipe import is_kernel_pointer
from vmexit.guest.lists import BrokenListError, links
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.symbols import Symbols
from vmexit.guest.windows.pe import Image, PeError
from vmexit.guest.windows.processes import read_unicode_string

# KLDR_DATA_TABLE_ENTRY, in every Windows for x86-64; InLoadOrderLinks is its first member.
_BASE, _SIZE, _NAME = 0x30, 0x40, 0x58
_MOST_MODULES = 4096
_MOST_SIZE = 512 << 20
_LONGEST_NAME = 512
_SUFFIX = re.compile(r"\.(sys|exe|dll)$", re.IGNORECASE)
_UNTYPEABLE = re.compile(r"\W", re.ASCII)


@dataclass(frozen=True, slots=True)
class Module:
    """A loaded driver: ``size`` bytes from ``base`` on. ``file``: its name with the suffix; ``name``: as one types it."""

    name: str
    base: int
    size: int
    file: str


def read_modules(memory: VirtualMemory, head: int) -> list[Module]:
    """All of the list PsLoadedModuleList at ``head``, the kernel among them, as far as it can be read."""
    modules: list[Module] = []
    with contextlib.suppress(BrokenListError, UnreadableError):
        for link in links(memory, head, head, _MOST_MODULES):
            if not is_kernel_pointer(link):
                break
            base, size = memory.u64(link + _BASE), memory.u32(link + _SIZE)
            file = read_unicode_string(memory, link + _NAME, _LONGEST_NAME)
            if file and is_kernel_pointer(base) and 0 < size <= _MOST_SIZE:
                modules.append(Module(_UNTYPEABLE.sub("_", _SUFFIX.sub("", file)), base, size, file))
    return modules


def symbols_of(image: Image) -> Symbols:
    """An image's exports, as RVAs; T is code, D is data, as nm has it."""
    rows = sorted((rva, name) for name, rva in image.exports.items())
    kinds = "".join("T" if image.is_code(rva) else "D" for rva, _ in rows)
    return Symbols.of(np.array([rva for rva, _ in rows], np.uint64), [name for _, name in rows], kinds)


def read_module_symbols(memory: VirtualMemory, module: Module) -> Symbols:
    """What a driver exports, at the addresses where it is; nothing where that is not in memory."""
    try:
        symbols = symbols_of(Image(memory, module.base))
    except (UnreadableError, PeError):
        return Symbols.none()
    return symbols.moved(module.base)
