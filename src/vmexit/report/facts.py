"""What tables and pages say of a recording in the same words: its machine, its times, names of MSRs, processes and places."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from vmexit import msr
from vmexit.msr import Msr
from vmexit.report.digest import OTHERS, Digest

_MOST_MEANINGS = 1 << 16


def _text(value: object) -> str:
    """Of something that a file says; files can say anything."""
    return value if isinstance(value, str) else ""


class Facts:
    """Names and meanings for one digest."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._info = digest.file.info
        self._msrs: dict[int, Msr | None] = {}
        self._changes: dict[tuple[int, int, int, bool], str] = {}

    def _object(self, name: str) -> dict[str, Any]:
        found = self._info.get(name)
        return found if isinstance(found, dict) else {}

    # ---- the machine and the recording ----

    @property
    def machine(self) -> str:
        """What was recorded: "QEMU 7.2.22, 2 vCPUs"."""
        machine = self._object("machine")
        vcpus = machine.get("vcpus")
        cores = f", {vcpus:,} core{'s' * (vcpus != 1)}" if isinstance(vcpus, int) else ""
        return f"{_text(machine.get('name')) or 'an unknown machine'}{cores}"

    @property
    def recorded(self) -> str:
        """When it began, in UTC; "" where that is not known."""
        began = self._object("clock").get("realtime_ns")
        if not isinstance(began, int):
            return ""
        try:
            return datetime.datetime.fromtimestamp(began // 1_000_000_000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        except (OverflowError, ValueError, OSError):
            return ""

    @property
    def version(self) -> str:
        """Of the vmexit that has recorded it."""
        return _text(self._info.get("vmexit"))

    @property
    def ended(self) -> str:
        """Why the recording ended; "" where it has no end."""
        return _text((self._digest.file.end or {}).get("reason"))

    def event(self, number: int) -> str:
        """An event's command line."""
        event = self._object("events").get(str(number))
        return _text(event.get("text")) if isinstance(event, dict) else ""

    @property
    def events(self) -> list[int]:
        """The numbers of all events, whether or not they left a trap."""
        told = [int(number) for number in self._object("events") if number.isascii() and number.isdigit() and len(number) < 10]
        return sorted({*told, *(series.event for series in self._digest.series if series.event != OTHERS)})

    # ---- names ----

    def process(self, pid: int | None) -> str:
        """ "1234 cron", "1234", "other processes", or "unknown"."""
        if pid is None:
            return "unknown"
        if pid == OTHERS:
            return "other processes"
        name = recorded_text(self._info, "processes", str(pid))
        return f"{pid} {name}" if name else f"{pid}"

    def place(self, rip: int) -> str:
        """The function at an address; "" where the recording does not tell."""
        return recorded_text(self._info, "symbols", f"{rip:x}")

    def origin(self, rip: int, caller: int, *, is_guess: bool) -> str:
        """The same with what has called it; ``caller`` is 0 where that is not known."""
        place = self.place(rip)
        if not caller:
            return place
        return f"{place or f'{rip:016x}'} <- {'? ' * is_guess}{self.place(caller) or f'{caller:016x}'}"

    def msr(self, address: int) -> Msr | None:
        """What is known of an MSR."""
        if address not in self._msrs:
            self._msrs[address] = None if address == OTHERS else msr.find(address)
        return self._msrs[address]

    def name(self, address: int) -> str:
        """An MSR's name; "" where nothing is known of it."""
        if address == OTHERS:
            return "other MSRs"
        found = self.msr(address)
        return found.name if found else ""

    def says(self, address: int, value: int) -> str:
        """What a value says: "SCE LME LMA NXE"."""
        found = self.msr(address)
        return " ".join(found.words(value)) if found else ""

    def change(self, address: int, old: int, new: int, known: bool) -> str:
        """ "EFER 0x500 -> 0xd01 +SCE +NXE"; where the old value is not known, "EFER = 0xd01 SCE LME LMA NXE"."""
        key = (address, old, new, known)
        text = self._changes.get(key)
        if text is None:
            if len(self._changes) >= _MOST_MEANINGS:
                self._changes.clear()
            text = self._changes[key] = self._change(address, old, new, known)
        return text

    def _change(self, address: int, old: int, new: int, known: bool) -> str:
        if (found := self.msr(address)) is not None:
            return found.change(old, new) if known else found.explain(new)
        return f"{address:x} {old:#x} -> {new:#x}" if known else f"{address:x} = {new:#x}"


def recorded_text(info: Mapping[str, Any], kind: str, key: str) -> str:
    """What a recording says of a thing ("symbols", "processes"); "" where it does not."""
    said = info.get(kind)
    return _text(said.get(key)) if isinstance(said, dict) else ""


def seconds_text(nanoseconds: int) -> str:
    """A length of time, as people read it."""
    for unit, size in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1000)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}" if nanoseconds < 1000 * size else f"{nanoseconds / size:,.0f} {unit}"
    return f"{nanoseconds} ns"


def counted(count: int, what: str) -> str:
    """ "1 trap", "2,000 traps"."""
    return f"{count:,} {what}{'s' * (count != 1)}"
