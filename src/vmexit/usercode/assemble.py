"""Assembly in Intel's syntax to machine code, by LLVM's assembler in a process of its own.

LLVM ends the process that it is in on a syntax error. The text is data for it: directives that read files, or that make much of
little, are refused before.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vmexit.usercode.errors import CodeError
from vmexit.usercode.hexcode import MAX_CODE

_CHILD = Path(__file__).with_name("assembler.py")
_TIMEOUT_S = 20.0
_MAX_TEXT = 0x40000

_STATEMENT = re.compile(r"[^;\n]+")
_LABELS = re.compile(r"\s*(?:[A-Za-z_.$?@][\w.$?@]*\s*:\s*)*")
_DIRECTIVE = re.compile(r"\.[A-Za-z_0-9]+")
_DATA = frozenset((".byte", ".2byte", ".4byte", ".8byte", ".word", ".short", ".long", ".int", ".quad"))
_ERROR = re.compile(r"error: (?:<inline asm>:(\d+):(\d+): )?(.*)")
# In front of the user's text stands one line, .intel_syntax.
_LINES_BEFORE = 1

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_HEADER = struct.Struct("<40xQ10xHHH")
_PROGBITS, _SYMBOLS, _RELOCATIONS = 1, 2, 4


def assemble(text: str) -> bytes:
    """Machine code of statements that ``;`` or the ends of lines separate, with labels (``name:``); ``#`` begins a comment.

    Numbers are decimal unless written 0x10, as in HyperDbg's own assembler. Raises CodeError at what is wrong.
    """
    _check(text)
    lines = text.expandtabs(1).replace("\r", " ")
    try:
        child = subprocess.run(
            # -P: this room's files are no modules for it.
            [sys.executable, "-P", str(_CHILD)],
            input=lines.encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CodeError(f"the assembler did not come to an end within {_TIMEOUT_S:g} s", 0, len(text)) from None
    except OSError as error:
        raise CodeError(f"the assembler cannot be started: {error.strerror}", 0, len(text)) from None
    said = child.stderr.decode(errors="replace")
    if child.returncode != 0 or "error:" in said:
        raise _explained(text, said)
    code = _code_of(child.stdout, text)
    if not code:
        raise CodeError("there is no instruction", 0, len(text))
    if len(code) > MAX_CODE:
        raise CodeError(f"machine code of {len(code):x} bytes is too long; {MAX_CODE:x} is the most", 0, len(text))
    return code


def _check(text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise CodeError(f"the text is too long: {len(text)} characters; {_MAX_TEXT} are the most", 0, len(text))
    for place, char in enumerate(text):
        if char in "\"'\\" or not (char in "\t\r\n" or " " <= char <= "~"):
            raise CodeError(f"{char!r} has no place in assembly", place, place + 1)
    for statement in _STATEMENT.finditer(text):
        labels = _LABELS.match(statement[0])
        at = labels.end() if labels else 0
        directive = _DIRECTIVE.match(statement[0], at)
        if directive is not None and directive[0].lower() not in _DATA:
            start = statement.start() + directive.start()
            raise CodeError(f"the directive {directive[0]} is not available; {', '.join(sorted(_DATA))} are", start, start + 1)
        # LLVM takes a bracket that is left open for a closed one.
        if statement[0].count("[") != statement[0].count("]"):
            raise CodeError("a bracket is left open", *statement.span())
        if "=" in statement[0]:
            start = statement.start() + statement[0].index("=")
            raise CodeError("symbols cannot be given values; labels are all that has a name", start, start + 1)


def _explained(text: str, said: str) -> CodeError:
    """The first error that LLVM tells of."""
    for line in said.splitlines():
        if found := _ERROR.match(line):
            row, column, message = found.groups()
            if row is None:
                return CodeError(message, 0, len(text))
            start = _offset(text, int(row) - _LINES_BEFORE - 1, int(column) - 1)
            return CodeError(message, start, start + 1)
    return CodeError("the assembler has failed", 0, len(text))


def _offset(text: str, row: int, column: int) -> int:
    """Where a place is in the text; row and column count from 0."""
    start = 0
    for line in text.splitlines(keepends=True)[: max(row, 0)]:
        start += len(line)
    return min(start + column, len(text))


def _code_of(data: bytes, text: str) -> bytes:
    """The section .text of an ELF object. Raises CodeError where something in it refers to the outside."""
    table, size, count, names = _HEADER.unpack_from(data)
    sections = [_SECTION.unpack_from(data, table + index * size) for index in range(count)]
    strings = sections[names][4]
    code = b""
    for name, kind, _, _, offset, length, *_ in sections:
        if kind == _PROGBITS and _string(data, strings + name) == ".text":
            code = data[offset : offset + length]
    symbols = dict(enumerate(_symbols(data, sections)))
    for _, kind, _, _, offset, length, _, _, _, _ in sections:
        if kind == _RELOCATIONS and length:
            _, info, _ = _RELOCATION.unpack_from(data, offset)
            raise _loose(text, symbols[info >> 32])
    return code


def _symbols(data: bytes, sections: list[tuple[int, ...]]) -> Iterator[str]:
    """The names of the symbols that are defined nowhere; empty for all others."""
    for section in sections:
        if section[1] == _SYMBOLS:
            names = sections[section[6]][4]
            for name, _, _, where, _, _ in _SYMBOL.iter_unpack(data[section[4] : section[4] + section[5]]):
                yield _string(data, names + name) if where == 0 else ""


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode(errors="replace")


def _loose(text: str, name: str) -> CodeError:
    if not name:
        return CodeError("the address of a label is not known yet; lea reg, [rip + label] takes it", 0, len(text))
    found = re.search(rf"(?<![\w.$?@]){re.escape(name)}(?![\w.$?@])", text)
    start, end = found.span() if found else (0, len(text))
    return CodeError(f"there is no label '{name}'", start, end)
