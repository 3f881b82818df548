"""Reading a recording, a block at a time: ten million traps need no more memory than ten thousand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vmexit.link.rings import Records
from vmexit.link.wire import RECORD, Action
from vmexit.report import fileformat
from vmexit.report.fileformat import ChunkHead, DamagedError, Head, Numbers, RecordingError

NOBODY = 0xFFFF_FFFF
"""No process has this number."""
_NEEDED = ("time_ns", "value", "msr", "vcpu", "access", "stage")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block of traps is."""

    offset: int
    """Of its payload in the file."""
    head: Head
    chunk: ChunkHead


class Chunk:
    """Traps in a row, by columns."""

    def __init__(self, columns: dict[str, Numbers], lost: int) -> None:
        self.columns = columns
        self.lost = lost
        """Records that were lost up to the last of these."""

    def __len__(self) -> int:
        return len(self.columns["time_ns"])

    def __getitem__(self, name: str) -> Numbers:
        """A column; of one that the recording lacks every number is 0."""
        found = self.columns.get(name)
        return np.zeros(len(self), np.uint8) if found is None else found

    def pids(self) -> Numbers:
        """The process of each trap; NOBODY where it is not known."""
        if "process" not in self.columns:
            return np.full(len(self), NOBODY, np.uint32)
        known = (self["flags"] & np.uint8(fileformat.PROCESS_KNOWN)) != 0
        return np.where(known, self.columns["process"], np.uint32(NOBODY))

    def records(self) -> Records:
        """The same as the wire has them; columns that it does not know are left out."""
        records: Records = np.zeros(len(self), RECORD)
        records["action"] = int(Action.RECORD)
        for name in RECORD.names or ():
            if name in self.columns:
                records[name] = self.columns[name]
        return records


class RecordingFile:
    """A recording. It may be damaged, cut off, or still be written: what is whole of it can be read."""

    def __init__(self, path: Path) -> None:
        """Looks through the file. Raises RecordingError for one that cannot be read, or is no recording."""
        self.path = path
        self.info: dict[str, Any] = {}
        """What the recorder wrote about it; the page on recordings tells what there can be."""
        self.end: dict[str, Any] | None = None
        """How it ended; None: it has no end."""
        self.problem: str | None = None
        """Why not all of the file could be read."""
        self.damaged: set[int] = set()
        """Where blocks are (bytes from the start) that had to be left out; those of traps come in while they are read."""
        self._places: list[_Place] = []
        try:
            # Looked at before it is opened: that of a pipe nobody writes would never come to an end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise RecordingError(f"{path} is no regular file: a recording is read more than once")
            self._file = path.open("rb", buffering=1 << 16)
        except OSError as error:
            raise RecordingError(f"{path}: {error.strerror}") from None
        try:
            self._scan()
        except OSError as error:
            self._file.close()
            raise RecordingError(f"{path}: {error.strerror}") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _scan(self) -> None:
        self.is_being_written = self._is_locked()
        self.size = os.fstat(self._file.fileno()).st_size
        beginning = self._file.read(fileformat.START.size)
        if len(beginning) < fileformat.START.size or not beginning.startswith(fileformat.MAGIC):
            raise RecordingError(f"{self.path} is no recording of vmexit")
        version = fileformat.START.unpack(beginning)[1]
        if version != fileformat.VERSION:
            raise RecordingError(
                f"{self.path} is of version {version} of recordings; this vmexit reads version {fileformat.VERSION}"
            )
        while self.end is None and (place := self._file.tell()) < self.size:
            try:
                self._scan_block(place)
            except DamagedError as error:
                self.problem = f"{error} (at byte {place:,} of {self.size:,})"
                break

    def _is_locked(self) -> bool:
        """A recorder holds its file."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)
        except BlockingIOError:
            return True
        except OSError:  # a file system that knows no locks
            pass
        return False

    def _scan_block(self, place: int) -> None:
        head = Head.unpack(self._file.read(fileformat.BLOCK.size))
        offset = place + fileformat.BLOCK.size
        if offset + head.length > self.size:
            raise DamagedError("it ends within a block")
        if head.kind == fileformat.TRAPS:
            with self._leaving_out(place):
                self._places.append(_Place(offset, head, ChunkHead.unpack(self._file.read(fileformat.CHUNK.size))))
        elif head.kind in (fileformat.INFO, fileformat.END):
            with self._leaving_out(place):
                payload = self._file.read(head.length)
                head.check(payload)
                content = fileformat.read_text(payload)
                if head.kind == fileformat.INFO:
                    fileformat.merge(self.info, content)
                else:
                    self.end = content
        self._file.seek(offset + head.length)

    @contextlib.contextmanager
    def _leaving_out(self, place: int) -> Iterator[None]:
        """What is damaged within a block, whose length is known, is left out."""
        try:
            yield
        except DamagedError:
            self.damaged.add(place)

    # ---- what it holds ----

    @property
    def is_whole(self) -> bool:
        """Whether the recorder came to its end, and everything could be read so far."""
        return self.end is not None and self.problem is None and not self.damaged

    def _sound(self) -> Iterator[ChunkHead]:
        """What blocks of traps say of themselves, those left out that are known to be damaged: all of these once it was read."""
        return (place.chunk for place in self._places if place.offset - fileformat.BLOCK.size not in self.damaged)

    @property
    def total(self) -> int:
        """Its traps, as far as blocks tell."""
        return sum(chunk.count for chunk in self._sound())

    @property
    def times(self) -> tuple[int, int]:
        """When the first and the last trap happened (CLOCK_MONOTONIC, ns), as far as blocks tell."""
        first = min((chunk.first_ns for chunk in self._sound()), default=0)
        last = max((chunk.last_ns for chunk in self._sound()), default=first)
        return first, last

    @property
    def lost(self) -> int:
        """Records that were lost, as far as is known."""
        told = self.end.get("lost") if self.end else None
        return max([chunk.lost for chunk in self._sound()] + [told if isinstance(told, int) else 0])

    def chunks(self) -> Iterator[Chunk]:
        """All traps, in the order in which they were recorded; may be called again. Blocks that are damaged are left out.

        Raises RecordingError where the file cannot be read any more.
        """
        for place in self._places:
            try:
                self._file.seek(place.offset)
                payload = self._file.read(place.head.length)
            except OSError as error:
                raise RecordingError(f"{self.path}: {error.strerror}") from None
            try:
                place.head.check(payload)
                columns = fileformat.read_traps(payload)
                if missing := [name for name in _NEEDED if name not in columns]:
                    raise DamagedError(f"traps without {missing[0]}")
            except DamagedError:
                self.damaged.add(place.offset - fileformat.BLOCK.size)
                continue
            yield Chunk(columns, place.chunk.lost)

    def notes(self) -> list[str]:
        """What is to be said of it before anything else: that it has no end, is damaged, has lost something. Once it was read."""
        notes = []
        if self.is_being_written:
            notes.append("it is still being recorded: this is what there was when it was read")
        elif self.end is None:
            why = f": {self.problem}" if self.problem else ""
            notes.append(f"it was cut off, or its recorder was killed{why}; all that is whole of it is here")
        elif self.problem:
            notes.append(f"it could not be read to its end: {self.problem}")
        if self.damaged:
            count = len(self.damaged)
            notes.append(f"{count} damaged block{'s' * (count != 1)} left out, the first at byte {min(self.damaged):,}")
        if self.lost:
            notes.append(f"{self.lost:,} record{'s' * (self.lost != 1)} lost: they came faster than they were taken")
        return notes
