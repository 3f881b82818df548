"""Modules of a made-up Linux, and their symbols."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.linux.fake_linux import DATA, FakeLinux, member
from vmexit.guest.linux.running import Linux

Attach = Callable[[FakeLinux], Linux]


def test_modules_and_their_symbols(attach: Attach) -> None:
    guest = FakeLinux()
    guest.add_module(b"msr", ["msr_open", "msr_write"])
    guest.add_module(b"empty", [])
    linux = attach(guest)
    msr, empty = linux.modules
    assert (msr.name, msr.size, empty.name) == ("msr", 0x4000, "empty")
    assert linux.describe().endswith("2 modules")
    assert str(linux.name_of(msr.base + 0x44)) == "msr_open+0x4 [msr]"
    assert str(linux.name_of(msr.base + 0x90)) == "msr_write+0x10 [msr]"
    assert str(linux.name_of(msr.base + 4)) == "msr+0x4 [msr]"
    assert str(linux.name_of(empty.base + 4)) == "empty+0x4 [empty]"
    assert linux.name_of(msr.base - 1) is linux.name_of(empty.base + 0x4000) is None
    assert linux.address_of("msr!msr_write") == linux.address_of("msr_write") == msr.base + 0x80
    assert linux.address_of("empty!msr_write") is linux.address_of("none!msr_write") is None


def test_kernel_names(attach: Attach) -> None:
    guest = FakeLinux()
    guest.add_module(b"msr", ["native_write_msr", "msr_open"])
    linux = attach(guest)
    address = guest.address(0x2000)
    for name in ("native_write_msr", "kernel!native_write_msr", "nt!native_write_msr", "KERNEL!native_write_msr"):
        assert linux.address_of(name) == address  # the kernel's own goes first
    assert linux.address_of("kernel!msr_open") is linux.address_of("nonsense") is None
    assert linux.address_of("this_cpu_off") == 0x100  # of each CPU's own area
    assert {(symbol.name, module) for symbol, module in linux.search("*write_msr*")} == {
        ("native_write_msr", "kernel"),
        ("native_write_msr_safe", "kernel"),
        ("native_write_msr", "msr"),
    }
    assert [module for _, module in linux.search("msr!*")] == ["msr", "msr"]
    assert {symbol.address for symbol, _ in linux.search("nt!_text")} == {guest.address(0)}
    # Names are the same when they are asked for again.
    assert linux.name_of(address + 4) == linux.name_of(address + 4)


def test_modules_come_and_go(attach: Attach) -> None:
    guest = FakeLinux()
    linux = attach(guest)
    assert linux.modules == []
    guest.add_module(b"msr", ["msr_open"])
    assert linux.modules == []
    linux.forget()
    assert [module.name for module in linux.modules] == ["msr"]


@pytest.mark.parametrize("target", [0, 5, 0xFFFF_8880_7000_0000, "itself"])
def test_lists_that_lie(attach: Attach, target: int | str) -> None:
    guest = FakeLinux()
    link = guest.add_module(b"msr", ["msr_open"]) + member("module.list")
    guest.u64(link, link if target == "itself" else int(target))
    assert [module.name for module in attach(guest).modules] == ["msr"]
    guest.u64(guest.address(DATA + 0x1000), link if target == "itself" else int(target))
    assert len(attach(guest).modules) <= 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("module.core_layout.base", 0),
        ("module.core_layout.base", 0x1000),
        ("module.core_layout.size", 0),
        ("module.core_layout.size", 0xFFFF_FFFF),
        ("module.name", 0),
        ("module.state", 3),
    ],
)
def test_modules_that_make_no_sense_are_left_out(attach: Attach, path: str, value: int) -> None:
    guest = FakeLinux()
    bad = guest.add_module(b"bad", ["f"])
    guest.add_module(b"good", ["f"])
    guest.write(bad + member(path), value.to_bytes(4 if "size" in path or "state" in path else 8, "little"))
    assert [module.name for module in attach(guest).modules] == ["good"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mod_kallsyms.num_symtab", 0xFFFF_FFFF),
        ("mod_kallsyms.num_symtab", 0x1_0000),
        ("mod_kallsyms.symtab", 0),
        ("mod_kallsyms.strtab", 0x1234),
        ("mod_kallsyms.typetab", (1 << 64) - 1),
    ],
)
def test_symbols_that_lie(attach: Attach, path: str, value: int) -> None:
    guest = FakeLinux()
    module = guest.add_module(b"msr", ["msr_open"])
    kallsyms = int.from_bytes(guest.read(module + member("module.kallsyms"), 8), "little")
    guest.write(kallsyms + member(path), value.to_bytes(4 if "num" in path else 8, "little"))
    linux = attach(guest)
    (found,) = linux.modules
    assert len(linux.module_symbols(found)) == 0
    assert str(linux.name_of(found.base + 0x44)) == "msr+0x44 [msr]"
