"""From the syntax tree to the typed tree: statements, declarations, functions; their values are checked in values.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmexit.script import tree, typed
from vmexit.script.abi import constant
from vmexit.script.builtins import BUILTINS, How
from vmexit.script.errors import ScriptError
from vmexit.script.globals import GlobalTable, defined_globals
from vmexit.script.printf import Format, Take, parse_format, wanted
from vmexit.script.types import (
    CHAR,
    DOUBLE,
    IMPLICIT,
    LITERAL,
    LONG,
    UINT,
    ULLONG,
    USHORT,
    VOID,
    Array,
    Float,
    Struct,
    Type,
    alignment_of,
    size_of,
)
from vmexit.script.values import Values

_MAX_SLOTS = constant("MAX_SLOTS")
_MAX_FRAME = constant("MAX_FRAME")
_MAX_GLOBALS = constant("MAX_GLOBALS")


def check(script: tree.Script, known: GlobalTable, symbol: Callable[[str], int | None]) -> typed.Program:
    """The typed tree; ScriptError where there is none. `known` is not changed: see Program.globals. `symbol`: as for parse()."""
    return _Checker(script, known, symbol).program()


class _Checker(Values):
    def __init__(self, script: tree.Script, known: GlobalTable, symbol: Callable[[str], int | None]) -> None:
        super().__init__(known, symbol)
        self.script = script
        self.formats: list[Format] = []
        self.loops = 0

    def program(self) -> typed.Program:
        self.define_globals()
        for function in self.script.functions:
            parameters = [typed.Local(parameter.name, parameter.type) for parameter in function.parameters]
            self.functions[function.name] = typed.Function(function.name, function.returns, parameters, place=function.place)
        for function in self.script.functions:
            self.check_function(self.functions[function.name], function.body)
        main = typed.Function("", VOID, place=self.script.place)
        self.check_function(main, self.script.body)
        found = list(self.functions.values())
        return typed.Program(main, found, bytes(self.constants), self.formats, list(self.globals.values()))

    def define_globals(self) -> None:
        count = len(self.known)
        for name, (place, type_) in defined_globals(self.script).items():
            if isinstance(type_, Array | Struct):
                raise ScriptError("a global variable holds one number", place, "arrays and structs are local")
            before = self.known.get(name)
            if before is None and count == _MAX_GLOBALS:
                raise ScriptError(f"there are {_MAX_GLOBALS} global variables already", place)
            index = before.index if before else count
            count += before is None
            self.globals[name] = typed.Global(name, index, type_ or (before.type if before else IMPLICIT))

    def check_function(self, function: typed.Function, body: tree.Block) -> None:
        self.function = function
        self.scope = {parameter.name: parameter for parameter in function.parameters}
        self.locals = list(function.parameters)
        self.loops = 0
        function.body = self.block(body)
        for local in self.locals:
            if local.in_memory:
                scalar = not isinstance(local.type, Array | Struct)
                alignment = 8 if scalar else max(alignment_of(local.type), 8)
                function.frame = (function.frame + alignment - 1) // alignment * alignment
                local.offset = function.frame
                function.frame += 8 if scalar else size_of(local.type)
        function.frame = (function.frame + 15) // 16 * 16
        if function.frame > _MAX_FRAME:
            where = f"'{function.name}'" if function.name else "the script"
            raise ScriptError(
                f"the arrays and structs of {where} take {function.frame:#x} bytes; there are {_MAX_FRAME:#x}",
                function.place or self.script.place,
            )

    # ---- statements ----

    def block(self, block: tree.Block) -> list[typed.Statement]:
        return self.statements(block.statements)

    def statements(self, statements: list[tree.Statement]) -> list[typed.Statement]:
        return [found for statement in statements for found in self.statement(statement)]

    def statement(self, statement: tree.Statement) -> list[typed.Statement]:
        match statement:
            case tree.Block():
                return self.block(statement)
            case tree.Declare():
                return self.declare(statement)
            case tree.Assign():
                return self.assign(statement)
            case tree.Evaluate(call=tree.Call() as call):
                return self.call_statement(call)
            case tree.If():
                branches = [(self.condition(condition), self.block(body)) for condition, body in statement.branches]
                return [typed.If(branches, self.block(statement.otherwise) if statement.otherwise else [])]
            case tree.Loop():
                return self.loop(statement)
            case tree.Jump():
                if not self.loops:
                    raise ScriptError(f"'{statement.word}' outside of a loop", statement.place)
                return [typed.Jump(statement.word)]
            case tree.Return():
                return self.return_(statement)
            case _:
                raise AssertionError(statement)

    def loop(self, loop: tree.Loop) -> list[typed.Statement]:
        found = self.statements(loop.first)
        condition = self.condition(loop.condition) if loop.condition and loop.test_first else None
        step = self.statements(loop.step)
        self.loops += 1
        body = self.block(loop.body)
        self.loops -= 1
        if loop.condition and not loop.test_first:
            condition = self.condition(loop.condition)
        return [*found, typed.Loop(condition, step, body, loop.test_first, loop.place)]

    def return_(self, statement: tree.Return) -> list[typed.Statement]:
        returns = self.function.returns
        if statement.value is None:
            if returns != VOID:
                raise ScriptError(f"'{self.function.name}' returns a value: {returns}", statement.place, "return one")
            return [typed.Return(None)]
        if returns == VOID:
            what = f"'{self.function.name}' is void" if self.function.name else "this is no function"
            raise ScriptError(f"{what} and returns no value", statement.value.place)
        return [typed.Return(self.convert(self.value(statement.value), returns))]

    def condition(self, node: tree.Expression) -> typed.Value:
        value = self.scalar(node)
        if isinstance(value.type, Float):
            # HyperDbg looks at the bits, to which -0.0 is not 0.
            return typed.Bits(value.place, ULLONG if value.type == DOUBLE else UINT, value)
        return value

    def declare(self, node: tree.Declare) -> list[typed.Statement]:
        if node.is_global:
            variable = self.globals[node.name]
            if isinstance(node.start, tree.Braces):
                raise ScriptError("a global variable holds one number", node.start.place)
            target: typed.Target = typed.GlobalTarget(node.place, variable.type, variable)
            # Without an initial value it keeps what it has.
            return [] if node.start is None else [self.store(target, self.value(node.start))]
        if isinstance(node.type, Array | Struct):
            return self.declare_whole(node)
        if isinstance(node.start, tree.Braces):
            if len(node.start.items) != 1 or isinstance(node.start.items[0], tree.Braces):
                raise ScriptError(f"a {node.type} has one value", node.start.place)
            value = self.value(node.start.items[0])
        elif node.start is not None:
            value = self.value(node.start)
        else:
            value = typed.Const(node.place, LITERAL, 0)
        local = self.new_local(node.name, node.type)
        return [self.store(typed.LocalTarget(node.place, node.type, local), value)]

    def declare_whole(self, node: tree.Declare) -> list[typed.Statement]:
        """An array or struct: all of it 0, then what is given."""
        before = self.scope.get(node.name)
        local = self.new_local(node.name, node.type)
        target = typed.LocalTarget(node.place, node.type, local)
        found: list[typed.Statement] = [typed.Zero(local)]
        match node.start:
            case None:
                pass
            case tree.Braces():
                items = list(node.start.items)
                self.fill(target, items, found)
                self.none_left(items, node.type)
            case tree.Text() if isinstance(node.type, Array):
                self.fill(target, [node.start], found)
            case _ if isinstance(node.type, Struct):
                if before is not None and before is local:
                    found.clear()  # `struct T v = v;`
                found.append(self.copy(target, node.start))
            case _:
                raise ScriptError("an array is given its values between braces", node.start.place)
        return found

    def none_left(self, items: list[tree.Expression | tree.Braces], type_: Type) -> None:
        if items:
            raise ScriptError(f"more values than {type_} has room for", items[0].place)

    def fill(self, target: typed.Target, items: list[tree.Expression | tree.Braces], found: list[typed.Statement]) -> None:
        """Take from `items` what an array or struct has room for, as C does."""
        type_ = target.type
        if isinstance(type_, Array) and items and isinstance(items[0], tree.Text) and type_.of in (CHAR, USHORT):
            self.fill_text(target, type_, items.pop(0), found)
            return
        parts: Iterator[typed.Target]
        if isinstance(type_, Array):
            element = type_.of
            parts = (
                typed.Element(target.place, element, target, typed.Const(target.place, LONG, index))
                for index in range(type_.count)
            )
        else:
            assert isinstance(type_, Struct)
            parts = (typed.MemberTarget(target.place, part.type, target, part.offset) for part in type_.members.values())
        for part in parts:
            if not items:
                return
            self.fill_part(part, items, found)

    def fill_part(self, part: typed.Target, items: list[tree.Expression | tree.Braces], found: list[typed.Statement]) -> None:
        item = items[0]
        if isinstance(item, tree.Braces):
            items.pop(0)
            inner = list(item.items)
            if isinstance(part.type, Array | Struct):
                self.fill(part, inner, found)
            elif inner:
                self.fill_part(part, inner, found)
            self.none_left(inner, part.type)
        elif isinstance(part.type, Array):
            self.fill(part, items, found)
        elif isinstance(part.type, Struct):
            if isinstance(item, tree.Name) and (local := self.scope.get(item.name)) and local.type == part.type:
                found.append(self.copy(part, item))
                items.pop(0)
            else:
                self.fill(part, items, found)
        else:
            items.pop(0)
            found.append(self.store(part, self.value(item)))

    def fill_text(
        self, target: typed.Target, type_: Array, item: tree.Expression | tree.Braces, found: list[typed.Statement]
    ) -> None:
        assert isinstance(item, tree.Text)
        width = 2 if item.wide else 1
        if size_of(type_.of) != width:
            raise ScriptError(f"{type_} does not fit this kind of string", item.place)
        units = [item.data[at : at + width] for at in range(0, len(item.data), width)]
        if len(units) > type_.count:
            raise ScriptError(f"the string is too long for {type_}", item.place)
        for index, unit in enumerate(units):
            element = typed.Element(item.place, type_.of, target, typed.Const(item.place, LONG, index))
            found.append(self.store(element, typed.Const(item.place, LITERAL, int.from_bytes(unit, "little"))))

    def assign(self, node: tree.Assign) -> list[typed.Statement]:
        if node.sign != "=":
            return [self.update(node)]
        if len(node.targets) == 1 and (copy := self.struct_assignment(node)):
            return [copy]
        return [typed.Evaluate(self.chain(node.targets, node.value))]

    def struct_assignment(self, node: tree.Assign) -> typed.Statement | None:
        first = node.targets[0]
        if isinstance(first, tree.Name) and first.name not in self.scope:
            return None
        if not isinstance(first, tree.Name | tree.Index | tree.Access | tree.Unary):
            return None
        target = self.target(first)
        return self.copy(target, node.value) if isinstance(target.type, Struct) else None

    def copy(self, target: typed.Target, node: tree.Expression) -> typed.Statement:
        source = self.target(node)
        if source.type != target.type:
            raise ScriptError(f"{target.type} expected, not {source.type}", node.place)
        return typed.Copy(target, source, size_of(target.type), node.place)

    def update(self, node: tree.Assign) -> typed.Statement:
        target = self.written(node.targets[0], must_exist=True)
        current = typed.Current(target.place, target.type)
        value = self.combine(node.sign, self.checked_scalar(current), self.scalar(node.value), node.place)
        return typed.Update(target, self.convert(value, target.type))

    def store(self, target: typed.Target, value: typed.Value) -> typed.Statement:
        value = self.convert(value, target.type)
        return typed.Evaluate(typed.Assigned(target.place, target.type, target, value))

    def call_statement(self, call: tree.Call) -> list[typed.Statement]:
        builtin = BUILTINS.get(call.name)
        if builtin is None:
            return [typed.Evaluate(self.call_function(call))]
        if builtin.how is How.PRINT:
            return [self.print(call)]
        return [typed.Evaluate(self.call_builtin(call, builtin))]

    # ---- printing ----

    def print(self, call: tree.Call) -> typed.Statement:
        if call.name != "printf":
            if len(call.arguments) != 1:
                self.wrong_count(call, 1)
            value = self.scalar(call.arguments[0])
            text = b"%f\n" if isinstance(value.type, Float) else b"%llx\n"
            return self.print_format(text, [value], call)
        if not call.arguments or not isinstance(call.arguments[0], tree.Text) or call.arguments[0].wide:
            place = call.arguments[0].place if call.arguments else call.place
            raise ScriptError("printf's format is a string between quotes", place)
        format_ = call.arguments[0]
        return self.print_format(format_.data, [self.scalar(argument) for argument in call.arguments[1:]], call)

    def print_format(self, text: bytes, values: list[typed.Value], call: tree.Call) -> typed.Statement:
        place = call.arguments[0].place
        if b"\0" in text:
            text = text[: text.index(b"\0")]
        format_ = parse_format(text, len(values))
        if format_ is None:
            count = wanted(text)
            raise ScriptError(f"the format wants {count} argument{'s' * (count != 1)}, not {len(values)}", place)
        if sum(conversion.slots for conversion in format_.conversions) > _MAX_SLOTS:
            raise ScriptError(f"one print takes {_MAX_SLOTS} arguments", place, "print in several parts")
        arguments = [self.print_argument(take, value, call) for take, value in zip(format_.takes, values, strict=True)]
        self.formats.append(format_)
        return typed.Print(format_, len(self.formats) - 1, arguments, call.place)

    def print_argument(self, take: Take, value: typed.Value, call: tree.Call) -> typed.Value:
        is_float = isinstance(value.type, Float)
        if is_float != (take is Take.FLOAT):
            hint = "cast it: (double)" if take is Take.FLOAT else "print it with %f, or cast it: (long)"
            raise ScriptError(f"the format wants {take.value} here, not {value.type}", value.place, hint)
        return self.convert(value, DOUBLE if is_float else ULLONG)
