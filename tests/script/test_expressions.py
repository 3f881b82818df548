"""Random expressions, each checked against Python's integers cut to the same width and signedness."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.script.running import Session, machine
from vmexit.script.errors import ScriptRunError


class EndedError(Exception):
    """The expression ends the run: division by zero and the like."""


@dataclass(frozen=True)
class Kind:
    """An integer type as C knows it; written down here once more, on purpose."""

    name: str
    bits: int
    signed: bool
    rank: int

    def cut(self, value: int) -> int:
        value &= (1 << self.bits) - 1
        return value - (1 << self.bits) if self.signed and value >> (self.bits - 1) else value

    def promoted(self) -> Kind:
        return INT if self.rank < INT.rank else self


CHAR, UCHAR = Kind("char", 8, True, 1), Kind("unsigned char", 8, False, 1)
SHORT, USHORT = Kind("short", 16, True, 2), Kind("unsigned short", 16, False, 2)
INT, UINT = Kind("int", 32, True, 3), Kind("unsigned int", 32, False, 3)
LONG, ULONG = Kind("long", 64, True, 4), Kind("unsigned long", 64, False, 4)
LLONG, ULLONG = Kind("long long", 64, True, 5), Kind("unsigned long long", 64, False, 5)
KINDS = [CHAR, UCHAR, SHORT, USHORT, INT, UINT, LONG, ULONG, LLONG, ULLONG]


def usual(left: Kind, right: Kind) -> Kind:
    left, right = left.promoted(), right.promoted()
    high, low = (left, right) if left.rank >= right.rank else (right, left)
    if high.signed == low.signed or not high.signed:
        return high
    if high.bits > low.bits:
        return high
    return next(kind for kind in KINDS if kind.rank == high.rank and not kind.signed)


@dataclass(frozen=True)
class Node:
    """An expression: its text, and its type and value (None: it ends the run)."""

    text: str
    kind: Kind
    value: int | None


def binary(sign: str, left: Node, right: Node) -> Node:
    kind = usual(left.kind, right.kind)
    text = f"({left.text} {sign} {right.text})"
    if sign in ("&&", "||"):
        if left.value is None:
            return Node(text, INT, None)
        if bool(left.value) == (sign == "||"):
            return Node(text, INT, int(bool(left.value)))
        return Node(text, INT, None if right.value is None else int(bool(right.value)))
    if left.value is None or right.value is None:
        return Node(text, INT if sign in _COMPARE else kind, None)
    x, y = kind.cut(left.value), kind.cut(right.value)
    if sign in _COMPARE:
        return Node(text, INT, int(_COMPARE[sign](x, y)))
    try:
        return Node(text, kind, kind.cut(compute(sign, x, y, kind)))
    except EndedError:
        return Node(text, kind, None)


_COMPARE = {
    "==": int.__eq__,
    "!=": int.__ne__,
    "<": int.__lt__,
    ">": int.__gt__,
    "<=": int.__le__,
    ">=": int.__ge__,
}


def compute(sign: str, x: int, y: int, kind: Kind) -> int:
    match sign:
        case "+":
            return x + y
        case "-":
            return x - y
        case "*":
            return x * y
        case "&":
            return x & y
        case "|":
            return x | y
        case "^":
            return x ^ y
        case "<<" | ">>":
            if not 0 <= y < kind.bits:
                raise EndedError
            return x << y if sign == "<<" else x >> y
        case _:
            if y == 0 or (kind.signed and y == -1 and x == -(1 << (kind.bits - 1))):
                raise EndedError
            quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
            return quotient if sign == "/" else x - quotient * y


def unary(sign: str, operand: Node) -> Node:
    kind = INT if sign == "!" else operand.kind.promoted()
    text = f"({sign}{operand.text})"
    if operand.value is None:
        return Node(text, kind, None)
    value = {"-": -operand.value, "~": ~operand.value, "+": operand.value, "!": int(operand.value == 0)}[sign]
    return Node(text, kind, kind.cut(value))


def cast(kind: Kind, operand: Node) -> Node:
    return Node(f"(({kind.name}){operand.text})", kind, None if operand.value is None else kind.cut(operand.value))


def corners(kind: Kind) -> list[int]:
    top = 1 << (kind.bits - 1)
    return [kind.cut(value) for value in (0, 1, 2, 7, -1, -2, top, top - 1, top + 1, kind.bits, kind.bits - 1)]


VARIABLES = [(f"{'us'[kind.signed]}{kind.bits}_{kind.rank}_{number}", kind) for kind in KINDS for number in range(2)]


@st.composite
def environments(draw: st.DrawFn) -> dict[str, Node]:
    found = {}
    for name, kind in VARIABLES:
        value = draw(st.sampled_from(corners(kind)) | st.integers(0, (1 << kind.bits) - 1).map(kind.cut))
        found[name] = Node(name, kind, value)
    return found


def literals() -> st.SearchStrategy[Node]:
    values = st.sampled_from([0, 1, 2, 0x3F, 0x40, 0x7FFF, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    return (values | st.integers(0, (1 << 64) - 1)).map(lambda value: Node(f"0x{value:x}", LONG, LONG.cut(value)))


def expressions(environment: dict[str, Node]) -> st.SearchStrategy[Node]:
    leaves = st.sampled_from(list(environment.values())) | literals()
    signs = st.sampled_from(["+", "-", "*", "/", "%", "&", "|", "^", "<<", ">>", "&&", "||", *_COMPARE])
    return st.recursive(
        leaves,
        lambda inner: (
            st.builds(binary, signs, inner, inner)
            | st.builds(unary, st.sampled_from("-~+!"), inner)
            | st.builds(cast, st.sampled_from(KINDS), inner)
        ),
        max_leaves=12,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Node], list[Node]]:
    environment = draw(environments())
    return environment, draw(st.lists(expressions(environment), min_size=4, max_size=12))


def check(environment: dict[str, Node], nodes: list[Node]) -> None:
    """Print each expression in turn; the first one that ends the run has to end it."""
    lines = [f"{node.kind.name} {name} = {hexadecimal(node.value or 0)};" for name, node in environment.items()]
    expected = []
    for node in nodes:
        lines.append(f"print({node.text});")
        if node.value is None:
            break
        expected.append(f"{node.value & (1 << 64) - 1:x}\n")
    out = bytearray()
    session = Session()
    try:
        session.runtime.run(session.compiler.compile("\n".join(lines)), machine(), out.extend)
        ended = False
    except ScriptRunError:
        ended = True
    assert out.decode() == "".join(expected)
    assert ended == any(node.value is None for node in nodes)


def hexadecimal(value: int) -> str:
    return f"-0x{-value:x}" if value < 0 else f"0x{value:x}"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_expressions(case: tuple[dict[str, Node], list[Node]]) -> None:
    check(*case)


def grown(source: random.Random, environment: dict[str, Node], depth: int) -> Node:
    """An expression as deep as that, more often than not with operands that make sense."""
    if depth == 0 or source.random() < 0.1:
        if source.random() < 0.8:
            return source.choice(list(environment.values()))
        value = source.choice([0, 1, 2, 3, 7, 31, 63, 64, (1 << 63) - 1, 1 << 63, source.getrandbits(64)])
        return Node(f"0x{value:x}", LONG, LONG.cut(value))
    inner = grown(source, environment, depth - 1)
    match source.randrange(10):
        case 0 | 1:
            return unary(source.choice("-~+!"), inner)
        case 2:
            return cast(source.choice(KINDS), inner)
        case 3 | 4:
            few = source.choice([0, 1, 2, 5, 7, 15, 31, 32, 63])
            return binary(source.choice(["<<", ">>"]), inner, Node(f"0x{few:x}", LONG, few))
        case _:
            sign = source.choice(["+", "-", "*", "/", "%", "&", "|", "^", "<<", ">>", "&&", "||", *_COMPARE])
            return binary(sign, inner, grown(source, environment, depth - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(environments(), st.integers(0, 1 << 64))
def test_dense_expressions(environment: dict[str, Node], seed: int) -> None:
    """Many at a time, where hypothesis itself makes mostly small ones; all but the last give a value."""
    source = random.Random(seed)
    nodes = [grown(source, environment, source.randint(1, 4)) for _ in range(60)]
    sound = [node for node in nodes if node.value is not None]
    check(environment, sound + [node for node in nodes if node.value is None][:1])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, (1 << 64) - 1), st.sampled_from("+-*&|^"), st.integers(0, 1 << 64)),
        min_size=10,
        max_size=30,
    )
)
def test_updates(steps: list[tuple[Kind, int, str, int]]) -> None:
    """`x op= y` on every type: in the common type, then cut to the variable's own."""
    lines, expected = [], []
    for number, (kind, start, sign, operand) in enumerate(steps):
        lines.append(f"{kind.name} v_{number} = 0x{start:x}; v_{number} {sign}= 0x{operand:x}; print(v_{number});")
        common = usual(kind, LONG)
        value = compute(sign, common.cut(kind.cut(start)), common.cut(operand), common)
        expected.append(f"{kind.cut(common.cut(value)) & (1 << 64) - 1:x}\n")
    assert Session().run("\n".join(lines)) == "".join(expected)
