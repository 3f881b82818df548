"""printf: reading a format when a script is compiled, and making the text from what a run recorded."""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass


class Take(enum.Enum):
    """What a conversion needs as its argument."""

    INTEGER = "an integer"
    FLOAT = "a floating-point number"
    TEXT = "a string or its address"
    WIDE = "a wide string or its address"


@dataclass(frozen=True, slots=True)
class Conversion:
    """One ``%...`` of a format."""

    flags: str
    width: int | None
    star_width: bool
    """The width is an argument of its own."""
    precision: int | None
    star_precision: bool
    letter: str
    bits: int
    """Of an integer: how many of the argument's 64 are shown."""

    @property
    def take(self) -> Take:
        """Of its last argument; those of the stars are integers."""
        if self.letter in "eEfgG":
            return Take.FLOAT
        if self.letter == "s":
            return Take.WIDE if self.bits == 16 else Take.TEXT
        return Take.INTEGER

    @property
    def takes(self) -> list[Take]:
        """All of its arguments."""
        stars = self.star_width + self.star_precision
        return [Take.INTEGER] * stars + [self.take]

    @property
    def slots(self) -> int:
        """Places in a record: one an argument, and one for the precision of a string, which bounds what is copied."""
        return len(self.takes) + (self.take in (Take.TEXT, Take.WIDE) and self.precision is not None)


@dataclass(frozen=True, slots=True)
class Format:
    """A format: literal bytes and conversions in their order."""

    parts: tuple[bytes | Conversion, ...]

    @property
    def conversions(self) -> list[Conversion]:
        """Without the literal parts."""
        return [part for part in self.parts if isinstance(part, Conversion)]

    @property
    def takes(self) -> list[Take]:
        """What the arguments must be."""
        return [take for conversion in self.conversions for take in conversion.takes]


_FULL = re.compile(
    rb"%(?P<flags>[-+ #0]*)(?P<width>[0-9]+|\*)?(?:\.(?P<precision>[0-9]*|\*))?"
    rb"(?P<length>hh|h|ll|l|w|I64)?(?P<letter>[diuoxXcpsfeEgG])"
)
_HYPERDBG = re.compile(
    rb"%(?P<flags>)(?P<width>)(?P<precision>)(?P<length>(?:ll|l|h)(?=[diuox])|[wl](?=s)|)(?P<letter>[diuoxcpsf])"
)
_BITS = {"": 32, "l": 32, "h": 16, "hh": 8, "ll": 64, "I64": 64}
_MOST = 4096


def parse_format(text: bytes, arguments: int) -> Format | None:
    """The format, for that many arguments; None where it wants another number.

    ``%%`` is a percent sign. What C has and HyperDbg has not (flags, width, precision, %X, %e, %g, %hh) is understood where the
    number of arguments fits; else the format is read as HyperDbg does, to whom such things are literal text.
    """
    for pattern in (_FULL, _HYPERDBG):
        found = _parse(text, pattern)
        if len(found.takes) == arguments:
            return found
    return None


def wanted(text: bytes) -> int:
    """How many arguments the format wants, for a message."""
    return len(_parse(text, _FULL).takes)


def _parse(text: bytes, pattern: re.Pattern[bytes]) -> Format:
    parts: list[bytes | Conversion] = []
    literal = bytearray()
    at = 0
    while at < len(text):
        if text[at : at + 2] == b"%%":
            literal += b"%"
            at += 2
            continue
        match = pattern.match(text, at) if text[at : at + 1] == b"%" else None
        conversion = _conversion(match) if match else None
        if match and conversion:
            if literal:
                parts.append(bytes(literal))
                literal.clear()
            parts.append(conversion)
            at = match.end()
        else:
            literal.append(text[at])
            at += 1
    if literal:
        parts.append(bytes(literal))
    return Format(tuple(parts))


