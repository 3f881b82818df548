"""Where the members lie that vmexit reads of a Windows kernel's structures: their names, and the three ways to know them.

A PDB says it of its own build. Without one, small functions that every kernel exports are read instead: PsGetProcessId
does nothing but give back one member. What no function gives comes from a table by build (offsets.toml).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PROCESS_ID = "_EPROCESS.UniqueProcessId"
PROCESS_LINKS = "_EPROCESS.ActiveProcessLinks"
PROCESS_NAME = "_EPROCESS.ImageFileName"
PARENT_ID = "_EPROCESS.InheritedFromUniqueProcessId"
PROCESS_PATH = "_EPROCESS.SeAuditProcessCreationInfo"
PEB = "_EPROCESS.Peb"
PAGE_TABLES = "_KPROCESS.DirectoryTableBase"
PROCESS_THREADS = "_KPROCESS.ThreadListHead"
THREAD_LINKS = "_KTHREAD.ThreadListEntry"
THREAD_PROCESS = "_KTHREAD.Process"
THREAD_STATE = "_KTHREAD.State"
TEB = "_KTHREAD.Teb"
STACK_BASE = "_KTHREAD.StackBase"
STACK_LIMIT = "_KTHREAD.StackLimit"
CLIENT_ID = "_ETHREAD.Cid"
CURRENT_THREAD = "_KPRCB.CurrentThread"

MEMBERS = (
    *(PROCESS_ID, PROCESS_LINKS, PROCESS_NAME, PARENT_ID, PROCESS_PATH, PEB),
    *(PAGE_TABLES, PROCESS_THREADS, THREAD_LINKS, THREAD_PROCESS, THREAD_STATE, TEB, STACK_BASE, STACK_LIMIT),
    *(CLIENT_ID, CURRENT_THREAD),
)
NEEDED = (PROCESS_ID, PROCESS_LINKS, PROCESS_NAME, PAGE_TABLES, THREAD_PROCESS, CLIENT_ID, CURRENT_THREAD)
"""Without these nothing is known of processes."""

Offsets = Mapping[str, int]
"""In bytes from the structure's begin, by name."""

HIGHEST_OFFSET = 0x4000
"""No structure that is read here is longer (KPRCB.CurrentThread is at its begin)."""

# The same in every Windows for x86-64 since Vista.
UNCHANGING: Offsets = {PAGE_TABLES: 0x28, PROCESS_THREADS: 0x30, CURRENT_THREAD: 8}


@dataclass(frozen=True, slots=True)
class Build:
    """A row of the table."""

    first: int
    last: int
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Table:
    """offsets.toml."""

    names: Mapping[int, str]
    """What Microsoft calls a build: "Windows 10 22H2"."""
    builds: Sequence[Build]

    def offsets(self, build: int) -> Offsets | None:
        """Of a build; None: the table does not have it."""
        return next((row.offsets for row in self.builds if row.first <= build <= row.last), None)

    def name(self, build: int) -> str:
        """What runs, as people call it."""
        return self.names.get(build, "Windows")


@cache
def table() -> Table:
    """The table that comes with vmexit."""
    with (files(__package__) / "offsets.toml").open("rb") as file:
        data = tomllib.load(file)
    return Table({int(build): name for build, name in data["names"].items()}, list(_rows(data["builds"])))


def _rows(rows: Sequence[Mapping[str, object]]) -> Iterator[Build]:
    for row in rows:
        first, last, offsets = row["first"], row["last"], row["offsets"]
        assert isinstance(first, int) and isinstance(last, int) and isinstance(offsets, dict)
        yield Build(first, last, {**UNCHANGING, **offsets})
