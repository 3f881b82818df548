"""Who called whom on a vCPU's kernel stack.

Where the kernel has ORC tables (CONFIG_UNWINDER_ORC, every distribution's choice) the walk is the kernel's own and exact
(Documentation/arch/x86/orc-unwinder.rst, struct orc_entry in arch/x86/include/asm/orc_types.h). Where it has none but its
functions keep frame pointers (CONFIG_UNWINDER_FRAME_POINTER), RBP leads from frame to frame. Where neither leads on, what is left
is a guess: every word of the stack that points right behind a call instruction.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmexit.guest.linux.profile import ProfileError
from vmexit.guest.linux.recipe import THREAD_SIZE, is_kernel_pointer
from vmexit.guest.linux.running import Linux
from vmexit.guest.memory import UnreadableError
from vmexit.guest.scan import MOST_FRAMES, guesses, is_behind_call
from vmexit.guest.system import CodeMap, CodePiece, Frame

_MOST_ENTRIES = 1 << 24

# struct orc_entry: two offsets, then 4 bits for each of two registers, then what differs by kernel.
_ENTRY = struct.Struct("<hhH")
_UNDEFINED, _PREV_SP, _DX, _DI, _BP, _SP, _R10, _R13, _BP_INDIRECT, _SP_INDIRECT = range(10)
# Kernels number them in two ways. At the first instruction of a function RSP before the call is RSP and 8, so what stands for RSP
# there tells which: 5, or, seen in 7.3, 3. (Which number RDI has in the second way was not seen, so it has none.)
_NUMBERINGS: Mapping[int, Mapping[int, int]] = {
    5: {number: number for number in range(10)},
    3: {0: _UNDEFINED, 2: _DX, 3: _SP, 4: _BP, 6: _R10, 7: _R13, 8: _PREV_SP, 9: _SP_INDIRECT, 10: _BP_INDIRECT},
}
# Likewise the kinds, by what a function begins with: up to Linux 6.3 two bits and one for the end of a stack, later three bits.
_KINDS: Mapping[int, Mapping[int, str]] = {
    0: {0: "call", 1: "regs", 2: "iret", 4: "end", 5: "end", 6: "end", 7: "end"},
    2: {1: "end", 2: "call", 3: "regs", 4: "iret"},
}
_FUNCTIONS = ("schedule", "native_write_msr", "kmem_cache_alloc")
# What a function begins with that keeps a frame pointer: push rbp; mov rbp, rsp. Before it ENDBR64 may stand, and a call or NOP
# of 5 bytes for ftrace.
_PROLOGUE = re.compile(rb"(\xf3\x0f\x1e\xfa)?(\xe8....|\x0f\x1f\x44\x00\x00)?\x55\x48\x89\xe5", re.DOTALL)
_PROLOGUE_BYTES = 13
_REGISTERS = {_DX: "rdx", _DI: "rdi", _R10: "r10", _R13: "r13"}

# struct pt_regs: where registers lie in it; its last five words are what the processor itself has pushed.
_PT_REGS = {"r13": 0x10, "rbp": 0x20, "r10": 0x38, "rdx": 0x60, "rdi": 0x70}
_PT_RIP, _PT_CS, _PT_RSP = 0x80, 0x88, 0x98


@dataclass(frozen=True, slots=True)
class _Entry:
    sp_offset: int
    bp_offset: int
    sp_register: int
    bp_register: int
    kind: str
    """"call", "regs", "iret" or "end"."""


@dataclass(slots=True)
class _State:
    """As the kernel's struct unwind_state. ``registers``: those that are known beside RIP, RSP and RBP."""

    ip: int
    sp: int
    bp: int
    is_exact: bool
    """``ip`` is an instruction that was interrupted, not one that a call returns to."""
    registers: Mapping[str, int]


