"""A Windows that runs in the guest: its symbols where they are now, its processes, its drivers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain

import numpy as np

from vmexit.errors import VmexitError
from vmexit.guest.linux.btf import Btf
from vmexit.guest.linux.recipe import Recipe, is_kernel_pointer
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.naming import Naming
from vmexit.guest.symbols import KERNEL, Place, Symbols
from vmexit.guest.windows import layout
from vmexit.guest.windows.accessors import processor_table, read_offsets
from vmexit.guest.windows.locate import KPRCB, Kernel, is_kpcr
from vmexit.guest.windows.modules import Module, read_module_symbols, read_modules, symbols_of
from vmexit.guest.windows.processes import Known, Task, Tasks
from vmexit.guest.windows.profile import Profile
from vmexit.guest.windows.settle import Candidate, ProcessesUnknownError, settle, system_process

NT = "nt"
"""What the kernel is called where modules have names, as in Microsoft's own debuggers."""
_OTHER_NAMES = (KERNEL, "ntoskrnl", "ntkrnlmp")
_SHARED_BUILD = 0xFFFF_F780_0000_0000 + 0x260
"""KUSER_SHARED_DATA.NtBuildNumber: the build as programs see it, which updates raise without another kernel."""
_MOST_CPUS = 2048


class TypesUnknownError(VmexitError):
    """No PDB has told the kernel's types."""


