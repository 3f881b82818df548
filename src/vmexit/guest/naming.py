"""Names of a running system's addresses, and addresses of its names: the kernel's own symbols first, then its modules'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from typing import Generic, TypeVar

from vmexit.guest.symbols import Place, Symbol, Symbols
from vmexit.guest.system import Module

_MOST_PLACES = 1 << 16

M = TypeVar("M", bound=Module)


class _Loaded(Generic[M]):
    """The modules of one moment."""

    def __init__(self, found: Iterable[M]) -> None:
        self.modules = sorted(found, key=lambda module: module.base)
        self._bases = [module.base for module in self.modules]

    def at(self, address: int) -> M | None:
        """The one whose code or data an address is."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        module = self.modules[index]
        return module if address < module.base + module.size else None


class Naming(ABC, Generic[M]):
    """What has which name in one boot of a kernel. A system says by the methods with an underscore what is its own way.

    The kernel's own names stay what they are. Modules come and go: they are read once a stop, until ``_forget_modules``. What
    ``known_...`` and ``seen_modules`` tell may be asked while the machine runs, and from any thread.
    """

    def __init__(self, kernel_name: str, other_names: Collection[str], extent: tuple[int, int], symbols: Symbols) -> None:
        """``other_names``: what else may stand before the ! of the kernel's symbols, in lower case. ``extent``: where its image
        begins and ends. ``symbols``: the kernel's own, at the addresses where they are."""
        self.kernel_name = kernel_name
        self._kernel_names = frozenset({kernel_name, *other_names})
        self._start, self._end = extent
        self._symbols = symbols
        self._places: dict[int, Place] = {}
        self._loaded: _Loaded[M] = _Loaded(())
        self._loaded_now = False
        self._module_symbols: dict[M, Symbols] = {}

    # ---- what each system does its own way ----

    @abstractmethod
    def _read_modules(self) -> Iterable[M]:
        """Those that are loaded now, without the kernel itself; none where the list cannot be found."""

    @abstractmethod
    def _read_module_symbols(self, module: M) -> Symbols:
        """At the addresses where they are; empty where they cannot be read."""

    def _nameless(self, address: int) -> Place | None:
        """What an address in the kernel's image is called that belongs to no symbol."""
        return None

    def _find_in_kernel(self, symbol: str) -> int | None:
        """Where a symbol of the kernel's is."""
        return self._symbols.find(symbol)

    @staticmethod
    def _is_of(module: M, address: int, distance: int) -> bool:
        """Whether an address so far behind a symbol of a module belongs to that symbol."""
        return address - distance >= module.base  # A symbol below the module is none of its code: an absolute one.

    @staticmethod
    def _typed(name: str) -> str:
        """The name of a module as it is compared with others."""
        return name

    # ---- the same for all ----

    @property
    def extent(self) -> tuple[int, int]:
        """Where the kernel's image begins and ends."""
        return self._start, self._end

    @property
    def symbol_count(self) -> int:
        """How many symbols of the kernel's own are known."""
        return len(self._symbols)

    def _forget_modules(self) -> None:
        """The machine has run: they are read again when they are next asked for."""
        self._loaded_now = False

    @property
    def _now(self) -> _Loaded[M]:
        if not self._loaded_now:
            self._loaded = _Loaded(self._read_modules())
            self._loaded_now = True
        return self._loaded

    @property
    def modules(self) -> list[M]:
        """By their address, without the kernel itself; those that are loaded at this stop. Empty where they cannot be found."""
        return self._now.modules

    @property
    def seen_modules(self) -> list[M]:
        """Those last seen, without looking at the machine: another list each time that they have been read."""
        return self._loaded.modules

    def look_at_modules(self) -> None:
        """Reads them and their symbols, so that ``known_name`` and ``known_address`` know them when the machine runs again."""
        for module in self.modules:
            self.module_symbols(module)

    def module_symbols(self, module: M) -> Symbols:
        """At the addresses where they are; empty where they cannot be read."""
        symbols = self._module_symbols.get(module)
        if symbols is None:
            symbols = self._module_symbols[module] = self._read_module_symbols(module)
        return symbols

    def module_at(self, address: int) -> M | None:
        """The module whose code or data an address is."""
        return self._now.at(address)

    def name_of(self, address: int) -> Place | None:
        """What lies at an address; None: nothing that has a name."""
        # Traps come from few places.
        place = self._places.get(address)
        if place is not None:
            return place
        if self._start <= address < self._end:
            return self._in_kernel(address)
        module = self._now.at(address)
        return self._in_module(module, self.module_symbols(module), address) if module else None

    def known_name(self, address: int) -> Place | None:
        """The same without looking at the machine, which may run: a module's where it was among those last seen."""
        if self._start <= address < self._end:
            return self._places.get(address) or self._in_kernel(address)
        module = self._loaded.at(address)
        return self._in_module(module, self._module_symbols.get(module), address) if module else None

    def _in_kernel(self, address: int) -> Place | None:
        # A new address of the kernel's comes here, and two microseconds are all that it may take.
        place = self._symbols.place(address, self.kernel_name)
        if place is None or not place[0]:
            place = self._nameless(address)
            if place is None:
                return None
        if len(self._places) >= _MOST_PLACES:
            self._places.clear()
        self._places[address] = place
        return place

    def _in_module(self, module: M, symbols: Symbols | None, address: int) -> Place:
        place = symbols.place(address, module.name) if symbols is not None else None
        if place is None or not self._is_of(module, address, place.offset):
            return Place(module.name, address - module.base, module.name)
        return place

    def address_of(self, name: str) -> int | None:
        """Of a symbol: "schedule", "kernel!schedule", "msr!msr_write"; the kernel's own go first. None: there is none."""
        return self._address_of(name, None)

    def known_address(self, name: str) -> int | None:
        """The same without looking at the machine: a module's where it was among those last seen."""
        return self._address_of(name, [module for module in self.seen_modules if module in self._module_symbols])

    def _address_of(self, name: str, modules: list[M] | None) -> int | None:
        """``modules``: those that may be asked; None: those that are loaded now, which are read only where it takes them."""
        wanted, has_module, symbol = name.rpartition("!")
        if not has_module or wanted.lower() in self._kernel_names:
            address = self._find_in_kernel(symbol)
            if address is not None or has_module:
                return address
        for module in self.modules if modules is None else modules:
            if not has_module or self._typed(module.name) == self._typed(wanted):
                address = self.module_symbols(module).find(symbol)
                if address is not None:
                    return address
        return None

    def search(self, pattern: str) -> Iterator[tuple[Symbol, str]]:
        """Symbols, each with its module, whose name matches a pattern: "*msr*", "kernel!sched_*", "msr!*"."""
        wanted, has_module, symbols = pattern.rpartition("!")
        if not has_module or wanted.lower() in (*self._kernel_names, "*"):
            for symbol in self._symbols.search(symbols):
                yield symbol, self.kernel_name
        for module in self.modules:
            if not has_module or wanted == "*" or self._typed(module.name) == self._typed(wanted):
                for symbol in self.module_symbols(module).search(symbols):
                    yield symbol, module.name
