"""From the typed tree to LLVM's intermediate representation: functions, statements and values.

The code is position independent and calls nothing but the script's own functions and, through the context's table, the runtime
(agent/script.h). Each function returns at once when a run has failed, so a fault unwinds to the entry by itself.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from vmexit.script import typed
from vmexit.script.abi import address, constant, value_offset
from vmexit.script.builtins import How
from vmexit.script.errors import Place
from vmexit.script.frame import F32, F64, I1, I8, I32, I64, PTR, Frame, Places, llvm_type, number
from vmexit.script.names import OF_PROCESSES
from vmexit.script.printf import Conversion, Take
from vmexit.script.types import BOOL, Float, Int, Type, size_of

ENTRY = "script_entry"

_CONSTANTS_ADDRESS = address(constant("ARENA_CONSTANTS"))
_TAG = constant("ARENA_TAG")

_FLOAT_OPERATION = {"+": "fadd", "-": "fsub", "*": "fmul", "/": "fdiv"}
_INT_OPERATION = {"+": "add", "-": "sub", "*": "mul", "&": "and_", "|": "or_", "^": "xor"}


def lower(program: typed.Program, triple: str, data_layout: str) -> tuple[str, Places]:
    """The module's text, and the places that its fault numbers stand for (number 0 for none)."""
    module = _Module(program, triple, data_layout)
    return str(module.module), module.places


class _Module:
    """What all functions share: the module, the declarations, the places."""

    def __init__(self, program: typed.Program, triple: str, data_layout: str) -> None:
        self.module = ir.Module("script")
        self.module.triple = triple
        self.module.data_layout = data_layout
        self.places = Places()
        self.functions: dict[typed.Function, Any] = {}
        for function in program.functions:
            parameters = [PTR, *(llvm_type(parameter.type) for parameter in function.parameters)]
            found = ir.Function(self.module, ir.FunctionType(llvm_type(function.returns), parameters), f"f_{function.name}")
            found.linkage = "internal"
            self.functions[function] = found
        entry = ir.Function(self.module, ir.FunctionType(I32, [PTR]), ENTRY)
        self.functions[program.main] = entry
        for function, found in self.functions.items():
            # There is no C library here, so no loop must become a memset; the unwind table tells the frame's size.
            set.update(found.attributes, ("nounwind", "uwtable", '"no-builtins"'))
            _Function(self, function, found).lower()


