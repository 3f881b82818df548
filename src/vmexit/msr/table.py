"""All MSRs by name and address, read from the data files when the first one is asked for."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vmexit.errors import VmexitError
from vmexit.msr.fields import Field, changes, decode, parse_field

DATA = Path(__file__).with_name("data")
_SOURCES = "sources.txt"
_DIGITS = re.compile("0|[1-9][0-9]*")

VENDORS: Mapping[str, str] = MappingProxyType(
    {
        "both": "Intel and AMD",
        "intel": "Intel",
        "amd": "AMD",
        "kvm": "KVM",
        "hyperv": "Hyper-V",
        "via": "VIA",
        "transmeta": "Transmeta",
    }
)
"""How a vendor is written in the data files, and who it is. "intel-p4": only those processors."""

# What systems and manuals put before a name, and what it stands for.
_PREFIXES = (("HV_X64_MSR_", "HV_"), ("HV_MSR_", "HV_"), ("MSR_", ""), ("IA32_", ""))


class _Definition:
    """What a line of a data file says, for all of the MSRs that it makes."""

    __slots__ = ("_fields", "lines", "sources", "text", "vendor")

    def __init__(self, vendor: str, sources: str, text: str) -> None:
        self.vendor = vendor
        self.sources = sources
        self.text = text
        self.lines: list[str] = []
        self._fields: tuple[Field, ...] | None = None

    @property
    def fields(self) -> tuple[Field, ...]:
        if self._fields is None:
            if len(self.lines) == 1 and self.lines[0].startswith("  like "):
                like = _table().named(self.lines[0].removeprefix("  like ").strip())
                assert like is not None, self.lines
                self._fields = like.fields
            else:
                self._fields = tuple(map(parse_field, self.lines))
        return self._fields


class Msr:
    """A model-specific register; one address can mean several, on processors of different vendors."""

    __slots__ = ("_definition", "address", "aliases", "name")

    def __init__(self, address: int, names: Sequence[str], definition: _Definition) -> None:
        self.address = address
        self.name = names[0]
        self.aliases = tuple(names[1:])
        """Other names, without MSR_ and IA32_ before them."""
        self._definition = definition

    def __repr__(self) -> str:
        return f"<Msr {self.name} {self.address:x}>"

    @property
    def vendor(self) -> str:
        """One of VENDORS, which can be followed by "-" and the processors that have it."""
        return self._definition.vendor

    @property
    def vendor_text(self) -> str:
        """Who has it, in words."""
        vendor, _, processors = self.vendor.partition("-")
        return f"{VENDORS[vendor]} {processors}".rstrip()

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the facts come from, in words."""
        return tuple(_sources()[key] for key in self._definition.sources.split(","))

    @property
    def text(self) -> str:
        """What it is, in a few words."""
        return self._definition.text

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its bit fields; () where the value is one number."""
        return self._definition.fields

    def words(self, value: int) -> list[str]:
        """What a value of 64 bits says; [] where the MSR has no fields, and where none of them is worth telling."""
        return decode(self.fields, value).words() if self.fields else []

    def explain(self, value: int) -> str:
        """A value and what it says: "EFER = 0xd01 SCE LME LMA NXE"."""
        return " ".join((f"{self.name} = {value:#x}", *self.words(value)))

    def change(self, old: int, new: int) -> str:
        """Two values and what differs: "EFER 0x500 -> 0xd01 +SCE +NXE"."""
        words = changes(self.fields, old, new) if self.fields else []
        return " ".join((f"{self.name} {old:#x} -> {new:#x}", *words))


@dataclass(frozen=True, slots=True)
class _Family:
    """MSRs that differ only in a number: one line of a data file."""

    start: int
    distance: int
    count: int
    names: Sequence[str]
    """With "#" where the number stands."""
    definition: _Definition

    def member(self, number: int) -> Msr:
        """One of them."""
        text = str(number)
        return Msr(self.start + number * self.distance, [name.replace("#", text) for name in self.names], self.definition)


class _Table:
    """The data files, read. Of what one line makes many, each is made when it is asked for: reading takes a third of the time."""

    def __init__(self) -> None:
        self._by_name: dict[str, Msr] = {}
        self._by_address: dict[int, list[Msr]] = {}
        self._families: list[_Family] = []
        self._family_names: dict[str, _Family] = {}
        for path in sorted(DATA.glob("[0-9]*.txt")):
            self._read(path)

    def _read(self, path: Path) -> None:
        lines: list[str] = []
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("  "):
                lines.append(line)
            elif line and line[0] != "#":
                where, names, vendor, sources, text = line.split(None, 4)
                definition = _Definition(vendor, sources, text)
                lines = definition.lines
                if "+" in where:
                    self._add_family(where, names.split(","), definition)
                else:
                    self._add(Msr(int(where, 16), names.split(","), definition))

    def _add(self, msr: Msr) -> None:
        self._by_address.setdefault(msr.address, []).append(msr)
        for name in (msr.name, *msr.aliases):
            self._by_name[name] = msr

    def _add_family(self, where: str, names: Sequence[str], definition: _Definition) -> None:
        start, distance, count = where.replace("*", "+").split("+")
        family = _Family(int(start, 16), int(distance, 16), int(count), names, definition)
        self._families.append(family)
        for name in names:
            self._family_names[name] = family

    def named(self, name: str) -> Msr | None:
        """The MSR with exactly this name."""
        if (msr := self._by_name.get(name)) is not None:
            return msr
        for digits in _DIGITS.finditer(name):
            family = self._family_names.get(f"{name[: digits.start()]}#{name[digits.end() :]}")
            if family is not None and int(digits[0]) < family.count:
                return family.member(int(digits[0]))
        return None

    def at(self, address: int) -> list[Msr]:
        """What this address can mean, as the files have it; what only some processors have comes last."""
        found = list(self._by_address.get(address, ()))
        for family in self._families:
            number, rest = divmod(address - family.start, family.distance)
            if rest == 0 <= number < family.count:
                found.append(family.member(number))
        return found if len(found) < 2 else sorted(found, key=lambda msr: "-" in msr.vendor)

    @functools.cached_property
    def all(self) -> list[Msr]:
        """Every MSR, by address."""
        made = [msr for found in self._by_address.values() for msr in found]
        made += [family.member(number) for family in self._families for number in range(family.count)]
        return sorted(made, key=lambda msr: msr.address)


@functools.cache
def _table() -> _Table:
    return _Table()


@functools.cache
def _sources() -> Mapping[str, str]:
    lines = (DATA / _SOURCES).read_text(encoding="ascii").splitlines()
    return dict(line.split(None, 1) for line in lines if line and line[0] != "#")


def everything() -> Sequence[Msr]:
    """All MSRs, by address."""
    return _table().all


def at(address: int) -> Sequence[Msr]:
    """All that an address can mean, the likeliest first; [] where nothing is known of it."""
    return _table().at(address)


def find(what: str | int, vendor: str | None = None) -> Msr | None:
    """The MSR with that name, in any letter case and with or without MSR_ and IA32_ before it, or with that address.

    ``vendor``: "intel", "amd", "kvm" or "hyperv", where an address means different things; None: the likeliest one.
    """
    if isinstance(what, str):
        return next((msr for name in _spellings(what.upper()) if (msr := _table().named(name))), None)
    found = at(what)
    wanted = [msr for msr in found if vendor is None or msr.vendor.partition("-")[0] in (vendor, "both")]
    return next(iter([*wanted, *found]), None)


def address_of(name: str) -> int:
    """The address of the MSR with that name, as in find. Raises VmexitError, with names that may have been meant."""
    found = find(name)
    if found is None:
        names = similar(name)
        raise VmexitError(f"there is no MSR '{name}'" + (f": did you mean {', '.join(names)}?" if names else ""))
    return found.address


def _spellings(name: str) -> Iterator[str]:
    """A name as it is, and without what can stand before it."""
    yield name
    for prefix, instead in _PREFIXES:
        if name.startswith(prefix):
            yield from _spellings(instead + name.removeprefix(prefix))
            return


def beginning(start: str) -> list[str]:
    """The names, in lower case, that begin like this in any letter case; where none does, other names that do."""
    wanted = start.upper()
    names = [msr.name for msr in everything() if msr.name.startswith(wanted)]
    if not names:
        names = [name for msr in everything() for name in msr.aliases if name.startswith(wanted)]
    if not names:
        prefix, instead = next((both for both in _PREFIXES if wanted.startswith(both[0])), ("", ""))
        if prefix:
            rest = beginning(instead + wanted.removeprefix(prefix))
            names = [prefix + name.removeprefix(instead.lower()) for name in rest]
    return [name.lower() for name in names]


def similar(word: str, most: int = 6) -> list[str]:
    """Names that somebody may have meant: those that hold the word, else the most alike."""
    *_, wanted = _spellings(word.upper())
    holding = [msr.name for msr in everything() if wanted in msr.name] if len(wanted) > 2 else []
    return holding[:most] or difflib.get_close_matches(wanted, [msr.name for msr in everything()], most, 0.7)
