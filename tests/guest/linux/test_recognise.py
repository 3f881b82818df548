"""Recognising a made-up Linux by its image, its System.map, the cache and its memory; and what is not recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.linux.fake_linux import (
    BANNER,
    KALLSYMS,
    PHYSICAL,
    RODATA,
    SLIDE,
    TABLES,
    FakeLinux,
    make_btf,
    make_bzimage,
    make_image,
    make_vmlinux,
    symbols,
)
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.image import LINKED_AT
from vmexit.guest.linux.recognise import recognise
from vmexit.guest.memory import PAGE
from vmexit.guest.system import Help, NotRecognisedError

LINE = f"Linux 6.1.0-fake-amd64 x86_64, slide {SLIDE:#x}, {len(symbols(0))} symbols, 0 modules"
NOWHERE = Cache(Path("/dev/null/nowhere"))


def bzimage(path: Path, image: bytes | None = None) -> Path:
    path.write_bytes(make_bzimage(make_vmlinux(bytes(make_image()) if image is None else image), lambda data: data))
    return path


def system_map(path: Path, shift: int = 0) -> Path:
    rows = [
        (address + shift * (name not in ("_text", "linux_banner")), kind, name)
        for address, kind, name in symbols(len(make_btf()))
    ]
    path.write_text("".join(f"{address:016x} {kind} {name}\n" for address, kind, name in sorted(rows)))
    return path


def test_by_memory_alone(cache: Cache) -> None:
    found = recognise(FakeLinux(), cache=cache)
    assert found.linux.describe() == LINE
    assert (found.source, found.remarks) == ("the guest's memory", ())
    assert found.linux.placement.physical == PHYSICAL
    assert found.linux.name_of(LINKED_AT + SLIDE + 0x2004) is not None
    # What was found out is kept, and holds for another boot of the same kernel.
    again = recognise(FakeLinux(slide=0x20_0000), cache=cache)
    assert (again.source, again.linux.slide) == ("a kernel met before", 0x20_0000)


@pytest.mark.parametrize("slide", [0, 0x20_0000, 0x3E00_0000])
def test_every_slide(slide: int) -> None:
    assert recognise(FakeLinux(slide=slide), cache=NOWHERE).linux.slide == slide


@pytest.mark.parametrize("layout", ["6.12", "7.3"])
def test_every_layout(layout: str) -> None:
    linux = recognise(FakeLinux(layout=layout), cache=NOWHERE).linux
    assert str(linux.name_of(linux.slide + LINKED_AT + 0x2002)) == "native_write_msr+0x2 [kernel]"


def test_by_image_cold_and_kept(tmp_path: Path, cache: Cache) -> None:
    given = Help(image=bzimage(tmp_path / "vmlinuz"))
    for _ in range(2):
        found = recognise(FakeLinux(), given=given, cache=cache)
        assert (found.linux.describe(), found.source, found.remarks) == (LINE, str(tmp_path / "vmlinuz"), ())
    assert len(list(cache.known())) == 1


def test_by_system_map(tmp_path: Path) -> None:
    found = recognise(FakeLinux(), given=Help(system_map=system_map(tmp_path / "map")), cache=NOWHERE)
    assert (found.linux.describe(), found.source) == (LINE, str(tmp_path / "map"))
    assert found.linux.tasks.find(94) is not None  # the types came out of memory


def test_help_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    other = make_image()
    other[RODATA : RODATA + len(BANNER)] = BANNER.replace(b"6.1.0-1", b"6.1.0-2")
    for given, remark in (
        (
            Help(image=bzimage(tmp_path / "other", bytes(other))),
            "other is not the kernel that runs here (it is 6.1.0-fake-amd64)",
        ),
        (Help(image=Path("/bin/sh")), "/bin/sh is of no use: there is no kernel in this ELF file"),
        (Help(image=tmp_path / "none"), "none is of no use: cannot read"),
        (Help(system_map=system_map(tmp_path / "moved", 0x40)), "moved is not of the kernel that runs here"),
        (Help(system_map=Path("/etc/passwd")), "/etc/passwd is of no use: this is no System.map"),
    ):
        found = recognise(FakeLinux(), given=given, cache=NOWHERE)
        assert found.linux.describe() == LINE  # by its memory, all the same
        assert len(found.remarks) == 1 and remark in found.remarks[0]


def test_lstar_says_where_it_is(tmp_path: Path, profiles: Cache) -> None:
    entry = LINKED_AT + SLIDE + 0x8080
    for lstar in (entry, entry + 0x20_0000, entry + 1, 0, (1 << 64) - 1):
        assert recognise(FakeLinux(), lstar=lstar, cache=profiles).linux.slide == SLIDE


def test_cr3_of_a_program_with_page_table_isolation(profiles: Cache) -> None:
    """It maps the kernel's entry code only; bit 12 tells it from the kernel's own."""
    guest = FakeLinux()
    user = PHYSICAL + TABLES + 5 * PAGE
    assert user & PAGE
    guest.cores[0]["cr3"] = user
    # The kernel's own tables lie before it.
    guest.pages[(user - PAGE) // PAGE] = guest.pages[(PHYSICAL + TABLES) // PAGE]
    assert recognise(guest, 0, cache=profiles).linux.slide == SLIDE
    assert recognise(guest, 0, cache=NOWHERE).linux.slide == SLIDE


def test_five_levels(profiles: Cache) -> None:
    guest = FakeLinux()
    top = PHYSICAL + TABLES
    old = bytes(guest.pages[top // PAGE])
    below = 0x70_0000
    guest.pages[below // PAGE] = bytearray(old)
    new = bytearray(PAGE)
    new[511 * 8 :] = (below | 3).to_bytes(8, "little")
    guest.pages[top // PAGE] = new
    for core in guest.cores:
        core["cr4"] |= 0x1000
    assert recognise(guest, cache=profiles).linux.slide == SLIDE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cr0": 0x11}, "not in 64-bit mode yet"),
        ({"efer": 0}, "not in 64-bit mode yet"),
        ({"cr3": 0x7FFF_F000}, "nothing is mapped"),
        ({"cr3": 0}, "nothing is mapped"),
    ],
)
def test_what_is_no_linux(change: dict[str, int], reason: str, profiles: Cache) -> None:
    guest = FakeLinux()
    guest.cores[0].update(change)
    with pytest.raises(NotRecognisedError, match=f"the guest is not known: .*{reason}"):
        recognise(guest, 0, cache=profiles)


def test_a_kernel_that_still_boots(profiles: Cache) -> None:
    """It runs by the tables of its first steps; its own are not there yet."""
    guest = FakeLinux()
    early = 0x70_0000
    guest.pages[early // PAGE] = guest.pages[(PHYSICAL + TABLES) // PAGE]
    guest.pages[(PHYSICAL + TABLES) // PAGE] = bytearray(PAGE)
    guest.cores[0]["cr3"] = early
    with pytest.raises(NotRecognisedError, match="still booting: its page tables are not ready yet"):
        recognise(guest, 0, cache=profiles)


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (RODATA, bytes(600), "has no banner"),
        (KALLSYMS, bytes(0x1_0000), "no symbol table"),
        (RODATA + 3, b"X" * 20, "no banner"),
    ],
)
def test_a_kernel_that_cannot_be_understood(at: int, data: bytes, reason: str) -> None:
    guest = FakeLinux()
    guest.write(guest.address(at), data)
    with pytest.raises(NotRecognisedError, match=reason):
        recognise(guest, cache=NOWHERE)


def test_a_kernel_without_types_has_names_all_the_same(profiles: Cache) -> None:
    guest = FakeLinux()
    linux = recognise(guest, cache=profiles).linux
    guest = FakeLinux()
    guest.write(guest.address(0x28_0000), bytes(64))
    linux = recognise(guest, cache=NOWHERE).linux
    assert str(linux.name_of(guest.address(0x2000))) == "native_write_msr [kernel]"
    assert linux.current(0, guest.registers(0)) is None
    assert linux.modules == []


def test_whether_it_is_still_there(profiles: Cache) -> None:
    guest = FakeLinux()
    linux = recognise(guest, cache=profiles).linux
    assert linux.is_still_there()
    guest.write(guest.address(RODATA), b"Linux version 6.2")
    assert linux.is_still_there()  # nobody has said that the machine has run
    linux.forget()
    assert not linux.is_still_there()
