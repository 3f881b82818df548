"""Writing a recording while a machine runs: records are handed over at once, a thread makes blocks of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vmexit.link.rings import Records, joined
from vmexit.report import fileformat
from vmexit.report.fileformat import Numbers, RecordingError

FLUSH_S = 0.25
"""How long records wait, at most, before they are in the file, where they outlive the recorder."""
_IN_BLOCK = 1 << 16
"""Traps of a block, at most."""
_MOST_WAITING = 1 << 19
"""Records that wait to be written; whoever brings more waits too, and the guest with it."""
_MOST_PLACES = 1 << 14
"""So many places are named; a guest can execute WRMSR anywhere."""
_LEFT_OUT = frozenset({"action", "script", "text", "caller"})
"""Fields of a record that say nothing of a trap that was recorded, or only to the session."""

Namer = Callable[[int, int], str | None]


class Recorder:
    """A file that records go into. ``add`` and ``note`` are to be called by one thread."""

    def __init__(self, path: Path) -> None:
        """Takes the file, and changes nothing in it yet.

        Raises RecordingError where it cannot be written, is being recorded into, or holds something else than a recording.
        """
        self.path = path
        self.name_of: Namer | None = None
        """Gives a process's name from its number and that of one of its threads; called by the thread that writes."""
        self.place_of: Callable[[int], str] = lambda rip: ""
        """Gives the name of an address, "" where it is not known; called by the same thread."""
        self.callers_of: Callable[[Records], Numbers] | None = None
        """Gives the address that each trap was called from, 0 where it is not known; called by the same thread."""
        self.lost: Callable[[], int] = lambda: 0
        """Gives how many records were lost so far; called by any thread."""
        self.traps = 0
        """Those that are in the file."""
        self.bytes = 0
        self._fd, self._is_new = _taken(path)
        self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._waiting: deque[Records] = deque()
        self._waiting_count = 0
        self._news: list[Mapping[str, Any]] = []
        self._named: dict[int, str] = {}
        self._placed: set[int] = set()
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._end: Mapping[str, Any] | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- from outside ----

    def begin(self, info: Mapping[str, Any]) -> None:
        """Makes it a new recording. ``info``: what is known of it already. Raises RecordingError."""
        try:
            if self._is_regular:
                os.ftruncate(self._fd, 0)
            self._put(fileformat.start() + fileformat.text_block(fileformat.INFO, info))
        except OSError as error:
            raise self._error(error) from None
        self._thread = threading.Thread(target=self._write_all, name="vmexit-recorder", daemon=True)
        self._thread.start()

    def note(self, info: Mapping[str, Any]) -> None:
        """Adds to what is known of it."""
        with self._changed:
            self._news.append(info)

    def add(self, records: Records) -> None:
        """Takes records in, oldest first; they must not change any more. Raises RecordingError once writing has failed."""
        if not len(records):
            return
        with self._changed:
            while self._waiting_count >= _MOST_WAITING and self._failure is None:
                self._changed.wait()
            self._check()
            self._waiting.append(records)
            before, self._waiting_count = self._waiting_count, self._waiting_count + len(records)
            # The thread looks by itself every now and then; a full block is worth waking it for.
            if before < _IN_BLOCK <= self._waiting_count:
                self._changed.notify_all()

    def check(self) -> None:
        """Raises RecordingError once writing has failed."""
        with self._changed:
            self._check()

    def close(self, end: Mapping[str, Any] | None = None) -> None:
        """Writes what is still there and, with ``end``, that this is the end. Raises RecordingError where that fails."""
        if self._fd < 0:
            return
        try:
            with self._changed:
                self._is_closing = True
                self._end = end
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
            elif self._is_new:  # nothing was ever written
                with contextlib.suppress(OSError):
                    self.path.unlink()
        finally:
            os.close(self._fd)
            self._fd = -1
        if end is not None:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._error(self._failure)

    def _error(self, error: Exception) -> RecordingError:
        why = error.strerror if isinstance(error, OSError) else f"internal error: {type(error).__name__}: {error}"
        count = f"; the {self.traps:,} traps up to then are in it" if self.traps else ""
        return RecordingError(f"{self.path}: {why}{count}")

    # ---- the thread that writes ----

    def _write_all(self) -> None:
        try:
            while not self._write_some():
                pass
        except Exception as error:  # whatever it is, nobody must wait for this thread any more
            with self._changed:
                self._failure = error
                self._waiting.clear()
                self._changed.notify_all()

    def _write_some(self) -> bool:
        """Writes what there is; whether that was the end."""
        parts, news, is_over = self._take()
        for info in news:
            self._put(fileformat.text_block(fileformat.INFO, info))
        if parts:
            records = joined(parts)
            for start in range(0, len(records), _IN_BLOCK):
                self._put_traps(records[start : start + _IN_BLOCK])
        if is_over and self._end is not None:
            self._put(fileformat.text_block(fileformat.END, {"traps": self.traps, "lost": self.lost(), **self._end}))
        return is_over

    def _take(self) -> tuple[list[Records], list[Mapping[str, Any]], bool]:
        """What is there once a block is full, or the time is over, or all is."""
        with self._changed:
            deadline = time.monotonic() + FLUSH_S
            while self._waiting_count < _IN_BLOCK and not self._is_closing and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            parts, self._waiting, self._waiting_count = list(self._waiting), deque(), 0
            news, self._news = self._news, []
            self._changed.notify_all()
            return parts, news, self._is_closing

    def _put_traps(self, records: Records) -> None:
        columns: dict[str, Numbers] = {name: records[name] for name in records.dtype.names or () if name not in _LEFT_OUT}
        if self.callers_of is not None and records["caller"].any():
            columns["called_from"] = self.callers_of(records)
            self._name_places(columns["called_from"])
        self._name_processes(columns)
        self._name_places(records["rip"])
        self._put(fileformat.traps_block(columns, self.lost()))
        self.traps += len(records)

    def _name_processes(self, columns: Mapping[str, Numbers]) -> None:
        """A process ends, and its name with it: so it is asked for while its traps are fresh, and again in case it changes."""
        if self.name_of is None or not {"process", "thread"} <= columns.keys():
            return
        known = np.flatnonzero(columns["flags"] & np.uint8(fileformat.PROCESS_KNOWN))
        pids, firsts = np.unique(columns["process"][known], return_index=True)
        names = {}
        for pid, tid in zip(pids.tolist(), columns["thread"][known][firsts].tolist(), strict=True):
            name = self.name_of(pid, tid)
            if name is not None and self._named.get(pid) != name:
                self._named[pid] = names[str(pid)] = name
        if names:
            self._put(fileformat.text_block(fileformat.INFO, {"processes": names}))

    def _name_places(self, rips: Numbers) -> None:
        """Traps come from few places, and so do callers; each is named once, as soon as its name is known."""
        if len(self._placed) >= _MOST_PLACES:
            return
        different = rips[:1] if (rips == rips[0]).all() else np.unique(rips)
        new = set(different.tolist()) - self._placed
        names = {f"{rip:x}": name for rip in new if (name := self.place_of(rip))}
        if names:
            self._placed |= {int(rip, 16) for rip in names}
            self._put(fileformat.text_block(fileformat.INFO, {"symbols": names}))

    def _put(self, data: bytes) -> None:
        """Writes all of it, or leaves the file as it was before."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, memoryview(data)[written:])
        except OSError:
            if self._is_regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self.bytes)
            raise
        self.bytes += len(data)


def _taken(path: Path) -> tuple[int, bool]:
    """The file, held against other recorders, and whether it was made just now."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
    try:
        try:
            fd, is_new = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            fd, is_new = os.open(path, flags | os.O_CREAT, 0o666), False
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    try:
        if not is_new and stat.S_ISREG(os.fstat(fd).st_mode):
            _check_is_recording(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RecordingError(f"{path} is being recorded into by somebody else") from None
    except BaseException:
        os.close(fd)
        raise
    return fd, is_new


def _check_is_recording(path: Path) -> None:
    """A disk image, say, is not to be overwritten because of a mistyped line."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(fileformat.MAGIC))
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    if beginning not in (b"", fileformat.MAGIC):
        raise RecordingError(f"{path} is there already and is no recording: it is not overwritten")
