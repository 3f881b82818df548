"""Cuts what a person typed into tokens, numbers and whole commands, by HyperDbg's rules."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

U32_MAX = 0xFFFF_FFFF
U64_MAX = 0xFFFF_FFFF_FFFF_FFFF

# What C calls white space: str.strip() alone would also eat non-breaking and other Unicode spaces.
_WHITE = " \t\n\v\f\r"
_TO_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")

_WORD_MARK = re.compile(r'[ "{\\/]')
_BLOCK_MARK = re.compile(r'["{}\\/]')
_CLOSING_QUOTE = re.compile(r'(?<!\\)"')
_CLOSING_BRACE = re.compile(r"(?<!\\)\}")
_QUOTE = re.compile('"')
_NEWLINE = re.compile("\n")
_TYPED_NEWLINE = re.compile(r"\\n")

_NUMBER_PREFIX = re.compile(r"[0\\]?([xXnN])")
_HEX_DIGITS = re.compile(r"[0-9a-fA-F]+")
_DECIMAL_DIGITS = re.compile(r"[0-9]+")

# A backslash before another backslash or a quote takes its meaning away; before a brace it does not.
_NESTING = re.compile(r'\\[\\"]|["{}]')


class TokenKind(enum.Enum):
    """What a token was typed as."""

    NUMBER = "number"
    """A word that `parse_number` accepts (`add`, `0n10`); a command may well take it as a name."""
    WORD = "word"
    STRING = "string"
    """Text in double quotes."""
    BLOCK = "block"
    """Text in braces."""


@dataclass(frozen=True, slots=True)
class Token:
    """One piece of a command.

    `text` is what the token means: without its quotes or outer braces, with escapes undone. `start` and
    `end` (exclusive) are offsets into the tokenized line of the token as typed, quotes and braces included.
    """

    kind: TokenKind
    text: str
    start: int
    end: int

    @property
    def lower(self) -> str:
        """The text with A-Z made small (no other letter), for comparing with keywords."""
        return self.text.translate(_TO_LOWER)


def tokenize(line: str) -> list[Token]:
    """The tokens of one command, which may span lines; any text at all is accepted.

    Only the space character separates words; tabs and newlines stay in a word and are trimmed at its ends. An
    unfinished quote or brace makes the rest of the line one word.
    """
    return _Tokenizer(line).run()


def words_of(words: Iterable[str]) -> list[Token]:
    """Words that a shell has cut already, as the tokens of a line in which one space stands between them."""
    tokens, at = [], 0
    for word in words:
        kind = TokenKind.WORD if parse_number(word) is None else TokenKind.NUMBER
        tokens.append(Token(kind, word, at, at + len(word)))
        at += len(word) + 1
    return tokens


class _Next:
    """Finds where a pattern occurs next.

    Positions asked about must not go back, and so all searches together read the text once.
    """

    def __init__(self, pattern: re.Pattern[str], text: str) -> None:
        self._pattern = pattern
        self._text = text
        self._found = -1

    def at_or_after(self, position: int) -> int:
        """Offset of the first occurrence from `position` on; the text's length when there is none."""
        if self._found < position:
            match = self._pattern.search(self._text, position)
            self._found = match.start() if match else len(self._text)
        return self._found


