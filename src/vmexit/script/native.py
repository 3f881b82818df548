"""From LLVM's intermediate representation to machine code without loose ends."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_RELA = 1, 2, 4
_SHF_WRITE, _SHF_ALLOC = 1, 2
_R_X86_64_PC32, _R_X86_64_PLT32 = 2, 4
_UNWIND = ".eh_frame"


# LLVM's own -O2 takes ten times as long as these, for code that is as fast on scripts.
_PASSES = (
    "sroa",
    "simplify_cfg",
    "instruction_combine",
    "loop_rotate",
    "instruction_combine",
    "simplify_cfg",
    "global_dead_code_eliminate",
)


class NativeError(Exception):
    """The code is not what it has to be: another host than x86-64, or something that this file does not know."""


@dataclass(frozen=True, slots=True)
class Code:
    """Machine code that runs wherever it is put."""

    data: bytes
    entry: int
    """Offset of the entry, in bytes."""
    frame: int
    """The most that one function takes of the native stack, in bytes."""


@cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    # No CPU features beyond the architecture's own: the code may run in a VMM that was started elsewhere.
    return target.create_target_machine(cpu="", features="", opt=2, reloc="pic", codemodel="small", jit=False)


def triple_and_layout() -> tuple[str, str]:
    """What a module for this host has to say of its target."""
    machine = _machine()
    if not machine.triple.startswith("x86_64"):
        raise NativeError(f"scripts can be compiled on x86-64 hosts only, not on {machine.triple}")
    return machine.triple, str(machine.target_data)


def optimized(text: str) -> Any:
    """The module after LLVM's passes."""
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options()))
    return module


def compile_module(text: str, entry: str) -> Code:
    """Machine code of a module; `entry` is the function to begin with."""
    return _link(_machine().emit_object(optimized(text)), entry)


@dataclass(slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


def _sections(data: bytes) -> list[_Section]:
    header = _HEADER.unpack_from(data)
    table, size, count, names = header[5], header[10], header[11], header[12]
    raw = [_SECTION.unpack_from(data, table + index * size) for index in range(count)]
    strings = raw[names][4]
    return [
        _Section(_string(data, strings + name), kind, flags, offset, length, link, info, alignment)
        for name, kind, flags, _, offset, length, link, info, alignment, _ in raw
    ]


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _link(data: bytes, entry: str) -> Code:
    """Put code and constants next to each other and resolve what refers from one to the other; nothing else may be left."""
    sections = _sections(data)
    placed: dict[int, int] = {}
    blob = bytearray()
    for index, section in enumerate(sections):
        if section.kind != _SHT_PROGBITS or not section.flags & _SHF_ALLOC or not section.size or section.name == _UNWIND:
            continue
        if section.flags & _SHF_WRITE:
            raise NativeError(f"writable data: {section.name}")
        blob += b"\xcc" * (-len(blob) % max(section.alignment, 1))
        placed[index] = len(blob)
        blob += data[section.offset : section.offset + section.size]
    symbols, start = _symbols(data, sections, placed, entry)
    for index, place, kind, symbol, addend in _relocations(data, sections):
        if index not in placed:
            continue
        target = symbols[symbol]
        if target is None or kind not in (_R_X86_64_PC32, _R_X86_64_PLT32):
            raise NativeError(f"relocation {kind} to symbol {symbol} is left")
        at = placed[index] + place
        struct.pack_into("<i", blob, at, target + addend - at)
    frame = max(_deepest(data[section.offset : section.offset + section.size]) for section in sections if section.name == _UNWIND)
    return Code(bytes(blob), start, frame)


def _symbols(data: bytes, sections: list[_Section], placed: dict[int, int], entry: str) -> tuple[list[int | None], int]:
    """Where each symbol is in the blob (None: elsewhere), and where the entry is."""
    table = next(section for section in sections if section.kind == _SHT_SYMTAB)
    names = sections[table.link].offset
    found: list[int | None] = []
    start = None
    for name, _, _, section, value, _ in _SYMBOL.iter_unpack(data[table.offset : table.offset + table.size]):
        where = placed[section] + value if section in placed else None
        found.append(where)
        if _string(data, names + name) == entry:
            start = where
    if start is None:
        raise NativeError("no entry")
    return found, start


def _relocations(data: bytes, sections: list[_Section]) -> Iterator[tuple[int, int, int, int, int]]:
    """Section, offset in it, kind, symbol, addend."""
    for section in sections:
        if section.kind == _SHT_RELA:
            for offset, info, addend in _RELOCATION.iter_unpack(data[section.offset : section.offset + section.size]):
                yield section.info, offset, info & 0xFFFFFFFF, info >> 32, addend


# ---- unwind tables: how deep a function makes the stack ----

_ADVANCE, _OFFSET, _RESTORE = 1, 2, 3
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET = 0x0C, 0x0D, 0x0E
_OPERANDS = {0x00: 0, 0x02: -1, 0x03: -2, 0x04: -4, 0x0A: 0, 0x0B: 0, 0x2E: 1}
"""Other instructions: how many LEB128 numbers follow, or (negative) how many bytes."""


def _deepest(table: bytes) -> int:
    """The largest distance between stack pointer and return address in the functions of an .eh_frame (DWARF 5, 6.4.2)."""
    deepest = at = 0
    while at + 4 <= len(table):
        (length,) = struct.unpack_from("<I", table, at)
        if length == 0:
            break
        (cie,) = struct.unpack_from("<I", table, at + 4)
        end = at + 4 + length
        if cie == 0:
            at = end
            continue
        # Begin and length of the function, 4 bytes each, then augmentation data.
        body = at + 16
        size, body = _leb128(table, body)
        deepest = max(deepest, _deepest_of(table[body + size : end]))
        at = end
    return deepest


def _deepest_of(program: bytes) -> int:
    deepest = 8
    at = 0
    while at < len(program):
        high, low = program[at] >> 6, program[at] & 0x3F
        at += 1
        if high == _OFFSET:
            _, at = _leb128(program, at)
        elif high == 0 and low == _DEF_CFA_OFFSET:
            value, at = _leb128(program, at)
            deepest = max(deepest, value)
        elif high == 0 and low in (_DEF_CFA, _DEF_CFA_REGISTER):
            # A frame pointer would hide the depth; only frames of a size that is not constant need one.
            if low == _DEF_CFA_REGISTER:
                raise NativeError("a frame of unknown size")
            _, at = _leb128(program, at)
            value, at = _leb128(program, at)
            deepest = max(deepest, value)
        elif high == 0:
            if low not in _OPERANDS:
                raise NativeError(f"unwind instruction {low:#x}")
            operands = _OPERANDS[low]
            at -= min(operands, 0)
            for _ in range(operands):
                _, at = _leb128(program, at)
    return deepest


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number, and where the data goes on."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
