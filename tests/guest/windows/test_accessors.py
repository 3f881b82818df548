"""What the kernel's small functions tell, in the forms that compilers give them, and what is no such function."""

from __future__ import annotations

import pytest

from tests.guest.windows.conftest import attach
from tests.guest.windows.fake_windows import LAYOUTS, PROCESSOR_BLOCK, TEXT, FakeWindows, Layout
from vmexit.guest.memory import PhysicalMemory, VirtualMemory
from vmexit.guest.windows.accessors import Value, processor_table, read_offsets, result_of

AT = TEXT + 0xC000


def result(code: str, at: int = AT) -> Value | None:
    guest = FakeWindows()
    guest.write(guest.address(at), bytes.fromhex(code))
    return result_of(VirtualMemory(PhysicalMemory(guest), guest.root, 4), guest.address(at))


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("48 8b 81 40 04 00 00 c3", Value("argument", (0x440,))),
        ("48 8b 41 38 c3", Value("argument", (0x38,))),
        ("48 8b 01 c3", Value("argument", (0,))),
        ("8b 81 d4 07 00 00 c3", Value("argument", (0x7D4,))),
        ("48 8d 81 a8 05 00 00 c3", Value("argument", (), 0x5A8)),
        ("65 48 8b 04 25 88 01 00 00 c3", Value("gs", (0x188,))),
        ("65 48 8b 04 25 88 01 00 00 48 8b 80 b8 00 00 00 c3", Value("gs", (0x188, 0xB8))),
        ("65 48 8b 14 25 88 01 00 00 48 8b 82 80 04 00 00 c3", Value("gs", (0x188, 0x480))),
        ("0f 1f 44 00 00 48 8b 81 40 04 00 00 c3", Value("argument", (0x440,))),
        ("f3 0f 1e fa 48 8b 81 40 04 00 00 c3", Value("argument", (0x440,))),
        ("eb 02 cc cc 48 8b 81 40 04 00 00 c3", Value("argument", (0x440,))),
        ("48 8d 41 10 48 8b 40 08 c3", Value("argument", (0x18,))),
        ("48 8b c1 c3", Value("argument")),
        ("48 63 c1 c3", Value("argument")),
        ("48 8b 81 40 04 00 00 c2 00 00", Value("argument", (0x440,))),
    ],
)
def test_values(code: str, value: Value) -> None:
    assert result(code) == value


@pytest.mark.parametrize(
    "code",
    [
        "c3",  # nothing was put into RAX
        "33 c0 c3",
        "48 83 ec 28 48 8b 81 40 04 00 00 c3",
        "e8 00 00 00 00 c3",
        "48 8b 02 c3",  # RDX is not known
        "48 8b 04 0a c3",
        "65 48 8b 01 c3",
        "64 48 8b 04 25 88 01 00 00 c3",
        "48 8b 81 40 04 00 00 b8 05 00 00 00 c3",
        "48 89 c8 48 89 01 c3",
        "ff ff ff ff",
        "eb fe",
        "90 90 90 90 90 90 90 90 90 c3",
        "ff 25 00 00 00 00",
    ],
)
def test_what_is_no_such_function(code: str) -> None:
    assert result(code) is None


def test_an_index_counts_only_where_it_is_the_argument() -> None:
    at = FakeWindows().address(AT)
    table = Value("image", (at + 7 + 0x100,), 0, True)
    assert result("48 8d 15 00 01 00 00 48 8b 04 ca c3") == table
    assert result("48 8d 15 00 01 00 00 48 8b 04 8a c3") is None  # times 4
    assert result("48 8d 15 00 01 00 00 48 8d 04 ca c3") is None  # an address alone
    assert result("48 8d 0d 00 01 00 00 48 8b 04 c9 c3") is None  # RCX is the argument no more


def test_code_that_is_not_there() -> None:
    guest = FakeWindows()
    memory = VirtualMemory(PhysicalMemory(guest), guest.root, 4)
    assert result_of(memory, guest.address(TEXT + 0x4_0000)) is None
    # The page ends within the instruction, and no page follows.
    assert result("48 8b 81", TEXT + 0xFFFD) is None


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_all_that_is_told(layout: Layout) -> None:
    guest = FakeWindows(layout)
    windows = attach(guest)
    build = guest.layout
    assert read_offsets(windows.memory, windows.image) == {
        "_EPROCESS.UniqueProcessId": build.pid,
        "_EPROCESS.ActiveProcessLinks": build.pid + 8,
        "_EPROCESS.InheritedFromUniqueProcessId": build.parent,
        "_EPROCESS.ImageFileName": build.image_name,
        "_EPROCESS.Peb": build.peb,
        "_KTHREAD.Process": build.thread_process,
        "_KTHREAD.Teb": 0xF0,
        "_KTHREAD.StackBase": 0x38,
        "_KTHREAD.StackLimit": 0x30,
        "_ETHREAD.Cid": build.cid,
        "_KPRCB.CurrentThread": 8,
    }
    assert processor_table(windows.memory, windows.image) == guest.address(PROCESSOR_BLOCK)


def test_functions_that_contradict_each_other_tell_nothing() -> None:
    guest = FakeWindows()
    guest.write(guest.address(guest.exports["PsGetThreadId"]) + 3, b"\x88")
    windows = attach(guest)
    assert "_ETHREAD.Cid" not in read_offsets(windows.memory, windows.image)


def test_a_processor_table_outside_of_the_image_is_none() -> None:
    guest = FakeWindows()
    guest.write(guest.address(guest.exports["KeQueryPrcbAddress"]) + 5, b"\xff\xff\xff\x7f")
    windows = attach(guest)
    assert processor_table(windows.memory, windows.image) is None
    assert windows.known.bases == tuple(guest.kpcrs)  # as the vCPUs have them
