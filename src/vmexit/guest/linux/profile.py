"""All that is known of one kernel before a guest runs it: its banner, its symbols, its types, and what follows from those."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vmexit.errors import NotKnownError
from vmexit.guest.linux.btf import Btf, BtfError, Kind
from vmexit.guest.linux.image import KERNEL_MAP, LINKED_AT, Image
from vmexit.guest.linux.kallsyms import read_symbols
from vmexit.guest.memory import printable
from vmexit.guest.symbols import Symbols

BANNER_LENGTH = 512
_MOST_BTF = 64 << 20
_RELEASE = re.compile(rb"Linux version ([!-~]{1,128}) ")
_MAP_LINE = re.compile(r"([0-9a-fA-F]{16}) (\S) (\S+)")
_PERCPU_HOT = "pcpu_hot"

# What is wanted of which struct; where kernels differ, the first that is there.
_WANTED: Mapping[str, tuple[str, ...]] = {
    "task_struct": (
        *("tasks", "pid", "tgid", "comm", "mm", "active_mm", "stack", "signal", "thread_node", "real_parent", "group_leader"),
        *("__state|state", "exit_state", "flags", "on_cpu", "thread.sp"),
    ),
    "signal_struct": ("thread_head",),
    "mm_struct": ("pgd", "exe_file"),
    "file": ("f_path.dentry|__f_path.dentry",),
    "dentry": ("d_parent", "d_name.name|__d_name.name"),
    "module": (
        *("state", "list", "name", "kallsyms"),
        *("core_layout.base|mem.base", "core_layout.size|mem.size"),
        *("arch.num_orcs", "arch.orc_unwind_ip", "arch.orc_unwind"),
    ),
    "mod_kallsyms": ("symtab", "num_symtab", "strtab", "typetab"),
    _PERCPU_HOT: ("current_task",),
}
_SIZES = ("task_struct", "module")


class ProfileError(NotKnownError):
    """A kernel of which too little can be found out."""


@dataclass(frozen=True)
class Profile:
    """One kernel. Addresses are those that it was linked at; a running one is moved by its slide."""

    banner: bytes
    """linux_banner: "Linux version ..." without the newline; what a running kernel is compared with."""
    symbols: Symbols
    btf_data: bytes
    """Empty: the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)."""
    offsets: Mapping[str, int] = field(default_factory=dict)
    """In bytes, of members: "task_struct.pid"; and sizes: "task_struct"."""

    @property
    def release(self) -> str:
        """What uname -r says: "6.1.0-56-cloud-amd64"."""
        match = _RELEASE.match(self.banner)
        return match[1].decode("ascii") if match else "of an unknown release"

    @property
    def version(self) -> str:
        """What uname -v says, and more: the banner behind the release."""
        return printable(self.banner.partition(b"#")[2]) if b"#" in self.banner else "not known"

    @cached_property
    def btf(self) -> Btf:
        """The kernel's types. Raises BtfError where there are none."""
        if not self.btf_data:
            raise BtfError("this kernel has no type information (CONFIG_DEBUG_INFO_BTF)")
        return Btf(self.btf_data)

    def address(self, symbol: str) -> int:
        """Of a symbol. Raises ProfileError."""
        address = self.symbols.find(symbol)
        if address is None:
            raise ProfileError(f"this kernel has no symbol {symbol}")
        return address

    def offset(self, member: str) -> int:
        """Of a member: "task_struct.pid". Raises ProfileError."""
        if member not in self.offsets:
            raise ProfileError(f"this kernel's types do not say where {member} is")
        return self.offsets[member]


def profile_of(image: Image) -> Profile:
    """What an image tells. Raises KallsymsError, ProfileError."""
    symbols = read_symbols(image)
    # Of an image out of a guest's memory the addresses have moved.
    slide = (symbols.find("_text") or LINKED_AT) - LINKED_AT
    return complete(symbols.moved(-slide, KERNEL_MAP), lambda address, length: image.read(address + slide, length))


def complete(symbols: Symbols, read: Callable[[int, int], bytes]) -> Profile:
    """A profile from symbols at the addresses that they were linked at. ``read`` gives what lies there. Raises ProfileError."""
    at = symbols.find("linux_banner")
    banner = read(at, BANNER_LENGTH).partition(b"\n")[0].partition(b"\0")[0] if at is not None else b""
    if not _RELEASE.match(banner):
        raise ProfileError("there is no Linux banner where the symbols say it is")
    data = _read_btf(symbols, read)
    offsets: dict[str, int] = {}
    if data:
        try:
            offsets = _offsets(Btf(data))
        except BtfError:
            data = b""
    return Profile(banner, symbols, data, offsets)


def parse_map(text: str) -> Symbols:
    """The symbols of a System.map. Raises ProfileError."""
    rows = [match.groups() for match in map(_MAP_LINE.fullmatch, text.splitlines()) if match]
    addresses = np.array([int(address, 16) for address, _, _ in rows], np.uint64)
    symbols = Symbols.of(addresses, [name for _, _, name in rows], "".join(kind for _, kind, _ in rows))
    if symbols.find("_text") != LINKED_AT or symbols.find("linux_banner") is None:
        raise ProfileError("this is no System.map of an x86-64 kernel")
    return symbols


def _read_btf(symbols: Symbols, read: Callable[[int, int], bytes]) -> bytes:
    start, stop = symbols.find("__start_BTF"), symbols.find("__stop_BTF")
    if start is None or stop is None or not 0 < stop - start <= _MOST_BTF:
        return b""
    data = read(start, stop - start)
    return data if len(data) == stop - start else b""


def _offsets(btf: Btf) -> dict[str, int]:
    """Where the members are that are wanted. Raises BtfError."""
    offsets = {}
    for owner, paths in _WANTED.items():
        for path in paths:
            for name in path.split("|"):
                # module.mem is an array from Linux 6.4 on; its first element is the text.
                offset = _array_offset(btf, owner, name) if name.startswith("mem.") else btf.offset(owner, name)
                if offset is not None:
                    offsets[f"{owner}.{path.partition('|')[0]}"] = offset
                    break
    for owner in _SIZES:
        found = btf.find(owner)
        if found is not None:
            offsets[owner] = found.size
    return offsets


def _array_offset(btf: Btf, owner: str, path: str) -> int | None:
    """Of a member of an array's first element."""
    name, _, inner = path.partition(".")
    found = btf.find(owner)
    member = btf.member(found, name) if found else None
    array = btf.strip(member.type) if member else None
    if member is None or array is None or array.kind != Kind.ARRAY:
        return None
    element = btf.member(btf.strip(btf.array(array)[0]), inner)
    return member.offset + element.offset if element else None
