"""Who called whom on a vCPU's kernel stack, by the tables that Windows itself unwinds with (x64 exception handling, Microsoft
Learn).

Every function that moves RSP has a row in its image's function table, which leads to codes that undo its prolog; one without a
row has its return address at RSP. Where that does not lead on, what is left is a guess.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmexit.guest.linux.recipe import is_kernel_pointer
from vmexit.guest.memory import UnreadableError
from vmexit.guest.scan import MOST_FRAMES, guesses
from vmexit.guest.system import CodeMap, CodePiece, Frame
from vmexit.guest.windows.modules import Module
from vmexit.guest.windows.pe import FUNCTION, Image, PeError
from vmexit.guest.windows.running import Windows

# As instructions and unwind codes number them.
_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_CHAINED = 4


class _Operation(enum.IntEnum):
    """UWOP_... of an unwind code."""

    PUSH = 0
    ALLOC_LARGE = 1
    ALLOC_SMALL = 2
    SET_FRAME = 3
    SAVE = 4
    SAVE_FAR = 5
    EPILOG = 6
    SPARE = 7
    SAVE_XMM = 8
    SAVE_XMM_FAR = 9
    MACHINE_FRAME = 10


# How many slots of 2 bytes each takes; ALLOC_LARGE has two forms.
_SLOTS = {
    _Operation.PUSH: 1,
    _Operation.ALLOC_SMALL: 1,
    _Operation.SET_FRAME: 1,
    _Operation.SAVE: 2,
    _Operation.SAVE_FAR: 3,
    _Operation.EPILOG: 1,
    _Operation.SPARE: 2,
    _Operation.SAVE_XMM: 2,
    _Operation.SAVE_XMM_FAR: 3,
    _Operation.MACHINE_FRAME: 1,
}
_MOST_CHAINED = 32
_LARGEST_STACK = 0x1_8000
"""What is looked through for a guess where the thread's own stack is not known; stacks for DPCs are not longer."""
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Code:
    at: int
    """It undoes an instruction that ends so many bytes into the function."""
    operation: int
    info: int
    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Unwind:
    """UNWIND_INFO."""

    codes: tuple[_Code, ...]
    frame_register: int
    frame_offset: int
    parent: tuple[int, int, int] | None
    """The row that it continues."""


@dataclass(slots=True)
class _State:
    ip: int
    registers: dict[str, int]
    is_exact: bool
    """``ip`` is an instruction that was interrupted, not one that a call returns to."""