class _Function(Frame):
    def __init__(self, module: _Module, function: typed.Function, llvm: Any) -> None:
        super().__init__(module.places, function, llvm)
        self.module = module
        self.loops: list[tuple[Any, Any]] = []
        self.current: list[Any] = []

    def lower(self) -> None:
        """Emit all of the function."""
        self.enter()
        for parameter, value in zip(self.function.parameters, self.llvm.args[1:], strict=True):
            self.spot(typed.LocalTarget(self.nowhere, parameter.type, parameter)).store(value)
        self.statements(self.function.body)
        if not self.builder.block.is_terminated:
            self.return_(None)
        # What the entry holds is complete only now: it grew with the variables.
        self.start.branch(self.llvm.blocks[1])

    # ---- statements ----

    def statements(self, statements: list[typed.Statement]) -> None:
        for statement in statements:
            if self.builder.block.is_terminated:
                return  # nothing gets here
            self.statement(statement)

    def statement(self, statement: typed.Statement) -> None:
        match statement:
            case typed.Evaluate():
                self.value(statement.value)
            case typed.Update():
                spot = self.spot(statement.target)
                self.current.append(spot.load())
                value = self.value(statement.value)
                self.current.pop()
                spot.store(value)
            case typed.Zero():
                offset = self.builder.add(self.frame, number(statement.local.offset))
                self.call("ZERO", [offset, number(size_of(statement.local.type))], self.nowhere)
            case typed.Copy():
                to, source = self.address(statement.target), self.address(statement.source)
                self.call("COPY", [to, source, number(statement.size)], statement.place, spends=True)
            case typed.Print():
                self.print(statement)
            case typed.If():
                self.if_(statement)
            case typed.Loop():
                self.loop(statement)
            case typed.Jump():
                self.builder.branch(self.loops[-1][statement.word == "continue"])
            case typed.Return():
                self.return_(None if statement.value is None else self.value(statement.value))

    def if_(self, statement: typed.If) -> None:
        end = self.llvm.append_basic_block("end")
        for condition, body in statement.branches:
            then, otherwise = self.llvm.append_basic_block("then"), self.llvm.append_basic_block("else")
            self.builder.cbranch(self.truth(condition), then, otherwise)
            self.builder.position_at_end(then)
            self.statements(body)
            if not self.builder.block.is_terminated:
                self.builder.branch(end)
            self.builder.position_at_end(otherwise)
        self.statements(statement.otherwise)
        if not self.builder.block.is_terminated:
            self.builder.branch(end)
        self.builder.position_at_end(end)

    def loop(self, loop: typed.Loop) -> None:
        test, body, step, end = (self.llvm.append_basic_block(name) for name in ("test", "loop", "step", "end"))
        self.builder.branch(test if loop.test_first else body)
        self.builder.position_at_end(body)
        self.spend_step(loop.place)
        self.loops.append((end, step))
        self.statements(loop.body)
        self.loops.pop()
        if not self.builder.block.is_terminated:
            self.builder.branch(step)
        self.builder.position_at_end(step)
        self.statements(loop.step)
        self.builder.branch(test)
        self.builder.position_at_end(test)
        if loop.condition is None:
            self.builder.branch(body)
        else:
            self.builder.cbranch(self.truth(loop.condition), body, end)
        self.builder.position_at_end(end)

    def print(self, statement: typed.Print) -> None:
        slots: list[Any] = []
        masks = {"text": 0, "wide": 0, "limited": 0}
        values = iter([(self.value(argument), argument) for argument in statement.arguments])
        for conversion in statement.format.conversions:
            for take in conversion.takes:
                value, _ = next(values)
                last = take is conversion.take
                if last and take in (Take.TEXT, Take.WIDE):
                    self.limit(conversion, slots, masks)
                    masks["text" if take is Take.TEXT else "wide"] |= 1 << len(slots)
                slots.append(self.builder.bitcast(value, I64) if value.type == F64 else value)
        array = self.alloca(ir.ArrayType(I64, max(len(slots), 1)))
        for index, slot in enumerate(slots):
            self.builder.store(slot, self.builder.gep(array, [number(index)], source_etype=I64))
        arguments = [
            number(statement.number),
            number(len(slots)),
            array,
            *(number(masks[name]) for name in ("text", "wide", "limited")),
        ]
        self.call("PRINT", arguments, statement.place, spends=True)

    def limit(self, conversion: Conversion, slots: list[Any], masks: dict[str, int]) -> None:
        """What comes before a string: its precision, where it has one."""
        if conversion.precision is not None:
            slots.append(number(conversion.precision))
        if conversion.precision is not None or conversion.star_precision:
            masks["limited"] |= 1 << len(slots)

    # ---- values ----

    def value(self, value: typed.Value) -> Any:
        # Chains of operators lean to the left and may be long: no recursion along them.
        spine: list[typed.Value] = []
        while isinstance(value, typed.Arithmetic | typed.Compare | typed.Convert):
            spine.append(value)
            value = value.operand if isinstance(value, typed.Convert) else value.left
        found = self.leaf(value)
        for node in reversed(spine):
            if isinstance(node, typed.Convert):
                found = self.convert(found, node.operand.type, node.type, node.place)
            elif isinstance(node, typed.Compare):
                found = self.builder.zext(self.compare(node, found), I32)
            else:
                assert isinstance(node, typed.Arithmetic)
                found = self.arithmetic(node, found, self.value(node.right))
        return found

    def leaf(self, value: typed.Value) -> Any:
        match value:
            case typed.Const():
                return ir.Constant(llvm_type(value.type), value.value)
            case typed.TextAddress():
                return number(_CONSTANTS_ADDRESS + value.offset)
            case typed.Load():
                return self.spot(value.target).load()
            case typed.AddressOf():
                return self.address(value.target)
            case typed.PseudoValue():
                return self.pseudo(value)
            case typed.Current():
                return self.current[-1]
            case typed.Bits():
                return self.builder.bitcast(self.value(value.operand), llvm_type(value.type))
            case typed.Unary():
                return self.unary(value)
            case typed.Logic():
                return self.builder.zext(self.truth(value), I32)
            case typed.Offset():
                return self.offset(value)
            case typed.Distance():
                return self.distance(value)
            case typed.CallBuiltin():
                return self.builtin(value)
            case typed.CallFunction():
                return self.call_function(value)
            case typed.Assigned():
                found = self.value(value.value)
                self.spot(value.target).store(found)
                return found
            case typed.AtomicAddress():
                bare = self.value(value.bare)
                is_address = self.builder.icmp_unsigned("==", self.builder.lshr(bare, number(56)), number(_TAG))
                return self.builder.select(is_address, bare, self.address(value.target))
            case _:
                raise AssertionError(value)

    def pseudo(self, value: typed.PseudoValue) -> Any:
        if value.name in ("date", "time"):
            return self.call(value.name.upper(), [], value.place)
        self.places.asks_process |= value.name in OF_PROCESSES
        there = self.builder.gep(self.context, [number(value_offset(value.name.upper()))], source_etype=I8)
        return self.builder.load(there, typ=I64)

    def unary(self, value: typed.Unary) -> Any:
        if value.sign == "!":
            return self.builder.zext(self.builder.not_(self.truth(value.operand)), I32)
        operand = self.value(value.operand)
        if value.sign == "~":
            return self.builder.not_(operand)
        return self.builder.fneg(operand) if isinstance(value.type, Float) else self.builder.neg(operand)

    def truth(self, value: typed.Value) -> Any:
        """Whether a value is not 0, as one bit."""
        match value:
            case typed.Compare():
                return self.compare(value, self.value(value.left))
            case typed.Logic():
                return self.logic(value)
            case typed.Unary(sign="!"):
                return self.builder.not_(self.truth(value.operand))
        found = self.value(value)
        if isinstance(value.type, Float):
            return self.builder.fcmp_unordered("!=", found, ir.Constant(found.type, 0.0))
        return self.builder.icmp_unsigned("!=", found, number(0, found.type))

    def logic(self, value: typed.Logic) -> Any:
        is_and = value.sign == "&&"
        end = self.llvm.append_basic_block("logic")
        known = []
        for item in value.items[:-1]:
            truth = self.truth(item)
            known.append(self.builder.block)
            going_on = self.llvm.append_basic_block("next")
            self.builder.cbranch(truth, going_on if is_and else end, end if is_and else going_on)
            self.builder.position_at_end(going_on)
        last = self.truth(value.items[-1])
        from_last = self.builder.block
        self.builder.branch(end)
        self.builder.position_at_end(end)
        phi = self.builder.phi(I1)
        for block in known:
            phi.add_incoming(number(not is_and, I1), block)
        phi.add_incoming(last, from_last)
        return phi

    def compare(self, value: typed.Compare, left: Any) -> Any:
        right = self.value(value.right)
        match value.left.type:
            case Float():
                make = self.builder.fcmp_unordered if value.sign == "!=" else self.builder.fcmp_ordered
                return make(value.sign, left, right)
            case Int(signed=True):
                return self.builder.icmp_signed(value.sign, left, right)
            case _:
                return self.builder.icmp_unsigned(value.sign, left, right)

    def arithmetic(self, value: typed.Arithmetic, left: Any, right: Any) -> Any:
        sign, type_ = value.sign, value.type
        if isinstance(type_, Float):
            return self.finite(getattr(self.builder, _FLOAT_OPERATION[sign])(left, right), value.place)
        assert isinstance(type_, Int)
        if sign in _INT_OPERATION:
            return getattr(self.builder, _INT_OPERATION[sign])(left, right)
        if sign in ("<<", ">>"):
            return self.shift(value, left, right)
        self.fail_if(self.builder.icmp_unsigned("==", right, number(0, right.type)), "DIVISION", value.place)
        if not type_.signed:
            return self.builder.udiv(left, right) if sign == "/" else self.builder.urem(left, right)
        lowest = self.builder.icmp_unsigned("==", left, number(1 << (type_.bits - 1), left.type))
        minus_one = self.builder.icmp_unsigned("==", right, number(-1, right.type))
        self.fail_if(self.builder.and_(lowest, minus_one), "OVERFLOW", value.place)
        return self.builder.sdiv(left, right) if sign == "/" else self.builder.srem(left, right)

    def shift(self, value: typed.Arithmetic, left: Any, count: Any) -> Any:
        assert isinstance(value.type, Int)
        detail = self.widen(count, value.type)
        too_far = self.builder.icmp_unsigned(">=", count, number(value.type.bits, count.type))
        self.fail_if(too_far, "SHIFT", value.place, detail)
        if value.sign == "<<":
            return self.builder.shl(left, count)
        return self.builder.ashr(left, count) if value.type.signed else self.builder.lshr(left, count)

    def finite(self, value: Any, place: Place) -> Any:
        """The run ends where the exponent says infinity or not a number."""
        bits, mask = (I32, 0x7F80_0000) if value.type == F32 else (I64, 0x7FF0_0000_0000_0000)
        exponent = self.builder.and_(self.builder.bitcast(value, bits), number(mask, bits))
        self.fail_if(self.builder.icmp_unsigned("==", exponent, number(mask, bits)), "FLOAT", place)
        return value

    def convert(self, value: Any, from_: Type, to: Type, place: Place) -> Any:
        builder = self.builder
        llvm = llvm_type(to)
        match from_, to:
            case Float(), Float():
                if from_.bits < to.bits:
                    return builder.fpext(value, llvm)
                return self.finite(builder.fptrunc(value, llvm), place)
            case Float(), _ if to == BOOL:
                return builder.zext(builder.fcmp_unordered("!=", value, ir.Constant(value.type, 0.0)), I8)
            case Float(), Int():
                return self.float_to_int(value, to, place)
            case Int(), Float():
                return builder.sitofp(value, llvm) if from_.signed else builder.uitofp(value, llvm)
            case _, _ if to == BOOL:
                return builder.zext(builder.icmp_unsigned("!=", value, number(0, value.type)), I8)
        if value.type.width == llvm.width:
            return value
        if value.type.width > llvm.width:
            return builder.trunc(value, llvm)
        return builder.sext(value, llvm) if isinstance(from_, Int) and from_.signed else builder.zext(value, llvm)

    def float_to_int(self, value: Any, to: Int, place: Place) -> Any:
        """Towards zero; the run ends where the whole part does not fit."""
        builder = self.builder
        if value.type == F32:
            value = builder.fpext(value, F64)
        lowest, highest = (-(1 << (to.bits - 1)), 1 << (to.bits - 1)) if to.signed else (0, 1 << to.bits)
        # Up to 53 bits "one below the lowest" is a double of its own; beyond, the lowest itself is the bound.
        below = (
            builder.fcmp_ordered(">", value, ir.Constant(F64, float(lowest - 1)))
            if to.bits < 64 or not to.signed
            else builder.fcmp_ordered(">=", value, ir.Constant(F64, float(lowest)))
        )
        fits = builder.and_(below, builder.fcmp_ordered("<", value, ir.Constant(F64, float(highest))))
        self.fail_if(builder.not_(fits), "CONVERSION", place)
        return builder.fptosi(value, llvm_type(to)) if to.signed else builder.fptoui(value, llvm_type(to))

    def offset(self, value: typed.Offset) -> Any:
        pointer = self.value(value.pointer)
        distance = self.builder.mul(self.value(value.index), number(value.size))
        return self.builder.sub(pointer, distance) if value.backwards else self.builder.add(pointer, distance)

    def distance(self, value: typed.Distance) -> Any:
        left = self.value(value.left)
        bytes_ = self.builder.sub(left, self.value(value.right))
        size = number(value.size)
        rest = self.builder.srem(bytes_, size)
        self.fail_if(self.builder.icmp_unsigned("!=", rest, number(0)), "DIFFERENCE", value.place)
        return self.builder.sdiv(bytes_, size)

    # ---- calls ----

    def call_function(self, value: typed.CallFunction) -> Any:
        builder = self.builder
        arguments = [self.value(argument) for argument in value.arguments]
        self.spend_step(value.place)
        builder.store(builder.load(self.steps, typ=I64), self.field("steps"))
        found = builder.call(self.module.functions[value.function], [self.context, *arguments])
        self.leave_if_failed()
        builder.store(builder.load(self.field("steps"), typ=I64), self.steps)
        return found

    def builtin(self, value: typed.CallBuiltin) -> Any:
        builtin = value.builtin
        arguments = [self.value(argument) for argument in value.arguments]
        if builtin.how is How.CALL:
            extra = [number(extra) for extra in builtin.extra]
            return self.call(builtin.call, [*arguments, *extra], value.place, spends=builtin.spends)
        match builtin.name:
            case "not":
                return self.builder.not_(arguments[0])
            case "neg":
                return self.builder.neg(arguments[0])
            case "hi" | "low" | "hi_pa" | "low_pa":
                call = "LOAD_PHYSICAL" if builtin.name.endswith("_pa") else "LOAD"
                found = self.call(call, [arguments[0], number(8)], value.place)
                shifted = self.builder.lshr(found, number(16)) if builtin.name.startswith("hi") else found
                return self.builder.and_(shifted, number(0xFFFF))
            case "interlocked_increment" | "interlocked_decrement":
                by = number(1 if builtin.name.endswith("increment") else -1)
                return self.builder.add(self.call("ADD", [arguments[0], by], value.place), by)
            case "test_statement":
                return None
            case _:
                raise AssertionError(builtin.name)