class Stacks:
    """The stacks of one running kernel."""

    def __init__(self, linux: Linux) -> None:
        self._linux = linux
        self._memory = linux.memory
        symbols = linux.profile.symbols
        names = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind")
        start, stop, entries = (symbols.find(name) for name in names)
        self._table: tuple[int, int, int] | None = None
        if start is not None and stop is not None and entries is not None and 0 < stop - start < 4 * _MOST_ENTRIES:
            self._table = start + linux.slide, entries + linux.slide, (stop - start) // 4
        self._kinds: Mapping[int, str] = {}
        self._numbering: Mapping[int, int] = {}

    def frames(self, registers: Mapping[str, int]) -> Iterator[Frame]:
        """The frames of what a vCPU executes, the innermost first; a program's code is one frame."""
        yield Frame(registers["rip"], registers["rsp"])
        if registers["cs"] & 3:
            return
        state = _State(registers["rip"], registers["rsp"], registers["rbp"], True, registers)
        for _ in range(MOST_FRAMES):
            try:
                following = self._step(state)
            except (UnreadableError, ProfileError):
                yield from self._without_table(state)
                return
            if following is None:
                return
            state = following
            yield Frame(state.ip, state.sp)

    def code_map(self) -> CodeMap:
        """How to find callers at a trap: the same tables."""
        numbers: dict[int, int] = {}
        call = 0
        with contextlib.suppress(UnreadableError, ProfileError):
            if self._numbering or self._choose_layout():
                numbers = {meaning: number for number, meaning in self._numbering.items()}
                call = next(number for number, kind in self._kinds.items() if kind == "call")
        pieces = [CodePiece(start, end - 1, *(self._table or ())) for start, end in self._linux.code if start < end]
        for module in self._linux.modules:
            table = None
            with contextlib.suppress(UnreadableError, ProfileError):
                table = self._module_table(module.address)
            pieces.append(CodePiece(module.base, module.base + module.size - 1, *(table or ())))
        if not numbers:
            bare = tuple(CodePiece(piece.first, piece.last) for piece in pieces)
            return CodeMap(bare, keeps_frame_pointers=self._keeps_frame_pointers())
        return CodeMap(tuple(pieces), numbers[_SP], numbers[_BP], call)

    def _without_table(self, state: _State) -> Iterator[Frame]:
        frames = self._by_frame_pointers(state.sp, state.bp) if self._keeps_frame_pointers() else iter(())
        first = next(frames, None)
        if first is None:
            yield from self._guesses(state.sp)
        else:
            yield first
            yield from frames

    # ---- frame pointers ----

    def _keeps_frame_pointers(self) -> bool:
        """Whether all of some functions do that would."""
        if self._table is not None:
            return False
        places = [place for name in _FUNCTIONS if (place := self._linux.profile.symbols.find(name)) is not None]
        try:
            return bool(places) and all(
                _PROLOGUE.match(self._memory.read(place + self._linux.slide, _PROLOGUE_BYTES)) for place in places
            )
        except UnreadableError:
            return False

    def _by_frame_pointers(self, sp: int, bp: int) -> Iterator[Frame]:
        """As far as each frame lies above the one before on the same stack and returns behind a call."""
        for _ in range(MOST_FRAMES):
            if bp % 8 or not sp <= bp or bp // THREAD_SIZE != sp // THREAD_SIZE:
                return
            try:
                following, ip = self._memory.words(bp, 2)
            except UnreadableError:
                return
            if not self._linux.is_code(ip) or not is_behind_call(self._memory, ip):
                return
            yield Frame(ip, bp + 16)
            sp, bp = bp + 16, following

    # ---- ORC ----

    def _step(self, state: _State) -> _State | None:
        """The caller; None: there is none in the kernel. Raises UnreadableError where it cannot be known."""
        entry = self._find(state.ip if state.is_exact else state.ip - 1)
        if entry is None:
            raise UnreadableError(state.ip)
        if entry.kind == "end":
            return None
        sp = self._previous_sp(entry, state)
        read = self._memory.u64
        registers: Mapping[str, int] = {}
        bp = state.bp
        match entry.kind:
            case "call":
                ip, next_sp, is_exact = read(sp - 8), sp, False
                # A stack is unwound upwards; where an interrupt has its own, there is one step to another.
                if next_sp <= state.sp and next_sp // THREAD_SIZE == state.sp // THREAD_SIZE:
                    raise UnreadableError(sp)
            case "regs":
                if read(sp + _PT_CS) & 3:
                    return None
                ip, next_sp, is_exact = read(sp + _PT_RIP), read(sp + _PT_RSP), True
                registers = {name: read(sp + offset) for name, offset in _PT_REGS.items()}
                bp = registers["rbp"]
            case _:
                # Only what the processor has pushed: RIP, CS, RFLAGS, RSP, SS.
                if read(sp + 8) & 3:
                    return None
                ip, next_sp, is_exact = read(sp), read(sp + 24), True
        if entry.bp_register == _PREV_SP:
            bp = read(sp + entry.bp_offset)
        elif entry.bp_register == _BP:
            bp = read(state.bp + entry.bp_offset)
        if not self._linux.is_code(ip):
            raise UnreadableError(ip)
        return _State(ip, next_sp, bp, is_exact, registers)

    def _previous_sp(self, entry: _Entry, state: _State) -> int:
        """RSP before the call or interrupt that made this frame."""
        register, offset = entry.sp_register, entry.sp_offset
        if register == _SP:
            return state.sp + offset
        if register == _BP:
            return state.bp + offset
        if register == _SP_INDIRECT:
            return self._memory.u64(state.sp) + offset
        if register == _BP_INDIRECT:
            return self._memory.u64(state.bp + offset)
        name = _REGISTERS.get(register, "")
        if name not in state.registers:
            raise UnreadableError(state.sp)
        return state.registers[name]

    def _find(self, ip: int) -> _Entry | None:
        """The entry for an instruction: the last whose address is not above it. Raises UnreadableError, ProfileError."""
        module = self._linux.module_at(ip)
        table = self._module_table(module.address) if module else self._table
        if table is None:
            return None
        data = self._lookup(table, ip)
        return self._entry(data) if data and (self._numbering or self._choose_layout()) else None

    def _choose_layout(self) -> bool:
        """Finds out how this kernel writes its entries; whether that is known."""
        for name in _FUNCTIONS:
            address = self._linux.profile.symbols.find(name)
            data = self._lookup(self._table, address + self._linux.slide) if address and self._table else None
            if data:
                rest = _ENTRY.unpack(data)[2]
                self._kinds = _KINDS.get(rest >> 8 & 7, {})
                self._numbering = _NUMBERINGS.get(rest & 15, {}) if self._kinds else {}
                break
        return bool(self._numbering)

    def _lookup(self, table: tuple[int, int, int], ip: int) -> bytes | None:
        """The entry for an instruction as it lies in memory."""
        places, entries, count = table
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            at = places + middle * 4
            # Each counts from its own place.
            if at + _signed32(self._memory.u32(at)) <= ip:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None
        return self._memory.read(entries + (low - 1) * _ENTRY.size, _ENTRY.size)

    def _entry(self, data: bytes) -> _Entry | None:
        sp_offset, bp_offset, rest = _ENTRY.unpack(data)
        sp_register, bp_register = self._numbering.get(rest & 15, -1), self._numbering.get(rest >> 4 & 15, -1)
        kind = self._kinds.get(rest >> 8 & 7, "")
        if kind != "end" and (not kind or sp_register in (-1, _UNDEFINED) or bp_register == -1):
            return None
        return _Entry(sp_offset, bp_offset, sp_register, bp_register, kind)

    def _module_table(self, module: int) -> tuple[int, int, int] | None:
        count, places, entries = (
            self._linux.profile.offset(f"module.arch.{name}") for name in ("num_orcs", "orc_unwind_ip", "orc_unwind")
        )
        number = self._memory.u32(module + count)
        if not 0 < number < _MOST_ENTRIES:
            return None
        return self._memory.u64(module + places), self._memory.u64(module + entries), number

    # ---- guesses ----

    def _guesses(self, sp: int) -> Iterator[Frame]:
        """What looks like a return address, from there to the end of the stack."""
        if not is_kernel_pointer(sp):
            return
        # Kernel stacks are aligned to their size.
        yield from guesses(self._memory, sp, (sp | THREAD_SIZE - 1) + 1, self._linux.is_code)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
