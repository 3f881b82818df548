"""Parsing expressions and the types within them, from tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmexit.script import tree
from vmexit.script.builtins import BUILTINS
from vmexit.script.errors import Place, ScriptError, Source, UnknownGuestError
from vmexit.script.lexer import Kind, Token, is_hex_word, tokens_of
from vmexit.script.names import BARE_REGISTERS, KEYWORDS, PSEUDO, REGISTERS, did_you_mean
from vmexit.script.types import TYPE_WORDS, VOID, Array, Pointer, Struct, Type, size_of, type_of_words

MAX_DEPTH = 128
"""Parentheses, blocks and so on that may stand within each other."""

# Lower binds tighter. Conditions and ordinary expressions share one table, C's.
_PRECEDENCE: dict[str, int] = {
    sign: level
    for level, signs in enumerate(
        (
            ("*", "/", "%"),
            ("+", "-"),
            ("<<", ">>"),
            ("<", ">", "<=", ">="),
            ("==", "!="),
            ("&",),
            ("^",),
            ("|",),
            ("&&",),
            ("||",),
        ),
    )
    for sign in signs
}
_LOOSEST = max(_PRECEDENCE.values())
_UNARY = frozenset("-+~!*&")
_MAX_ELEMENTS = 1 << 20


@dataclass(slots=True)
class Scope:
    """Where the parser is: names of types, and how deep."""

    typedefs: dict[str, Type]
    structs: dict[str, Struct]
    depth: int = 0
    in_function: bool = False


class Expressions:
    """Tokens, and how far they are read."""

    def __init__(self, source: Source, symbol: Callable[[str], int | None]) -> None:
        self.tokens = tokens_of(source)
        self.at = 0
        self.symbol = symbol
        self.scope = Scope({}, {})

    # ---- tokens ----

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def peek(self, ahead: int = 1) -> Token:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def advance(self) -> Token:
        token = self.token
        if token.kind is not Kind.END:
            self.at += 1
        return token

    def is_sign(self, text: str) -> bool:
        return self.token.kind is Kind.SIGN and self.token.text == text

    def is_word(self, text: str) -> bool:
        return self.token.kind is Kind.WORD and self.token.text == text

    def accept(self, sign: str) -> bool:
        if self.is_sign(sign):
            self.at += 1
            return True
        return False

    def expect(self, sign: str, hint: str | None = None) -> Token:
        if not self.is_sign(sign):
            raise self.expected(f"'{sign}'", hint)
        return self.advance()

    def expected(self, what: str, hint: str | None = None) -> ScriptError:
        token = self.token
        if token.kind is Kind.END:
            # What is missing is missing behind the last token.
            end = self.tokens[self.at - 1].place.end if self.at else 0
            return ScriptError(f"{what} expected, but the script ends here", Place(token.place.source, end, end), hint)
        return ScriptError(f"{what} expected", token.place, hint)

    def deeper(self) -> None:
        self.scope.depth += 1
        if self.scope.depth > MAX_DEPTH:
            raise ScriptError(f"nested more than {MAX_DEPTH} deep", self.token.place, "use variables for parts of it")

    def shallower(self) -> None:
        self.scope.depth -= 1

    # ---- types ----

    def starts_type(self) -> bool:
        token = self.token
        return token.kind is Kind.WORD and (
            token.text in TYPE_WORDS or token.text in ("struct", "typedef") or token.text in self.scope.typedefs
        )

    def type_words(self) -> Type:
        """A type without its stars."""
        start = self.token.place
        if self.is_word("struct"):
            return self.struct_type()
        if self.token.kind is Kind.WORD and self.token.text in self.scope.typedefs:
            return self.scope.typedefs[self.advance().text]
        words = []
        while self.token.kind is Kind.WORD and self.token.text in TYPE_WORDS:
            words.append(self.advance().text)
        if not words:
            raise self.expected("a type")
        type_ = type_of_words(words)
        if type_ is None:
            raise ScriptError(f"'{' '.join(words)}' is no type", start.to(self.tokens[self.at - 1].place))
        return type_

    def stars(self, type_: Type) -> Type:
        while self.accept("*"):
            type_ = Pointer(type_)
        return type_

    def struct_type(self) -> Type:
        self.advance()
        token = self.token
        name = self.new_name("the struct's name") if not self.is_sign("{") else ""
        known = self.scope.structs.get(name)
        if not self.is_sign("{"):
            if known is None:
                # Known by name only, until it is defined: enough for a pointer to it.
                known = self.scope.structs[name] = Struct(name)
            return known
        if known is not None and known.complete:
            raise ScriptError(f"struct {name} is there already", token.place)
        struct = known or Struct(name or "(without a name)")
        if name:
            self.scope.structs[name] = struct
        self.members(struct)
        return struct

    def members(self, struct: Struct) -> None:
        self.expect("{")
        found: dict[str, Type] = {}
        while not self.accept("}"):
            if not self.starts_type() or self.is_word("typedef"):
                raise self.expected("a member's type or '}'")
            base = self.type_words()
            while True:
                type_ = self.stars(base)
                token = self.token
                name = self.member_name()
                type_ = self.dimensions(type_, token.place)
                if name in found:
                    raise ScriptError(f"there is a member '{name}' already", token.place)
                self.sized(type_, token.place)
                found[name] = type_
                if not self.accept(","):
                    break
            self.expect(";")
        if not found:
            raise ScriptError("a struct needs a member", self.tokens[self.at - 1].place)
        struct.lay_out(list(found.items()))

    def sized(self, type_: Type, place: Place) -> int:
        """Its size; ScriptError where it has none."""
        try:
            size = size_of(type_)
        except ValueError:
            what = "void has no value" if type_ == VOID else f"{type_} is not defined here"
            raise ScriptError(what, place, "a pointer to it would do" if type_ != VOID else None) from None
        if size > 1 << 24:
            raise ScriptError(f"{size:#x} bytes are too many", place)
        return size

    def dimensions(self, type_: Type, place: Place) -> Type:
        counts: list[int] = []
        while self.accept("["):
            if self.is_sign("]") and not counts:
                counts.append(0)  # as many as there are initial values
            elif self.token.kind is Kind.NUMBER or (self.token.kind is Kind.WORD and is_hex_word(self.token.text)):
                token = self.advance()
                count = int(token.value) if token.kind is Kind.NUMBER else int(token.text, 16)
                if not 0 < count <= _MAX_ELEMENTS:
                    raise ScriptError("an array has from 1 to 100000 elements (hexadecimal)", token.place)
                counts.append(count)
            else:
                raise self.expected("the number of elements", "hexadecimal, or with 0n decimal")
            self.expect("]")
        if counts and type_ == VOID:
            raise ScriptError("void has no value", place)
        for count in reversed(counts):
            type_ = Array(type_, count)
        return type_

    def new_name(self, what: str) -> str:
        token = self.token
        if token.kind is not Kind.WORD:
            raise self.expected(what)
        text = token.text
        if text in KEYWORDS or text in TYPE_WORDS or text in BUILTINS or text in self.scope.typedefs:
            raise ScriptError(f"'{text}' has a meaning already", token.place, "choose another name")
        if text in BARE_REGISTERS:
            raise ScriptError(f"'{text}' is a register", token.place, "choose another name")
        if is_hex_word(text):
            raise ScriptError(
                f"'{text}' is a hexadecimal number", token.place, f"a name needs another letter, as {text}_ or my_{text}"
            )
        if "!" in text:
            raise ScriptError(f"'{text}' is the name of a symbol", token.place, "choose a name without !")
        self.advance()
        return text

    def member_name(self) -> str:
        # Behind a dot there are no numbers and registers, so a member may be called as one.
        if self.token.kind is not Kind.WORD or "!" in self.token.text:
            raise self.expected("the member's name")
        return self.advance().text

    # ---- expressions ----

    def expression(self, loosest: int = _LOOSEST) -> tree.Expression:
        """Signs that bind at least as tight as `loosest`; the left spine grows in a loop, so it may be long."""
        self.deeper()
        left = self.unary()
        while self.token.kind is Kind.SIGN and _PRECEDENCE.get(self.token.text, _LOOSEST + 1) <= loosest:
            sign = self.advance()
            right = self.expression(_PRECEDENCE[sign.text] - 1)
            left = tree.Binary(left.place.to(right.place), sign.text, left, right, sign.place)
        self.shallower()
        return left

    def unary(self) -> tree.Expression:
        self.deeper()
        found = self.prefixed()
        self.shallower()
        return found

    def prefixed(self) -> tree.Expression:
        token = self.token
        if token.kind is Kind.SIGN and token.text in _UNARY:
            self.advance()
            operand = self.unary()
            return tree.Unary(token.place.to(operand.place), token.text, operand)
        if token.kind is Kind.SIGN and token.text in ("++", "--"):
            raise ScriptError(
                f"'{token.text}' is a statement of its own", token.place, f"or write {token.text[0]} {token.text[0]}"
            )
        if token.kind is Kind.SIGN and token.text == "&&":
            raise self.expected("a value")
        if self.is_word("sizeof"):
            return self.sizeof()
        if token.kind is Kind.SIGN and token.text == "(" and self.type_follows():
            self.advance()
            type_ = self.stars(self.type_words())
            self.expect(")")
            operand = self.unary()
            return tree.Cast(token.place.to(operand.place), type_, operand)
        return self.postfixed(self.primary())

    def type_follows(self) -> bool:
        token = self.peek()
        return token.kind is Kind.WORD and (
            token.text in TYPE_WORDS or token.text == "struct" or token.text in self.scope.typedefs
        )

    def sizeof(self) -> tree.Expression:
        place = self.advance().place
        if self.is_sign("(") and self.type_follows():
            self.advance()
            start = self.token.place
            type_ = self.stars(self.type_words())
            self.sized(type_, start)
            return tree.SizeOf(place.to(self.expect(")").place), type_)
        operand = self.unary()
        return tree.SizeOf(place.to(operand.place), operand)

    def postfixed(self, base: tree.Expression) -> tree.Expression:
        links = 0
        while True:
            links += 1
            if links > MAX_DEPTH:
                raise ScriptError("too many members and indexes in one expression", self.token.place, "use a variable")
            token = self.token
            if self.accept("["):
                index = self.expression()
                base = tree.Index(base.place.to(self.expect("]").place), base, index)
            elif token.kind is Kind.DOTTED:
                self.advance()
                base = tree.Access(base.place.to(token.place), base, token.text, False)
            elif self.accept("->"):
                if self.token.kind is not Kind.DOTTED:
                    raise self.expected("a member's name")
                name = self.advance()
                base = tree.Access(base.place.to(name.place), base, name.text, True)
            else:
                return base

    def primary(self) -> tree.Expression:
        token = self.token
        if self.accept("("):
            inner = self.expression()
            if self.is_sign("="):
                raise ScriptError("an assignment is a statement of its own", self.token.place, "to compare, write ==")
            self.expect(")")
            return inner
        match token.kind:
            case Kind.NUMBER:
                self.advance()
                assert isinstance(token.value, int)
                return tree.Number(token.place, token.value)
            case Kind.FLOAT:
                self.advance()
                assert isinstance(token.value, float)
                return tree.FloatNumber(token.place, token.value)
            case Kind.STRING | Kind.WIDE:
                self.advance()
                assert isinstance(token.value, bytes)
                return tree.Text(token.place, token.value, token.kind is Kind.WIDE)
            case Kind.DOTTED:
                self.advance()
                return tree.Global(token.place, token.text)
            case Kind.REGISTER:
                return self.register()
            case Kind.PSEUDO:
                return self.pseudo()
            case Kind.WORD:
                return self.word()
            case _:
                raise self.expected("a value")

    def register(self) -> tree.Expression:
        token = self.advance()
        if token.text not in REGISTERS:
            raise ScriptError(f"there is no register '@{token.text}'", token.place, did_you_mean(token.text, REGISTERS))
        return tree.Register(token.place, token.text)

    def pseudo(self) -> tree.Expression:
        token = self.advance()
        if token.text not in PSEUDO:
            hint = did_you_mean(token.text, PSEUDO)
            if token.text.startswith("arg"):
                hint = "arguments are those of .script"
            raise ScriptError(f"there is no pseudo-register '${token.text}'", token.place, hint)
        return tree.Pseudo(token.place, token.text)

    def word(self) -> tree.Expression:
        token = self.advance()
        text = token.text
        if text in BUILTINS:
            return self.call(token)
        if text in BARE_REGISTERS:
            return tree.Register(token.place, text)
        if text in KEYWORDS or text in TYPE_WORDS or text in self.scope.typedefs:
            raise ScriptError(f"a value expected, not '{text}'", token.place)
        if is_hex_word(text):
            return tree.Number(token.place, int(text, 16) & 0xFFFF_FFFF_FFFF_FFFF)
        if "!" in text:
            try:
                address, hint = self.symbol(text), None
            except UnknownGuestError as error:
                address, hint = None, str(error)
            if address is None:
                raise ScriptError(f"the symbol '{text}' is not known", token.place, hint)
            return tree.Number(token.place, address)
        if self.is_sign("("):
            return self.call(token)
        return tree.Name(token.place, text)

    def call(self, name: Token) -> tree.Expression:
        self.expect("(", f"'{name.text}' is a function")
        arguments: list[tree.Expression] = []
        if not self.is_sign(")"):
            while True:
                arguments.append(self.expression())
                if not self.accept(","):
                    break
        if not self.is_sign(")"):
            raise self.expected("',' or ')'")
        end = self.advance().place
        return tree.Call(name.place.to(end), name.text, arguments, name.place)
