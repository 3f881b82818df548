"""``vmexit record``: a session whose traps go into a file instead of onto the screen."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vmexit
from vmexit.debugger import Debugger
from vmexit.events.event import Event
from vmexit.link.rings import Records
from vmexit.link.wire import Access, Stage
from vmexit.report.facts import counted
from vmexit.report.fileformat import RecordingError
from vmexit.report.recorder import Recorder

EVERYTHING = "!msrwrite"
"""What is recorded where no event is named."""


@dataclass(frozen=True, slots=True)
class RecordTo:
    """What ``vmexit record`` was told."""

    path: Path
    seconds: float | None = None
    """How long; None: until the machine ends or somebody ends it."""


class Tape:
    """Records what a debugger's events bring."""

    def __init__(self, to: RecordTo) -> None:
        """Takes the file. Raises RecordingError where it cannot be had."""
        self._recorder = Recorder(to.path)
        self._seconds = to.seconds
        self._debugger: Debugger | None = None
        self._events: tuple[int, ...] = ()
        self._started_ns: int | None = None
        self._deadline: float | None = None
        self._info: Mapping[str, Any] | None = None
        """What is known when it begins; None: it has begun."""

    def watch(self, debugger: Debugger, *, target: str, arguments: tuple[str, ...] = ()) -> None:
        """Records this machine, from the first trap on. ``target``: which of run, attach, watch and host it is."""
        self._debugger = debugger
        machine = {"name": debugger.target.name, "vmm": debugger.target.vmm, "vcpus": debugger.target.vcpus, "target": target}
        self._recorder.lost = debugger.dropped
        looks, names = debugger.target.only_looks, debugger.thread_names
        # A process is called as its first thread is.
        self._recorder.name_of = lambda pid, tid: names.get(pid, pid) or names.get(pid, tid)
        if looks is None:
            self._recorder.place_of = debugger.names.of
            self._recorder.callers_of = debugger.callers.of_all
        self._info = {
            "vmexit": vmexit.__version__,
            "machine": {**machine, "arguments": list(arguments)},
            "host": {"system": f"{platform.system()} {platform.release()}", "processor": platform.machine()},
        }
        debugger.record_listeners.append(self._on_records)

    def begin(self) -> None:
        """Begins the file, if that was not done; what was in it before is gone then. Raises RecordingError."""
        if self._info is not None:
            info, self._info = self._info, None
            clock = {"monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()}
            self._recorder.begin({**info, "clock": clock})

    def _on_records(self, records: Records) -> None:
        self.begin()
        self._tell_news()
        self._recorder.add(records)

    def _tell_news(self) -> None:
        """Events that were made since, and when the machine first ran."""
        assert self._debugger is not None
        events = tuple(event.number for event in self._debugger.events)
        if events != self._events:
            fresh = {
                str(event.number): _description(event) for event in self._debugger.events if event.number not in self._events
            }
            self._events = events
            self._recorder.note({"events": fresh})
        if self._started_ns is None and self._debugger.started_ns is not None:
            self._started_ns = self._debugger.started_ns
            self._recorder.note({"clock": {"started_ns": self._started_ns}})

    @property
    def is_over(self) -> bool:
        """Whether so much time has passed since this was first asked as was wanted. Raises RecordingError: writing has failed."""
        self._recorder.check()
        if self._seconds is None:
            return False
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        return time.monotonic() >= self._deadline

    def end(self, reason: str, exit_status: int | None) -> str:
        """Ends it, once all records are in; gives what there is to say. Raises RecordingError where not all could be written."""
        self.begin()
        self._tell_news()
        self._recorder.close({"reason": reason, "exit_status": exit_status, "monotonic_ns": time.monotonic_ns()})
        lost = self._recorder.lost()
        what = f"recorded {counted(self._recorder.traps, 'trap')} into {self._recorder.path} ({_size(self._recorder.bytes)})"
        return f"{what}; {f'{lost:,} lost: they came faster than they were taken' if lost else 'none lost'}"

    def close(self) -> None:
        """Lets go of the file; without ``end`` something has gone wrong."""
        if self._debugger is not None and self._on_records in self._debugger.record_listeners:
            self._debugger.record_listeners.remove(self._on_records)
        with contextlib.suppress(RecordingError):  # which has been told by now
            self._recorder.close({"reason": "vmexit failed", "exit_status": None})


def _description(event: Event) -> Mapping[str, Any]:
    return {
        "text": event.text,
        "access": [access.name for access in Access if access & event.access],
        "stage": [stage.name for stage in (Stage.PRE, Stage.POST) if stage & event.stage],
        "msrs": str(event.msrs),
        "core": event.core,
        "process": event.process,
    }


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