class Stacks:
    """The stacks of one running kernel."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._images: dict[Module, Image | None] = {}

    def frames(self, registers: Mapping[str, int]) -> Iterator[Frame]:
        """The frames of what a vCPU executes, the innermost first; a program's code is one frame."""
        yield Frame(registers["rip"], registers["rsp"])
        if registers["cs"] & 3:
            return
        state = _State(registers["rip"], {name: registers[name] for name in _REGISTERS}, True)
        for _ in range(MOST_FRAMES):
            sp = state.registers["rsp"]
            try:
                goes_on = self._step(state)
            except UnreadableError:
                yield from self._guesses(sp)
                return
            if not goes_on:
                return
            yield Frame(state.ip, state.registers["rsp"])

    def code_map(self) -> CodeMap:
        """Where code is. Its tables have another form, so that at a trap a caller is a guess."""
        kernel = self._windows.image
        pieces = [CodePiece(kernel.base, kernel.base + kernel.size - 1)]
        pieces += [CodePiece(module.base, module.base + module.size - 1) for module in self._windows.modules if module.size]
        return CodeMap(tuple(pieces))

    def _step(self, state: _State) -> bool:
        """To the caller; whether there is one in the kernel. Raises UnreadableError where it cannot be known."""
        image = self._image_at(state.ip)
        if image is None:
            raise UnreadableError(state.ip)
        sp = state.registers["rsp"]
        # A call may be its function's last instruction.
        rva = state.ip - image.base - (not state.is_exact)
        row = image.function_at(rva)
        read = self._windows.memory.u64
        was_interrupted = False
        if row is None:
            if not state.is_exact:
                raise UnreadableError(state.ip)
        elif not (state.is_exact and self._undo_epilog(state, image, row)):
            offset = state.ip - image.base - row[0]
            for _ in range(_MOST_CHAINED):
                unwind = self._unwind(image, row[2])
                was_interrupted = self._undo(unwind, state.registers, offset) or was_interrupted
                if unwind.parent is None:
                    break
                # All of the parent's prolog has been executed.
                row, offset = unwind.parent, _MASK64
            else:
                raise UnreadableError(state.ip)
        at = state.registers["rsp"]
        if was_interrupted:
            # What the processor has pushed: RIP, CS, RFLAGS, RSP, SS.
            ip, cs, next_sp = read(at), read(at + 8), read(at + 24)
            if cs & 3:
                return False
        else:
            ip, next_sp = read(at), at + 8
            # A stack is unwound upwards.
            if next_sp <= sp:
                raise UnreadableError(at)
        if self._image_at(ip) is None:
            # The last function of a thread returns to nothing.
            if ip == 0:
                return False
            raise UnreadableError(ip)
        state.ip, state.is_exact = ip, was_interrupted
        state.registers["rsp"] = next_sp
        return True

    def _image_at(self, address: int) -> Image | None:
        """The image whose code an address can be."""
        kernel = self._windows.image
        if kernel.base <= address < kernel.base + kernel.size:
            return kernel if kernel.is_code(address - kernel.base) else None
        module = self._windows.module_at(address)
        if module is None:
            return None
        if module not in self._images:
            try:
                self._images[module] = Image(self._windows.memory, module.base)
            except (UnreadableError, PeError):
                self._images[module] = None
        image = self._images[module]
        return image if image is not None and image.is_code(address - image.base) else None

    def _unwind(self, image: Image, rva: int) -> _Unwind:
        """The unwind information at an RVA. Raises UnreadableError."""
        read = self._windows.memory.read
        if rva & 1:
            # The row of another function, whose information this one shares.
            rva = FUNCTION.unpack(read(image.base + rva - 1, FUNCTION.size))[2]
        head, _, count, frame = read(image.base + rva, 4)
        if head & 7 not in (1, 2):
            raise UnreadableError(image.base + rva)
        words = struct.unpack(f"<{count}H", read(image.base + rva + 4, 2 * count))
        codes = []
        index = 0
        while index < count:
            operation, info = words[index] >> 8 & 15, words[index] >> 12
            slots = (3 if info else 2) if operation == _Operation.ALLOC_LARGE else _SLOTS.get(operation, 0)
            if not slots or index + slots > count:
                raise UnreadableError(image.base + rva)
            codes.append(_Code(words[index] & 0xFF, operation, info, words[index + 1 : index + slots]))
            index += slots
        parent = None
        if head >> 3 & _CHAINED:
            parent = FUNCTION.unpack(read(image.base + rva + 4 + 2 * (count + count % 2), FUNCTION.size))
        return _Unwind(tuple(codes), frame & 15, (frame >> 4) * 16, parent)

    def _undo(self, unwind: _Unwind, registers: dict[str, int], offset: int) -> bool:
        """Undoes what of a prolog has been executed ``offset`` bytes into it; whether the processor's own frame comes next."""
        read = self._windows.memory.u64
        has_frame = any(code.operation == _Operation.SET_FRAME and code.at <= offset for code in unwind.codes)
        frame = registers[_REGISTERS[unwind.frame_register]] - unwind.frame_offset if has_frame else registers["rsp"]
        for code in unwind.codes:
            if code.at > offset or code.operation == _Operation.EPILOG:
                continue
            operands = sum(word << 16 * index for index, word in enumerate(code.operands))
            match code.operation:
                case _Operation.PUSH:
                    registers[_REGISTERS[code.info]] = read(registers["rsp"])
                    registers["rsp"] += 8
                case _Operation.ALLOC_LARGE:
                    registers["rsp"] += operands if code.info else operands * 8
                case _Operation.ALLOC_SMALL:
                    registers["rsp"] += code.info * 8 + 8
                case _Operation.SET_FRAME:
                    registers["rsp"] = frame
                case _Operation.SAVE | _Operation.SAVE_FAR:
                    registers[_REGISTERS[code.info]] = read(
                        frame + (operands * 8 if code.operation == _Operation.SAVE else operands)
                    )
                case _Operation.MACHINE_FRAME:
                    registers["rsp"] += 8 * code.info
                    return True
            registers["rsp"] &= _MASK64
        return False

    def _undo_epilog(self, state: _State, image: Image, row: tuple[int, int, int]) -> bool:
        """Executes the rest of an epilog up to its return, where RIP is in one: ADD RSP, POPs, RET."""
        registers = dict(state.registers)
        at, end = state.ip, image.base + row[1]
        memory = self._windows.memory
        code = memory.read(at, min(64, end - at))
        if code[:3] == b"\x48\x83\xc4" and len(code) > 4:
            registers["rsp"] += struct.unpack_from("b", code, 3)[0]
            code = code[4:]
        elif code[:3] == b"\x48\x81\xc4" and len(code) > 7:
            registers["rsp"] += struct.unpack_from("<i", code, 3)[0]
            code = code[7:]
        while code:
            high = 8 if code[0] == 0x41 else 0
            pop = code[1:2] if high else code[:1]
            if not pop or not 0x58 <= pop[0] <= 0x5F:
                break
            registers[_REGISTERS[high + pop[0] - 0x58]] = memory.u64(registers["rsp"] & _MASK64)
            registers["rsp"] += 8
            code = code[2 if high else 1 :]
        if code[:1] not in (b"\xc3", b"\xc2") and code[:2] != b"\xf3\xc3":
            return False
        registers["rsp"] &= _MASK64
        state.registers.update(registers)
        return True

    def _guesses(self, sp: int) -> Iterator[Frame]:
        if is_kernel_pointer(sp):
            end = sp + _LARGEST_STACK
            yield from guesses(self._windows.memory, sp, end, lambda address: self._image_at(address) is not None)
