"""From what the agent tells to messages: the texts and lines that a screen would show, or one JSON object a trap."""

from __future__ import annotations

import abc
import functools
import json
import platform
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vmexit import msr
from vmexit.link.rings import Records
from vmexit.link.wire import Access, Action, RecordFlag, Stage
from vmexit.outputs.rows import Gatherer, Item, Row
from vmexit.trap import Trap

if TYPE_CHECKING:
    from vmexit.names import TrapNames

_ACCESSES = {Access.WRMSR: "wrmsr", Access.RDMSR: "rdmsr"}
_STAGES = {Stage.PRE: "pre", Stage.POST: "post"}
_Name = TypeVar("_Name")


class Encoder(abc.ABC):
    """Makes messages. Used by one thread, that of its output."""

    structured = False
    """It wants a record of each trap, and not only what is printed."""

    @property
    def held(self) -> int:
        """Traps that wait for what may still come of them."""
        return 0

    @abc.abstractmethod
    def encode(self, items: Iterable[Item]) -> list[bytes]:
        """The messages that these make, with what was held before."""

    def rest(self, *, all_of_them: bool) -> list[bytes]:
        """The messages of what was held long enough; or of all."""
        return []


class TextEncoder(Encoder):
    """Each print is a message, and each line of the log."""

    def __init__(self, lines: Callable[[Records], str]) -> None:
        """``lines``: the lines that traps are shown as."""
        self._lines = lines

    def encode(self, items: Iterable[Item]) -> list[bytes]:
        messages: list[bytes] = []
        for item in items:
            records, texts = item.records, item.texts
            if texts is None:
                messages += self._lines_of(records)
                continue
            is_print = records["action"] == Action.PRINT
            starts = [0, *(np.flatnonzero(is_print[1:] != is_print[:-1]) + 1).tolist()]
            for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
                messages += texts[start:end] if is_print[start] else self._lines_of(records[start:end])
        return messages

    def _lines_of(self, records: Records) -> list[bytes]:
        return self._lines(records).encode().splitlines(keepends=True)


class RowEncoder(Encoder):
    """Each trap is a message."""

    structured = True

    def __init__(self) -> None:
        self._gatherer = Gatherer()

    @property
    def held(self) -> int:
        return self._gatherer.held

    @abc.abstractmethod
    def message(self, row: Row) -> bytes:
        """What is said of one trap."""

    def encode(self, items: Iterable[Item]) -> list[bytes]:
        return [self.message(row) for item in items for row in self._gatherer.add(item)]

    def rest(self, *, all_of_them: bool) -> list[bytes]:
        return [self.message(row) for row in self._gatherer.rest(all_of_them=all_of_them)]


class Names(dict[int, _Name]):
    """What MSRs are called, by address."""

    def __init__(self, written: Callable[[str | None], _Name]) -> None:
        """``written``: makes what is kept of a name; None: it has none."""
        super().__init__()
        self._written = written

    def __missing__(self, address: int) -> _Name:
        found = msr.find(address)
        name = self[address] = self._written(found.name if found else None)
        return name


def has_value(trap: Trap) -> bool:
    """Before an RDMSR, EDX:EAX is only what it is about to replace."""
    return not (trap.access == Access.RDMSR and trap.stage == Stage.PRE)


def has_place(trap: Trap) -> bool:
    """A tracepoint does not tell where the instruction is."""
    return bool(trap.rip or trap.length or trap.stage != Stage.POST)


def what(trap: Trap) -> tuple[str, str]:
    """The instruction and the stage."""
    return _ACCESSES[trap.access], _STAGES[trap.stage]


def flag_names(flags: RecordFlag) -> list[str]:
    """In lower case."""
    return [(flag.name or "").lower() for flag in flags]


class JsonEncoder(RowEncoder):
    """A JSON object on a line. Numbers of 64 bits are texts in hexadecimal, as most readers of JSON keep only 53 bits."""

    def __init__(self, names: TrapNames | None = None, **constant: object) -> None:
        """``names``: of places; None: there are none. ``constant``: what stands in each object besides."""
        super().__init__()
        self._names = names
        self._json_names = Names(json.dumps)
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self._second = (-1, "")
        self._after = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in constant.items()) + "}\n"

    def _time(self, time_ns: int) -> str:
        """By the clock on the wall, as RFC 3339 writes it."""
        seconds, fraction = divmod(time_ns + self._ahead_ns, 1_000_000_000)
        if seconds != self._second[0]:
            self._second = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
        return f"{self._second[1]}.{fraction:09}Z"

    def _origin(self, trap: Trap) -> str:
        """What is known of the place, and where its function returns to."""
        if self._names is None:
            return '"symbol":null,"caller":null,"caller_symbol":null'
        caller = self._names.caller_of(trap)
        symbols = [_quoted(self._names.of(address) if address else "") for address in (trap.rip, caller)]
        address = f'"{caller:#x}"' if caller else "null"
        return f'"symbol":{symbols[0]},"caller":{address},"caller_symbol":{symbols[1]}'

    def message(self, row: Row) -> bytes:
        trap = row.trap
        access, stage = what(trap)
        name = self._json_names[trap.msr]
        value = f'"{trap.value:#x}"' if has_value(trap) else "null"
        rip = f'"{trap.rip:#x}"' if has_place(trap) else "null"
        flags = json.dumps(flag_names(trap.flags)) if trap.flags else "[]"
        known = trap.flags & RecordFlag.PROCESS_KNOWN
        process = f'"pid":{trap.pid},"tid":{trap.tid}' if known else '"pid":null,"tid":null'
        fault = "null" if row.fault is None else json.dumps(row.fault)
        text = json.dumps(row.text.decode("utf-8", "replace")) if row.text else '""'
        return (
            f'{{"event":{trap.event},"sequence":{trap.sequence},"time":"{self._time(trap.time_ns)}","time_ns":{trap.time_ns},'
            f'"core":{trap.core},"access":"{access}","stage":"{stage}","msr":"{trap.msr:#x}","name":{name},'
            f'"value":{value},"rip":{rip},{self._origin(trap)},"rsp":"{trap.rsp:#x}","length":{trap.length},{process},"action":{_actions(row.actions)},'
            f'"flags":{flags},"text":{text},"fault":{fault}{self._after}'
        ).encode()


@functools.lru_cache(4096)
def _quoted(text: str) -> str:
    return json.dumps(text or None)


@functools.cache
def _actions(actions: int) -> str:
    """What the event did, as far as there are records of it."""
    return json.dumps([(action.name or "").lower() for action in Action(actions)])


def fleet_fields(machine: str) -> dict[str, object]:
    """What tells this machine's objects from those of others in the same place."""
    return {"host": platform.node(), "machine": machine}
