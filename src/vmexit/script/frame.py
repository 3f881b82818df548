"""A function while it is lowered: its frame, how it fails and calls the runtime, where what it reads and writes is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from vmexit.script import typed
from vmexit.script.abi import address, constant, context_offset
from vmexit.script.errors import Place
from vmexit.script.types import BOOL, VOID, Array, Float, Int, Pointer, Type, size_of

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
PTR = ir.PointerType()

_GENERAL = 16
_RAX, _RCX, _RDX = constant("RAX"), constant("RCX"), constant("RDX")
_STACK_ADDRESS = address(constant("ARENA_STACK"))
_GLOBALS_ADDRESS = address(constant("ARENA_GLOBALS"))


def llvm_type(type_: Type) -> Any:
    """What a value of the type is to LLVM; a pointer is an integer, as a script address is none of this process."""
    match type_:
        case Int():
            return ir.IntType(type_.bits)
        case Float():
            return F32 if type_.bits == 32 else F64
        case Pointer():
            return I64
        case _ if type_ == VOID:
            return ir.VoidType()
        case _:
            raise AssertionError(type_)


def number(value: int, type_: Any = I64) -> Any:
    """An integer constant."""
    return ir.Constant(type_, value & ((1 << type_.width) - 1))


class Places:
    """The places in the source that fault numbers stand for; from 1."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.general: Place | None = None
        """Where a general register is named first."""
        self.asks_process = False
        """Whether a pseudo-register of the guest's processes is named."""
        self._numbers: dict[Place, int] = {}

    def number(self, place: Place) -> int:
        """The number of a place."""
        if place not in self._numbers:
            self.places.append(place)
            self._numbers[place] = len(self.places)
        return self._numbers[place]


@dataclass(slots=True)
class Spot:
    """Where a target is: how to read and how to write it, found out once."""

    load: Callable[[], Any]
    store: Callable[[Any], None]


