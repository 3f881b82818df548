"""A recording as one page for a browser that needs nothing else: no other file, no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmexit.link.wire import Access, Stage
from vmexit.report.digest import OTHERS, Cells, Digest
from vmexit.report.facts import Facts, counted, seconds_text
from vmexit.report.fileformat import CALLER_GUESSED
from vmexit.report.reader import NOBODY

_ROOM = Path(__file__).parent
EXACT = 20_000
"""Up to so many traps, each is in the page by itself."""
_SAMPLED = 4_000
"""Of more traps, so many at most, evenly chosen; all others are counted in parts of the time."""
_MOST_CELLS = 100_000
_PARTS = 32
"""Parts of the time that there should be at least, however much there is on each core."""
_SERIES = range(60, 600)
"""How many kinds of traps are counted by themselves, at least and at most."""


def page(digest: Digest) -> str:
    """The whole page."""
    parts = {
        "title": _escaped(f"{digest.file.path.name}: MSR accesses"),
        "css": (_ROOM / "page.css").read_text(encoding="utf-8"),
        "js": (_ROOM / "page.js").read_text(encoding="utf-8"),
        # "<" would end the element that holds the data, or begin a comment in it.
        "data": json.dumps(_Data(digest).all(), separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c"),
    }
    text = (_ROOM / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        before, after = text.split(f"%{name}%", 1)
        text = before + part + after
    return text


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


class _Indices:
    """Numbers things by the order in which they are first met."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        """Its number."""
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
        return number


class _Data:
    """What the page's script works with. Lists rather than objects: a page of ten million traps stays below some megabytes."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._facts = Facts(digest)
        self._exact = digest.total <= EXACT
        self._msrs, self._cores, self._processes = _Indices(), _Indices(), _Indices()
        self._events, self._places, self._texts = _Indices(), _Indices(), _Indices()
        for core in sorted(digest.by_core):
            self._cores.of(core)
        # Where something is counted, the commonest MSRs come first.
        self._by_msr: dict[int, list[int]] = {}
        for number, series in enumerate(digest.series):
            self._by_msr.setdefault(series.msr, []).append(number)
        self._counts = {msr: sum(digest.rows[number].count for number in numbers) for msr, numbers in self._by_msr.items()}
        for msr in sorted(self._counts, key=lambda msr: (-self._counts[msr], msr)):
            self._msrs.of(msr)
        most = max(_SERIES[0], min(_SERIES[-1], _MOST_CELLS // (_PARTS * max(1, len(digest.by_core)))))
        # With every trap in the page every series is, too.
        self._groups = digest.groups(len(digest.series) if self._exact else most)
        self._pids = {series.pid for series in self._groups.kept}

    def all(self) -> dict[str, Any]:
        """Everything."""
        digest = self._digest
        data: dict[str, Any] = {
            "series": self._series(),
            "cells": None,
            "fine": None,
            "traps": self._traps(),
            "changes": self._changes(),
        }
        width_ns = 1
        if not self._exact:
            # Without processes there is much less to be counted, and room for many more parts of the time.
            cells, fine = digest.cells([self._groups, self._groups.without_processes()], _MOST_CELLS)
            data["cells"], width_ns, data["fine"] = self._cells(cells), cells.width_ns, [*self._cells(fine), fine.width_ns]
        # What these have referred to.
        data |= {
            "meta": self._meta(width_ns),
            "cores": [f"{core:x}" if core != OTHERS else "others" for core in self._cores.values],
            "msrs": [self._msr(address) for address in self._msrs.values],
            "processes": [self._facts.process(pid) for pid in self._processes.values],
            "events": [
                [f"{event:x}" if event != OTHERS else "others", self._facts.event(event)] for event in self._events.values
            ],
            "places": [
                [f"{rip:016x}", self._facts.origin(rip, caller, is_guess=guessed)] for rip, caller, guessed in self._places.values
            ],
            "texts": self._texts.values,
        }
        return data

    def _meta(self, width_ns: int) -> dict[str, Any]:
        digest, facts = self._digest, self._facts
        stride = digest.stride(_SAMPLED)
        notes = digest.file.notes()
        if not self._exact:
            notes.append(
                f"{counted(digest.total, 'trap')} are too many to have each in this page: they are counted in parts of "
                f"{seconds_text(width_ns)}, and the list of traps has every {stride:,}th"
            )
        processes = len({series.pid for series in digest.series} - {None})
        if digest.has_processes and self._groups.processes < processes:
            notes.append(
                f"of {processes:,} processes the {self._groups.processes:,} busiest are told apart, the others put together"
            )
        if any(series.msr == OTHERS for series in self._groups.kept):
            notes.append("there are more MSRs than can be told apart here: the rarest are put together")
        if left_out := digest.changes.left_out():
            names = [f"{count:,} of {facts.name(msr) or f'{msr:x}'}" for msr, count in sorted(left_out.items())]
            more = f" and of {len(names) - 6:,} more MSRs" if len(names) > 6 else ""
            left = f"{', '.join(names[:6])}{more}"
            notes.append(f"MSRs that changed very often: the first and the last changes are listed; left out are {left}")
        return {
            "file": digest.file.path.name,
            "machine": facts.machine,
            "recorded": facts.recorded,
            "version": facts.version,
            "ended": facts.ended,
            "total": digest.total,
            "lost": digest.file.lost,
            "span": max(1, digest.end_ns - digest.start_ns + 1),
            "spanText": seconds_text(digest.end_ns - digest.start_ns),
            "changes": digest.changes.total,
            "notes": notes,
            "exact": self._exact,
            "width": 1 if self._exact else width_ns,
            "stride": 1 if self._exact else stride,
            "hasProcesses": digest.has_processes,
            "processes": processes,
        }

    def _msr(self, address: int) -> list[Any]:
        """Address, name, what it is, changes, and the last value with what it says."""
        found = self._facts.msr(address)
        last = ""
        rows = [
            self._digest.rows[number]
            for number in self._by_msr.get(address, [])
            if not (self._digest.series[number].access == Access.RDMSR and self._digest.series[number].stage == Stage.PRE)
        ]
        if rows and address != OTHERS:
            value = max(rows, key=lambda row: row.last_place).last
            last = f"{value:#x} {self._facts.says(address, value)}".strip()
        return [
            f"{address:x}" if address != OTHERS else "",
            self._facts.name(address),
            found.text if found else "",
            self._digest.changes.by_msr.get(address, 0),
            last,
        ]

    def _series(self) -> list[list[int]]:
        """Of each group its MSR, access, stage, event, process, outcome."""
        return [
            [
                self._msrs.of(series.msr),
                int(series.access),
                int(series.stage),
                self._events.of(series.event),
                self._processes.of(series.pid),
                series.skipped + 2 * series.faulted,
            ]
            for series in self._groups.kept
        ]

    def _cells(self, cells: Cells) -> list[list[int]]:
        """Group, core, part of the time (by how much it is later than the one before), count."""
        series, cores, bins, counts = cells.columns()
        numbers = np.array([self._cores.of(self._digest.core_of(code)) for code in range(int(cores.max()) + 1)])[cores]
        return [series.tolist(), numbers.tolist(), np.diff(bins, prepend=0).tolist(), counts.tolist()]

    def _traps(self) -> list[list[Any]]:
        """Time (by how much it is later than the one before), core, series, value, place and caller."""
        columns: list[list[Any]] = [[], [], [], [], []]
        before = self._digest.start_ns
        for chunk in self._digest.sample(EXACT if self._exact else _SAMPLED):
            series = self._groups.places[self._digest.series_of(chunk)]
            guessed = (chunk["flags"] & np.uint8(CALLER_GUESSED)) != 0
            parts = (chunk["time_ns"], chunk["vcpu"], series, chunk["value"], chunk["rip"], chunk["called_from"], guessed)
            for time, core, number, value, *place in zip(*(part.tolist() for part in parts), strict=True):
                columns[0].append(time - before)
                columns[1].append(self._cores.of(core))
                columns[2].append(number)
                columns[3].append(f"{value:x}")
                columns[4].append(self._places.of(tuple(place)))
                before = time
        return columns

    def _changes(self) -> list[list[Any]]:
        """Time (as above), core, MSR, process, text without the MSR's name, and whether the value before was known."""
        rows = self._digest.changed()
        columns: list[list[Any]] = [[], [], [], [], [], []]
        before = self._digest.start_ns
        names = ("time_ns", "vcpu", "msr", "pid", "old", "new", "known")
        for time, core, msr, pid, old, new, known in _rows(rows, names):
            columns[0].append(time - before)
            columns[1].append(self._cores.of(core))
            columns[2].append(self._msrs.of(msr))
            process = None if pid == NOBODY else pid
            columns[3].append(self._processes.of(process if process in self._pids else OTHERS))
            columns[4].append(self._texts.of(self._facts.change(msr, old, new, known).partition(" ")[2]))
            columns[5].append(int(known))
            before = time
        return columns


def _rows(rows: Any, names: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    return zip(*(rows[name].tolist() for name in names), strict=True)
