"""Machine code written as hexadecimal digits, in all forms that HyperDbg documents."""

from __future__ import annotations

import re

from vmexit.usercode.errors import CodeError

MAX_CODE = 0x10000
"""The longest code there can be, in bytes."""

# One word: an optional prefix and digits; between the bytes of one word there may be further \x.
_WORD = re.compile(r"[^\s,]+")
_PREFIX = re.compile(r"0x|\\x|x", re.IGNORECASE)
_INNER = re.compile(r"\\x", re.IGNORECASE)
_NO_DIGIT = re.compile(r"[^0-9a-fA-F]")


def parse(text: str) -> bytes:
    """The bytes of ``90 90``, ``9090``, ``0x9090``, ``0x90, 0x90``, ``\\x90\\x90`` or ``x9090``, in any letter case.

    As in HyperDbg a single word with an odd number of digits gets a zero in front. Raises CodeError.
    """
    words = list(_WORD.finditer(text))
    digits = [_digits(word) for word in words]
    if len(words) == 1 and len(digits[0]) % 2:
        digits[0] = "0" + digits[0]
    for word, found in zip(words, digits, strict=True):
        if len(found) % 2:
            raise CodeError(f"'{word[0]}' has an odd number of digits; a byte has two", word.start(), word.end())
    code = bytes.fromhex("".join(digits))
    if not code:
        raise CodeError("there is no machine code", 0, len(text))
    if len(code) > MAX_CODE:
        raise CodeError(f"machine code of {len(code):x} bytes is too long; {MAX_CODE:x} is the most", 0, len(text))
    return code


def _digits(word: re.Match[str]) -> str:
    prefix = _PREFIX.match(word[0])
    first = prefix.end() if prefix else 0
    digits = _INNER.sub("", word[0][first:])
    if _NO_DIGIT.search(digits) is not None:
        raise CodeError(
            f"'{word[0]}' is no machine code, which is written as hexadecimal digits; 'asm' in front makes it assembly",
            word.start(),
            word.end(),
        )
    return digits