class Windows(Naming[Module]):
    """One boot of a kernel. What is read of it holds for one stop of the machine: ``forget`` when it has run."""

    def __init__(self, kernel: Kernel, profile: Profile | None = None) -> None:
        """``profile``: what a PDB of this very kernel says."""
        image = kernel.image
        # As RVAs; a PDB's hold the exports, too.
        symbols = profile.symbols if profile else symbols_of(image)
        symbols = symbols.moved(image.base)
        # Without a PDB most functions have no name, and shall not be called by the one before.
        symbols.nameless = image.functions[:, 0].astype(np.uint64) + np.uint64(image.base)
        super().__init__(NT, _OTHER_NAMES, (image.base, image.base + image.size), symbols)
        self.image = image
        self.memory = kernel.memory
        self.profile = profile
        self.tasks = Tasks(lambda: self.memory, lambda: self.known)
        self._seen: set[int] = set()
        self._settled: Candidate | None = None
        self._known: Known | None = None
        self._unknown: ProcessesUnknownError | None = None

    def forget(self) -> None:
        """The machine has run, or somebody has changed its memory."""
        self.memory.forget()
        self._forget_modules()
        self._known = self._unknown = None

    def is_still_there(self) -> bool:
        """Whether this kernel is still in memory: it is not after a reset."""
        try:
            return self.memory.read(self.image.base, len(self.image.identity)) == self.image.identity
        except UnreadableError:
            return False

    def is_same(self, other: object) -> bool:
        """Whether two are one kernel at one place."""
        if not isinstance(other, Windows):
            return False
        return (self.image.base, self.image.identity) == (other.image.base, other.image.identity)

    def is_entered_at(self, lstar: int) -> bool:
        """Whether that can be the address which this kernel gives SYSCALL."""
        return self.image.is_code(lstar - self.image.base)

    # ---- what it is ----

    @cached_property
    def build(self) -> int:
        """The number of the build; 0: not known."""
        at = self._variable("NtBuildNumber")
        for address in (_SHARED_BUILD, at):
            try:
                number = self.memory.u32(address) & 0xFFFF if address is not None else 0
            except UnreadableError:
                continue
            if number:
                return number
        return 0

    @property
    def built(self) -> str:
        """The name and key of its PDB, which no other build has."""
        record = self.image.codeview
        return f"{record.file} {record.key}" if record else "not known: it has no CodeView record"

    def describe(self) -> str:
        """One line: what runs, and how much is known of it."""
        count = len(self.modules)
        build = f"build {self.build}" if self.build else "unknown build"
        return (
            f"{layout.table().name(self.build)} x86_64, {build}, base {self.image.base:#x}, {self.symbol_count} symbols, "
            f"{count} module{'s' * (count != 1)}"
        )

    @property
    def types(self) -> Btf:
        """The kernel's types. Raises TypesUnknownError, BtfError."""
        if self.profile is None:
            raise TypesUnknownError(f"the types of Windows are in its PDB: {self.built} (guest pdb FILE, or --pdb FILE)")
        return self.profile.types

    # ---- symbols ----

    def _variable(self, name: str) -> int | None:
        """The address of one of the kernel's own symbols, exported or known by the PDB."""
        rva = self.image.exports.get(name)
        if rva is None and self.profile:
            rva = self.profile.symbols.find(name)
        return None if rva is None or rva >= self.image.size else self.image.base + rva

    def _read_modules(self) -> Iterable[Module]:
        head = self._variable("PsLoadedModuleList")
        found = read_modules(self.memory, head) if head is not None else []
        return (module for module in found if module.base != self.image.base)

    def _read_module_symbols(self, module: Module) -> Symbols:
        return read_module_symbols(self.memory, module)

    def _nameless(self, address: int) -> Place:
        return Place(NT, address - self.image.base, NT)

    def _find_in_kernel(self, symbol: str) -> int | None:
        address = super()._find_in_kernel(symbol)
        if address is not None:
            return address
        rva = self.image.exports.get(symbol)
        return None if rva is None else self.image.base + rva

    @staticmethod
    def _is_of(module: Module, address: int, distance: int) -> bool:
        # What a driver exports says little of the rest of it: only the very address.
        return distance == 0

    @staticmethod
    def _typed(name: str) -> str:
        return name.lower()

    # ---- processes ----

    def add_processor(self, base: int) -> None:
        """A vCPU's GS has been seen to be a KPCR."""
        if base not in self._seen:
            self._seen.add(base)
            self._known = None

    @property
    def known(self) -> Known:
        """What it takes to look at processes. Raises ProcessesUnknownError."""
        if self._unknown is not None:
            raise self._unknown
        if self._known is None:
            try:
                self._known = self._find_out()
            except ProcessesUnknownError as error:
                self._unknown = error
                raise
        return self._known

    @property
    def process_source(self) -> str:
        """Where the offsets come from. Raises ProcessesUnknownError."""
        assert self.known is not None and self._settled is not None
        return self._settled.source

    def _find_out(self) -> Known:
        system = system_process(self.memory, self._variable("PsInitialSystemProcess"))
        bases = self._processors()
        # What has fitted once is only looked at again: another boot of the same build, or a CPU more.
        candidates = chain([self._settled] if self._settled else [], self._candidates())
        found = settle(self.memory, self.image, system, bases, candidates)
        if found is None:
            build = f"build {self.build}" if self.build else "a build"
            raise ProcessesUnknownError(
                f"the processes of this Windows are not known: {build} is none that vmexit knows; "
                f"give its PDB, {self.built} (guest pdb FILE, or --pdb FILE)"
            )
        self._settled, known = found
        root = self.memory.u64(system + known.offsets[layout.PAGE_TABLES])
        if root != self.memory.root:
            # That of the process System stays, while the one that the kernel was found through may be any program's.
            self.memory = VirtualMemory(self.memory.physical, root, self.memory.levels)
        return known

    def _candidates(self) -> Iterator[Candidate]:
        if self.profile:
            yield Candidate("its PDB", self.profile.offsets)
        derived = read_offsets(self.memory, self.image)
        row = layout.table().offsets(self.build)
        if row is not None and derived and all(row.get(member, offset) == offset for member, offset in derived.items()):
            yield Candidate("its exported functions, and the table of builds", {**row, **derived})
        if derived:
            yield Candidate("its exported functions", derived)
        if row is not None:
            yield Candidate("the table of builds", row)

    def _processors(self) -> tuple[int, ...]:
        """The KPCRs: those of the kernel's own table, or where it cannot be found those that vCPUs were seen with."""
        table = processor_table(self.memory, self.image)
        if table is None and self.profile:
            table = self._variable("KiProcessorBlock")
        found: list[int] = []
        for index in range(_MOST_CPUS) if table is not None else ():
            try:
                block = self.memory.u64(table + 8 * index) if table is not None else 0
            except UnreadableError:
                break
            if not is_kernel_pointer(block) or not is_kpcr(self.memory, block - KPRCB):
                break
            found.append(block - KPRCB)
        return tuple(found) or tuple(sorted(base for base in self._seen if is_kpcr(self.memory, base)))

    @property
    def recipe(self) -> Recipe:
        """The way to a vCPU's thread, for those who are at the trap itself. Raises ProcessesUnknownError."""
        return self.tasks.recipe

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The thread that a vCPU executes; None: not known."""
        try:
            return self.tasks.current(core, registers)
        except VmexitError:
            return None
