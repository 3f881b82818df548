"""Names of addresses, drivers and stacks of a made-up Windows."""

from __future__ import annotations

import struct

import pytest

from tests.guest.windows.conftest import attach, look
from tests.guest.windows.fake_windows import CALLER, DATA, DRIVER, LEAF, MODULES, NAMELESS, OUTER, TEXT, WRITER, FakeWindows
from vmexit.guest.system import Frame


@pytest.mark.parametrize(
    ("rva", "name"),
    [
        (WRITER, "KeWriteMsr [nt]"),
        (WRITER + 2, "KeWriteMsr+0x2 [nt]"),
        (OUTER + 0xC, "KeBugCheckEx+0xc [nt]"),
        # CALLER has a row in the function table, and no name.
        (CALLER + 5, f"nt+{CALLER + 5:#x} [nt]"),
        (NAMELESS, f"nt+{NAMELESS:#x} [nt]"),
        # No function of the table lies between: it may well be the one before.
        (LEAF, f"KeBugCheckEx+{LEAF - OUTER:#x} [nt]"),
        (TEXT + 0x10, f"nt+{TEXT + 0x10:#x} [nt]"),
        (DATA + 0x908, "PsInitialSystemProcess+0x8 [nt]"),
        (0, "nt [nt]"),
    ],
)
def test_names(rva: int, name: str) -> None:
    guest = FakeWindows()
    assert str(attach(guest).name_of(guest.address(rva))) == name


def test_names_of_drivers_and_elsewhere() -> None:
    windows = attach(FakeWindows())
    assert str(windows.name_of(DRIVER + 0x1010)) == "NdisSend [NDIS]"
    assert str(windows.name_of(DRIVER + 0x1018)) == "NDIS+0x1018 [NDIS]"
    assert str(windows.name_of(DRIVER + 0x10_0004)) == "my_filter+0x100004 [my_filter]".replace("0x100004", "0x4")
    assert windows.name_of(DRIVER - 1) is windows.name_of(0) is windows.name_of(0x7FF6_0000_0000) is None


@pytest.mark.parametrize("name", ["NtClose", "nt!NtClose", "NT!NtClose", "ntoskrnl!NtClose", "kernel!NtClose"])
def test_addresses(name: str) -> None:
    guest = FakeWindows()
    windows = attach(guest)
    assert windows.address_of(name) == guest.address(guest.exports["NtClose"])
    assert windows.address_of("ndis!NdisSend") == windows.address_of("NdisSend") == DRIVER + 0x1010
    assert windows.address_of("nt!NdisSend") is windows.address_of("ndis!NtClose") is windows.address_of("nothing") is None


def test_search() -> None:
    windows = attach(FakeWindows())
    assert [(symbol.name, symbol.kind, module) for symbol, module in windows.search("*thread*id")] == [
        ("PsGetThreadId", "T", "nt"),
        ("PsGetThreadProcessId", "T", "nt"),
    ]
    assert [symbol.name for symbol, _ in windows.search("NDIS!*")] == ["NdisSend", "NdisReceive"]
    assert [symbol.kind for symbol, _ in windows.search("nt!PsLoadedModuleList")] == ["D"]


def test_drivers_whose_list_lies() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    assert [(module.name, module.base, module.size, module.file) for module in windows.modules] == [
        ("NDIS", DRIVER, 0x4000, "NDIS.SYS"),
        ("my_filter", DRIVER + 0x10_0000, 0x3000, "my-filter.sys"),
    ]
    _, first, second = guest.module_entries
    for link in (0, 8, first, 0xFFFF_B50F_7000_0000):
        guest.u64(first, link)
        windows.forget()
        assert [module.name for module in windows.modules] == ["NDIS"]
    guest.u64(first, second)
    guest.u64(first + 0x30, 0x1000)  # a program's address
    guest.write(second + 0x40, b"\xff\xff\xff\xff")
    windows.forget()
    assert windows.modules == []
    guest.u64(guest.address(MODULES), 0)
    windows.forget()
    assert windows.modules == [] and windows.describe().endswith("0 modules")


def on_stack(guest: FakeWindows, rip: int, words: dict[int, int]) -> list[Frame]:
    """The frames with these words on the stack, from RSP on."""
    guest.cores[0]["rip"] = guest.address(rip)
    for offset, word in words.items():
        guest.u64(guest.cores[0]["rsp"] + offset, word)
    return list(look(guest).stacks.frames(guest.registers(0)))


CALLS = {0: CALLER + 0xA, 0x30 + 8: OUTER + 0xC, 0x1008 + 0x38 + 8: 0}


