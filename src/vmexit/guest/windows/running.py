"""A Windows that runs in the guest: its symbols where they are now, its processes, its drivers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import chain

from vmexit.errors import VmexitError
from vmexit.guest.linux.btf import Btf
from vmexit.guest.linux.recipe import Recipe, is_kernel_pointer
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.symbols import KERNEL, Place, Symbol, Symbols
from vmexit.guest.windows import layout
from vmexit.guest.windows.accessors import processor_table, read_offsets
from vmexit.guest.windows.locate import KPRCB, Kernel, is_kpcr
from vmexit.guest.windows.modules import Module, read_module_symbols, read_modules, symbols_of
from vmexit.guest.windows.processes import Known, Task, Tasks
from vmexit.guest.windows.profile import Profile
from vmexit.guest.windows.settle import Candidate, ProcessesUnknownError, settle, system_process

NT = "nt"
"""What the kernel is called where modules have names, as in Microsoft's own debuggers."""
_KERNEL_NAMES = frozenset({NT, KERNEL, "ntoskrnl", "ntkrnlmp"})
_SHARED_BUILD = 0xFFFF_F780_0000_0000 + 0x260
"""KUSER_SHARED_DATA.NtBuildNumber: the build as programs see it, which updates raise without another kernel."""
_MOST_CPUS = 2048
_MOST_PLACES = 1 << 16


class TypesUnknownError(VmexitError):
    """No PDB has told the kernel's types."""


