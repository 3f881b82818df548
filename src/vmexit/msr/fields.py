"""The bit fields of an MSR: what a value says, and what a change of it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_NUMBERED = re.compile(r"(.*\D)(\d+)")
_LINE = re.compile(r"(\d+)(?::(\d+))?(@?)\s+(\S+)\s*([^{]*?)\s*(?:\{([^}]*)\})?")


@dataclass(frozen=True, slots=True)
class Field:
    """Bits ``high`` to ``low`` of an MSR."""

    low: int
    high: int
    name: str
    text: str
    """What it means when it is set, or what it holds; may be empty."""
    values: Mapping[int, str]
    """What some values of it are called."""
    usual: int | None
    """The value that is not worth telling (but 0 without a name never is)."""
    in_place: bool
    """It is told as an address: the bits below it as zeros."""

    @property
    def mask(self) -> int:
        """Its bits within the MSR."""
        return (1 << self.high + 1) - (1 << self.low)

    @property
    def is_flag(self) -> bool:
        """A single bit that has no names for its values."""
        return self.low == self.high and not self.values

    @property
    def bits(self) -> str:
        """As the manuals write it: "51:12", or "8"."""
        return f"{self.high}" if self.low == self.high else f"{self.high}:{self.low}"

    def extract(self, value: int) -> int:
        """What the field holds in this value of the MSR."""
        return (value & self.mask) >> self.low

    def insert(self, value: int, held: int) -> int:
        """The MSR's value with this field replaced. Raises ValueError for what does not fit."""
        if not 0 <= held <= self.mask >> self.low:
            raise ValueError(f"{self.name} has the bits {self.bits}; {held:#x} does not fit")
        return value & ~self.mask | held << self.low

    def shown(self, held: int) -> str:
        """What it holds, as people read it."""
        return self.values.get(held) or f"{held << self.low if self.in_place else held:#x}"


def parse_field(line: str) -> Field:
    """A field as the data files have it (data/README.md). Raises ValueError for another line."""
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{line.strip()!r} is no field of an MSR")
    high = int(match[1])
    low = high if match[2] is None else int(match[2])
    if not 63 >= high >= low:
        raise ValueError(f"an MSR has the bits 63 to 0; {line.strip()!r} is none of them")
    values: dict[int, str] = {}
    usual = None
    for entry in (match[6] or "").split():
        number, _, name = entry.partition("=")
        value = int(number, 16)
        if name.startswith("("):
            usual, name = value, name.strip("()")
        values[value] = name
    return Field(low, high, match[4], match[5], values, usual, bool(match[3]))


@dataclass(frozen=True, slots=True)
class Decoded:
    """A value of an MSR, taken apart."""

    fields: tuple[tuple[Field, int], ...]
    """Each field and what it holds."""
    rest: int
    """The bits that no field covers, in place."""

    def encode(self) -> int:
        """The value again."""
        value = self.rest
        for field, held in self.fields:
            value = field.insert(value, held)
        return value

    def words(self) -> list[str]:
        """What is worth telling: flags that are set, "NAME=value", and "other=..." for bits that no field covers.

        Numbered fields that hold the same are told together, "T0-T7=WB", from three on.
        """
        words: list[str] = []
        for run in _runs(self.telling()):
            field, held = run[0]
            names = [field.name for field, _ in run]
            if field.is_flag:
                words += names
            elif len(run) > 2:
                words.append(f"{names[0]}-{names[-1]}={field.shown(held)}")
            else:
                words += [f"{name}={field.shown(held)}" for name in names]
        return [*words, f"other={self.rest:#x}"] if self.rest else words

    def telling(self) -> Iterable[tuple[Field, int]]:
        """The fields that are worth telling."""
        return [(field, held) for field, held in self.fields if (held or 0 in field.values) and held != field.usual]


def _runs(told: Iterable[tuple[Field, int]]) -> Iterator[list[tuple[Field, int]]]:
    """Fields that are numbered one after another and hold the same, put together."""
    run: list[tuple[Field, int]] = []
    for field, held in told:
        if run and not (held == run[-1][1] and _follows(run[-1][0], field)):
            yield run
            run = []
        run.append((field, held))
    if run:
        yield run


def _follows(before: Field, field: Field) -> bool:
    """Whether one is T3, say, and the other T4, and the same stands in both for the same."""
    this, that = _NUMBERED.fullmatch(before.name), _NUMBERED.fullmatch(field.name)
    if this is None or that is None or before.values != field.values or before.in_place:
        return False
    return this[1] == that[1] and int(this[2]) + 1 == int(that[2])


def decode(fields: Sequence[Field], value: int) -> Decoded:
    """Takes a value of 64 bits apart."""
    rest = value
    for field in fields:
        rest &= ~field.mask
    return Decoded(tuple((field, field.extract(value)) for field in fields), rest)


def changes(fields: Sequence[Field], old: int, new: int) -> list[str]:
    """What differs: "+FLAG", "-FLAG", "NAME=old->new", and "other=old->new" for bits that no field covers."""
    words = []
    before, after = decode(fields, old), decode(fields, new)
    for (field, was), (_, is_now) in zip(before.fields, after.fields, strict=True):
        if was == is_now:
            continue
        if field.is_flag:
            words.append(f"{'+' if is_now else '-'}{field.name}")
        else:
            words.append(f"{field.name}={field.shown(was)}->{field.shown(is_now)}")
    if before.rest != after.rest:
        words.append(f"other={before.rest:#x}->{after.rest:#x}")
    return words