def test_a_stack_by_the_kernels_own_tables() -> None:
    guest = FakeWindows()
    words = {offset: guest.address(rva) if rva else 0 for offset, rva in CALLS.items()}
    rsp = guest.cores[0]["rsp"]
    assert on_stack(guest, WRITER + 2, words) == [
        Frame(guest.address(WRITER + 2), rsp),
        Frame(guest.address(CALLER + 0xA), rsp + 8),
        Frame(guest.address(OUTER + 0xC), rsp + 0x40),
    ]


@pytest.mark.parametrize(
    ("rip", "pushed"),
    [
        (CALLER, 0),
        (CALLER + 1, 8),
        (CALLER + 5, 0x30),
        (CALLER + 0xA, 0x30),  # ADD RSP, 0x28
        (CALLER + 0xE, 8),  # POP RBX
        (CALLER + 0xF, 0),  # RET
    ],
)
def test_every_instruction_of_a_function(rip: int, pushed: int) -> None:
    guest = FakeWindows()
    frames = on_stack(guest, rip, {pushed: guest.address(OUTER + 0xC)})
    assert frames[1] == Frame(guest.address(OUTER + 0xC), guest.cores[0]["rsp"] + pushed + 8)


def test_a_leaf_function() -> None:
    guest = FakeWindows()
    frames = on_stack(guest, LEAF, {0: guest.address(CALLER + 0xA)})
    assert frames[1] == Frame(guest.address(CALLER + 0xA), guest.cores[0]["rsp"] + 8)


def test_a_stack_with_an_interrupt() -> None:
    """PUSH_MACHFRAME: what comes next is what the processor has pushed."""
    guest = FakeWindows()
    windows = attach(guest)
    unwind = guest.address(windows.image.functions[-1].tolist()[2])
    guest.write(unwind, struct.pack("<BBBBHH", 1, 0, 1, 0, 0x0A00, 0))
    above = guest.cores[0]["rsp"] + 0x800
    frame = {0: guest.address(WRITER + 2), 8: 0x10, 16: 0x202, 24: above, 32: 0x18, 0x800: guest.address(CALLER + 0xA)}
    frames = on_stack(guest, NAMELESS + 1, frame)
    assert frames[1:3] == [Frame(guest.address(WRITER + 2), above), Frame(guest.address(CALLER + 0xA), above + 8)]
    # From a program: there the kernel was entered.
    assert len(on_stack(guest, NAMELESS + 1, {**frame, 8: 0x33})) == 1


def test_where_the_tables_do_not_lead_on_it_is_a_guess() -> None:
    guest = FakeWindows()
    frames = on_stack(guest, WRITER + 2, {0: 0x1234, 0x10: guest.address(CALLER + 0xA), 0x18: guest.address(CALLER + 0xB)})
    rsp = guest.cores[0]["rsp"]
    assert frames == [Frame(guest.address(WRITER + 2), rsp), Frame(guest.address(CALLER + 0xA), rsp + 0x18, is_guess=True)]


def test_stacks_that_lie_end() -> None:
    guest = FakeWindows()
    frames = on_stack(guest, WRITER + 2, {offset: guest.address(CALLER + 0xA) for offset in range(0, 0x1800, 8)})
    assert 100 < len(frames) <= 260
    guest.cores[0]["rsp"] = 0xFFFF_B50F_7000_0000
    assert len(list(look(guest).stacks.frames(guest.registers(0)))) == 1
    guest.enter_program(0)
    assert len(list(look(guest).stacks.frames(guest.registers(0)))) == 1


def test_names_while_the_machine_runs() -> None:
    """What was seen at the last stop is told without a look at the machine."""
    guest = FakeWindows()
    windows = attach(guest)
    windows.look_at_modules()
    seen = windows.seen_modules
    close = guest.address(guest.exports["NtClose"])
    guest.pages.clear()
    windows.forget()
    assert windows.seen_modules is seen and [module.name for module in seen] == ["NDIS", "my_filter"]
    assert str(windows.known_name(guest.base + WRITER + 2)) == "KeWriteMsr+0x2 [nt]"
    assert str(windows.known_name(DRIVER + 0x1010)) == "NdisSend [NDIS]"
    assert windows.known_name(0x1000) is None
    assert windows.known_address("nt!NtClose") == close and windows.known_address("ndis!NdisSend") == DRIVER + 0x1010
    assert not windows.is_still_there() and windows.modules == []


def test_the_same_kernel_and_its_entry() -> None:
    guest = FakeWindows()
    windows = attach(guest)
    assert windows.is_same(attach(FakeWindows())) and not windows.is_same(attach(FakeWindows(base=guest.base + 0x20_0000)))
    assert not windows.is_same(None)
    assert windows.is_entered_at(guest.address(LEAF)) and not windows.is_entered_at(guest.address(DATA))
