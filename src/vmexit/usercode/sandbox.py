"""Runs the user's machine code in an emulator, called as HyperDbg calls it, with the guest's memory in reach.

The code sees four things of its own: itself (it may not be written), the registers, a stack, and the event's buffer. They lie at
non-canonical addresses, which no guest uses. Every other address is the guest's: a page is fetched when the code first
touches it, and what the code has changed goes back once the run has ended well. A run that is ended leaves guest memory and
registers alone.
"""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import unicorn
from unicorn import x86_const as x86

from vmexit.errors import VmexitError
from vmexit.usercode.buffer import ADDRESS as BUFFER
from vmexit.usercode.buffer import Buffer, Memory
from vmexit.usercode.errors import CodeRunError
from vmexit.usercode.instructions import refused, shown

PAGE = 0x1000

_TAG = 0x5D << 56
CODE, REGISTERS, STACK, _STUB, _FRAME = (_TAG | part << 48 for part in range(1, 6))
"""Where the code sees what is its own; and where what calls it lies, with the context and what came back."""
_OWN_TAGS = (_TAG >> 56, BUFFER >> 56)

_STACK_BYTES = 0x10000
# As a caller leaves it: the return address on top, the 32 bytes of Microsoft's convention above, aligned as behind a call.
_TOP = _STACK_BYTES - 0x48
_GENERAL = struct.Struct("<16Q")
_U64 = struct.Struct("<Q")
_SEGMENT_PREFIXES = (0x64, 0x65)
_READ, _WRITE, _EXECUTE = unicorn.UC_PROT_READ, unicorn.UC_PROT_WRITE, unicorn.UC_PROT_EXEC
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
# What calls the code: takes the context from the frame, and leaves RAX there and that it is done. To set and ask registers from
# outside takes longer than all of this. It ends with HLT: what lies where Unicorn is told to stop is translated at each run.
_LOAD = b"\x48\xa1" + struct.pack("<Q", _FRAME)  # mov rax, [frame]
_JUMP = b"\x31\xc0\xff\x25\0\0\0\0" + struct.pack("<Q", CODE)  # xor eax, eax; jmp code
# mov [frame + 8], rax; mov al, 1; mov [frame + 16], al; hlt
_LEAVE = b"\x48\xa3" + struct.pack("<Q", _FRAME + 8) + b"\xb0\x01\xa2" + struct.pack("<Q", _FRAME + 16) + b"\xf4"
_LEAVE_AT = 0x80
_FRAME_WORDS = struct.Struct("<3Q")
_STUB_INSTRUCTIONS = 8
_NOWHERE = 0  # where Unicorn is to stop: no address of anything that can be executed
_SEGMENT_REGISTERS = (x86.UC_X86_REG_FS_BASE, x86.UC_X86_REG_GS_BASE)
_TCG_BYTES = 4 << 20
_UNKNOWN = unicorn.UC_ERR_INSN_INVALID


class Kind(enum.Enum):
    """What the code is called as."""

    CONDITION = "condition"
    """RCX: the registers; RDX: the context. True if RAX is not 0 in the end."""
    ACTION = "code"
    """RCX: the buffer or 0; RDX: the registers; R8: the context."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take."""

    instructions: int = 100_000
    """Each turn of a repeated instruction counts."""
    seconds: float = 5.0
    pages: int = 256
    """Pages of guest memory."""


class Guest(Protocol):
    """The guest as the vCPU sees it that was trapped. Each raises VmexitError where it cannot be done."""

    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...
    def segment_bases(self) -> tuple[int, int]:
        """Of FS and GS."""
        ...


class Result(NamedTuple):
    """What a run has left."""

    rax: int
    registers: tuple[int, ...]
    """The structure's sixteen fields."""


