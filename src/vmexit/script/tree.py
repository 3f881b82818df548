"""The syntax tree: a script as it was written. Every node knows its place; names and types are not looked at yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmexit.script.errors import Place
from vmexit.script.types import Type


@dataclass(slots=True)
class Node:
    """Anything in the tree."""

    place: Place


# ---- expressions ----


@dataclass(slots=True)
class Number(Node):
    """An integer literal, by its 64 bits."""

    value: int


@dataclass(slots=True)
class FloatNumber(Node):
    """A floating-point literal."""

    value: float


@dataclass(slots=True)
class Text(Node):
    """A string; `data` without its terminator."""

    data: bytes
    wide: bool


@dataclass(slots=True)
class Name(Node):
    """A local variable or parameter."""

    name: str


@dataclass(slots=True)
class Global(Node):
    """``.name``"""

    name: str


@dataclass(slots=True)
class Register(Node):
    """``@rax``, or ``rax``"""

    name: str


@dataclass(slots=True)
class Pseudo(Node):
    """``$context``"""

    name: str


@dataclass(slots=True)
class Unary(Node):
    """One of ``- + ~ ! * &`` before an expression."""

    sign: str
    operand: Expression


@dataclass(slots=True)
class Binary(Node):
    """Two expressions and a sign; also comparisons and ``&& ||``. `sign_place` is the sign's own."""

    sign: str
    left: Expression
    right: Expression
    sign_place: Place


@dataclass(slots=True)
class Cast(Node):
    """``(type) operand``"""

    type: Type
    operand: Expression


@dataclass(slots=True)
class SizeOf(Node):
    """``sizeof`` of a type or of an expression, which is not evaluated."""

    what: Type | Expression


@dataclass(slots=True)
class Call(Node):
    """A built-in or a function of the script's own."""

    name: str
    arguments: list[Expression]
    name_place: Place


@dataclass(slots=True)
class Index(Node):
    """``base[index]``"""

    base: Expression
    index: Expression


@dataclass(slots=True)
class Access(Node):
    """``base.member`` or (`arrow`) ``base->member``"""

    base: Expression
    member: str
    arrow: bool


@dataclass(slots=True)
class Chain(Node):
    """``a = b = value`` as the initial value of a variable; nowhere else is an assignment a value."""

    targets: list[Expression]
    value: Expression


Expression = (
    Number
    | FloatNumber
    | Text
    | Name
    | Global
    | Register
    | Pseudo
    | Unary
    | Binary
    | Cast
    | SizeOf
    | Call
    | Index
    | Access
    | Chain
)


# ---- statements ----


@dataclass(slots=True)
class Braces(Node):
    """``{a, b, ...}`` behind a declaration."""

    items: list[Expression | Braces]


@dataclass(slots=True)
class Declare(Node):
    """One variable of a declaration; a global where its name has a dot."""

    type: Type
    name: str
    is_global: bool
    start: Expression | Braces | None


@dataclass(slots=True)
class Assign(Node):
    """``a = b = value`` (sign "=", one or more targets) or ``a += value`` (sign "+")."""

    targets: list[Expression]
    sign: str
    value: Expression


@dataclass(slots=True)
class Evaluate(Node):
    """A call as a statement."""

    call: Expression


@dataclass(slots=True)
class If(Node):
    """The branches, each with its condition, and what is done otherwise."""

    branches: list[tuple[Expression, Block]]
    otherwise: Block | None


@dataclass(slots=True)
class Loop(Node):
    """for, while (no `first`, no `step`) and do-while (`test_first` false)."""

    first: list[Statement]
    condition: Expression | None
    step: list[Statement]
    body: Block
    test_first: bool = True


@dataclass(slots=True)
class Jump(Node):
    """break or continue."""

    word: str


@dataclass(slots=True)
class Return(Node):
    """Out of a function; at top level, the end of the run."""

    value: Expression | None


@dataclass(slots=True)
class Block(Node):
    """Statements between braces."""

    statements: list[Statement] = field(default_factory=list)


Statement = Declare | Assign | Evaluate | If | Loop | Jump | Return | Block


@dataclass(slots=True)
class Parameter(Node):
    """Of a function."""

    type: Type
    name: str


@dataclass(slots=True)
class Function(Node):
    """A function of the script's own."""

    name: str
    returns: Type
    parameters: list[Parameter]
    body: Block


@dataclass(slots=True)
class Script(Node):
    """A whole script."""

    functions: list[Function]
    body: Block
