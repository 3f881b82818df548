"""Conditions that only compare registers and the context, as text of the script language, which runs in the vCPU's own thread.

What this does not know is left to the sandbox: any instruction, operand or flag that is not below makes the answer None. The
meaning is the sandbox's own, down to what registers hold before the first instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capstone import x86_const as x86

from vmexit.usercode.instructions import decoded

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_LONGEST_TEXT = 8000
_MOST_STEPS = 300

_FIELDS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
_PARTS: dict[str, tuple[str, int]] = {name: (name, 64) for name in _FIELDS}
for _letter in "abcd":
    _PARTS |= {f"e{_letter}x": (f"r{_letter}x", 32), f"{_letter}x": (f"r{_letter}x", 16), f"{_letter}l": (f"r{_letter}x", 8)}
for _stem in ("si", "di", "bp"):
    _PARTS |= {f"e{_stem}": (f"r{_stem}", 32), _stem: (f"r{_stem}", 16), f"{_stem}l": (f"r{_stem}", 8)}
for _number in range(8, 16):
    _PARTS |= {f"r{_number}d": (f"r{_number}", 32), f"r{_number}w": (f"r{_number}", 16), f"r{_number}b": (f"r{_number}", 8)}

Value = int | str
"""A number, or an expression of type unsigned long long."""
Truth = bool | str
_POINTER = "the registers"


class _UnknownError(Exception):
    """Something that is not lifted."""


@dataclass(frozen=True, slots=True)
class Lifted:
    """A condition in the script language."""

    setup: str
    """Statements that come first."""
    expression: str
    """Holds where the condition does."""


@dataclass(frozen=True, slots=True)
class _Flags:
    """What set them: the difference of two values, or (``right`` is None) a logical result; each of so many bits."""

    left: Value
    right: Value | None
    bits: int


@dataclass(slots=True)
class _State:
    registers: dict[str, Value]
    flags: _Flags | None = None


def lift(code: bytes) -> Lifted | None:
    """A condition's code, without the RET that is appended; None: it has to be emulated."""
    try:
        truth = _Lifter(code + b"\xc3").run()
    except _UnknownError:
        return None
    expression = truth if isinstance(truth, str) else str(int(truth))
    if len(expression) > _LONGEST_TEXT:
        return None
    words = set(expression.replace("(", " ").split())
    sources = {"zero": "0", "context": "$context"} | {name: f"@{name}" for name in _FIELDS}
    setup = "".join(f"condition_{name} = {source}; " for name, source in sources.items() if f"condition_{name}" in words)
    return Lifted(setup, expression)


class _Lifter:
    """A walk along all ways through the code. Every jump goes forward, so that there is an end."""

    def __init__(self, code: bytes) -> None:
        self._code = code
        self._steps = 0

    def run(self) -> Truth:
        registers: dict[str, Value] = dict.fromkeys(_FIELDS, 0)
        registers["rcx"] = _POINTER
        registers["rdx"] = "condition_context"
        del registers["rsp"]
        return self._walk(0, _State(registers))

    def _walk(self, at: int, state: _State) -> Truth:
        while True:
            self._steps += 1
            instruction = decoded(self._code, at)
            if instruction is None or self._steps > _MOST_STEPS:
                raise _UnknownError
            after = at + instruction.size
            name, operands = instruction.mnemonic, instruction.operands
            if (name == "ret" or name.startswith("j")) and any(instruction.prefix):
                raise _UnknownError
            if name == "ret" and not operands:
                rax = state.registers["rax"]
                return True if rax is _POINTER else _compared(rax, "!=", 0)
            if name.startswith("j") and len(operands) == 1 and operands[0].type == x86.X86_OP_IMM:
                target = operands[0].imm
                if target < after:
                    raise _UnknownError
                if name == "jmp":
                    at = target
                    continue
                truth = _holds(name[1:], state.flags)
                taken = self._walk(target, _State(dict(state.registers), state.flags))
                return _either(truth, taken, self._walk(after, state))
            _step(instruction, name, operands, state)
            at = after


def _step(instruction: Any, name: str, operands: Any, state: _State) -> None:
    """One instruction that does not jump."""
    if name == "nop":
        return
    if instruction.prefix[0] or not operands:
        raise _UnknownError
    first = operands[0]
    if name.startswith("set"):
        truth = _holds(name[3:], state.flags)
        _put(instruction, first, state, int(truth) if isinstance(truth, bool) else f"(condition_zero + ({truth}))")
        return
    if len(operands) != 2:
        raise _UnknownError
    bits = first.size * 8
    right = _get(instruction, operands[1], state, bits)
    if name in ("mov", "movabs", "movzx"):
        _put(instruction, first, state, right)
        return
    is_cleared = name in ("xor", "sub") and first.type == operands[1].type == x86.X86_OP_REG and first.reg == operands[1].reg
    left = 0 if is_cleared else _get(instruction, first, state, bits)
    if is_cleared:
        right = 0
    if left is _POINTER or right is _POINTER:
        raise _UnknownError
    match name:
        case "cmp":
            state.flags = _Flags(left, right, bits)
        case "test":
            state.flags = _Flags(_and(left, right), None, bits)
        case "sub":
            _put(instruction, first, state, _masked(_calculated(left, "-", right), bits))
            state.flags = _Flags(left, right, bits)
        case "add":
            _put(instruction, first, state, _masked(_calculated(left, "+", right), bits))
            state.flags = None
        case "and" | "or" | "xor":
            result = _calculated(left, {"and": "&", "or": "|", "xor": "^"}[name], right)
            _put(instruction, first, state, result)
            state.flags = _Flags(result, None, bits)
        case _:
            raise _UnknownError


