"""The instructions of the user's code: which may not be executed, and one as text with its place."""

from __future__ import annotations

import functools
import threading
from typing import Any

import capstone
from capstone import x86_const as x86

# What would be the emulator's processor's and not the guest's, or would change the way the emulator runs.
_NOT_THE_GUESTS = frozenset(
    (
        "cpuid rdtsc rdtscp rdrand rdseed rdpmc xgetbv sgdt sidt sldt str smsw verr verw lar lsl rdpkru wrpkru rdpid syscall "
        "sysenter sysret sysexit int int1 int3 into iret iretd iretq retf retfq lcall ljmp vmcall vmmcall vmfunc enclu swapgs "
        "clac stac rdfsbase rdgsbase wrfsbase wrgsbase lds les lfs lgs lss xabort xbegin xend wbnoinvd in insb insd insw out "
        "outsb outsd outsw cli sti hlt rdmsr wrmsr invlpg invpcid clts lmsw lgdt lidt lldt ltr xsetbv wbinvd invd monitor mwait "
        "rsm getsec bound"
    ).split()
)
_GROUPS = (x86.X86_GRP_PRIVILEGE, x86.X86_GRP_VM)
_SEGMENTS = (x86.X86_REG_DS, x86.X86_REG_ES, x86.X86_REG_FS, x86.X86_REG_GS, x86.X86_REG_SS, x86.X86_REG_CS)
_LEGACY_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
_AVX = (b"\xc4", b"\xc5", b"\x62")
_LONGEST = 15

_lock = threading.Lock()


@functools.cache
def decoder() -> Any:
    """Of 64-bit code, with details. To be used by one thread at a time."""
    found = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    found.detail = True
    return found


def refused(code: bytes, start: int, size: int) -> tuple[int, str] | None:
    """Which instruction of a piece of straight code may not be executed, and why; None: all may.

    The piece begins at ``start``; what cannot be decoded is left to who executes it.
    """
    end = start + size
    at = start
    with _lock:
        for instruction in decoder().disasm(code[start:end], start):
            at = instruction.address
            if (why := _why_not(instruction)) is not None:
                return at, why
            at += instruction.size
    if end > len(code):
        return min(at, len(code) - 1), "it runs on behind its own end"
    return None


def _why_not(instruction: Any) -> str | None:
    name = instruction.mnemonic.split()[-1]
    first = instruction.operands[0] if instruction.operands else None
    loads_segment = name in ("mov", "pop") and first is not None and first.type == x86.X86_OP_REG and first.reg in _SEGMENTS
    if loads_segment or name in _NOT_THE_GUESTS or any(group in instruction.groups for group in _GROUPS):
        return "this instruction is not allowed here: privileged, or it asks what is not the guest's"
    # The emulator takes AVX for what SSE has at the same place.
    if instruction.bytes.lstrip(_LEGACY_PREFIXES)[:1] in _AVX:
        return "the emulator does not know this instruction"
    return None


def _text(instruction: Any) -> str:
    return f"{instruction.mnemonic} {instruction.op_str}".strip()


def decoded(code: bytes, offset: int) -> Any:
    """The instruction at this place, with capstone's details; None: there is none."""
    with _lock:
        return next(decoder().disasm(code[offset : offset + _LONGEST], offset, 1), None)


def shown(code: bytes, offset: int) -> str:
    """The instruction at this place of the code: ``+1a: mov rax, qword ptr [rax]``."""
    found = decoded(code, offset)
    return f"+{offset:x}: {_text(found) if found is not None else '(no instruction: ' + code[offset : offset + 8].hex(' ') + ')'}"