class Frame:
    """One function while it is lowered."""

    def __init__(self, places: Places, function: typed.Function, llvm: Any) -> None:
        self.places = places
        self.function = function
        self.llvm = llvm
        self.is_main = not function.name
        self.context = llvm.args[0]
        self.entry = llvm.append_basic_block("entry")
        self.builder = ir.IRBuilder(llvm.append_basic_block("body"))
        self.start = ir.IRBuilder(self.entry)
        self.locals: dict[typed.Local, Any] = {}
        self.steps = self.alloca(I64)
        self.registers, self.globals, self.functions = (
            self.start.load(self.field(name, self.start), typ=PTR) for name in ("registers", "globals", "functions")
        )
        self.frame: Any = None
        self.frame_bytes: Any = None
        self.leave_block: Any = None

    def value(self, value: typed.Value) -> Any:
        """What computes a value; lower.py knows how."""
        raise NotImplementedError

    # ---- the frame ----

    def enter(self) -> None:
        """What comes before the function's own statements: fetch what is needed throughout, check the stack, make the frame."""
        self.start.store(self.start.load(self.field("steps", self.start), typ=I64), self.steps)
        if not self.is_main:
            self.check_native_stack()
        if self.function.frame:
            self.enter_frame()

    @property
    def nowhere(self) -> Place:
        place = self.function.place
        assert place is not None
        return place

    def field(self, name: str, builder: Any = None) -> Any:
        return (builder or self.builder).gep(self.context, [number(context_offset(name))], inbounds=True, source_etype=I8)

    def alloca(self, llvm: Any) -> Any:
        """Room in the native frame, of a size that is known."""
        found = self.start.alloca(llvm)
        found.type = PTR  # llvmlite would name the type that it points to, which LLVM no longer has
        return found

    def check_native_stack(self) -> None:
        # The address of something in this frame tells how deep the native stack is.
        mark = self.alloca(I8)
        here = self.builder.ptrtoint(mark, I64)
        floor = self.builder.load(self.field("native_floor"), typ=I64)
        self.fail_if(self.builder.icmp_unsigned("<", here, floor), "STACK", self.nowhere)

    def enter_frame(self) -> None:
        self.frame = self.call("ENTER", [number(self.function.frame)], self.nowhere)
        stack = self.builder.load(self.field("stack"), typ=PTR)
        self.frame_bytes = self.builder.gep(stack, [self.frame], source_etype=I8)

    def leave_frame(self) -> None:
        self.builder.store(self.builder.load(self.steps, typ=I64), self.field("steps"))
        if self.function.frame:
            self.builder.store(self.frame, self.field("stack_used"))

    def return_(self, value: Any) -> None:
        self.leave_frame()
        if self.is_main:
            self.builder.ret(number(0, I32))
        elif self.function.returns == VOID:
            self.builder.ret_void()
        else:
            self.builder.ret(ir.Constant(llvm_type(self.function.returns), None) if value is None else value)

    # ---- faults ----

    def end_run(self, builder: Any) -> None:
        """Return from a block of its own after a failure."""
        if self.is_main:
            builder.ret(builder.load(self.field("error", builder), typ=I32))
        elif self.function.returns == VOID:
            builder.ret_void()
        else:
            builder.ret(ir.Constant(llvm_type(self.function.returns), None))

    def fail_if(self, condition: Any, fault: str, place: Place, detail: Any = None) -> None:
        """End the run where `condition` holds; `detail` is the number that is to blame."""
        failing = self.llvm.append_basic_block("fail")
        self.leave_if(condition, failing)
        builder = ir.IRBuilder(failing)
        builder.store(number(constant(f"FAULT_{fault}"), I32), self.field("error", builder))
        builder.store(self.place(place), self.field("place", builder))
        builder.store(number(0) if detail is None else detail, self.field("detail", builder))
        builder.branch(self.leaving())

    def leaving(self) -> Any:
        """The block that leaves the function in a run that has failed."""
        if self.leave_block is None:
            self.leave_block = self.llvm.append_basic_block("leave")
            self.end_run(ir.IRBuilder(self.leave_block))
        return self.leave_block

    def leave_if_failed(self) -> None:
        """End the run where what was just called has failed."""
        error = self.builder.load(self.field("error"), typ=I32)
        self.leave_if(self.builder.icmp_unsigned("!=", error, number(0, I32)), self.leaving())

    def place(self, place: Place) -> Any:
        return number(self.places.number(place), I32)

    def leave_if(self, condition: Any, to: Any) -> None:
        going_on = self.llvm.append_basic_block("on")
        self.builder.cbranch(condition, to, going_on).set_weights([1, 1000])
        self.builder.position_at_end(going_on)

    def call(self, name: str, arguments: Sequence[Any], place: Place, spends: bool = False) -> Any:
        """A function of the runtime; the run ends here if it fails."""
        builder = self.builder
        if spends:
            builder.store(builder.load(self.steps, typ=I64), self.field("steps"))
        kind = ir.FunctionType(I64, [PTR, *(argument.type for argument in arguments)])
        slot = builder.gep(self.functions, [number(constant(f"CALL_{name}"))], source_etype=PTR)
        function = builder.load(slot, typ=PTR)
        # The runtime does not know where in the script it is called from.
        builder.store(self.place(place), self.field("place"))
        found = call_pointer(builder, function, kind, [self.context, *arguments])
        self.leave_if_failed()
        if spends:
            builder.store(builder.load(self.field("steps"), typ=I64), self.steps)
        return found

    def spend_step(self, place: Place) -> None:
        left = self.builder.load(self.steps, typ=I64)
        self.fail_if(self.builder.icmp_unsigned("==", left, number(0)), "STEPS", place)
        self.builder.store(self.builder.sub(left, number(1)), self.steps)

    # ---- targets ----

    def spot(self, target: typed.Target) -> Spot:
        match target:
            case typed.LocalTarget() if not target.local.in_memory:
                cell = self.locals.get(target.local)
                if cell is None:
                    cell = self.locals[target.local] = self.alloca(llvm_type(target.type))
                    self.start.store(ir.Constant(llvm_type(target.type), None), cell)
                return Spot(lambda: self.builder.load(cell, typ=llvm_type(target.type)), lambda value: self.put(value, cell))
            case typed.LocalTarget():
                cell = self.builder.gep(self.frame_bytes, [number(target.local.offset)], source_etype=I8)
                return self.cell(cell, target.type)
            case typed.GlobalTarget():
                cell = self.builder.gep(self.globals, [number(target.variable.index)], source_etype=I64)
                return self.cell(cell, target.type, shared=True)
            case typed.RegisterTarget():
                return self.register(target)
            case typed.SpecialTarget():
                return self.special(target)
            case typed.Element() | typed.MemberTarget() if (there := self.direct(target)) is not None:
                type_ = llvm_type(target.type)
                return Spot(lambda: self.get_direct(there, target.type, type_), lambda value: self.put_direct(value, there))
            case typed.Deref() | typed.Element() | typed.MemberTarget():
                there = self.address(target)
                return Spot(lambda: self.load_from(there, target), lambda value: self.store_to(there, value, target))
            case _:
                raise AssertionError(target)

    def put(self, value: Any, cell: Any) -> None:
        self.builder.store(value, cell)

    def get_direct(self, there: Any, type_: Type, llvm: Any) -> Any:
        found = self.builder.load(there, typ=llvm, align=1)
        return self.as_bool(found) if type_ == BOOL else found

    def put_direct(self, value: Any, there: Any) -> None:
        self.builder.store(value, there, align=1)

    def as_bool(self, value: Any) -> Any:
        """Memory may hold any byte where a bool is read."""
        return self.builder.zext(self.builder.icmp_unsigned("!=", value, number(0, value.type)), I8)

    def cell(self, cell: Any, type_: Type, shared: bool = False) -> Spot:
        """8 bytes that hold a value of the type, widened: a global, or a local whose address is taken."""

        def load() -> Any:
            found = self.builder.load_atomic(cell, "monotonic", 8, typ=I64) if shared else self.builder.load(cell, typ=I64)
            return self.narrow(found, type_)

        def store(value: Any) -> None:
            wide = self.widen(value, type_)
            if shared:
                self.builder._insert(ir.instructions.StoreAtomicInstr(self.builder.block, wide, cell, "monotonic", 8))
            else:
                self.builder.store(wide, cell)

        return Spot(load, store)

    def widen(self, value: Any, type_: Type) -> Any:
        """A value of any scalar type as 64 bits."""
        builder = self.builder
        match type_:
            case Float(bits=64):
                return builder.bitcast(value, I64)
            case Float():
                return builder.zext(builder.bitcast(value, I32), I64)
            case Int(bits=64) | Pointer():
                return value
            case Int(signed=True):
                return builder.sext(value, I64)
            case _:
                return builder.zext(value, I64)

    def narrow(self, value: Any, type_: Type) -> Any:
        """The reverse; `value` may be anything."""
        builder = self.builder
        match type_:
            case Float(bits=64):
                return builder.bitcast(value, F64)
            case Float():
                return builder.bitcast(builder.trunc(value, I32), F32)
            case Int(bits=64) | Pointer():
                return value
            case _ if type_ == BOOL:
                return self.as_bool(builder.trunc(value, I8))
            case _:
                return builder.trunc(value, llvm_type(type_))

    def load_from(self, there: Any, target: typed.Target) -> Any:
        return self.narrow(self.call("LOAD", [there, number(size_of(target.type))], target.place), target.type)

    def store_to(self, there: Any, value: Any, target: typed.Target) -> None:
        self.call("STORE", [there, self.widen(value, target.type), number(size_of(target.type))], target.place)

    def direct(self, target: typed.Target) -> Any:
        """The host's address of a part of a local array or struct; None where the target is reached through a pointer."""
        match target:
            case typed.LocalTarget():
                return self.builder.gep(self.frame_bytes, [number(target.local.offset)], source_etype=I8)
            case typed.Element() if self.is_direct(target):
                base = self.direct(target.base)
                return self.builder.gep(base, [self.scaled_index(target)], source_etype=I8)
            case typed.MemberTarget() if self.is_direct(target):
                return self.builder.gep(self.direct(target.base), [number(target.offset)], source_etype=I8)
            case _:
                return None

    def is_direct(self, target: typed.Target) -> bool:
        while isinstance(target, typed.Element | typed.MemberTarget):
            target = target.base
        return isinstance(target, typed.LocalTarget)

    def scaled_index(self, target: typed.Element) -> Any:
        """The offset of an element within its array, the index checked."""
        array = target.base.type
        assert isinstance(array, Array)
        index = self.value(target.index)
        self.fail_if(self.builder.icmp_unsigned(">=", index, number(array.count)), "INDEX", target.place, index)
        return self.builder.mul(index, number(size_of(array.of)))

    def address(self, target: typed.Target) -> Any:
        """The script address of a target."""
        match target:
            case typed.LocalTarget():
                return self.builder.add(self.frame, number(_STACK_ADDRESS + target.local.offset))
            case typed.GlobalTarget():
                return number(_GLOBALS_ADDRESS + 8 * target.variable.index)
            case typed.Deref():
                return self.value(target.address)
            case typed.Element():
                base = self.address(target.base)
                return self.builder.add(base, self.scaled_index(target))
            case typed.MemberTarget():
                return self.builder.add(self.address(target.base), number(target.offset))
            case _:
                raise AssertionError(target)

    # ---- registers ----

    def whole_register(self, which: int, place: Place) -> Spot:
        if which >= _GENERAL:

            def store(value: Any) -> None:
                self.call("SET_REGISTER", [number(which), value], place)

            return Spot(lambda: self.call("GET_REGISTER", [number(which)], place), store)
        self.places.general = self.places.general or place
        cell = self.builder.gep(self.registers, [number(which)], source_etype=I64)

        def store_general(value: Any) -> None:
            self.builder.store(value, cell)
            changed = self.builder.load(self.field("changed"), typ=I32)
            self.builder.store(self.builder.or_(changed, number(1 << which, I32)), self.field("changed"))

        return Spot(lambda: self.builder.load(cell, typ=I64), store_general)

    def register(self, target: typed.RegisterTarget) -> Spot:
        register = target.register
        whole = self.whole_register(register.number, target.place)
        if register.bits == 64:
            return whole
        mask = (1 << register.bits) - 1

        def load() -> Any:
            return self.builder.and_(self.builder.lshr(whole.load(), number(register.shift)), number(mask))

        def store(value: Any) -> None:
            kept = self.builder.and_(whole.load(), number(~(mask << register.shift)))
            part = self.builder.shl(self.builder.and_(value, number(mask)), number(register.shift))
            whole.store(self.builder.or_(kept, part))

        return Spot(load, store)

    def special(self, target: typed.SpecialTarget) -> Spot:
        """As RDMSR and WRMSR use them: halves of 32 bits, the rest of a register that is written becoming 0."""
        low_half = number(0xFFFF_FFFF)
        if target.name == "msr":
            rcx = self.whole_register(_RCX, target.place)
            return Spot(
                lambda: self.builder.and_(rcx.load(), low_half), lambda value: rcx.store(self.builder.and_(value, low_half))
            )
        rax, rdx = self.whole_register(_RAX, target.place), self.whole_register(_RDX, target.place)

        def load() -> Any:
            low = self.builder.and_(rax.load(), low_half)
            return self.builder.or_(low, self.builder.shl(rdx.load(), number(32)))

        def store(value: Any) -> None:
            rax.store(self.builder.and_(value, low_half))
            rdx.store(self.builder.lshr(value, number(32)))

        return Spot(load, store)


def call_pointer(builder: Any, pointer: Any, kind: Any, arguments: Sequence[Any]) -> Any:
    """A call through a pointer, whose type says nothing of what it points to."""
    return builder.call(_Callee(pointer, kind), arguments)


class _Callee:
    """What llvmlite's call needs to know of a function that is only a pointer."""

    def __init__(self, pointer: Any, kind: Any) -> None:
        self.type = PTR
        self.function_type = kind
        self.ftype = kind
        self._pointer = pointer
        self.name = ""

    def get_reference(self) -> str:
        """As an operand."""
        return str(self._pointer.get_reference())
