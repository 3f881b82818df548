"""From the text of a script to its tokens."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

from vmexit.script.errors import Place, ScriptError, Source

MAX_TEXT = 64 * 1024
"""Characters that a script may have; its includes count on their own."""


class Kind(enum.Enum):
    """What a token is."""

    NUMBER = "number"
    FLOAT = "floating-point number"
    STRING = "string"
    WIDE = "wide string"
    WORD = "word"
    """A keyword, register, type, number of hex letters or name; the parser knows which."""
    DOTTED = "name behind a dot"
    """A global variable, or a member where something stands before it."""
    REGISTER = "register"
    PSEUDO = "pseudo-register"
    INCLUDE = "#include"
    SIGN = "sign"
    END = "end of the script"


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its kind, the text that matters (without ``@``, ``$``, ``.``, backticks), its value, and its place."""

    kind: Kind
    text: str
    place: Place
    value: int | float | bytes = 0
    """Of a NUMBER its 64 bits, of a FLOAT the number, of a STRING or WIDE the bytes without the terminator."""


_SPACE = re.compile(r"(?:[ \t\r\n\f\v]+|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_`]|!(?=[A-Za-z0-9_]))*")
_DIGITS = re.compile(r"[0-9][A-Za-z0-9_`]*")
_FLOAT = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_!]*")
_STRING = re.compile(r'L?"')
_SIGN = re.compile(
    r"<<=|>>=|\+\+|\+=|->|--|-=|\*=|>>|>=|<<|<=|/=|==|!=|%=|\|\||\|=|&&|&=|\^=|[-~+*><=/!%,;:(){}\[\]|&^?]",
)
_INCLUDE = re.compile(r"#include\b")
_RADIX = {"x": (16, "hexadecimal"), "n": (10, "decimal"), "o": (8, "octal"), "t": (8, "octal"), "y": (2, "binary")}
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", '"': '"', "r": "\r", "0": "\0"}
_HEX = "0123456789abcdefABCDEF"
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def is_hex_word(word: str) -> bool:
    """Whether a word that starts with a letter is a number all the same: ``deadbeef``, ``a``, ``f1``."""
    return all(char in _HEX for char in word)


def tokens_of(source: Source) -> list[Token]:
    """All tokens of a source, the last of kind END. Raises ScriptError."""
    if len(source.text) > MAX_TEXT:
        raise ScriptError(f"a script can have {MAX_TEXT} characters, not {len(source.text)}", Place(source, 0, 0))
    return _Lexer(source).tokens()


