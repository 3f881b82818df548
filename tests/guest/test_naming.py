"""Names and addresses in a made-up system: a kernel with three symbols, and modules that come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest

from vmexit.guest.naming import Naming
from vmexit.guest.symbols import Symbols

BASE, SIZE = 0x10_0000, 0x1_0000
MODULES = 0x20_0000


def table(*rows: tuple[int, str]) -> Symbols:
    """A table of code."""
    return Symbols.of(np.array([address for address, _ in rows], np.uint64), [name for _, name in rows], "t" * len(rows))


@dataclass(frozen=True)
class Module:
    name: str
    base: int
    size: int = 0x1000


class Made(Naming[Module]):
    """A system that counts how often its memory is looked at."""

    def __init__(self, *loaded: Module) -> None:
        symbols = table((BASE + 0x100, "start"), (BASE + 0x200, "stop"), (BASE + 0x200, "alias"))
        super().__init__("kernel", ("core",), (BASE, BASE + SIZE), symbols)
        self.loaded = loaded
        self.looks = 0
        self.tables: dict[str, Symbols] = {}

    def _read_modules(self) -> Iterable[Module]:
        self.looks += 1
        return self.loaded

    def _read_module_symbols(self, module: Module) -> Symbols:
        self.looks += 1
        default = table(
            (module.base - 0x800, "absolute"), (module.base + 0x10, f"{module.name}_init"), (module.base + 0x80, "stop")
        )
        return self.tables.get(module.name, default)

    def run(self) -> None:
        """The machine has run."""
        self._forget_modules()


class AnyCase(Made):
    """One whose modules' names may be typed in any letter case, and whose symbols are only known where they begin."""

    @staticmethod
    def _typed(name: str) -> str:
        return name.lower()

    @staticmethod
    def _is_of(module: Module, address: int, distance: int) -> bool:
        return distance == 0


FIRST, SECOND = Module("net", MODULES), Module("Disk", MODULES + 0x4000)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (BASE - 1, None),
        (BASE, None),  # in the kernel, and below its first symbol
        (BASE + 0x100, "start [kernel]"),
        (BASE + 0x1FF, "start+0xff [kernel]"),
        (BASE + 0x200, "stop [kernel]"),
        (BASE + SIZE - 1, "stop+0xfdff [kernel]"),
        (BASE + SIZE, None),
        (MODULES - 1, None),
        (MODULES, "net [net]"),  # the symbol before it is none of its own
        (MODULES + 0xF, "net+0xf [net]"),
        (MODULES + 0x10, "net_init [net]"),
        (MODULES + 0xFFF, "stop+0xf7f [net]"),
        (MODULES + 0x1000, None),
        (MODULES + 0x4000 + 0x14, "Disk_init+0x4 [Disk]"),
        (0, None),
        ((1 << 64) - 1, None),
    ],
)
def test_names(address: int, name: str | None) -> None:
    made = Made(SECOND, FIRST)
    for _ in range(2):  # as it is found, and as it is remembered
        place = made.name_of(address)
        assert (str(place) if place else None) == name
        assert made.known_name(address) == place


def test_modules_by_their_address() -> None:
    made = Made(SECOND, FIRST)
    assert made.modules == [FIRST, SECOND]
    assert made.module_at(MODULES + 0xFFF) is FIRST and made.module_at(MODULES + 0x1000) is None
    assert made.extent == (BASE, BASE + SIZE) and made.symbol_count == 3
    assert Made().module_at(MODULES) is None


def test_a_module_without_symbols() -> None:
    made = Made(FIRST)
    made.tables["net"] = Symbols.none()
    assert str(made.name_of(MODULES + 0x20)) == "net+0x20 [net]"
    assert made.address_of("net!net_init") is None


def test_addresses() -> None:
    made = Made(FIRST, SECOND)
    for name in ("stop", "kernel!stop", "KERNEL!stop", "core!stop"):
        assert made.address_of(name) == made.known_address(name) == BASE + 0x200  # the kernel's own goes first
    assert made.looks == 0
    assert made.address_of("Disk!stop") == SECOND.base + 0x80 and made.address_of("net_init") == FIRST.base + 0x10
    assert made.address_of("disk!stop") is made.address_of("kernel!net_init") is made.address_of("none!stop") is None
    assert AnyCase(FIRST, SECOND).address_of("DISK!stop") == SECOND.base + 0x80


def test_search() -> None:
    made = Made(FIRST, SECOND)
    assert [(symbol.address, module) for symbol, module in made.search("STOP")] == [
        (BASE + 0x200, "kernel"),
        (FIRST.base + 0x80, "net"),
        (SECOND.base + 0x80, "Disk"),
    ]
    assert [symbol.name for symbol, _ in made.search("core!s*")] == ["start", "stop"]
    assert (
        [module for _, module in made.search("Disk!*")]
        == ["Disk"] * 3
        == [module for _, module in AnyCase(SECOND).search("DISK!*")]
    )
    assert {module for _, module in made.search("*!stop")} == {"kernel", "net", "Disk"}
    assert list(made.search("disk!*")) == list(made.search("none!*")) == []


def test_only_the_very_address() -> None:
    made = AnyCase(FIRST)
    assert [str(made.name_of(MODULES + offset)) for offset in (0x10, 0x11)] == ["net_init [net]", "net+0x11 [net]"]


def test_modules_are_read_once_a_stop() -> None:
    made = Made(FIRST)
    for address in range(MODULES, MODULES + 0x100):
        made.name_of(address)
    assert made.looks == 2
    made.run()
    made.loaded = (FIRST, SECOND)
    assert made.modules == [FIRST, SECOND] and made.looks == 3
    made.look_at_modules()
    assert made.looks == 4  # the symbols of the one that is new


def test_while_the_machine_runs_what_was_seen_last_is_told() -> None:
    made = Made(FIRST, SECOND)
    assert made.known_name(MODULES) is None and made.seen_modules == [] and made.known_address("net_init") is None
    assert str(made.known_name(BASE + 0x104)) == "start+0x4 [kernel]"
    seen = made.modules
    assert made.seen_modules is seen
    # Its symbols have not been read.
    assert str(made.known_name(MODULES + 0x14)) == "net+0x14 [net]" and made.known_address("net_init") is None
    made.look_at_modules()
    looks = made.looks
    made.run()
    made.loaded = ()
    assert str(made.known_name(MODULES + 0x14)) == "net_init+0x4 [net]" and made.known_address("net!net_init") == MODULES + 0x10
    assert made.seen_modules is seen and made.looks == looks
    assert made.modules == [] and made.seen_modules is not seen and made.known_name(MODULES + 0x14) is None


def test_another_thread_may_ask_while_modules_are_read() -> None:
    """The list changes between two looks at it; no address may be told to be another module's."""
    many = tuple(Module(f"m{index}", MODULES + index * 0x2000) for index in range(64))
    made = Made(*many)
    made.look_at_modules()
    wrong: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for module in many:
                place = made.known_name(module.base + 0x20)
                if place is not None and place.module != module.name:
                    wrong.append(str(place))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for count in range(400):
            made.loaded = many[count % 32 :]
            made.run()
            made.look_at_modules()
    finally:
        done.set()
        asking.join()
    assert wrong == []


def test_places_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmexit.guest.naming._MOST_PLACES", 16)
    made = Made()
    for address in range(BASE + 0x100, BASE + 0x180):
        assert str(made.name_of(address)).startswith("start")
        assert len(made._places) <= 16
