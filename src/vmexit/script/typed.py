"""The typed tree: what a script computes, with every type known, every conversion explicit and every name resolved."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmexit.guest.registers import Register
from vmexit.script.builtins import Builtin
from vmexit.script.errors import Place
from vmexit.script.printf import Format
from vmexit.script.types import Type

# ---- what has a name ----


@dataclass(eq=False, slots=True)
class Local:
    """A local variable or parameter. In memory it has a place in its function's frame, else it lives in a machine register."""

    name: str
    type: Type
    in_memory: bool = False
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Global:
    """A global variable: an 8-byte cell, the `index`-th, that holds a value of this type, widened."""

    name: str
    index: int
    type: Type


@dataclass(eq=False, slots=True)
class Function:
    """A function of the script's own; the script itself is one without a name."""

    name: str
    returns: Type
    parameters: list[Local] = field(default_factory=list)
    body: list[Statement] = field(default_factory=list)
    place: Place | None = None
    frame: int = 0
    """Bytes of its variables that live in memory."""


# ---- what can be assigned to ----


@dataclass(slots=True)
class Target:
    """Something with a value that can be read and, mostly, written."""

    place: Place
    type: Type


@dataclass(slots=True)
class LocalTarget(Target):
    """A local variable."""

    local: Local


@dataclass(slots=True)
class GlobalTarget(Target):
    """A global variable."""

    variable: Global


@dataclass(slots=True)
class RegisterTarget(Target):
    """A register or a part of one."""

    register: Register


@dataclass(slots=True)
class SpecialTarget(Target):
    """``$value`` (EDX:EAX) or ``$msr`` (ECX)."""

    name: str


@dataclass(slots=True)
class Deref(Target):
    """What is at an address."""

    address: Value


@dataclass(slots=True)
class Element(Target):
    """An element of an array."""

    base: Target
    index: Value


@dataclass(slots=True)
class MemberTarget(Target):
    """A part of a struct, `offset` bytes from its start."""

    base: Target
    offset: int


# ---- values ----


@dataclass(slots=True)
class Value:
    """An expression. Types of values are integers, floats and pointers."""

    place: Place
    type: Type


@dataclass(slots=True)
class Const(Value):
    """A number that is known."""

    value: int | float


@dataclass(slots=True)
class TextAddress(Value):
    """Where a string is: `offset` bytes into the constants."""

    offset: int


@dataclass(slots=True)
class Load(Value):
    """What a target holds."""

    target: Target


@dataclass(slots=True)
class AddressOf(Value):
    """Where a target is."""

    target: Target


@dataclass(slots=True)
class PseudoValue(Value):
    """A pseudo-register that only needs to be read."""

    name: str


@dataclass(slots=True)
class Current(Value):
    """In the value of an Update: what the target held."""


@dataclass(slots=True)
class Convert(Value):
    """The operand as a value of another type."""

    operand: Value


@dataclass(slots=True)
class Bits(Value):
    """A float's bits as an integer."""

    operand: Value


@dataclass(slots=True)
class Unary(Value):
    """``-`` or ``~``; the operand has the result's type. Or ``!``."""

    sign: str
    operand: Value


@dataclass(slots=True)
class Arithmetic(Value):
    """Both operands have the result's type."""

    sign: str
    left: Value
    right: Value


@dataclass(slots=True)
class Compare(Value):
    """Both operands have one type; the result is an int."""

    sign: str
    left: Value
    right: Value


@dataclass(slots=True)
class Logic(Value):
    """``&&`` or ``||`` between two or more."""

    sign: str
    items: list[Value]


@dataclass(slots=True)
class Offset(Value):
    """A pointer `index` times `size` bytes further."""

    pointer: Value
    index: Value
    size: int
    backwards: bool


@dataclass(slots=True)
class Distance(Value):
    """How many elements of `size` bytes lie between two pointers."""

    left: Value
    right: Value
    size: int


@dataclass(slots=True)
class CallBuiltin(Value):
    """A built-in; the arguments are 64-bit integers."""

    builtin: Builtin
    arguments: list[Value]


@dataclass(slots=True)
class CallFunction(Value):
    """A function of the script's own; the arguments have its parameters' types."""

    function: Function
    arguments: list[Value]


@dataclass(slots=True)
class Assigned(Value):
    """The value of an assignment, once it is carried out."""

    target: Target
    value: Value


@dataclass(slots=True)
class AtomicAddress(Value):
    """The value of `bare` where that is a script address already, else the address of it."""

    target: Target
    bare: Value


# ---- statements ----


@dataclass(slots=True)
class Evaluate:
    """A value that is computed for what else that does."""

    value: Value


@dataclass(slots=True)
class Update:
    """A target whose new value depends on what it held (see Current); where it is, is found out once."""

    target: Target
    value: Value


@dataclass(slots=True)
class Zero:
    """All of a local variable becomes 0."""

    local: Local


@dataclass(slots=True)
class Copy:
    """A struct."""

    target: Target
    source: Target
    size: int
    place: Place


@dataclass(slots=True)
class Print:
    """One print: the number of its format, and a value for each argument."""

    format: Format
    number: int
    arguments: list[Value]
    place: Place


@dataclass(slots=True)
class If:
    """Branches with their conditions, and what is done otherwise."""

    branches: list[tuple[Value, list[Statement]]]
    otherwise: list[Statement]


@dataclass(slots=True)
class Loop:
    """A loop; without a condition it has to be left by a jump."""

    condition: Value | None
    step: list[Statement]
    body: list[Statement]
    test_first: bool
    place: Place


@dataclass(slots=True)
class Jump:
    """break or continue."""

    word: str


@dataclass(slots=True)
class Return:
    """Out of the function."""

    value: Value | None


Statement = Evaluate | Update | Zero | Copy | Print | If | Loop | Jump | Return


@dataclass(slots=True)
class Program:
    """A whole script, ready to be lowered."""

    main: Function
    functions: list[Function]
    constants: bytes
    """The strings, at the offsets that TextAddress names."""
    formats: list[Format]
    globals: list[Global]
    """All that the script uses."""