class _Tokenizer:
    """A walk along one line: `_at` is the next character, `_pieces` the text gathered for the next token."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._at = 0
        self._pieces: list[str] = []
        self._start: int | None = None  # where what was gathered was typed, white space at its ends left out
        self._end = 0
        self._tokens: list[Token] = []
        self._no_comment_end = False
        self._newline = _Next(_NEWLINE, line)
        self._typed_newline = _Next(_TYPED_NEWLINE, line)
        self._literal_start = _Next(_QUOTE, line)
        self._literal_end = _Next(_QUOTE, line)
        self._closing_brace = _Next(_CLOSING_BRACE, line)

    def run(self) -> list[Token]:
        line = self._line
        while self._at < len(line):
            match line[self._at]:
                case " ":
                    self._finish_word()
                    self._at += 1
                case '"':
                    self._finish_word()
                    self._string()
                case "{":
                    self._finish_word()
                    self._block()
                case "\\":
                    self._backslash(in_block=False)
                case "/":
                    self._slash(in_block=False)
                case _:
                    self._take_up_to(_WORD_MARK)
        self._finish_word()
        return self._tokens

    def _string(self) -> None:
        opening = self._at
        closing = _CLOSING_QUOTE.search(self._line, opening + 1)
        end = closing.start() if closing else len(self._line)
        text = self._line[opening + 1 : end].replace('\\"', '"')
        if closing is None:
            self._at = opening + 1
            self._take(end, text)
            self._finish_word(opening)
        else:
            self._at = end + 1
            if text:
                self._tokens.append(Token(TokenKind.STRING, text, opening, self._at))

    def _block(self) -> None:
        line = self._line
        opening = self._at
        depth = 1
        self._at += 1
        while self._at < len(line):
            match line[self._at]:
                case '"':
                    closing = _CLOSING_QUOTE.search(line, self._at + 1)
                    self._take(closing.end() if closing else len(line))
                case "{":
                    depth += 1
                    self._take(self._at + 1)
                case "}":
                    depth -= 1
                    if depth == 0:
                        self._at += 1
                        self._tokens.append(Token(TokenKind.BLOCK, self._gathered(), opening, self._at))
                        return
                    self._take(self._at + 1)
                case "\\":
                    self._backslash(in_block=True)
                case "/":
                    self._slash(in_block=True)
                case _:
                    self._take_up_to(_BLOCK_MARK)
        self._finish_word(opening)

    def _backslash(self, in_block: bool) -> None:
        after = self._at + 2
        following = self._line[self._at + 1 : after]
        if following in ("{", "}"):
            self._take(after, following)
        elif following == '"':
            self._take(after, None if in_block else following)
        elif following == "n" and not self._pieces:
            self._at = after  # a newline written as \n, between tokens
        else:
            self._take(self._at + 1)

    def _slash(self, in_block: bool) -> None:
        """A comment, which a block keeps because it is the script's business, or just a slash."""
        end = self._comment_end(in_block)
        if end is None:
            self._take(self._at + 1)
        elif in_block:
            self._take(end)
        else:
            self._at = end

    def _comment_end(self, in_block: bool) -> int | None:
        """Offset just after the comment that starts here; None when none does."""
        if self._line.startswith("//", self._at):
            return self._line_comment_end(in_block)
        if self._line.startswith("/*", self._at) and not self._no_comment_end:
            closing = self._line.find("*/", self._at + 2)
            if closing >= 0:
                return closing + 2
            self._no_comment_end = True
        return None

    def _line_comment_end(self, in_block: bool) -> int:
        """A `//` comment ends before a newline, a newline written as `\\n` or, in a block, a closing brace.

        The first string literal that follows protects what is before its end from being taken for that brace,
        be it lines away: a comment with a brace in it does not end a script that goes on to print something.
        """
        whole = len(self._line)
        literal_start = self._literal_start.at_or_after(self._at)
        literal_end = self._literal_end.at_or_after(literal_start + 1)
        end = self._newline.at_or_after(self._at)
        typed = self._typed_newline.at_or_after(self._at)
        if not literal_start <= typed <= literal_end:
            end = min(end, typed)
        if in_block and literal_start == whole:
            end = min(end, self._closing_brace.at_or_after(self._at))
        elif in_block and literal_end < whole:
            end = min(end, self._closing_brace.at_or_after(literal_end))
        return whole if self._line[end - 1] == "\\" else end

    def _take_up_to(self, mark: re.Pattern[str]) -> None:
        match = mark.search(self._line, self._at)
        self._take(match.start() if match else len(self._line))

    def _take(self, end: int, text: str | None = None) -> None:
        """Add what was typed up to `end` to the token at hand, as it is or as `text`."""
        piece = self._line[self._at : end] if text is None else text
        if piece:
            self._pieces.append(piece)
            if piece.strip(_WHITE):
                if self._start is None:
                    self._start = self._at + len(piece) - len(piece.lstrip(_WHITE))
                self._end = end - len(piece) + len(piece.rstrip(_WHITE))
        self._at = end

    def _gathered(self) -> str:
        """The text of the token at hand, which ends here."""
        text = "".join(self._pieces)
        self._pieces.clear()
        self._start = None
        return text

    def _finish_word(self, opening: int | None = None) -> None:
        """Make the text gathered a word, unless blank; `opening` is where an unfinished token starts."""
        start = self._start if opening is None else opening
        text = self._gathered().strip(_WHITE)
        if text and start is not None:
            kind = TokenKind.WORD if parse_number(text) is None else TokenKind.NUMBER
            self._tokens.append(Token(kind, text, start, self._end))


def parse_number(text: str) -> int | None:
    """The number that `text` stands for, 0 to 2**64-1, or None when it is not a number.

    Digits are hexadecimal, with or without a prefix `0x`, `\\x` or `x`; after `0n`, `\\n` or `n` they are
    decimal. Prefixes may be capital, and backticks among the digits are ignored. A hexadecimal number too big
    becomes 2**64-1, a decimal one too big is no number.
    """
    prefix = _NUMBER_PREFIX.match(text)
    digits = (text[prefix.end() :] if prefix else text).replace("`", "")
    significant = digits.lstrip("0") or "0"
    if prefix and prefix[1] in "nN":
        # The length is looked at first because int() refuses thousands of decimal digits.
        if not _DECIMAL_DIGITS.fullmatch(digits) or len(significant) > 20:
            return None
        number = int(significant)
        return number if number <= U64_MAX else None
    if not _HEX_DIGITS.fullmatch(digits):
        return None
    return int(significant, 16) if len(significant) <= 16 else U64_MAX


def parse_u32(text: str) -> int | None:
    """Like `parse_number`, but None also for what does not fit in 32 bits."""
    number = parse_number(text)
    return number if number is not None and number <= U32_MAX else None


class _Nesting:
    """What is still open after the lines fed so far. Comments and escaped braces are not understood."""

    def __init__(self) -> None:
        self._in_string = False
        self._depth = 0

    def feed(self, line: str) -> None:
        for match in _NESTING.finditer(line):
            mark = match[0]
            if mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif mark == "{":
                self._depth += 1
            elif mark == "}" and self._depth:
                self._depth -= 1

    @property
    def closed(self) -> bool:
        return not self._in_string and self._depth == 0


def is_complete(text: str) -> bool:
    """Whether the lines typed so far make a whole command: no quote and no brace is still open."""
    nesting = _Nesting()
    nesting.feed(text)
    return nesting.closed


def commands_of(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The commands of a script file, each with the number of its first line, counted from 1.

    A command goes on while a quote or brace is open; its lines are joined by newlines. Line ends are taken
    off, blank lines between commands are skipped, and an unfinished last command is given as it stands.
    """
    gathered: list[str] = []
    nesting = _Nesting()
    first = 0
    for number, ended_line in enumerate(lines, start=1):
        line = ended_line.rstrip("\r\n")
        if not gathered:
            if not line.strip(_WHITE):
                continue
            first = number
        gathered.append(line)
        nesting.feed(line)
        if nesting.closed:
            yield first, "\n".join(gathered)
            gathered.clear()
    if gathered:
        yield first, "\n".join(gathered)
