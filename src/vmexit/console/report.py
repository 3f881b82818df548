"""``vmexit report``: shows a recording, or writes a page of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vmexit.console.recorded import RecordedNames
from vmexit.lines import Columns
from vmexit.report.digest import Digest
from vmexit.report.facts import counted
from vmexit.report.fileformat import RecordingError
from vmexit.report.page import page
from vmexit.report.reader import RecordingFile
from vmexit.report.table import table


def show_tables(path: Path, *, everything: bool) -> None:
    """Prints tables. Raises RecordingError."""
    with RecordingFile(path) as file:
        for line in table(Digest(file), everything=everything):
            print(_printable(line))


def show_traps(path: Path) -> None:
    """Prints a line for each trap, as the command's ``log`` does. Raises RecordingError."""
    with RecordingFile(path) as file:
        clock = file.info.get("clock")
        started = clock.get("started_ns") if isinstance(clock, dict) else None
        names = RecordedNames(file)
        columns = Columns(started if isinstance(started, int) else None, names=names)
        print(columns.heading())
        for chunk in file.chunks():
            print(columns.lines(names.records(chunk)), end="")
        for note in file.notes():
            print(f"note: {note}")


def write_page(path: Path, out: Path) -> None:
    """Writes the page, whole or not at all. Raises RecordingError."""
    with RecordingFile(path) as file:
        if out.exists() and out.samefile(path):
            raise RecordingError(f"{out} is the recording itself: the page goes into another file")
        digest = Digest(file)
        text = page(digest)
    try:
        if out.exists() and not out.is_file():  # a pipe, or /dev/stdout
            out.write_text(text, encoding="utf-8")
            return  # and nothing else goes there
        fd, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        fresh = Path(name)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as written:
                written.write(text)
            umask = os.umask(0)
            os.umask(umask)
            fresh.chmod(0o666 & ~umask)
            fresh.replace(out)
        except BaseException:
            fresh.unlink()
            raise
    except OSError as error:
        raise RecordingError(f"{out}: {error.strerror}") from None
    print(f"{out}: a page of {counted(digest.total, 'trap')} ({len(text) / 1000:,.0f} kB)")


def _printable(line: str) -> str:
    """A recording can hold any text, a process's name say; a terminal is not to obey it."""
    return "".join(char if char.isprintable() else "\ufffd" for char in line)