# ---- operands ----


def _get(instruction: Any, operand: Any, state: _State, bits: int) -> Value:
    """The value of an operand, zero-extended; ``bits``: of the operation, to which a constant is extended by its sign."""
    if operand.type == x86.X86_OP_IMM:
        return int(operand.imm) & ((1 << bits) - 1)
    if operand.type == x86.X86_OP_REG:
        whole, width = _part(instruction, operand.reg)
        value = state.registers[whole]
        if value is _POINTER and width != 64:
            raise _UnknownError
        return value if width == 64 else _masked(value, width)
    memory = operand.mem
    if memory.segment or memory.index or not memory.base:
        raise _UnknownError
    base, width = _part(instruction, memory.base)
    offset, size = memory.disp, operand.size
    if width != 64 or state.registers[base] is not _POINTER or not 0 <= offset < 128 or offset % 8 + size > 8:
        raise _UnknownError
    field: Value = f"condition_{_FIELDS[offset // 8]}"
    if offset % 8:
        field = f"( {field} >> {offset % 8 * 8:x} )"
    return field if size == 8 else _masked(field, size * 8)


def _put(instruction: Any, operand: Any, state: _State, value: Value) -> None:
    """Into a register; ``value`` fits its part."""
    if operand.type != x86.X86_OP_REG:
        raise _UnknownError
    whole, width = _part(instruction, operand.reg)
    if width >= 32:  # the upper half becomes 0
        if value is _POINTER and width != 64:
            raise _UnknownError
        state.registers[whole] = value
        return
    old = state.registers[whole]
    if old is _POINTER or value is _POINTER:
        raise _UnknownError
    state.registers[whole] = _calculated(_and(old, _MASK64 & ~((1 << width) - 1)), "|", value)


def _part(instruction: Any, register: int) -> tuple[str, int]:
    """The whole register and how many of its lowest bits."""
    found = _PARTS.get(instruction.reg_name(register))
    if found is None or found[0] == "rsp":
        raise _UnknownError
    return found


# ---- expressions ----

_FOLD = {
    "+": lambda a, b: a + b & _MASK64,
    "-": lambda a, b: a - b & _MASK64,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}
_COMPARE = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def _text(value: Value) -> str:
    # A number by itself is signed; next to an unsigned variable it does not matter.
    return value if isinstance(value, str) else f"{value:x}"


def _calculated(left: Value, operator: str, right: Value) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return int(_FOLD[operator](left, right))
    text = f"( {_text(left)} {operator} {_text(right)} )"
    if len(text) > _LONGEST_TEXT:
        raise _UnknownError
    return text


def _and(left: Value, right: Value) -> Value:
    return _calculated(left, "&", right)


def _masked(value: Value, bits: int) -> Value:
    return value if bits == 64 else _and(value, (1 << bits) - 1)


def _compared(left: Value, operator: str, right: Value) -> Truth:
    if isinstance(left, int) and isinstance(right, int):
        return bool(_COMPARE[operator](left, right))
    return f"( {_text(left)} {operator} {_text(right)} )"


def _not(truth: Truth) -> Truth:
    return f"( ! {truth} )" if isinstance(truth, str) else not truth


def _both(left: Truth, right: Truth) -> Truth:
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return f"( {left} && {right} )"


def _or(left: Truth, right: Truth) -> Truth:
    if isinstance(left, bool):
        return True if left else right
    if isinstance(right, bool):
        return True if right else left
    return f"( {left} || {right} )"


def _either(condition: Truth, yes: Truth, no: Truth) -> Truth:
    found = yes if yes == no else _or(_both(condition, yes), _both(_not(condition), no))
    if isinstance(found, str) and len(found) > _LONGEST_TEXT:
        raise _UnknownError
    return found


def _holds(suffix: str, flags: _Flags | None) -> Truth:
    """What a Jcc or SETcc asks (Intel SDM volume 1, appendix B)."""
    if flags is None:
        raise _UnknownError
    sign = 1 << (flags.bits - 1)
    if flags.right is None:
        # A logical result: CF and OF are 0.
        zero = _compared(flags.left, "==", 0)
        negative = _compared(_and(flags.left, sign), "!=", 0)
        below: Truth = False
        less = negative
    else:
        zero = _compared(flags.left, "==", flags.right)
        negative = _compared(_and(_calculated(flags.left, "-", flags.right), sign), "!=", 0)
        below = _compared(flags.left, "<", flags.right)
        less = _compared(_calculated(flags.left, "^", sign), "<", _calculated(flags.right, "^", sign))
    truths = {"e": zero, "b": below, "be": _or(below, zero), "l": less, "le": _or(less, zero), "s": negative}
    opposites = {"ne": "e", "ae": "b", "a": "be", "ge": "l", "g": "le", "ns": "s"}
    if suffix in truths:
        return truths[suffix]
    if suffix in opposites:
        return _not(truths[opposites[suffix]])
    raise _UnknownError