class Sandbox:
    """One piece of code, ready to run again and again. To be used by one thread at a time."""

    def __init__(self, code: bytes, kind: Kind, buffer: Buffer | None = None, limits: Limits = Limits()) -> None:
        """``code``: as the user gave it; a RET is appended."""
        self.code = code + b"\xc3"
        self.kind = kind
        self.buffer = buffer
        self.limits = limits
        self._needs_segments = any(prefix in code for prefix in _SEGMENT_PREFIXES)
        self._registers = Memory(PAGE)
        self._stack = Memory(_STACK_BYTES)
        self._frame = Memory(PAGE)
        self._pages = Memory(limits.pages * PAGE)
        self._guest: Guest | None = None
        self._fetched: dict[int, tuple[int, bytes]] = {}
        """Of the guest's pages that the run has touched: where they are, and how they were."""
        self._why: str | None = None
        self._place: int | None = None
        self._deadline = 0.0
        self._emulator: Any = None
        self._memories: tuple[Memory, ...] = ()
        self._start: Any = None

    def run(self, registers: Sequence[int], context: int, guest: Guest) -> Result:
        """Calls the code once. ``registers``: sixteen, in the structure's order. Raises CodeRunError where the run was ended."""
        if self._emulator is None:
            self._prepare()
        emulator = self._emulator
        self._guest, self._why, self._place = guest, None, None
        self._deadline = time.monotonic() + self.limits.seconds
        before = self._registers.map[: _GENERAL.size] = _GENERAL.pack(*registers)
        _U64.pack_into(self._stack.map, _TOP, _STUB + _LEAVE_AT)
        _FRAME_WORDS.pack_into(self._frame.map, 0, context, 0, 0)
        if self._fetched:
            self._fetched.clear()
            emulator.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        emulator.context_restore(self._start)
        try:
            if self._needs_segments:
                for register, base in zip(_SEGMENT_REGISTERS, guest.segment_bases(), strict=True):
                    emulator.reg_write(register, base)
            rax = self._emulate(emulator)
            if self._fetched:
                self._write_back(guest)
        except BaseException:
            self._discard()
            raise
        finally:
            self._guest = None
        after = self._registers.map[: _GENERAL.size]
        return Result(rax, tuple(registers) if after == before else _GENERAL.unpack(after))

    def _emulate(self, emulator: Any) -> int:
        """What is in RAX at the end."""
        failure = None
        try:
            emulator.emu_start(_STUB, _NOWHERE, 0, self.limits.instructions + _STUB_INSTRUCTIONS)
        except unicorn.UcError as error:
            failure = error.errno
        _, rax, done = _FRAME_WORDS.unpack_from(self._frame.map)
        if done and self._why is None and failure is None:
            return int(rax)
        at = emulator.reg_read(x86.UC_X86_REG_RIP) if self._place is None else CODE + self._place
        if self._why is None and failure is None:
            is_lost = at == _NOWHERE
            self._why = (
                "it jumps out of its own code"
                if is_lost
                else f"it has not returned after {self.limits.instructions:,} instructions"
            )
        if self._why is None:
            self._why = "the emulator does not know this instruction" if failure == _UNKNOWN else "this instruction faults"
        is_inside = 0 <= at - CODE < len(self.code)
        raise CodeRunError(f"{shown(self.code, at - CODE)}: {self._why}" if is_inside else self._why)

    # ---- the emulator ----

    def _prepare(self) -> None:
        emulator: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        emulator.ctl_set_tcg_buffer_size(_TCG_BYTES)
        emulator.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._fetched.clear()
        code = Memory(len(self.code))
        code.map[: len(self.code)] = self.code
        stub = Memory(PAGE)
        call = _LOAD + (b"\x48\x89\xc2" if self.kind is Kind.CONDITION else b"\x49\x89\xc0") + _JUMP  # mov rdx or r8, rax
        stub.map[: len(call)] = call
        stub.map[_LEAVE_AT : _LEAVE_AT + len(_LEAVE)] = _LEAVE
        parts = [
            (CODE, code, _READ | _EXECUTE),
            (_STUB, stub, _READ | _EXECUTE),
            (_FRAME, self._frame, _READ | _WRITE),
            (REGISTERS, self._registers, _READ | _WRITE),
            (STACK, self._stack, _READ | _WRITE),
        ]
        if self.buffer is not None:
            parts.append((BUFFER, self.buffer.memory, _READ | _WRITE))
        own: dict[int, tuple[int, int]] = {}
        physical = PAGE
        for address, memory, protection in parts:
            emulator.mem_map_ptr(physical, memory.size, protection, memory.address)
            for offset in range(0, memory.size, PAGE):
                own[address + offset] = (physical + offset, protection)
            physical += memory.size
        emulator.mem_map_ptr(physical, self._pages.size, _READ | _WRITE, self._pages.address)
        emulator.hook_add(unicorn.UC_HOOK_TLB_FILL, self._filler(own, physical))
        emulator.hook_add(unicorn.UC_HOOK_EDGE_GENERATED, self._on_block, begin=CODE, end=CODE + code.size - 1)
        emulator.reg_write(x86.UC_X86_REG_RSP, STACK + _TOP)
        if self.kind is Kind.CONDITION:
            emulator.reg_write(x86.UC_X86_REG_RCX, REGISTERS)
        else:
            emulator.reg_write(x86.UC_X86_REG_RCX, BUFFER if self.buffer is not None else 0)
            emulator.reg_write(x86.UC_X86_REG_RDX, REGISTERS)
        self._start = emulator.context_save()
        self._emulator = emulator
        self._memories = (code, stub)

    def _discard(self) -> None:
        """After a run that was ended the emulator's state is not to be relied on."""
        self._emulator = self._start = None

    def _end(self, why: str) -> bool:
        """The first reason counts."""
        if self._why is None:
            self._why = why
        return False

    def _filler(self, own: dict[int, tuple[int, int]], guest_pages: int) -> Callable[..., bool]:
        """What the emulator asks where an address is. ``guest_pages``: the physical address of the pages for guest memory."""

        def fill(emulator: Any, address: int, access: int, entry: Any, data: object) -> bool:
            del emulator, data
            # The emulator tells the page only.
            page = address & _MASK64 & ~(PAGE - 1)
            found = own.get(page)
            if access == unicorn.UC_MEM_FETCH and (found is None or not found[1] & _EXECUTE):
                return self._end("it jumps out of its own code")
            if found is not None:
                if access == unicorn.UC_MEM_WRITE and not found[1] & _WRITE:
                    return self._end("it writes to its own code")
                entry.paddr, entry.perms = found
                return True
            if page >> 56 in _OWN_TAGS:
                return self._end(f"it {_ACCESSES[access]} beside its stack, registers or buffer")
            slot = self._slot(page, access)
            if slot is None:
                return False
            entry.paddr, entry.perms = guest_pages + slot * PAGE, _READ | _WRITE
            return True

        return fill

    def _slot(self, page: int, access: int) -> int | None:
        """The number of the place that holds this page of the guest, fetched if it is not there yet."""
        if page in self._fetched:
            return self._fetched[page][0]
        slot = len(self._fetched)
        if slot == self.limits.pages:
            self._end(f"it touches more than {self.limits.pages:,} pages of guest memory")
            return None
        if time.monotonic() > self._deadline:
            self._end(f"it takes longer than {self.limits.seconds:g} s")
            return None
        assert self._guest is not None
        try:
            data = self._guest.read_memory(page, PAGE)
        except VmexitError:
            self._end(f"it {_ACCESSES[access]} in page {page:x}, which is not mapped in the guest")
            return None
        self._fetched[page] = slot, data
        self._pages.map[slot * PAGE : (slot + 1) * PAGE] = data
        return slot

    def _on_block(self, emulator: Any, block: Any, previous: Any, data: object) -> None:
        """Before each piece of straight code is executed for the first time."""
        del previous, data
        found = refused(self.code, block.pc - CODE, block.size)
        if found is not None:
            self._place, why = found
            self._end(why)
            emulator.emu_stop()

    # ---- the guest's memory ----

    def _write_back(self, guest: Guest) -> None:
        """Only bytes that were changed: what lies between them may be another vCPU's."""
        for page, (slot, before) in self._fetched.items():
            after = self._pages.map[slot * PAGE : (slot + 1) * PAGE]
            if after == before:
                continue
            differs = np.frombuffer(after, np.uint8) != np.frombuffer(before, np.uint8)
            edges = np.flatnonzero(np.diff(differs, prepend=False, append=False)).tolist()
            for start, end in zip(edges[::2], edges[1::2], strict=True):
                try:
                    guest.write_memory(page + start, after[start:end])
                except VmexitError:
                    raise CodeRunError(f"guest memory at {page + start:x} cannot be written") from None


_ACCESSES = {unicorn.UC_MEM_READ: "reads", unicorn.UC_MEM_WRITE: "writes", unicorn.UC_MEM_FETCH: "executes"}
