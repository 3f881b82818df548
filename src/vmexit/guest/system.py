"""What every system that is recognised in a guest can be asked, whichever it is: Linux and Windows both are a ``System``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vmexit.errors import VmexitError
from vmexit.guest.linux.btf import Btf
from vmexit.guest.linux.recipe import Recipe
from vmexit.guest.memory import VirtualMemory
from vmexit.guest.symbols import Place, Symbol, Symbols


class NotRecognisedError(VmexitError):
    """The guest is nothing that is known here, or not yet; ``reason`` says why."""

    def __init__(self, reason: str, *, is_other_system: bool = False) -> None:
        """``is_other_system``: it is certainly not the system that was looked for, so that another one may be."""
        super().__init__(f"the guest is not known: {reason}")
        self.reason = reason
        self.is_other_system = is_other_system

    remarks: tuple[str, ...] = ()
    """What was wrong with the help that was given; a line each."""


@dataclass(frozen=True, slots=True)
class Help:
    """What a user gives where the guest alone is not enough."""

    image: Path | None = None
    """A bzImage, or a vmlinux."""
    system_map: Path | None = None
    pdb: Path | None = None
    """The symbols of a Windows kernel."""


class Task(Protocol):
    """A thread of the guest's, or a process as a list of processes has it."""

    @property
    def address(self) -> int:
        """Of the kernel's own structure for it."""

    @property
    def pid(self) -> int:
        """Of its process."""

    @property
    def tid(self) -> int:
        """Its own number; a process in a list has its ``pid`` here."""

    @property
    def comm(self) -> str:
        """The program's name, or what the thread calls itself; as long as the kernel keeps it."""

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it never runs a program's code."""


T_co = TypeVar("T_co", bound=Task, covariant=True)


@dataclass(frozen=True, slots=True)
class TaskList(Generic[T_co]):
    """What a walk over the guest's list has found, in the list's own order."""

    tasks: tuple[T_co, ...]
    broken: str | None = None
    """Why the walk did not come to the list's end."""


T = TypeVar("T", bound=Task)


class Tasks(Protocol[T]):
    """The processes and threads of a system. All of them raise VmexitError where there is no way to what is asked for."""

    def processes(self) -> TaskList[T]:
        """All processes."""

    def threads(self, process: T, /) -> TaskList[T]:
        """All threads of a process, as ``processes`` or ``process_of`` gives it."""

    def process_of(self, task: T, /) -> T | None:
        """The process of a thread."""

    def find(self, pid: int) -> T | None:
        """The process of that number."""

    def find_thread(self, tid: int) -> T | None:
        """The thread of that number."""

    def parent_id(self, task: T, /) -> int | None:
        """The number of the process that has started a process; it may have ended since."""

    def state(self, task: T, /) -> str:
        """One letter; "?" where it is not known, "-" where there is none."""

    def program(self, task: T, /) -> str | None:
        """The path of the file that a process executes, as the kernel has it; None: not known, or there is none."""

    def stack(self, task: T, /) -> tuple[int, int] | None:
        """Begin and end of a thread's kernel stack."""

    def places(self, process: T, /) -> Sequence[tuple[str, int]]:
        """What belongs to its address space: what it is, and where."""


class Module(Protocol):
    """What the kernel has loaded: ``size`` bytes from ``base`` on."""

    @property
    def name(self) -> str:
        """As it stands before the ! of a symbol."""

    @property
    def base(self) -> int:
        """Its first byte."""

    @property
    def size(self) -> int:
        """In bytes."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One function on the stack. ``address``: where it goes on, or is now; ``stack``: RSP there."""

    address: int
    stack: int
    is_guess: bool = False


class System(Protocol):
    """A kernel that runs in the guest. What is read of it holds for one stop of the machine: ``forget`` when it has run."""

    @property
    def memory(self) -> VirtualMemory:
        """By the kernel's own page tables."""

    @property
    def tasks(self) -> Tasks[Any]:
        """Its processes and threads."""

    @property
    def kernel_name(self) -> str:
        """What stands before the ! of the kernel's own symbols."""

    @property
    def extent(self) -> tuple[int, int]:
        """Where the kernel's image begins and ends."""

    @property
    def symbol_count(self) -> int:
        """How many symbols of the kernel's own are known."""

    @property
    def modules(self) -> Sequence[Module]:
        """By their address; without the kernel itself."""

    @property
    def built(self) -> str:
        """Which build of the kernel it is, in its own words."""

    @property
    def types(self) -> Btf:
        """The kernel's types. Raises VmexitError where they are not known."""

    @property
    def recipe(self) -> Recipe:
        """The way to a vCPU's thread, for those who are at the trap itself. Raises VmexitError where there is none (yet)."""

    def forget(self) -> None:
        """The machine has run, or somebody has changed its memory."""

    def is_still_there(self) -> bool:
        """Whether this kernel is still in memory."""

    def is_same(self, other: Any, /) -> bool:
        """Whether two are one kernel at one place."""

    def is_entered_at(self, lstar: int) -> bool:
        """Whether that can be the address which this kernel gives SYSCALL."""

    def describe(self) -> str:
        """One line: what runs, and how much is known of it."""

    def module_symbols(self, module: Any, /) -> Symbols:
        """Of one of ``modules``, at the addresses where they are; empty where they cannot be read."""

    def name_of(self, address: int) -> Place | None:
        """What lies at an address; None: nothing that has a name."""

    def address_of(self, name: str) -> int | None:
        """Of a symbol, plain or "module!symbol"; None: there is none."""

    @property
    def seen_modules(self) -> object:
        """Those last seen: another object each time that they have been read."""

    def look_at_modules(self) -> None:
        """Reads them and their symbols, for ``known_name`` and ``known_address``."""

    def known_name(self, address: int) -> Place | None:
        """As ``name_of``, but without looking at the machine, which may run: by the modules last seen."""

    def known_address(self, name: str) -> int | None:
        """As ``address_of``, likewise."""

    def search(self, pattern: str) -> Iterator[tuple[Symbol, str]]:
        """Symbols whose name matches a pattern, each with its module."""

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The thread that a vCPU executes; None: not known."""


@dataclass(frozen=True, slots=True)
class CodePiece:
    """Code of the kernel's or of a module's: from ``first`` to ``last``.

    ``count`` entries of a table in guest memory (``places``, ``entries``; struct vmexit_code) tell where return addresses lie;
    0: there is none.
    """

    first: int
    last: int
    places: int = 0
    entries: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class CodeMap:
    """All the code that is known; and how entries of its tables call RSP, RBP and what a call leaves on the stack."""

    pieces: tuple[CodePiece, ...]
    rsp: int = 0
    rbp: int = 1
    call: int = 0
    keeps_frame_pointers: bool = False
    """Code without a table does."""


class Stacks(Protocol):
    """The kernel stacks of a system."""

    def code_map(self) -> CodeMap:
        """How to find callers, for those who are at the trap itself: with the modules last seen."""

    def frames(self, registers: Mapping[str, int]) -> Iterator[Frame]:
        """The frames of what a vCPU executes, the innermost first."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A system that was recognised."""

    system: System
    stacks: Stacks
    source: str
    """Where symbols and types come from, in a few words."""
    remarks: tuple[str, ...] = ()
    """What was wrong with the help that was given, or what is not known of the guest; a line each."""
