"""Runs compiled scripts in this process, with the agent's own runtime: registers and memory are what the caller gives."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Protocol

from vmexit.errors import VmexitError
from vmexit.script import abi
from vmexit.script.abi import constant, ffi
from vmexit.script.compile import CompiledScript
from vmexit.script.names import REGISTERS
from vmexit.script.printf import records_of, render

DEFAULT_STEPS = constant("DEFAULT_STEPS")
"""Turns of loops, calls, and 64-byte pieces of what is copied or compared, that a run may take."""
DEFAULT_STACK = constant("DEFAULT_STACK")
"""Bytes of the native stack that a run may take."""
MIN_STACK, MAX_STACK = constant("MIN_STACK"), constant("MAX_STACK")
_ARENA_STACK = constant("ARENA_STACK_BYTES")
_LOCK_WAIT_NS = constant("LOCK_WAIT_NS")
_OUTPUT = 256 * 1024
_MAX_GLOBALS = constant("MAX_GLOBALS")
_GENERAL = 16
_EVENT_CALLS = {
    constant("CALL_EVENT_ENABLE"): constant("STATE_ENABLED"),
    constant("CALL_EVENT_DISABLE"): constant("STATE_DISABLED"),
    constant("CALL_EVENT_CLEAR"): constant("STATE_CLEARED"),
}
_MFD_EXEC = 0x10  # Linux 6.3; uapi/linux/memfd.h
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@cache
def _library() -> Any:
    ffi.cdef(
        """
        uint32_t vmexit_script_eval(struct vmexit_script_context *context, const void *entry, uint64_t steps, uint64_t repeat);
        uint32_t vmexit_script_instruction_length(const uint8_t *bytes, uint64_t available, uint32_t bits);
        """
    )
    path = resources.files("vmexit.agent") / "agent.so"
    try:
        return ffi.dlopen(str(path))
    except OSError as error:
        raise VmexitError(f"the agent's library cannot be loaded: {error}; was the package built?") from None


def check_limits(steps: int, stack: int) -> None:
    """Raises VmexitError for limits of a run that make no sense."""
    if not 0 < steps < 1 << 64:
        raise VmexitError("a run needs one step at least, and 2^64 - 1 are the most")
    if not MIN_STACK <= stack <= MAX_STACK:
        raise VmexitError(f"the stack of a run can have {MIN_STACK:x} to {MAX_STACK:x} bytes")


def instruction_length(code: bytes, bits: int) -> int:
    """Bytes of the x86 instruction at the start of `code` in 64- or 32-bit mode, as disassemble_len sees it; 0: none."""
    return int(_library().vmexit_script_instruction_length(code, len(code), bits))


def sealed_file(code: bytes, constants: bytes = b"") -> int:
    """A file descriptor of a file in memory with this code and, from the next page on, the constants. The caller closes it.

    Nobody can write to it any more.
    """
    try:
        descriptor = os.memfd_create("vmexit-script", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
    except OSError:
        descriptor = os.memfd_create("vmexit-script", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Beyond the code, and where it is not to be entered: INT3.
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(code.ljust(_in_pages(len(code)), b"\xcc"))
            file.write(constants.ljust(_in_pages(len(constants)), b"\0"))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _in_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class NativeCode:
    """Code that this process can run. It was written through another view of the same memory, which is gone by then."""

    def __init__(self, code: bytes) -> None:
        descriptor = sealed_file(code)
        try:
            size = os.fstat(descriptor).st_size
            self._memory = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(descriptor)
        self._view = ffi.from_buffer(self._memory)

    def address(self, offset: int) -> Any:
        """Of a byte of the code, as a C pointer."""
        return ffi.cast("const void *", int(ffi.cast("uintptr_t", self._view)) + offset)


class Live(Protocol):
    """A real machine, as a script reaches it that runs in the debugger. Each raises VmexitError where that is not possible."""

    def get_register(self, number: int) -> int: ...
    def set_register(self, number: int, value: int) -> None: ...
    def read(self, physical: bool, address: int, length: int) -> bytes: ...
    def write(self, physical: bool, address: int, data: bytes) -> None: ...
    def translate(self, address: int, to_virtual: bool) -> int | None: ...
    def short_circuit(self, on: bool) -> None: ...
    def change_event(self, state: int, event: int) -> None: ...
    def pause(self) -> None: ...


@dataclass(slots=True)
class Machine:
    """What a script finds when it runs in this process. A run changes it."""

    registers: dict[int, int] = field(default_factory=dict)
    """By number (names.REGISTERS); the others are 0."""
    memory: list[tuple[int, bytearray]] = field(default_factory=list)
    """Address and bytes, virtual and physical alike; elsewhere there is none."""
    values: dict[str, int] = field(default_factory=dict)
    """Pseudo-registers by name: context, core ..."""
    buffer: bytearray = field(default_factory=bytearray)
    """$buffer; where empty, that is 0."""
    live: Live | None = None
    """Where registers and memory are; ``registers`` then holds the 16 general ones, and ``memory`` is of no use."""

    def set_register(self, name: str, value: int) -> None:
        """Set a register or a part of one by its name, in lower case. KeyError, ValueError as guest.registers."""
        register = REGISTERS[name]
        self.registers[register.number] = register.insert(self.registers.get(register.number, 0), value)


class Runtime:
    """Runs scripts; keeps the global variables of a session."""

    def __init__(self, steps: int = DEFAULT_STEPS, stack: int = DEFAULT_STACK) -> None:
        self.steps = steps
        self.stack = stack
        self.globals: Any = ffi.buffer(ffi.new("uint64_t[]", _MAX_GLOBALS))
        """The cells of the global variables: anything of that size that can be written to."""
        self._stack = ffi.new("uint64_t[]", _ARENA_STACK // 8)
        self._output = ffi.new("uint8_t[]", _OUTPUT)
        self._record = ffi.new("uint8_t[]", constant("MAX_PRINT"))
        self._library = _library()
        self._code: dict[CompiledScript, NativeCode] = {}

    def run(self, script: CompiledScript, machine: Machine, write: Callable[[bytes], None], repeat: int = 1) -> None:
        """Run a script; `write` is given what it prints, some of it at a time. Raises ScriptRunError when the run is ended.

        What `write` raises ends the run too, and is raised from here.
        """
        run = _Run(self, script, machine, write)
        try:
            run.run(repeat)
        finally:
            run.kept.clear()

    def code(self, script: CompiledScript) -> NativeCode:
        """The script, ready to run in this process."""
        if script not in self._code:
            if len(self._code) >= 256:
                self._code.clear()
            self._code[script] = NativeCode(script.code)
        return self._code[script]


class _Run:
    """One run: the C structures around it."""

    def __init__(self, runtime: Runtime, script: CompiledScript, machine: Machine, write: Callable[[bytes], None]) -> None:
        self.runtime = runtime
        self.script = script
        self.machine = machine
        self.write = write
        self.failed: BaseException | None = None
        self.kept: list[Any] = []
        self.eval = abi.new("struct vmexit_eval *")
        self.context = abi.new("struct vmexit_script_context *")

    def run(self, repeat: int) -> None:
        runtime, script = self.runtime, self.script
        code = runtime.code(script)
        self.fill_eval()
        self.fill_context()
        library = runtime._library
        error = library.vmexit_script_eval(self.context, code.address(script.entry), runtime.steps, repeat)
        self.drain()
        self.machine.registers = {number: value for number, value in enumerate(self.eval.registers) if value}
        if self.failed is not None:
            raise self.failed
        if self.machine.live is not None:
            for number in range(_GENERAL):
                if self.context.changed >> number & 1:
                    self.machine.live.set_register(number, self.eval.registers[number])
        if error:
            raise script.fault(error, self.context.place, self.context.detail)

    def keep(self, thing: Any) -> Any:
        """C objects live as long as Python's names for them."""
        self.kept.append(thing)
        return thing

    def fill_eval(self) -> None:
        machine, eval_ = self.machine, self.eval
        for number, value in machine.registers.items():
            eval_.registers[number] = value
        regions = self.keep(ffi.new("struct vmexit_eval_memory[]", len(machine.memory)))
        for region, (address, data) in zip(regions, machine.memory, strict=True):
            region.address, region.length = address, len(data)
            region.bytes = ffi.cast("uint8_t *", self.keep(ffi.from_buffer(data)))
        eval_.memory, eval_.memory_count = regions, len(machine.memory)
        eval_.output, eval_.output_size = self.runtime._output, _OUTPUT
        eval_.drain = self.keep(ffi.callback("int(struct vmexit_eval *)", lambda _: self.drain()))
        if machine.live is not None:
            eval_.live = self.live_host(machine.live)

    def fill_context(self) -> None:
        context, runtime = self.context, self.runtime
        constants = self.keep(ffi.from_buffer(self.script.constants))
        buffer = self.keep(ffi.from_buffer(self.machine.buffer))
        segments = {
            "CONSTANTS": (constants, len(self.script.constants), 0),
            "GLOBALS": (self.keep(ffi.from_buffer(runtime.globals)), 8 * _MAX_GLOBALS, 1),
            "STACK": (runtime._stack, _ARENA_STACK, 1),
            "BUFFER": (buffer, len(self.machine.buffer), 1),
        }
        for name, (data, size, writable) in segments.items():
            segment = context.segments[constant(f"ARENA_{name}")]
            segment.bytes, segment.size, segment.writable = ffi.cast("uint8_t *", data), size, writable
        if self.machine.buffer:
            context.values[constant("VALUE_BUFFER")] = abi.address(constant("ARENA_BUFFER"))
        for name, value in self.machine.values.items():
            context.values[constant(f"VALUE_{name.upper()}")] = value
        context.machine = self.eval
        context.record = runtime._record
        context.lock_wait_ns = _LOCK_WAIT_NS
        context.native_budget = runtime.stack
        context.local_time = time.localtime().tm_gmtoff

    def live_host(self, live: Live) -> Any:
        """The C functions (struct vmexit_script_host) that reach a real machine."""

        def get_register(_: Any, number: int, value: Any) -> int:
            value[0] = live.get_register(number)
            return 0

        def set_register(_: Any, number: int, value: int) -> int:
            live.set_register(number, value)
            return 0

        def memory(_: Any, physical: int, write: int, address: int, data: Any, length: int) -> int:
            if write:
                live.write(bool(physical), address, bytes(ffi.buffer(data, length)))
            else:
                ffi.memmove(data, live.read(bool(physical), address, length), length)
            return 0

        def translate(address: int, translated: Any, *, to_virtual: bool) -> int:
            try:
                found = live.translate(address, to_virtual)
            except VmexitError as error:
                self.failed = self.failed or error  # not to be taken for an address that is not mapped
                raise
            translated[0] = found or 0
            return constant("FAULT_READ") if found is None else 0

        def to_physical(_: Any, address: int, physical: Any) -> int:
            return translate(address, physical, to_virtual=False)

        def to_virtual(_: Any, physical: int, address: Any) -> int:
            return translate(physical, address, to_virtual=True)

        def short_circuit(_: Any, on: int) -> int:
            live.short_circuit(bool(on))
            return 0

        def event(_: Any, call: int, number: int) -> int:
            first = constant("FIRST_TAG")
            live.change_event(_EVENT_CALLS[call], number - first if number >= first else number)
            return 0

        def pause(_: Any) -> int:
            live.pause()
            return 0

        host = self.keep(abi.new("struct vmexit_script_host *"))
        functions: dict[str, tuple[Callable[..., int], str]] = {
            "get_register": (get_register, "REGISTER"),
            "set_register": (set_register, "REGISTER"),
            "memory": (memory, "READ"),
            "to_physical": (to_physical, "READ"),
            "to_virtual": (to_virtual, "READ"),
            "short_circuit": (short_circuit, "MACHINE"),
            "event": (event, "EVENT"),
            "pause": (pause, "MACHINE"),
        }
        for name, (function, fault) in functions.items():
            kind = ffi.typeof(getattr(host, name))
            setattr(host, name, self.keep(ffi.callback(kind, self.guarded(function, constant(f"FAULT_{fault}")))))
        return host

    def guarded(self, function: Callable[..., int], fault: int) -> Callable[..., int]:
        """What the machine cannot do is the script's fault; any other exception ends the run and is raised when it is over."""

        def call(*arguments: Any) -> int:
            try:
                return function(*arguments)
            except VmexitError:
                return fault
            except BaseException as error:
                self.failed = self.failed or error
                return fault

        return call

    def drain(self) -> int:
        """Make text of what was printed, and hand it on. 1 where that failed: the run is to end."""
        data = bytes(ffi.buffer(self.eval.output, self.eval.output_used))
        self.eval.output_used = 0
        if self.failed is None and data:
            try:
                self.write(b"".join(render(self.script.formats[number], slots) for number, slots in records_of(data)))
            except BaseException as error:
                self.failed = error
        return int(self.failed is not None)


def run_text(scripts: Sequence[CompiledScript], machine: Machine | None = None, runtime: Runtime | None = None) -> bytes:
    """What scripts print, run one after the other."""
    out = bytearray()
    runtime = runtime or Runtime()
    machine = machine or Machine()
    for script in scripts:
        runtime.run(script, machine, out.extend)
    return bytes(out)


def register_values(machine: Machine) -> Mapping[str, int]:
    """The whole registers of a machine by their names."""
    return {name: machine.registers.get(register.number, 0) for name, register in REGISTERS.items() if register.whole == name}
