"""Reads the little of an ELF file that tells whether it will do: machine, static or not, exported symbols.

Only 64-bit little-endian files, which is what hosts here use.  Layouts: System V ABI, chapters 4 and 5.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

X86_64 = 62
AARCH64 = 183
MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}
"""What platform.machine() says, and e_machine of a program for it."""

_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT_TYPE = struct.Struct("<I")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM = 11
_PT_INTERP = 3


class ElfError(Exception):
    """The file is not an ELF file that can be read here; str() says why."""


@dataclass(frozen=True)
class Elf:
    """What is known of an ELF file."""

    machine: int
    """e_machine: X86_64 and so on."""
    static: bool
    """It runs without a dynamic linker.  (True of shared libraries too, which name none.)"""
    exports: frozenset[str]
    """The names of the dynamic symbols that it defines: what dlsym() would find in it."""


def read_elf(path: Path) -> Elf:
    """Return what is known of the file; raise ElfError when it is none, OSError when it cannot be read."""
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            raise ElfError("not a 64-bit little-endian ELF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(data)
            except (struct.error, ValueError, OverflowError):
                raise ElfError("a damaged ELF file") from None


def _read(data: mmap.mmap) -> Elf:
    header = _HEADER.unpack_from(data)
    machine, segments, sections = header[1], header[4], header[5]
    segment_size, segment_count, section_size, section_count = header[8:12]
    types = [_SEGMENT_TYPE.unpack_from(data, segments + index * segment_size)[0] for index in range(segment_count)]
    table = [_SECTION.unpack_from(data, sections + index * section_size) for index in range(section_count)]
    exports: set[str] = set()
    for _, kind, _, _, offset, size, link, _, _, _ in table:
        if kind != _SHT_DYNSYM:
            continue
        if link >= len(table):
            raise ElfError("a damaged ELF file")
        names = data[table[link][4] : table[link][4] + table[link][5]]
        symbols = data[offset : offset + size - size % _SYMBOL.size]
        for name, _, _, section, _, _ in _SYMBOL.iter_unpack(symbols):
            if section != 0:
                exports.add(names[name : names.find(b"\0", name)].decode("ascii", "replace"))
    return Elf(machine, _PT_INTERP not in types, frozenset(exports))
