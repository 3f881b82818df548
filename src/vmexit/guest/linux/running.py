"""A Linux that runs in the guest: its symbols where they are now, its processes, its modules, its types."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

from vmexit.guest.linux.btf import Btf
from vmexit.guest.linux.modules import Module, read_module_symbols, read_modules
from vmexit.guest.linux.processes import Task, Tasks
from vmexit.guest.linux.profile import Profile, ProfileError
from vmexit.guest.linux.recipe import Recipe
from vmexit.guest.linux.slide import KERNEL_MAP, Placement, lstar_slide
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.symbols import KERNEL, Place, Symbol, Symbols

_KERNEL_NAMES = frozenset({KERNEL, "nt", "vmlinux"})
"""What may stand before the ! of a symbol of the kernel's own; "nt" is what people type who know Windows."""


_CODE = (("_stext", "_etext"), ("_sinittext", "_einittext"))
_MOST_PLACES = 1 << 16


class Linux:
    """One boot of a kernel. What is read of it holds for one stop of the machine: ``forget`` when it has run."""

    kernel_name = KERNEL

    def __init__(self, profile: Profile, placement: Placement, memory: VirtualMemory) -> None:
        """``memory``: by the kernel's own page tables."""
        self.profile = profile
        self.placement = placement
        self.memory = memory
        self.slide = placement.slide
        self.tasks = Tasks(profile, placement.slide, memory)
        self._end = (profile.symbols.find("_end") or 0) + self.slide
        self._start = (profile.symbols.find("_text") or 0) + self.slide
        self._code = [
            (start + self.slide, end + self.slide)
            for first, last in _CODE
            if (start := profile.symbols.find(first)) is not None and (end := profile.symbols.find(last)) is not None
        ]
        self._places: dict[int, Place] = {}
        self._modules: list[Module] = []
        self._modules_hold = False
        self._module_bases: list[int] = []
        self._module_symbols: dict[Module, Symbols] = {}

    @property
    def extent(self) -> tuple[int, int]:
        """Where the kernel's image begins and ends."""
        return self._start, self._end

    @property
    def symbol_count(self) -> int:
        """How many symbols of the kernel's own are known."""
        return len(self.profile.symbols)

    @property
    def built(self) -> str:
        """What the kernel says of its build."""
        return self.profile.version

    @property
    def types(self) -> Btf:
        """The kernel's types. Raises BtfError where it carries none."""
        return self.profile.btf

    def forget(self) -> None:
        """The machine has run, or somebody has changed its memory."""
        self.memory.forget()
        self.tasks.forget()
        self._modules_hold = False

    def is_same(self, other: object) -> bool:
        """Whether two are one kernel at one place."""
        if not isinstance(other, Linux):
            return False
        return self.placement == other.placement and self.profile.banner == other.profile.banner

    def is_entered_at(self, lstar: int) -> bool:
        """Whether that is the address which this kernel gives SYSCALL."""
        return lstar_slide(self.profile, lstar) == self.slide

    def is_still_there(self) -> bool:
        """Whether this kernel is still in memory: it is not after a reset, nor after kexec."""
        at = self.profile.address("linux_banner") + self.slide
        try:
            return self.memory.read(at, len(self.profile.banner)) == self.profile.banner
        except UnreadableError:
            return False

    def describe(self) -> str:
        """One line: what runs, and how much is known of it."""
        modules = self.modules
        return (
            f"Linux {self.profile.release} x86_64, slide {self.slide:#x}, {len(self.profile.symbols)} symbols, "
            f"{len(modules)} module{'s' * (len(modules) != 1)}"
        )

    # ---- symbols ----

    @property
    def modules(self) -> list[Module]:
        """By their address; those that are loaded at this stop. Empty where the list cannot be found."""
        if not self._modules_hold:
            try:
                found = read_modules(self.profile, self.slide, self.memory)
            except ProfileError:
                found = []
            self._modules = sorted(found, key=lambda module: module.base)
            self._module_bases = [module.base for module in self._modules]
            self._modules_hold = True
        return self._modules

    def module_symbols(self, module: Module) -> Symbols:
        """At the addresses where they are; empty where they cannot be read."""
        symbols = self._module_symbols.get(module)
        if symbols is None:
            try:
                symbols = read_module_symbols(self.profile, self.memory, module)
            except ProfileError:
                symbols = Symbols.none()
            self._module_symbols[module] = symbols
        return symbols

    def name_of(self, address: int) -> Place | None:
        """What lies at an address; None: nothing that has a name."""
        # The kernel's own names stay what they are, and traps come from few places.
        place = self._places.get(address)
        if place is not None:
            return place
        if not self._start <= address < self._end:
            return self._in_module(address)
        return self._in_kernel(address)

    def known_name(self, address: int) -> Place | None:
        """The same without looking at the machine, which may run: a module's where it was among those last seen."""
        if self._start <= address < self._end:
            return self._places.get(address) or self._in_kernel(address)
        module = self._module_of(self._modules, address)
        return self._place(module, self._module_symbols.get(module), address) if module else None

    @property
    def seen_modules(self) -> list[Module]:
        """Those last seen, without looking at the machine: another list each time that they have been read."""
        return self._modules

    def look_at_modules(self) -> None:
        """Reads them and their symbols, so that ``known_name`` and ``known_address`` know them when the machine runs again."""
        for module in self.modules:
            self.module_symbols(module)

    def _in_kernel(self, address: int) -> Place | None:
        found = self.profile.symbols.at(address - self.slide)
        if found is None:
            return None
        if len(self._places) >= _MOST_PLACES:
            self._places.clear()
        place = self._places[address] = Place(found[0], found[1], KERNEL)
        return place

    def module_at(self, address: int) -> Module | None:
        """The module whose code or data an address is."""
        return self._module_of(self.modules, address)

    def _module_of(self, modules: list[Module], address: int) -> Module | None:
        index = bisect_right(self._module_bases, address) - 1
        if index < 0 or address >= modules[index].base + modules[index].size:
            return None
        return modules[index]

    def is_code(self, address: int) -> bool:
        """Whether it can be the address of an instruction of the kernel's or of a module's."""
        in_kernel = any(start <= address < end for start, end in self._code)
        return in_kernel or self.module_at(address) is not None

    @property
    def code(self) -> list[tuple[int, int]]:
        """Where the kernel's own instructions begin and end."""
        return self._code

    def _in_module(self, address: int) -> Place | None:
        module = self.module_at(address)
        if module is None:
            return None
        return self._place(module, self.module_symbols(module), address)

    @staticmethod
    def _place(module: Module, symbols: Symbols | None, address: int) -> Place:
        found = symbols.at(address) if symbols is not None else None
        # A symbol below the module is none of its code: an absolute one.
        if found is None or address - found[1] < module.base:
            return Place(module.name, address - module.base, module.name)
        return Place(*found, module.name)

    def address_of(self, name: str) -> int | None:
        """Of a symbol: "schedule", "kernel!schedule", "msr!msr_write"; the kernel's own go first. None: there is none."""
        return self._address_of(name, lambda: self.modules)

    def known_address(self, name: str) -> int | None:
        """The same without looking at the machine: a module's where it was among those last seen."""
        return self._address_of(name, lambda: [module for module in self._modules if module in self._module_symbols])

    def _address_of(self, name: str, modules: Callable[[], list[Module]]) -> int | None:
        module, has_module, symbol = name.rpartition("!")
        if not has_module or module.lower() in _KERNEL_NAMES:
            address = self.profile.symbols.find(symbol)
            if address is not None:
                return self._moved(address)
            if has_module:
                return None
        for loaded in modules():
            if not has_module or loaded.name == module:
                address = self.module_symbols(loaded).find(symbol)
                if address is not None:
                    return address
        return None

    def search(self, pattern: str) -> Iterator[tuple[Symbol, str]]:
        """Symbols, each with its module, whose name matches a pattern: "*msr*", "kernel!sched_*", "msr!*"."""
        wanted, has_module, symbols = pattern.rpartition("!")
        if not has_module or wanted.lower() in (*_KERNEL_NAMES, "*"):
            for symbol in self.profile.symbols.search(symbols):
                yield symbol._replace(address=self._moved(symbol.address)), KERNEL
        for module in self.modules:
            if not has_module or wanted in (module.name, "*"):
                for symbol in self.module_symbols(module).search(symbols):
                    yield symbol, module.name

    def _moved(self, address: int) -> int:
        """Per-CPU variables are offsets into the area of each CPU; they do not move."""
        return address + self.slide if address >= KERNEL_MAP else address

    # ---- processes ----

    @property
    def recipe(self) -> Recipe:
        """The way to a vCPU's task, for those who are at the trap itself. Raises ProfileError."""
        return self.tasks.recipe

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The thread that a vCPU executes; None: not known."""
        try:
            return self.tasks.current(core, registers)
        except ProfileError:
            return None