def _conversion(match: re.Match[bytes]) -> Conversion | None:
    fields = {name: (value or b"").decode("ascii") for name, value in match.groupdict().items()}
    letter, length = fields["letter"], fields["length"]
    if letter == "s":
        if length not in ("", "w", "l"):
            return None
        bits = 16 if length else 8
    elif letter in "cp" or letter in "feEgG":
        if length not in ("", "l", "ll"):
            return None
        bits = 8 if letter == "c" else 64
    elif length == "w":
        return None
    else:
        bits = _BITS[length]
    width, precision = fields["width"], fields["precision"]
    has_precision = match["precision"] is not None and "." in match[0].decode("ascii", "replace")
    if any(part.isdigit() and int(part) > _MOST for part in (width, precision)):
        return None
    return Conversion(
        flags=fields["flags"],
        width=int(width) if width.isdigit() else None,
        star_width=width == "*",
        precision=(int(precision) if precision.isdigit() else 0) if has_precision and precision != "*" else None,
        star_precision=precision == "*",
        letter=letter,
        bits=bits,
    )


# ---- records ----


def records_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The prints in what a run left behind (struct vmexit_text): the number of the format, and the slots."""
    at = 0
    while at < len(data):
        size, number = struct.unpack_from("<II", data, at)
        yield number, data[at + 8 : at + size]
        at += size


class _Slots:
    """Reads the slots of a record one by one."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def number(self) -> int:
        value: int = struct.unpack_from("<Q", self.data, self.at)[0]
        self.at += 8
        return value

    def text(self) -> bytes:
        length = self.number()
        found = self.data[self.at : self.at + length]
        self.at += (length + 7) // 8 * 8
        return found


def render(format_: Format, data: bytes) -> bytes:
    """The text of one print from its slots. A NUL ends it, as in HyperDbg."""
    slots = _Slots(data)
    out = b"".join(part if isinstance(part, bytes) else _rendered(part, slots) for part in format_.parts)
    return out.split(b"\0", 1)[0]


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _star(slots: _Slots) -> int:
    """A width or precision that was given as an argument; bounded, as it may be any number."""
    return max(-_MOST, min(_signed(slots.number(), 32), _MOST))


def _rendered(conversion: Conversion, slots: _Slots) -> bytes:
    flags, width, precision = conversion.flags, conversion.width, conversion.precision
    if conversion.star_width:
        width = _star(slots)
        if width < 0:
            flags, width = flags + "-", -width
    if conversion.star_precision:
        given = _star(slots)
        precision = given if given >= 0 else None
    match conversion.take:
        case Take.TEXT | Take.WIDE:
            if conversion.precision is not None:
                slots.number()
            text = slots.text()
            if conversion.take is Take.WIDE:
                text = text.decode("utf-16-le", "replace").encode()
            return _padded(text, flags.replace("0", ""), width)
        case Take.FLOAT:
            (value,) = struct.unpack("<d", struct.pack("<Q", slots.number()))
            sign = "".join(flag for flag in "-+ #0" if flag in flags)
            form = f"%{sign}{width or ''}.{6 if precision is None else precision}{conversion.letter}"
            return str(form % value).encode()
        case Take.INTEGER:
            return _integer(conversion, slots.number(), flags, width, precision)


def _integer(conversion: Conversion, value: int, flags: str, width: int | None, precision: int | None) -> bytes:
    letter = conversion.letter
    if letter == "c":
        return _padded(bytes([value & 0xFF]), flags.replace("0", ""), width)
    if letter == "p":
        return _padded(b"%016X" % value, flags.replace("0", ""), width)
    sign = ""
    if letter in "di":
        value = _signed(value, conversion.bits)
        sign = "-" if value < 0 else "+" if "+" in flags else " " if " " in flags else ""
        value = abs(value)
    else:
        value &= (1 << conversion.bits) - 1
    digits = format(value, {"o": "o", "x": "x", "X": "X"}.get(letter, "d"))
    if precision is not None:
        digits = "" if precision == 0 and value == 0 else digits.rjust(precision, "0")
    if "#" in flags and letter == "o" and not digits.startswith("0"):
        digits = "0" + digits
    if "#" in flags and letter in "xX" and value:
        sign = "0" + letter
    if "0" in flags and "-" not in flags and precision is None and width:
        digits = digits.rjust(width - len(sign), "0")
    return _padded((sign + digits).encode(), flags, width)


def _padded(text: bytes, flags: str, width: int | None) -> bytes:
    if not width:
        return text
    return text.ljust(width) if "-" in flags else text.rjust(width)
