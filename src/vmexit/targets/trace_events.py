"""Events on tracepoints: the kernel filters, and its pages come as records of the wire.

What is here the debugger takes for a link to an agent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from vmexit.errors import TargetError
from vmexit.link import wire
from vmexit.link.rings import Records, joined
from vmexit.link.wire import RECORD, Access, Action, Capability, EventFlag, RecordFlag, Stage
from vmexit.targets.host_threads import HostThreads
from vmexit.targets.trace_instance import Instance
from vmexit.targets.trace_pages import Entries, read_page

_PAGES_AT_ONCE = 64
"""Of each CPU that are read before what they held is passed on."""
_SHORT_PAGES_AT_ONCE = 2
_LONGEST_FILTER = 3000
"""Bytes; the kernel takes a page."""

_ACCESS = np.dtype(
    [
        ("time", np.uint64),
        ("value", np.uint64),
        ("msr", np.uint32),
        ("thread", np.uint32),
        ("core", np.uint16),
        ("access", np.uint8),
        ("failed", np.uint8),
    ]
)
_Accesses = npt.NDArray[np.void]
# As link.rings has it: what has no named fields numpy copies in a tenth of the time.
_OPAQUE = np.dtype((np.void, _ACCESS.itemsize))


def _picked(accesses: _Accesses, places: npt.NDArray[np.intp]) -> _Accesses:
    """Those at these places, in their order."""
    return accesses.view(_OPAQUE).take(places).view(_ACCESS)


def _together(parts: Sequence[_Accesses]) -> _Accesses:
    """One array of all these."""
    return parts[0] if len(parts) == 1 else np.concatenate([part.view(_OPAQUE) for part in parts]).view(_ACCESS)


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """Where the kernel tells of an access that it has carried out, and what it calls the numbers."""

    system: str
    name: str
    msr: str
    value: str
    failed: str
    access: Access | None = None
    """None: ``write`` says which."""
    write: str = ""

    @property
    def folder(self) -> str:
        """Of its files, in the instance."""
        return f"events/{self.system}/{self.name}"

    @property
    def fields(self) -> list[str]:
        """All of these."""
        return [name for name in (self.msr, self.value, self.failed, self.write) if name]


class Cores(Protocol):
    """Which core an access belongs to."""

    def of(self, cpu: int, threads: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16] | int:
        """Of accesses that these threads made on that CPU of the host."""

    def filter(self, core: int) -> str | None:
        """What the kernel compares; None: it cannot tell."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An event, as the wire has it."""

    number: int
    slot: int
    access: int
    ranges: tuple[tuple[int, int], ...]
    core: int | None
    process: int
    value: int
    mask: int

    @classmethod
    def unpack(cls, data: bytes) -> _Wanted | None:
        """None for one that is disabled, or names no MSR."""
        event = wire.unpack("event", data)
        if not event.flags & EventFlag.ENABLED or not event.range_count:
            return None
        ranges = tuple((event.ranges[i].first, event.ranges[i].last) for i in range(event.range_count))
        core = None if event.core == wire.ALL_CORES else event.core
        return cls(event.id, event.slot, event.access, ranges, core, event.process, event.value, event.mask)

    def matches(self, accesses: _Accesses, threads: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which of these it is triggered by. ``threads``: those of its process."""
        mask: npt.NDArray[np.bool_] = (accesses["access"] & np.uint8(self.access)) != 0
        msrs = accesses["msr"]
        if self.ranges != ((0, 0xFFFF_FFFF),):
            inside = np.zeros(len(accesses), bool)
            for first, last in self.ranges:
                inside |= (msrs >= np.uint32(first)) & (msrs <= np.uint32(last))
            mask &= inside
        if self.core is not None:
            mask &= accesses["core"] == self.core
        if self.mask:
            mask &= (accesses["value"] ^ np.uint64(self.value)) & np.uint64(self.mask) == 0
        if self.process != wire.ALL_PROCESSES:
            mask &= np.isin(accesses["thread"], np.array(threads, np.uint32))
        return mask


def _msr_filter(name: str, ranges: Sequence[tuple[int, int]]) -> str:
    """Every MSR but a few is said by naming the few."""
    gaps = [(a[1] + 1, b[0] - 1) for a, b in itertools.pairwise(ranges)]
    if ranges and ranges[0][0] == 0 and ranges[-1][1] == 0xFFFF_FFFF:
        outside = [f"{name} != {a:#x}" if a == b else f"({name} < {a:#x} || {name} > {b:#x})" for a, b in gaps]
        return " && ".join(outside)
    inside = [f"{name} == {a:#x}" if a == b else f"({name} >= {a:#x} && {name} <= {b:#x})" for a, b in ranges]
    return f"({' || '.join(inside)})" if len(inside) > 1 else inside[0]


class TraceRings:
    """What the debugger takes for an agent's rings (link.rings.Rings): the instance's pages, as records, in order."""

    def __init__(
        self, instance: Instance, points: Sequence[Tracepoint], cores: Cores, host_threads: HostThreads | None = None
    ) -> None:
        """``host_threads``: records are to tell which process of the host made the access; None: it is not theirs."""
        self.globals: npt.NDArray[np.uint64] = np.zeros(wire.MAX_GLOBALS, np.uint64)
        self.changes = 0
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Nobody writes it: the instance's pipes can be waited for."""
        self.lost = 0
        self.runs = True
        self._instance = instance
        self._points = points
        self._cores = cores
        self._host_threads = host_threads
        self._formats = [instance.event_format(point.system, point.name, *point.fields) for point in points]
        self._wanted: list[_Wanted] = []
        self._threads: dict[int, list[int]] = {}
        self._filters: dict[str, str | None] = {point.folder: None for point in points}
        self._hits = [0] * wire.MAX_EVENTS
        self._sequence = 0
        self._has_more = False
        self._held: _Accesses = np.zeros(0, _ACCESS)
        self._ready: list[Records] = []
        self._closed = False

    def close(self) -> None:
        """The counters can still be read."""
        if not self._closed:
            self._closed = True
            os.close(self.wake_fd)

    # ---- what is wanted ----

    def set_events(self, events: Sequence[bytes]) -> None:
        """Takes events (struct vmexit_event) instead of those of before; what has come up to now is theirs."""
        wanted = [event for data in events if (event := _Wanted.unpack(data)) is not None]
        threads = {event.process: self._threads_of(event.process) for event in wanted if event.process != wire.ALL_PROCESSES}
        self._ready.append(self._collect(final=True))
        self._wanted, self._threads = wanted, threads
        self._filter()

    def refresh(self) -> None:
        """Takes in threads that have begun since: of the processes that events name, and of cores that had none."""
        self._threads = {process: self._threads_of(process) for process in self._threads}
        self._filter()

    def _threads_of(self, process: int) -> list[int]:
        """Of one that has ended, those that it had. Raises TargetError for one that never was."""
        if process == 0:
            return [0]  # every CPU's idle task
        with contextlib.suppress(OSError):
            return sorted(int(entry.name) for entry in Path(f"/proc/{process}/task").iterdir())
        if process in self._threads:
            return self._threads[process]
        raise TargetError(f"there is no process {process}")

    def _filter(self) -> None:
        """Has the kernel throw away what no event wants; what it cannot tell is sorted out here."""
        for point in self._points:
            filters = [text for event in self._wanted if (text := self._filter_of(event, point)) is not None]
            whole = " || ".join(f"({text})" for text in filters)
            # "0" is no filter; it is also what a filter that says nothing comes to.
            wish = None if not filters else "0" if "" in filters or len(whole) > _LONGEST_FILTER else whole
            if wish != self._filters[point.folder]:
                self._put(point, wish)
                self._filters[point.folder] = wish

    def _put(self, point: Tracepoint, wish: str | None) -> None:
        try:
            if wish is None:
                self._instance.write(f"{point.folder}/enable", "0")
                return
            try:
                self._instance.write(f"{point.folder}/filter", wish)
            except OSError:  # an older kernel, which does not know one of the fields
                self._instance.write(f"{point.folder}/filter", "0")
            self._instance.write(f"{point.folder}/enable", "1")
        except OSError as error:
            raise TargetError(f"the tracepoint {point.system}:{point.name} cannot be set: {error.strerror}") from None

    def _filter_of(self, event: _Wanted, point: Tracepoint) -> str | None:
        """As the kernel's filters are written; empty: it wants everything, None: nothing that this tracepoint tells of."""
        if point.access is not None and not event.access & point.access:
            return None
        parts = [_msr_filter(point.msr, event.ranges)]
        if point.access is None:
            parts.append({Access.WRMSR: f"{point.write} != 0", Access.RDMSR: f"{point.write} == 0"}.get(Access(event.access), ""))
        if event.core is not None:
            parts.append(self._cores.filter(event.core) or "")
        if event.process != wire.ALL_PROCESSES:
            parts.append(f"({' || '.join(f'common_pid == {thread}' for thread in self._threads[event.process])})")
        return " && ".join(part for part in parts if part)

    # ---- what comes ----

    def drain(self, *, final: bool = False) -> Records:
        """All records up to now. What one CPU has left later than another was looked at waits for the next call."""
        self._ready.append(self._collect(final))
        while self._has_more and not self.runs:  # nothing is added, so there is an end
            self._ready.append(self._collect(final))
        ready, self._ready = [part for part in self._ready if len(part)], []
        records = joined(ready) if ready else np.zeros(0, RECORD)
        records["sequence"] = np.arange(self._sequence, self._sequence + len(records), dtype=np.uint64)
        self._sequence += len(records)
        return records

    def drain_question(self) -> None:
        """Nobody waits for an answer here (link.rings)."""
        return

    def _collect(self, final: bool) -> Records:
        until = time.monotonic_ns()
        parts, self._has_more = [self._held], False
        # What another one has left, since it was switched off, no event wants.
        enabled = [i for i, point in enumerate(self._points) if self._filters[point.folder] is not None]
        for cpu in self._instance.pipes:
            pages = short = 0
            while data := self._instance.read_page(cpu):
                page = read_page(data, self._instance.layout)
                self.lost += page.lost + page.damaged
                parts += [self._accesses(cpu, entries, i) for entries in page.entries for i in enabled]
                pages, short = pages + 1, short + page.is_short
                # The first short page may be the rest of one; from the second on it would be a chase after single events.
                if pages < _PAGES_AT_ONCE and (short < _SHORT_PAGES_AT_ONCE or not self.runs):
                    continue
                self._has_more |= pages == _PAGES_AT_ONCE
                if page.entries:
                    until = min(until, int(page.entries[-1].times[-1]))
                break
        accesses = _together([part for part in parts if len(part)] or parts[:1])
        accesses = _picked(accesses, np.argsort(accesses["time"], kind="stable"))
        ready = len(accesses) if final else int(np.searchsorted(accesses["time"], np.uint64(until), side="right"))
        self._held = accesses[ready:]
        return self._records(accesses[:ready])

    def _accesses(self, cpu: int, entries: Entries, number: int) -> _Accesses:
        """Those among the entries that are of one tracepoint."""
        point, layout = self._points[number], self._formats[number]
        names = ["common_type", "common_pid", *point.fields]
        columns = {name: entries.column(layout.fields[name]) for name in names}
        types = columns["common_type"]
        if types is None or any(column is None for column in columns.values()):
            return np.zeros(0, _ACCESS)
        mine = types == layout.number
        found: _Accesses = np.zeros(int(np.count_nonzero(mine)), _ACCESS)
        found["time"] = entries.times[mine]
        wanted = {"value": point.value, "msr": point.msr, "thread": "common_pid", "failed": point.failed}
        for ours, theirs in wanted.items():
            column = columns[theirs]
            assert column is not None
            found[ours] = column[mine] != 0 if ours == "failed" else column[mine]
        if point.access is None:
            write = columns[point.write]
            assert write is not None
            found["access"] = np.where(write[mine] != 0, int(Access.WRMSR), int(Access.RDMSR))
        else:
            found["access"] = int(point.access)
        found["core"] = self._cores.of(cpu, found["thread"])
        return found

    def _records(self, accesses: _Accesses) -> Records:
        """A record for each access and event that it triggers, in the order of the accesses, then of the events."""
        whose, which = [np.zeros(0, np.intp)], [np.zeros(0, np.uint32)]
        for event in self._wanted:
            mine = np.flatnonzero(event.matches(accesses, self._threads.get(event.process, ())))
            self._hits[event.slot] += len(mine)
            whose.append(mine)
            which.append(np.full(len(mine), event.number, np.uint32))
        places, events = np.concatenate(whose), np.concatenate(which)
        if len(self._wanted) > 1:
            order = np.argsort(places, kind="stable")
            places, events = places[order], events[order]
        taken = accesses if len(places) == len(accesses) and len(self._wanted) == 1 else _picked(accesses, places)
        records: Records = np.zeros(len(taken), RECORD)
        for ours, theirs in (("time_ns", "time"), ("value", "value"), ("msr", "msr"), ("vcpu", "core"), ("access", "access")):
            records[ours] = taken[theirs]
        records["event"] = events
        records["stage"], records["action"] = int(Stage.POST), int(Action.RECORD)
        records["flags"] = taken["failed"] * np.uint8(RecordFlag.FAULTED)
        if self._host_threads is not None and len(taken):
            processes, known = self._host_threads.processes(taken["thread"])
            records["process"], records["thread"] = processes, np.where(known, taken["thread"], 0)
            records["flags"] |= known * np.uint8(RecordFlag.PROCESS_KNOWN)
        return records

    def calls(self) -> bool:
        """Whether more is there than was taken."""
        return self._has_more

    def before_sleep(self) -> bool:
        """False: there is something to drain now."""
        return not self._has_more

    def after_sleep(self) -> None:
        """Nobody has to know."""

    def state(self, slot: int) -> None:
        """Scripts, which could have changed events, do not run here."""

    def hits(self, slot: int) -> int:
        """How often the event with this slot has been triggered."""
        return self._hits[slot]

    def clear_hits(self, slot: int) -> None:
        """Starts counting anew."""
        self._hits[slot] = 0

    def counters(self) -> tuple[int, int]:
        """(events that the kernel had no room for, 0)."""
        return self.lost, 0


class TraceLink:
    """What the debugger takes for a link (link.client.Link)."""

    capabilities = Capability.RECORD | Capability.POST
    plugin_api = 0
    door = "a tracepoint"

    def __init__(self, rings: TraceRings, reason: str) -> None:
        """``reason``: why nothing but looking is possible."""
        self.rings = rings
        self.closed = False
        self._reason = reason

    def fileno(self) -> int:
        """Something that never becomes readable."""
        return self.rings.wake_fd

    def close(self) -> None:
        """Nothing is asked any more."""
        self.closed = True
        self.rings.close()

    def handle_notices(self) -> None:
        """There is nobody who would send any."""

    def set_events(self, events: list[bytes], changes: int) -> None:
        """Makes these the events, from now on."""
        self.rings.set_events(events)

    def set_overflow(self, drop: bool) -> None:
        """The kernel drops."""
        if not drop:
            raise TargetError("the kernel waits for nobody: what comes too fast is dropped, and counted")

    def set_script_limits(self, steps: int, stack: int) -> None:
        """Of the scripts of events, of which there are none; those at the prompt have them from the debugger."""

    def _refuse(self, what: str) -> NoReturn:
        raise TargetError(f"{what} is not possible here: {self._reason}")

    def registers(self, vcpu: int) -> list[int]:
        self._refuse("reading registers")

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        self._refuse("changing registers")

    def read_memory(self, vcpu: int, address: int, length: int, *, physical: bool = False) -> bytes:
        self._refuse("reading memory")

    def write_memory(self, vcpu: int, address: int, data: bytes, *, physical: bool = False) -> None:
        self._refuse("changing memory")

    def decide(self, vcpu: int, skip: bool) -> None:
        self._refuse("skipping")

    def add_script(
        self, number: int, file: int, entry: int, code_size: int, constants_size: int, buffer: tuple[int, int] | None = None
    ) -> None:
        self._refuse("a script")
