"""The modules that a running kernel has loaded, and their symbols."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass

import numpy as np

from vmexit.guest.linux.profile import Profile
from vmexit.guest.linux.recipe import is_kernel_pointer
from vmexit.guest.lists import BrokenListError, links
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.symbols import Symbols

_MOST_MODULES = 4096
_MOST_SIZE = 256 << 20
_MOST_SYMBOLS = 1 << 17
_NAME_LENGTH = 56
"""MODULE_NAME_LEN."""
_LONGEST_SYMBOL = 512
_ELF_SYMBOL = struct.Struct("<IBBHQQ")
_UNFORMED = 3


@dataclass(frozen=True, slots=True)
class Module:
    """A loaded module: its code and data are ``size`` bytes from ``base`` on. ``address``: of its struct module."""

    name: str
    base: int
    size: int
    address: int


def read_modules(profile: Profile, slide: int, memory: VirtualMemory) -> list[Module]:
    """All that are loaded, as far as the list can be read. Raises ProfileError where there is no way to it."""
    head = profile.address("modules") + slide
    in_list, name, base, size, state = (
        profile.offset(f"module.{member}") for member in ("list", "name", "core_layout.base", "core_layout.size", "state")
    )
    modules: list[Module] = []
    with contextlib.suppress(BrokenListError, UnreadableError):
        for link in links(memory, head, head, _MOST_MODULES):
            if not is_kernel_pointer(link):
                break
            start = link - in_list
            if memory.u32(start + state) == _UNFORMED:
                continue
            module = Module(memory.text(start + name, _NAME_LENGTH), memory.u64(start + base), memory.u32(start + size), start)
            if is_kernel_pointer(module.base) and 0 < module.size <= _MOST_SIZE and module.name:
                modules.append(module)
    return modules


def read_module_symbols(profile: Profile, memory: VirtualMemory, module: Module) -> Symbols:
    """A module's symbols as /proc/kallsyms has them; none where they cannot be read. Raises ProfileError."""
    table, count_at, strings_at, kinds_at = (
        profile.offset(f"mod_kallsyms.{member}") for member in ("symtab", "num_symtab", "strtab", "typetab")
    )
    rows: list[tuple[int, str, str]] = []
    try:
        at = memory.u64(module.address + profile.offset("module.kallsyms"))
        count = memory.u32(at + count_at)
        symbols, strings, kinds = (memory.u64(at + offset) for offset in (table, strings_at, kinds_at))
        if count <= _MOST_SYMBOLS:
            letters = memory.read(kinds, count).decode("latin-1")
            data = memory.read(symbols, count * _ELF_SYMBOL.size)
            for letter, (name, _, _, _, address, _) in zip(letters, _ELF_SYMBOL.iter_unpack(data), strict=True):
                text = memory.text(strings + name, _LONGEST_SYMBOL)
                if text:
                    rows.append((address, text, letter))
    except UnreadableError:
        pass
    rows.sort()
    addresses = np.array([address for address, _, _ in rows], np.uint64)
    return Symbols.of(addresses, [name for _, name, _ in rows], "".join(letter for _, _, letter in rows))