class Windows:
    """One boot of a kernel. What is read of it holds for one stop of the machine: ``forget`` when it has run."""

    kernel_name = NT

    def __init__(self, kernel: Kernel, profile: Profile | None = None) -> None:
        """``profile``: what a PDB of this very kernel says."""
        self.image = kernel.image
        self.memory = kernel.memory
        self.profile = profile
        self.tasks = Tasks(lambda: self.memory, lambda: self.known)
        self._seen: set[int] = set()
        self._settled: Candidate | None = None
        self._known: Known | None = None
        self._unknown: ProcessesUnknownError | None = None
        self._places: dict[int, Place] = {}
        self._modules: list[Module] = []
        self._modules_hold = False
        self._module_bases: list[int] = []
        self._module_symbols: dict[Module, Symbols] = {}
        # As RVAs; a PDB's hold the exports, too.
        self._symbols = profile.symbols if profile else symbols_of(self.image)
        # Both are read now, while the machine stands: names are asked for while it runs, too.
        self._functions = self.image.functions

    def forget(self) -> None:
        """The machine has run, or somebody has changed its memory."""
        self.memory.forget()
        self._modules_hold = False
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

    @property
    def extent(self) -> tuple[int, int]:
        """Where the kernel's image begins and ends."""
        return self.image.base, self.image.base + self.image.size

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

    @property
    def symbol_count(self) -> int:
        """How many symbols of the kernel's own are known."""
        return len(self._symbols)

    def _variable(self, name: str) -> int | None:
        """The address of one of the kernel's own symbols, exported or known by the PDB."""
        rva = self.image.exports.get(name)
        if rva is None and self.profile:
            rva = self.profile.symbols.find(name)
        return None if rva is None or rva >= self.image.size else self.image.base + rva

    @property
    def modules(self) -> list[Module]:
        """By their address, without the kernel itself; empty where the list cannot be found."""
        if not self._modules_hold:
            head = self._variable("PsLoadedModuleList")
            found = read_modules(self.memory, head) if head is not None else []
            self._modules = sorted((each for each in found if each.base != self.image.base), key=lambda module: module.base)
            self._module_bases = [module.base for module in self._modules]
            self._modules_hold = True
        return self._modules

    def module_symbols(self, module: Module) -> Symbols:
        """What it exports; empty where that cannot be read."""
        symbols = self._module_symbols.get(module)
        if symbols is None:
            symbols = self._module_symbols[module] = read_module_symbols(self.memory, module)
        return symbols

    def module_at(self, address: int) -> Module | None:
        """The driver whose code or data an address is."""
        return self._module_of(self.modules, address)

    def _module_of(self, modules: list[Module], address: int) -> Module | None:
        index = bisect_right(self._module_bases, address) - 1
        if index < 0 or address >= modules[index].base + modules[index].size:
            return None
        return modules[index]

    def name_of(self, address: int) -> Place | None:
        """What lies at an address; None: nothing that has a name."""
        # The kernel's own names stay what they are, and traps come from few places.
        place = self._places.get(address)
        if place is not None:
            return place
        rva = address - self.image.base
        if not 0 <= rva < self.image.size:
            return self._in_module(address)
        return self._in_kernel(rva)

    def known_name(self, address: int) -> Place | None:
        """The same without looking at the machine, which may run: a driver's where it was among those last seen."""
        rva = address - self.image.base
        if 0 <= rva < self.image.size:
            return self._places.get(address) or self._in_kernel(rva)
        module = self._module_of(self._modules, address)
        return self._place(module, self._module_symbols.get(module), address) if module else None

    @property
    def seen_modules(self) -> list[Module]:
        """Those last seen, without looking at the machine: another list each time that they have been read."""
        return self._modules

    def look_at_modules(self) -> None:
        """Reads them and what they export, so that ``known_name`` and ``known_address`` know them when the machine runs again."""
        for module in self.modules:
            self.module_symbols(module)

    def _in_kernel(self, rva: int) -> Place:
        found = self._symbols.at(rva)
        if found is None or not self._is_one_function(rva - found[1], rva):
            found = (NT, rva)
        if len(self._places) >= _MOST_PLACES:
            self._places.clear()
        place = self._places[rva + self.image.base] = Place(*found, NT)
        return place

    def _is_one_function(self, symbol: int, rva: int) -> bool:
        """Whether a symbol's function is the one that holds an address: without a PDB most functions have no name."""
        if not self.image.is_code(rva):
            return True
        function = self.image.function_at(rva)
        if function is not None:
            return symbol >= function[0]
        # A leaf function is not in the table; one that is may lie between.
        between = self._functions[:, 0]
        return not bool(((between > symbol) & (between <= rva)).any())

    def _in_module(self, address: int) -> Place | None:
        module = self.module_at(address)
        if module is None:
            return None
        return self._place(module, self.module_symbols(module), address)

    @staticmethod
    def _place(module: Module, symbols: Symbols | None, address: int) -> Place:
        found = symbols.at(address) if symbols is not None else None
        # What a driver exports says little of the rest of it: only the very address.
        if found is None or found[1]:
            return Place(module.name, address - module.base, module.name)
        return Place(*found, module.name)

    def address_of(self, name: str) -> int | None:
        """Of a symbol: "NtClose", "nt!NtClose", "tcpip!..."; the kernel's own go first. None: there is none."""
        return self._address_of(name, lambda: self.modules)

    def known_address(self, name: str) -> int | None:
        """The same without looking at the machine: a driver's where it was among those last seen."""
        return self._address_of(name, lambda: [module for module in self._modules if module in self._module_symbols])

    def _address_of(self, name: str, modules: Callable[[], list[Module]]) -> int | None:
        wanted, has_module, symbol = name.rpartition("!")
        if not has_module or wanted.lower() in _KERNEL_NAMES:
            rva = self._symbols.find(symbol)
            if rva is None:
                rva = self.image.exports.get(symbol)
            if rva is not None:
                return self.image.base + rva
            if has_module:
                return None
        for module in modules():
            if not has_module or module.name.lower() == wanted.lower():
                address = self.module_symbols(module).find(symbol)
                if address is not None:
                    return address
        return None

    def search(self, pattern: str) -> Iterator[tuple[Symbol, str]]:
        """Symbols, each with its module, whose name matches a pattern: "*msr*", "nt!Ps*", "tcpip!*"."""
        wanted, has_module, symbols = pattern.rpartition("!")
        if not has_module or wanted.lower() in (*_KERNEL_NAMES, "*"):
            for symbol in self._symbols.search(symbols):
                yield symbol._replace(address=symbol.address + self.image.base), NT
        for module in self.modules:
            if not has_module or wanted.lower() in (module.name.lower(), "*"):
                for symbol in self.module_symbols(module).search(symbols):
                    yield symbol, module.name

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
