"""From tokens to the syntax tree: the script, its functions and statements; expressions.py does what they are made of."""

from __future__ import annotations

from collections.abc import Callable

from vmexit.script import tree
from vmexit.script.builtins import BUILTINS
from vmexit.script.errors import Place, ScriptError, Source
from vmexit.script.expressions import Expressions
from vmexit.script.lexer import Kind, Token, tokens_of
from vmexit.script.names import KEYWORDS, did_you_mean
from vmexit.script.types import TYPE_WORDS, VOID, Array, Pointer, Struct, Type

_ASSIGN = frozenset({"+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="})
_MAX_TOKENS = 1 << 17


def parse(source: Source, read: Callable[[str, Source], Source], symbol: Callable[[str], int | None]) -> tree.Script:
    """The syntax tree of a script.

    `read(path, from)` gives the source that an ``#include`` names, once a path; it raises VmexitError or OSError. `symbol`
    gives the address of a symbol of the guest's, or None; it raises UnknownGuestError. Raises ScriptError.
    """
    return _Parser(source, read, symbol).script()


def parse_expression(source: Source, symbol: Callable[[str], int | None], function: str) -> tree.Script:
    """The syntax tree of a script that is a call of a built-in function with one expression, which is all that is written."""

    def read(path: str, asking: Source) -> Source:
        raise OSError("an expression includes nothing")

    return _Parser(source, read, symbol).expression_script(function)


