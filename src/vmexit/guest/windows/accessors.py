"""What the kernel's small exported functions give back, read from their machine code.

PsGetProcessId and its like are a load or two and a RET. Their code is followed with a value for each register that says where
it came from; whatever is not such a function, or has become more than that in some build, gives nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import capstone
from capstone import x86

from vmexit.guest.memory import PAGE, UnreadableError, VirtualMemory
from vmexit.guest.windows import layout
from vmexit.guest.windows.pe import Image

_MOST_INSTRUCTIONS = 8
_LONGEST = 15
_KPRCB = 0x180
"""Where the KPRCB begins in the KPCR, in every Windows for x86-64; GS points to the KPCR."""
_LIST_AFTER_ID = 8
"""ActiveProcessLinks follows UniqueProcessId, in every Windows for x86-64 since Vista."""


@dataclass(frozen=True, slots=True)
class Value:
    """Where a value comes from: ``base``, a load at each of ``loads`` from the value before, and ``plus`` added at the end."""

    base: str
    """"argument", "gs", or "image" for an address that is known."""
    loads: tuple[int, ...] = ()
    plus: int = 0
    is_indexed: bool = False
    """The last load is one of an array of 8-byte elements, by the argument."""

    def loaded(self, displacement: int, *, is_indexed: bool = False) -> Value:
        """What is at so many bytes from there."""
        return replace(self, loads=(*self.loads, self.plus + displacement), plus=0, is_indexed=is_indexed)


@functools.cache
def _decoder() -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    return decoder


# A decoder is not to be used by two threads at once.
_lock = threading.Lock()


def result_of(memory: VirtualMemory, address: int) -> Value | None:
    """What the function at an address returns; None where it is more than loads, or cannot be read."""
    values: dict[str, Value] = {"rcx": Value("argument")}
    at = address
    for _ in range(_MOST_INSTRUCTIONS):
        try:
            code = memory.read(at, min(_LONGEST, PAGE - at % PAGE))
            with _lock:
                found = next(_decoder().disasm(code, at, 1), None)
        except UnreadableError:
            return None
        if found is None:
            return None
        if found.mnemonic in ("ret", "retn"):
            return values.get("rax")
        if found.mnemonic == "jmp" and found.operands[0].type == x86.X86_OP_IMM:
            at = found.operands[0].imm & (1 << 64) - 1
            continue
        if found.mnemonic not in ("nop", "endbr64") and not _execute(found, values):
            return None
        at += found.size
    return None


def _execute(instruction: capstone.CsInsn, values: dict[str, Value]) -> bool:
    """What MOV and LEA do to the registers; False where it is another instruction."""
    if instruction.mnemonic not in ("mov", "movabs", "lea", "movsxd", "movzx") or len(instruction.operands) != 2:
        return False
    to, source = instruction.operands
    if to.type != x86.X86_OP_REG:
        return False
    target = _whole(instruction.reg_name(to.reg))
    if source.type == x86.X86_OP_REG:
        value = values.get(_whole(instruction.reg_name(source.reg)))
    elif source.type == x86.X86_OP_MEM:
        value = _memory_operand(instruction, source, values)
        if value is not None and instruction.mnemonic == "lea":
            value = None if value.is_indexed else replace(value, loads=value.loads[:-1], plus=value.loads[-1])
    else:
        value = None
    if value is None:
        values.pop(target, None)
    else:
        values[target] = value
    return True


def _memory_operand(instruction: capstone.CsInsn, operand: x86.X86Op, values: Mapping[str, Value]) -> Value | None:
    """The value that is loaded."""
    place = operand.mem
    if place.segment == x86.X86_REG_GS:
        return Value("gs").loaded(place.disp) if not place.base and not place.index else None
    if place.segment not in (0, x86.X86_REG_DS):
        return None
    if place.base == x86.X86_REG_RIP:
        return Value("image", plus=instruction.address + instruction.size).loaded(place.disp)
    base = values.get(_whole(instruction.reg_name(place.base))) if place.base else None
    if base is None:
        return None
    if not place.index:
        return base.loaded(place.disp)
    index = values.get(_whole(instruction.reg_name(place.index)))
    return base.loaded(place.disp, is_indexed=True) if index == Value("argument") and place.scale == 8 else None


def _whole(name: str) -> str:
    """The 64-bit register that a register is the lower half of."""
    if name.startswith("e"):
        return "r" + name[1:]
    return name[:-1] if name.endswith("d") and name[1:-1].isdigit() else name


def read_offsets(memory: VirtualMemory, image: Image) -> dict[str, int]:
    """The offsets that the kernel's own functions tell, by name; less what they do not."""

    def result(*names: str) -> Value | None:
        for name in names:
            rva = image.exports.get(name)
            if rva is not None and image.is_code(rva) and (value := result_of(memory, image.base + rva)):
                return value
        return None

    found: dict[str, int] = {}

    def keep(member: str, value: Value | None, base: str, *before: int) -> None:
        """What is loaded behind the loads ``before``."""
        if value and value.base == base and value.plus == 0 and value.loads[:-1] == before and value.loads:
            found[member] = value.loads[-1]

    keep(layout.PROCESS_ID, result("PsGetProcessId"), "argument")
    keep(layout.PARENT_ID, result("PsGetProcessInheritedFromUniqueProcessId"), "argument")
    keep(layout.PEB, result("PsGetProcessPeb"), "argument")
    keep(layout.THREAD_PROCESS, result("PsGetThreadProcess", "IoThreadToProcess"), "argument")
    keep(layout.TEB, result("PsGetThreadTeb"), "argument")
    keep(layout.CLIENT_ID, result("PsGetThreadProcessId"), "argument")
    name = result("PsGetProcessImageFileName")
    if name and name.base == "argument" and not name.loads:
        found[layout.PROCESS_NAME] = name.plus
    thread = result("PsGetThreadId")
    if thread and thread.base == "argument" and len(thread.loads) == 1 and not thread.plus:
        # Cid.UniqueThread, 8 bytes behind Cid.UniqueProcess; both have to say the same.
        place = thread.loads[0] - 8
        if found.setdefault(layout.CLIENT_ID, place) != place:
            del found[layout.CLIENT_ID]
    keep(layout.CURRENT_THREAD, result("PsGetCurrentThread", "KeGetCurrentThread"), "gs")
    current = found.get(layout.CURRENT_THREAD)
    if current is not None:
        keep(layout.STACK_BASE, result("PsGetCurrentThreadStackBase"), "gs", current)
        keep(layout.STACK_LIMIT, result("PsGetCurrentThreadStackLimit"), "gs", current)
        found[layout.CURRENT_THREAD] = current - _KPRCB
    if layout.PROCESS_ID in found:
        found[layout.PROCESS_LINKS] = found[layout.PROCESS_ID] + _LIST_AFTER_ID
    return {member: offset for member, offset in found.items() if 0 <= offset < layout.HIGHEST_OFFSET}


def processor_table(memory: VirtualMemory, image: Image) -> int | None:
    """The address of the kernel's table of KPRCBs (KiProcessorBlock), which KeQueryPrcbAddress reads."""
    rva = image.exports.get("KeQueryPrcbAddress")
    value = result_of(memory, image.base + rva) if rva is not None and image.is_code(rva) else None
    if value is None or value.base != "image" or len(value.loads) != 1 or not value.is_indexed or value.plus:
        return None
    return value.loads[0] if image.base <= value.loads[0] < image.base + image.size else None
