"""Values and what can be assigned to: their names resolved, their types found, their conversions inserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from vmexit.script import tree, typed
from vmexit.script.builtins import BUILTINS, Builtin, How, Take
from vmexit.script.errors import Place, ScriptError, UnknownGuestError
from vmexit.script.globals import GlobalTable
from vmexit.script.names import PSEUDO, REGISTERS, did_you_mean
from vmexit.script.types import (
    BOOL,
    CHAR,
    DOUBLE,
    IMPLICIT,
    INT,
    LITERAL,
    LONG,
    ULLONG,
    USHORT,
    VOID,
    Array,
    Float,
    Int,
    Member,
    Pointer,
    Struct,
    Type,
    common,
    promoted,
    size_of,
)

_COMPARE = frozenset({"==", "!=", "<", ">", "<=", ">="})
_ONLY_INT = frozenset({"%", "&", "|", "^", "<<", ">>"})


class Values:
    """What is known at one place of a script, and the checking of its expressions."""

    def __init__(self, known: GlobalTable, symbol: Callable[[str], int | None]) -> None:
        self.constants = bytearray()
        self.texts: dict[tuple[bytes, bool], int] = {}
        self.globals: dict[str, typed.Global] = {}
        self.known = known
        self.symbol = symbol
        self.functions: dict[str, typed.Function] = {}
        self.function = typed.Function("", VOID)
        self.scope: dict[str, typed.Local] = {}
        self.locals: list[typed.Local] = []

    # ---- calls ----

    def wrong_count(self, call: tree.Call, wanted_: int) -> NoReturn:
        plural = "" if wanted_ == 1 else "s"
        raise ScriptError(f"'{call.name}' takes {wanted_} argument{plural}, not {len(call.arguments)}", call.place)

    def call(self, call: tree.Call) -> typed.Value:
        """A call as a part of an expression: it has to have a value."""
        builtin = BUILTINS.get(call.name)
        if builtin is None:
            value = self.call_function(call)
            if value.type == VOID:
                raise ScriptError(f"'{call.name}' is void and has no value", call.place)
            return value
        if not builtin.gives:
            raise ScriptError(f"'{call.name}' has no value", call.place, "it is a statement of its own")
        return self.call_builtin(call, builtin)

    def call_function(self, call: tree.Call) -> typed.Value:
        function = self.functions.get(call.name)
        if function is None:
            hint = did_you_mean(call.name, [*BUILTINS, *self.functions])
            raise ScriptError(f"there is no function '{call.name}'", call.name_place, hint)
        if len(call.arguments) != len(function.parameters):
            self.wrong_count(call, len(function.parameters))
        arguments = [
            self.convert(self.value(node), parameter.type)
            for node, parameter in zip(call.arguments, function.parameters, strict=True)
        ]
        return typed.CallFunction(call.place, function.returns, function, arguments)

    def call_builtin(self, call: tree.Call, builtin: Builtin) -> typed.Value:
        if builtin.how is How.REFUSED:
            raise ScriptError(f"'{call.name}' is not possible yet", call.place, f"it would need {builtin.needs}")
        if len(call.arguments) != len(builtin.takes):
            self.wrong_count(call, len(builtin.takes))
        if builtin.name == "reference":
            return self.address_of(call.arguments[0], call.place)
        arguments = [self.argument(node, take, call) for node, take in zip(call.arguments, builtin.takes, strict=True)]
        return typed.CallBuiltin(call.place, IMPLICIT if builtin.gives else VOID, builtin, arguments)

    def argument(self, node: tree.Expression, take: Take, call: tree.Call) -> typed.Value:
        if isinstance(node, tree.Text) and take is not Take.NUMBER and (take is Take.WIDE) != node.wide:
            kind = 'a wide string, as L"text"' if take is Take.WIDE else "a string without L"
            raise ScriptError(f"'{call.name}' takes {kind}", node.place)
        if take is Take.ATOMIC and isinstance(node, tree.Name | tree.Global):
            target = self.target(node)
            if isinstance(target.type, Int) and target.type.bits == 64:
                address = self.address_of(node, node.place)
                assert isinstance(address, typed.AddressOf)
                bare = self.convert(typed.Load(node.place, target.type, address.target), ULLONG)
                return typed.AtomicAddress(node.place, ULLONG, address.target, bare)
        value = self.scalar(node)
        if isinstance(value.type, Float):
            raise ScriptError(f"'{call.name}' takes {take.value}, not {value.type}", node.place, "cast it: (long)")
        return self.convert(value, ULLONG)

    # ---- values ----

    def scalar(self, node: tree.Expression) -> typed.Value:
        """A value that can be reckoned with or compared."""
        return self.checked_scalar(self.value(node))

    def checked_scalar(self, value: typed.Value) -> typed.Value:
        if not isinstance(value.type, Int | Float | Pointer):
            raise ScriptError(f"{value.type} is no number", value.place)
        return value

    def value(self, node: tree.Expression) -> typed.Value:
        match node:
            case tree.Binary():
                return self.binary(node)
            case tree.Number():
                signed = node.value - (1 << 64) if node.value >> 63 else node.value
                return typed.Const(node.place, LITERAL, signed)
            case tree.FloatNumber():
                return typed.Const(node.place, DOUBLE, node.value)
            case tree.Text():
                return self.text(node)
            case tree.Pseudo() if node.name not in ("value", "msr", "ip"):
                return typed.PseudoValue(node.place, PSEUDO[node.name], node.name)
            case tree.Unary(sign="&"):
                return self.address_of(node.operand, node.place)
            case tree.Name() if (address := self.symbol_of(node)) is not None:
                return typed.Const(node.place, LITERAL, address - (1 << 64) if address >> 63 else address)
            case (
                tree.Unary(sign="*")
                | tree.Name()
                | tree.Global()
                | tree.Register()
                | tree.Pseudo()
                | tree.Index()
                | tree.Access()
            ):
                return self.load(self.target(node), node.place)
            case tree.Unary():
                return self.unary(node)
            case tree.Cast():
                return self.cast(node)
            case tree.SizeOf():
                return typed.Const(node.place, ULLONG, self.size(node))
            case tree.Call():
                return self.call(node)
            case tree.Chain():
                return self.chain(node.targets, node.value)
            case _:
                raise AssertionError(node)

    def load(self, target: typed.Target, place: Place) -> typed.Value:
        """A target's value; an array stands for the address of its first element."""
        if isinstance(target.type, Array):
            return typed.AddressOf(place, Pointer(target.type.of), target)
        if isinstance(target.type, Struct):
            raise ScriptError(f"{target.type} is no number", place, "name a member of it")
        return typed.Load(place, target.type, target)

    def text(self, node: tree.Text) -> typed.Value:
        key = (node.data, node.wide)
        if key not in self.texts:
            if node.wide and len(self.constants) % 2:
                self.constants.append(0)
            self.texts[key] = len(self.constants)
            self.constants += node.data + (b"\0\0" if node.wide else b"\0")
        return typed.TextAddress(node.place, Pointer(USHORT if node.wide else CHAR), self.texts[key])

    def size(self, node: tree.SizeOf) -> int:
        if isinstance(node.what, tree.Node):
            # Not `isinstance(..., Type)`: a type is one of several classes.
            operand: tree.Expression = node.what
            is_target = isinstance(operand, tree.Name | tree.Global | tree.Index | tree.Access) or (
                isinstance(operand, tree.Unary) and operand.sign == "*"
            )
            if isinstance(operand, tree.Text):
                return len(operand.data) + (2 if operand.wide else 1)
            type_ = self.target(operand).type if is_target else self.value(operand).type
        else:
            type_ = node.what
        try:
            return size_of(type_)
        except ValueError:
            raise ScriptError(f"{type_} has no size", node.place) from None

    def unary(self, node: tree.Unary) -> typed.Value:
        operand = self.scalar(node.operand)
        if node.sign == "!":
            return typed.Unary(node.place, INT, "!", operand)
        if isinstance(operand.type, Pointer) or (isinstance(operand.type, Float) and node.sign == "~"):
            raise ScriptError(f"'{node.sign}' makes no sense with {operand.type}", node.place, "cast it to an integer")
        assert isinstance(operand.type, Int | Float)
        type_ = promoted(operand.type) if isinstance(operand.type, Int) else operand.type
        operand = self.convert(operand, type_)
        if node.sign == "+":
            return operand
        if node.sign == "-" and isinstance(operand, typed.Const):
            return typed.Const(node.place, type_, _wrapped(-operand.value, type_))
        return typed.Unary(node.place, type_, node.sign, operand)

    def cast(self, node: tree.Cast) -> typed.Value:
        if not isinstance(node.type, Int | Float | Pointer):
            raise ScriptError(f"nothing can be cast to {node.type}", node.place)
        return self.convert(self.scalar(node.operand), node.type, explicit=True)

    def convert(self, value: typed.Value, to: Type, explicit: bool = False) -> typed.Value:
        """The value as one of type `to`. An integer and a pointer stand for each other where both have 64 bits."""
        from_ = value.type
        if from_ == to:
            return value
        match from_, to:
            case Int() | Float(), Int() | Float():
                pass
            case Pointer(), Pointer():
                pass
            case Pointer(), Int(bits=bits):
                if bits != 64 and to != BOOL and not explicit:
                    raise ScriptError(f"an address does not fit {to}", value.place, f"to cut it off, cast it: ({to})")
            case Int(bits=bits), Pointer():
                if bits != 64 and not explicit:
                    raise ScriptError(f"{from_} is no address", value.place, f"cast it: ({to})")
            case _:
                what = "nothing" if from_ == VOID else str(from_)
                raise ScriptError(f"{what} cannot become {to}", value.place)
        if isinstance(value, typed.Const) and isinstance(to, Int) and isinstance(value.value, int):
            return typed.Const(value.place, to, _wrapped(value.value, to))
        return typed.Convert(value.place, to, value)

    # ---- two operands ----

    def binary(self, node: tree.Binary) -> typed.Value:
        # The left side may be a chain of any length; only what nests is bounded by the parser.
        spine = [node]
        while isinstance(spine[-1].left, tree.Binary):
            spine.append(spine[-1].left)
        value = self.scalar(spine[-1].left)
        for part in reversed(spine):
            value = self.combine(part.sign, value, self.scalar(part.right), part.place, part.sign_place)
        return value

    def combine(
        self, sign: str, left: typed.Value, right: typed.Value, place: Place, sign_place: Place | None = None
    ) -> typed.Value:
        if sign in ("&&", "||"):
            if isinstance(left, typed.Logic) and left.sign == sign:
                left.items.append(right)
                left.place = place
                return left
            return typed.Logic(place, INT, sign, [left, right])
        if isinstance(left.type, Pointer) or isinstance(right.type, Pointer):
            return self.combine_pointers(sign, left, right, place, sign_place or place)
        assert isinstance(left.type, Int | Float) and isinstance(right.type, Int | Float)
        type_ = common(left.type, right.type)
        left, right = self.convert(left, type_), self.convert(right, type_)
        if sign in _COMPARE:
            return typed.Compare(place, INT, sign, left, right)
        if sign in _ONLY_INT and isinstance(type_, Float):
            raise ScriptError(f"'{sign}' makes no sense with {type_}", sign_place or place, "cast it to an integer")
        return typed.Arithmetic(sign_place or place, type_, sign, left, right)

    def combine_pointers(self, sign: str, left: typed.Value, right: typed.Value, place: Place, sign_place: Place) -> typed.Value:
        if isinstance(left.type, Float) or isinstance(right.type, Float):
            raise ScriptError("an address and a floating-point number do not go together", sign_place)
        if sign in _COMPARE:
            both = self.convert(left, ULLONG, explicit=True), self.convert(right, ULLONG, explicit=True)
            return typed.Compare(place, INT, sign, *both)
        if sign == "-" and isinstance(left.type, Pointer) and isinstance(right.type, Pointer):
            if left.type != right.type:
                raise ScriptError(f"{left.type} and {right.type} point to different things", sign_place)
            both = self.convert(left, LONG), self.convert(right, LONG)
            return typed.Distance(sign_place, LONG, *both, self.step_of(left.type, sign_place))
        if sign == "+" and isinstance(right.type, Pointer) and not isinstance(left.type, Pointer):
            left, right = right, left
        if sign not in ("+", "-") or isinstance(right.type, Pointer):
            raise ScriptError(f"'{sign}' makes no sense with an address", sign_place, "cast it to an integer")
        assert isinstance(left.type, Pointer)
        return self.offset(left, right, sign == "-", place)

    def step_of(self, type_: Pointer, place: Place) -> int:
        try:
            return 1 if type_.to == VOID else size_of(type_.to)
        except ValueError:
            raise ScriptError(f"{type_.to} is not defined here, so its size is not known", place) from None

    def offset(self, pointer: typed.Value, index: typed.Value, backwards: bool, place: Place) -> typed.Value:
        assert isinstance(pointer.type, Pointer)
        size = self.step_of(pointer.type, place)
        return typed.Offset(place, pointer.type, pointer, self.convert(index, LONG), size, backwards)

    # ---- targets ----

    def target(self, node: tree.Expression) -> typed.Target:
        """What an expression names, to be read, written or pointed to."""
        match node:
            case tree.Name():
                local = self.scope.get(node.name)
                if local is None:
                    raise self.unknown(node)
                return typed.LocalTarget(node.place, local.type, local)
            case tree.Global():
                return self.global_(node)
            case tree.Register():
                return typed.RegisterTarget(node.place, LITERAL, REGISTERS[node.name])
            case tree.Pseudo():
                if node.name == "ip":
                    return typed.RegisterTarget(node.place, LITERAL, REGISTERS["rip"])
                if node.name in ("value", "msr"):
                    return typed.SpecialTarget(node.place, LITERAL, node.name)
                raise ScriptError(f"'${node.name}' can only be read", node.place)
            case tree.Unary(sign="*"):
                return self.deref(node)
            case tree.Index():
                return self.index(node)
            case tree.Access():
                return self.access(node)
            case _:
                raise ScriptError("this is a value, but a variable, register or element is wanted", node.place)

    def symbol_of(self, node: tree.Name) -> int | None:
        """The address of the guest's symbol of that name, where the script has nothing of that name."""
        if node.name in self.scope or node.name in self.functions:
            return None
        try:
            return self.symbol(node.name)
        except UnknownGuestError:
            return None

    def no_symbol_because(self, node: tree.Name) -> str:
        """Why no symbol is known of that name, where that is not its own fault; else empty."""
        try:
            self.symbol(node.name)
        except UnknownGuestError as error:
            return str(error)
        return ""

    def unknown(self, node: tree.Name) -> ScriptError:
        if node.name in self.functions:
            return ScriptError(f"'{node.name}' is a function", node.place, f"call it: {node.name}(...)")
        hint = did_you_mean(node.name, [*self.scope, *self.functions, *REGISTERS])
        if hint is None and self.function.name and node.name in (name.lstrip(".") for name in self.globals):
            hint = f"a global variable has a dot: .{node.name}"
        if hint is None:
            reason = self.no_symbol_because(node)
            hint = f"assign one first; as for symbols, {reason}" if reason else "assign one first"
        return ScriptError(f"'{node.name}' has no value yet", node.place, hint)

    def global_(self, node: tree.Global) -> typed.Target:
        variable = self.globals.get(node.name)
        if variable is None:
            variable = self.known.get(node.name)
            if variable is None:
                hint = did_you_mean(node.name, [*self.globals, *self.known])
                raise ScriptError(f"'.{node.name}' is never assigned", node.place, hint or f"assign it first: .{node.name} = 0;")
            self.globals[node.name] = variable
        return typed.GlobalTarget(node.place, variable.type, variable)

    def deref(self, node: tree.Unary) -> typed.Target:
        address = self.scalar(node.operand)
        if isinstance(address.type, Float):
            raise ScriptError(f"{address.type} is no address", node.place)
        if isinstance(address.type, Int):
            # As poi(): 8 bytes.
            return typed.Deref(node.place, ULLONG, self.convert(address, ULLONG))
        return typed.Deref(node.place, self.pointed(address, node.place), self.convert(address, ULLONG))

    def pointed(self, address: typed.Value, place: Place) -> Type:
        assert isinstance(address.type, Pointer)
        type_ = address.type.to
        if type_ == VOID or (isinstance(type_, Struct) and not type_.complete):
            raise ScriptError(f"what {address.type} points to is not known", place, "cast the pointer")
        return type_

    def index(self, node: tree.Index) -> typed.Target:
        index = self.scalar(node.index)
        if not isinstance(index.type, Int):
            raise ScriptError(f"an index is an integer, not {index.type}", node.index.place)
        if isinstance(node.base, tree.Name | tree.Index | tree.Access) or (
            isinstance(node.base, tree.Unary) and node.base.sign == "*"
        ):
            base = self.target(node.base)
            if isinstance(base.type, Array):
                wide = self.convert(index, LONG if index.type.signed else ULLONG)
                return typed.Element(node.place, base.type.of, base, wide)
            pointer = self.load(base, node.base.place)
        else:
            pointer = self.scalar(node.base)
        if not isinstance(pointer.type, Pointer):
            hint = "to use it as an address, cast it: ((char *)x)[1]"
            raise ScriptError(f"{pointer.type} has no elements", node.base.place, hint)
        type_ = self.pointed(pointer, node.base.place)
        address = self.convert(self.offset(pointer, index, False, node.place), ULLONG)
        return typed.Deref(node.place, type_, address)

    def access(self, node: tree.Access) -> typed.Target:
        if node.arrow:
            pointer = self.scalar(node.base)
            if not isinstance(pointer.type, Pointer) or not isinstance(pointer.type.to, Struct):
                hint: str | None = (
                    "without a pointer, write ." if isinstance(pointer.type, Struct) else "cast it: ((struct T *)x)->member"
                )
                raise ScriptError(f"{pointer.type} is no pointer to a struct", node.base.place, hint)
            struct = self.pointed(pointer, node.base.place)
            base: typed.Target = typed.Deref(node.base.place, struct, self.convert(pointer, ULLONG))
        else:
            base = self.target(node.base)
        if not isinstance(base.type, Struct):
            is_pointer = isinstance(base.type, Pointer) and isinstance(base.type.to, Struct)
            hint = "of a pointer, write ->" if is_pointer else None
            raise ScriptError(f"{base.type} has no members", node.base.place, hint)
        member: Member | None = base.type.members.get(node.member)
        if member is None:
            hint = did_you_mean(node.member, base.type.members)
            raise ScriptError(f"{base.type} has no member '{node.member}'", node.place, hint)
        return typed.MemberTarget(node.place, member.type, base, member.offset)

    def address_of(self, node: tree.Expression, place: Place) -> typed.Value:
        if isinstance(node, tree.Register):
            # A register has none; HyperDbg says 0.
            return typed.Const(place, ULLONG, 0)
        target = self.target(node)
        if isinstance(target, typed.SpecialTarget):
            raise ScriptError(f"'${target.name}' has no address", place)
        root = target
        while isinstance(root, typed.Element | typed.MemberTarget):
            root = root.base
        if isinstance(root, typed.LocalTarget):
            root.local.in_memory = True
        return typed.AddressOf(place, Pointer(target.type), target)

    # ---- assignments ----

    def new_local(self, name: str, type_: Type) -> typed.Local:
        before = self.scope.get(name)
        if before is not None and before.type == type_:
            return before
        local = typed.Local(name, type_, in_memory=isinstance(type_, Array | Struct))
        self.locals.append(local)
        self.scope[name] = local
        return local

    def chain(self, targets: list[tree.Expression], last: tree.Expression) -> typed.Value:
        """``a = b = value``, carried out from the right; each target hands on what it holds then."""
        value = self.value(last)
        for node in reversed(targets):
            target = self.written(node)
            value = typed.Assigned(node.place, target.type, target, self.convert(value, target.type))
        return value

    def written(self, node: tree.Expression, must_exist: bool = False) -> typed.Target:
        """What is assigned to; a new name becomes a variable."""
        if isinstance(node, tree.Name) and node.name not in self.scope and not must_exist:
            if node.name in self.functions:
                raise ScriptError(f"'{node.name}' is a function", node.place)
            return typed.LocalTarget(node.place, IMPLICIT, self.new_local(node.name, IMPLICIT))
        target = self.target(node)
        if isinstance(target.type, Array):
            raise ScriptError("an array cannot be assigned as a whole", node.place, "assign its elements")
        if isinstance(target.type, Struct):
            raise ScriptError("a struct cannot be reckoned with", node.place, "name a member of it")
        return target


def _wrapped(value: float, type_: Int | Float) -> int | float:
    """A number as the type holds it."""
    if isinstance(type_, Float):
        return float(value)
    assert isinstance(value, int)
    if type_ == BOOL:
        return int(value != 0)
    value &= (1 << type_.bits) - 1
    return value - (1 << type_.bits) if type_.signed and value >> (type_.bits - 1) else value