class _Parser(Expressions):
    def __init__(self, source: Source, read: Callable[[str, Source], Source], symbol: Callable[[str], int | None]) -> None:
        super().__init__(source, symbol)
        self.read = read
        self.functions: list[tree.Function] = []
        self.included: set[str] = {source.name}

    # ---- the script ----

    def script(self) -> tree.Script:
        if len(self.tokens) == 1 and not self.token.place.source.text.strip():
            raise ScriptError("the script is empty", self.token.place)
        place = self.token.place
        # As in a script file: `? { ... }`
        self.accept("?")
        body = tree.Block(place)
        while self.token.kind is not Kind.END:
            self.top_level(body.statements)
        return tree.Script(place, self.functions, body)

    def expression_script(self, function: str) -> tree.Script:
        place = self.token.place
        value = self.expression()
        if self.token.kind is not Kind.END:
            raise self.expected("the end of the expression")
        call = tree.Call(value.place, function, [value], value.place)
        return tree.Script(place, [], tree.Block(place, [tree.Evaluate(value.place, call)]))

    def top_level(self, statements: list[tree.Statement]) -> None:
        if self.token.kind is Kind.INCLUDE:
            self.include()
        elif self.is_sign("{") and self.scope.depth == 0:
            # The braces around a whole script are none of a block; functions may stand within.
            self.deeper()
            self.advance()
            while not self.is_sign("}"):
                if self.token.kind is Kind.END:
                    raise self.expected("'}'")
                self.top_level(statements)
            self.advance()
            self.shallower()
        elif self.starts_type() and self.is_function():
            self.function()
        else:
            self.statement(statements)

    def include(self) -> None:
        start = self.advance()
        if self.token.kind is not Kind.STRING:
            raise self.expected("the file's name between quotes")
        name = self.advance()
        assert isinstance(name.value, bytes)
        path = name.value.decode("utf-8", "surrogateescape")
        self.accept(";")
        try:
            source = self.read(path, start.place.source)
        except OSError as error:
            raise ScriptError(f"'{path}' cannot be read: {error.strerror or error}", name.place) from None
        if source.name in self.included:
            return
        self.included.add(source.name)
        inner = tokens_of(source)[:-1]
        if inner and inner[0].kind is Kind.SIGN and inner[0].text == "?":
            del inner[0]
        # In place of the directive; a whole `{ ... }` is opened up where it stands at the top.
        if inner and inner[0].text == "{" and inner[-1].text == "}" and inner[0].kind is inner[-1].kind is Kind.SIGN:
            inner = inner[1:-1]
        if len(self.tokens) + len(inner) > _MAX_TOKENS:
            raise ScriptError("too much is included", name.place)
        self.tokens[self.at : self.at] = inner

    # ---- functions ----

    def is_function(self) -> bool:
        """Whether what starts with a type here goes on as a function: type, stars, a name, a parenthesis."""
        ahead = 1 if not self.is_word("struct") else 2
        while self.peek(ahead).kind is Kind.WORD and self.peek(ahead).text in TYPE_WORDS:
            ahead += 1
        while self.peek(ahead).kind is Kind.SIGN and self.peek(ahead).text == "*":
            ahead += 1
        name, behind = self.peek(ahead), self.peek(ahead + 1)
        return name.kind is Kind.WORD and behind.kind is Kind.SIGN and behind.text == "(" and not self.is_word("typedef")

    def function(self) -> None:
        returns = self.stars(self.type_words())
        token = self.token
        name = self.new_name("the function's name")
        if name == "main":
            raise ScriptError("the script itself is 'main'", token.place, "choose another name")
        if any(function.name == name for function in self.functions):
            raise ScriptError(f"there is a function '{name}' already", token.place)
        if isinstance(returns, Struct):
            raise ScriptError("a function cannot return a struct", token.place, "return a pointer, or take one")
        parameters = self.parameters()
        self.scope.in_function = True
        body = self.block("a function's body")
        self.scope.in_function = False
        self.functions.append(tree.Function(token.place, name, returns, parameters, body))

    def parameters(self) -> list[tree.Parameter]:
        self.expect("(")
        found: list[tree.Parameter] = []
        if self.is_word("void") and self.peek().text == ")" and self.peek().kind is Kind.SIGN:
            self.advance()
        if self.accept(")"):
            return found
        while True:
            if not self.starts_type() or self.is_word("typedef"):
                raise self.expected("a parameter's type", "as in: int count")
            type_ = self.stars(self.type_words())
            token = self.token
            name = self.new_name("the parameter's name")
            if any(other.name == name for other in found):
                raise ScriptError(f"there is a parameter '{name}' already", token.place)
            type_ = self.dimensions(type_, token.place)
            if isinstance(type_, Array):
                type_ = Pointer(type_.of)
            if isinstance(type_, Struct):
                raise ScriptError("a struct cannot be passed", token.place, "pass a pointer to it")
            self.sized(type_, token.place)
            found.append(tree.Parameter(token.place, type_, name))
            if self.accept(")"):
                return found
            self.expect(",")

    # ---- statements ----

    def block(self, what: str = "a block") -> tree.Block:
        place = self.token.place
        if not self.is_sign("{"):
            raise self.expected("'{'", f"{what} stands between braces")
        self.advance()
        self.deeper()
        block = tree.Block(place)
        while not self.accept("}"):
            if self.token.kind is Kind.END:
                raise self.expected("'}'")
            self.statement(block.statements)
        self.shallower()
        return block

    def statement(self, statements: list[tree.Statement]) -> None:
        """Parse one, and append what it comes to: nothing, or several where a declaration names several variables."""
        token = self.token
        if token.kind is Kind.SIGN and token.text == ";":
            self.advance()
        elif token.kind is Kind.SIGN and token.text == "{":
            statements.append(self.block())
        elif token.kind is Kind.INCLUDE:
            raise ScriptError("#include stands outside of all braces", token.place)
        elif token.kind is Kind.WORD and token.text == "typedef":
            self.typedef()
        elif self.starts_type():
            if self.is_function():
                raise ScriptError("a function stands outside of all other braces", token.place)
            statements += self.declaration()
            self.semicolon()
        elif token.kind is Kind.WORD and token.text in _STATEMENTS:
            _STATEMENTS[token.text](self, statements)
        else:
            statements.append(self.simple())
            self.semicolon()

    def semicolon(self) -> None:
        if self.is_sign(";"):
            self.advance()
            return
        if self.token.kind is Kind.END or (self.is_sign("}") and self.at):
            # `{ x = 1 }` and a last statement without one: it is clear what is meant, but HyperDbg wants it.
            end = self.tokens[self.at - 1].place
            raise ScriptError("';' expected", Place(end.source, end.end, end.end))
        raise self.expected("';' or a sign")

    def typedef(self) -> None:
        self.advance()
        if not self.starts_type():
            raise self.expected("a type")
        base = self.type_words()
        type_ = self.stars(base)
        token = self.token
        if token.kind is Kind.WORD and token.text in self.scope.typedefs:
            raise ScriptError(f"there is a type '{token.text}' already", token.place)
        name = self.new_name("the new type's name")
        self.scope.typedefs[name] = self.dimensions(type_, token.place)
        self.semicolon()

    def declaration(self) -> list[tree.Statement]:
        base = self.type_words()
        found: list[tree.Statement] = []
        if isinstance(base, Struct) and self.is_sign(";"):
            return found  # it only defines the struct
        while True:
            found.append(self.declarator(base))
            if not self.accept(","):
                return found

    def declarator(self, base: Type) -> tree.Declare:
        type_ = self.stars(base)
        token = self.token
        is_global = token.kind is Kind.DOTTED
        name = self.advance().text if is_global else self.new_name("a variable's name")
        type_ = self.dimensions(type_, token.place)
        start: tree.Expression | tree.Braces | None = None
        if self.accept("="):
            start = self.braces() if self.is_sign("{") else self.expression()
            if self.is_sign("="):
                # `int x = y = 5`: a chain, whose first target is the new variable.
                start = self.chain(start)
        if isinstance(type_, Array) and type_.count == 0:
            type_ = self.counted(type_, start, token.place)
        if type_ == VOID:
            raise ScriptError("a variable cannot be void", token.place)
        self.sized(type_, token.place)
        return tree.Declare(token.place, type_, name, is_global, start)

    def chain(self, first: tree.Expression | tree.Braces) -> tree.Expression:
        if isinstance(first, tree.Braces):
            raise self.expected("';'")
        targets = [first]
        while self.accept("="):
            targets.append(self.expression())
        value = targets.pop()
        return tree.Chain(first.place.to(value.place), targets, value)

    def counted(self, type_: Array, start: tree.Expression | tree.Braces | None, place: Place) -> Array:
        if isinstance(start, tree.Braces) and start.items:
            return Array(type_.of, len(start.items))
        if isinstance(start, tree.Text):
            return Array(type_.of, len(start.data) // (2 if start.wide else 1) + 1)
        raise ScriptError("the number of elements is missing", place)

    def braces(self) -> tree.Braces:
        self.deeper()
        place = self.expect("{").place
        found = tree.Braces(place, [])
        while not self.accept("}"):
            found.items.append(self.braces() if self.is_sign("{") else self.expression())
            if not self.accept(",") and not self.is_sign("}"):
                raise self.expected("',' or '}'")
        self.shallower()
        return found

    def simple(self) -> tree.Statement:
        """An assignment, ``++``/``--`` or a call."""
        token = self.token
        if token.kind is Kind.SIGN and token.text in ("++", "--"):
            self.advance()
            return self.step(self.unary(), token)
        first = self.expression()
        token = self.token
        if token.kind is Kind.SIGN and token.text in ("++", "--"):
            self.advance()
            return self.step(first, token)
        if token.kind is Kind.SIGN and token.text in _ASSIGN:
            self.advance()
            value = self.expression()
            return tree.Assign(first.place.to(value.place), [first], token.text[:-1], value)
        if not self.is_sign("="):
            return self.evaluate(first)
        targets = [first]
        while self.accept("="):
            targets.append(self.expression())
        value = targets.pop()
        return tree.Assign(first.place.to(value.place), targets, "=", value)

    def step(self, target: tree.Expression, sign: Token) -> tree.Statement:
        one = tree.Number(sign.place, 1)
        return tree.Assign(target.place.to(sign.place), [target], sign.text[0], one)

    def evaluate(self, call: tree.Expression) -> tree.Statement:
        if not isinstance(call, tree.Call):
            hint = "to assign, write = ; to see the value, print(...)"
            raise ScriptError("this computes a value and does nothing with it", call.place, hint)
        if self.is_sign("{") and call.name not in BUILTINS:
            raise ScriptError(f"there is no statement '{call.name}'", call.name_place, did_you_mean(call.name, KEYWORDS))
        return tree.Evaluate(call.place, call)

    def condition(self, what: str) -> tree.Expression:
        self.expect("(", f"the condition of '{what}' stands between parentheses")
        if self.is_sign(")"):
            raise self.expected("a condition")
        condition = self.expression()
        if self.is_sign("="):
            raise ScriptError("this assigns, but a condition is wanted here", self.token.place, "to compare, write ==")
        self.expect(")")
        return condition

    def if_(self, statements: list[tree.Statement]) -> None:
        place = self.advance().place
        branches = [(self.condition("if"), self.block("what an 'if' does"))]
        otherwise = None
        while True:
            if self.is_word("elsif"):
                self.advance()
            elif self.is_word("else") and self.peek().kind is Kind.WORD and self.peek().text == "if":
                self.advance()
                self.advance()
            else:
                break
            branches.append((self.condition("elsif"), self.block("what an 'elsif' does")))
        if self.is_word("else"):
            self.advance()
            otherwise = self.block("what an 'else' does")
        statements.append(tree.If(place, branches, otherwise))

    def while_(self, statements: list[tree.Statement]) -> None:
        place = self.advance().place
        condition = self.condition("while")
        statements.append(tree.Loop(place, [], condition, [], self.block("a loop's body")))

    def do(self, statements: list[tree.Statement]) -> None:
        place = self.advance().place
        body = self.block("a loop's body")
        if not self.is_word("while"):
            raise self.expected("'while'")
        self.advance()
        condition = self.condition("while")
        self.semicolon()
        statements.append(tree.Loop(place, [], condition, [], body, test_first=False))

    def for_(self, statements: list[tree.Statement]) -> None:
        place = self.advance().place
        self.expect("(")
        first: list[tree.Statement] = []
        if self.starts_type():
            first += self.declaration()
        elif not self.is_sign(";"):
            first += self.simple_list()
        self.expect(";")
        condition = None if self.is_sign(";") else self.expression()
        self.expect(";")
        step = [] if self.is_sign(")") else self.simple_list()
        self.expect(")")
        statements.append(tree.Loop(place, first, condition, step, self.block("a loop's body")))

    def simple_list(self) -> list[tree.Statement]:
        found = [self.simple()]
        while self.accept(","):
            found.append(self.simple())
        return found

    def jump(self, statements: list[tree.Statement]) -> None:
        token = self.advance()
        self.semicolon()
        statements.append(tree.Jump(token.place, token.text))

    def return_(self, statements: list[tree.Statement]) -> None:
        place = self.advance().place
        value = None if self.is_sign(";") else self.expression()
        self.semicolon()
        statements.append(tree.Return(place, value))

    def lost_else(self, statements: list[tree.Statement]) -> None:
        raise ScriptError(f"'{self.token.text}' without an 'if' before it", self.token.place)


_STATEMENTS: dict[str, Callable[[_Parser, list[tree.Statement]], None]] = {
    "if": _Parser.if_,
    "while": _Parser.while_,
    "do": _Parser.do,
    "for": _Parser.for_,
    "break": _Parser.jump,
    "continue": _Parser.jump,
    "return": _Parser.return_,
    "else": _Parser.lost_else,
    "elsif": _Parser.lost_else,
}