class _Lexer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.text = source.text
        self.at = 0

    def tokens(self) -> list[Token]:
        found: list[Token] = []
        while True:
            self._skip_space()
            if self.at >= len(self.text):
                end = len(self.text)
                found.append(Token(Kind.END, "", Place(self.source, end, end)))
                return found
            found.append(self._token(found[-1] if found else None))

    def _place(self, start: int, end: int) -> Place:
        return Place(self.source, start, end)

    def _error(self, message: str, start: int, end: int, hint: str | None = None) -> ScriptError:
        return ScriptError(message, self._place(start, end), hint)

    def _skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        if match:
            self.at = match.end()
        if self.text.startswith("/*", self.at):
            raise self._error("this comment does not end", self.at, self.at + 2, "end it with */")

    def _make(self, kind: Kind, text: str, start: int, value: int | float | bytes = 0) -> Token:
        return Token(kind, text, self._place(start, self.at), value)

    def _token(self, previous: Token | None) -> Token:
        start, text = self.at, self.text
        char = text[start]
        after_arrow = previous is not None and previous.kind is Kind.SIGN and previous.text == "->"
        if after_arrow and (match := _NAME.match(text, start)):
            self.at = match.end()
            return self._make(Kind.DOTTED, match[0], start)
        if _STRING.match(text, start):
            return self._string()
        if char.isdecimal() and char.isascii():
            return self._number()
        if match := _WORD.match(text, start):
            self.at = match.end()
            return self._make(Kind.WORD, match[0].replace("`", ""), start)
        if char == ".":
            return self._dotted()
        if char in "@$":
            return self._named(char)
        if match := _INCLUDE.match(text, start):
            self.at = match.end()
            return self._make(Kind.INCLUDE, match[0], start)
        if match := _SIGN.match(text, start):
            self.at = match.end()
            return self._make(Kind.SIGN, match[0], start)
        hint = "there are no character literals; write the number, as 41 for A" if char == "'" else None
        raise self._error(f"'{char}' means nothing here", start, start + 1, hint)

    def _dotted(self) -> Token:
        start = self.at
        if match := _FLOAT.match(self.text, start):
            return self._float(match)
        match = _NAME.match(self.text, start + 1)
        if not match:
            raise self._error("a name is missing behind the dot", start, start + 1)
        self.at = match.end()
        return self._make(Kind.DOTTED, match[0], start)

    def _named(self, sign: str) -> Token:
        start = self.at
        match = _NAME.match(self.text, start + 1)
        kind = Kind.REGISTER if sign == "@" else Kind.PSEUDO
        if not match:
            raise self._error(f"the name of a {kind.value} is missing behind '{sign}'", start, start + 1)
        # A register next to a comparison: `@rax!=5`.
        name = match[0].split("!", 1)[0]
        self.at = start + 1 + len(name)
        return self._make(kind, name, start)

    def _float(self, match: re.Match[str]) -> Token:
        start = self.at
        self.at = match.end()
        tail = _WORD.match(self.text, self.at) or _DIGITS.match(self.text, self.at)
        if tail:
            raise self._error("a floating-point number has neither exponent nor suffix", start, tail.end())
        value = float(match[0])
        if math.isinf(value) or (value == 0 and match[0].strip("0.")):
            raise self._error("this floating-point number is out of range", start, self.at)
        return self._make(Kind.FLOAT, match[0], start, value)

    def _number(self) -> Token:
        start = self.at
        match = _DIGITS.match(self.text, start)
        assert match
        end = match.end()
        if self.text.startswith(".", end):
            decimal = _FLOAT.match(self.text, start)
            if decimal:
                return self._float(decimal)
            raise self._error("a floating-point number is written in decimal digits", start, end + 1)
        self.at = end
        digits = match[0].replace("`", "")
        radix, name = 16, "hexadecimal"
        prefixed = len(digits) > 1 and digits[0] == "0" and digits[1] in _RADIX
        if prefixed:
            radix, name = _RADIX[digits[1]]
        try:
            body = digits[2:] if prefixed else digits
            if "_" in body:
                raise ValueError
            value = _in_radix(body, radix)
        except ValueError:
            hint = "prefixes are 0x, 0n, 0o, 0t and 0y, in lower case" if len(digits) > 1 and digits[1] in "XNOTY" else None
            raise self._error(f"'{digits}' is no {name} number", start, end, hint) from None
        return self._make(Kind.NUMBER, match[0], start, value)

    def _string(self) -> Token:
        start = self.at
        wide = self.text[start] == "L"
        at = start + (2 if wide else 1)
        data = bytearray()
        while True:
            if at >= len(self.text):
                raise self._error("this string does not end", start, start + 1, 'end it with "')
            char = self.text[at]
            if char == '"':
                self.at = at + 1
                return self._make(Kind.WIDE if wide else Kind.STRING, self.text[start : self.at], start, bytes(data))
            if char == "\\":
                unit, at = self._escape(at, 4 if wide else 2)
                data += unit.to_bytes(2, "little") if wide else bytes([unit])
            else:
                data += char.encode("utf-16-le" if wide else "utf-8", "surrogatepass" if wide else "surrogateescape")
                at += 1

    def _escape(self, at: int, most: int) -> tuple[int, int]:
        """The value of the escape at `at`, and where the text goes on."""
        char = self.text[at + 1 : at + 2]
        if char in _ESCAPES and char:
            return ord(_ESCAPES[char]), at + 2
        if char != "x":
            raise self._error(f"'\\{char}' is no escape", at, at + 2, r"there are \n, \t, \r, \0, \\, \" and \x41")
        end = at + 2
        while end < len(self.text) and self.text[end] in _HEX:
            end += 1
        if not 0 < end - at - 2 <= most:
            raise self._error(rf"\x takes 1 to {most} hexadecimal digits here", at, max(end, at + 2))
        return int(self.text[at + 2 : end], 16), end


def _in_radix(digits: str, radix: int) -> int:
    """The low 64 bits; ValueError for digits that the radix does not have. A prefix alone is 0."""
    value = 0
    allowed = _HEX if radix == 16 else "0123456789"[:radix]
    for digit in digits:
        if digit not in allowed:
            raise ValueError
        value = (value * radix + int(digit, 16)) & _MASK64
    return value
