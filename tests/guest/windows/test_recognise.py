"""Which Windows runs: found from LSTAR, the interrupt table or a program's page tables; what it is; and what is no Windows."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import pytest

from tests.guest.linux.fake_linux import KALLSYMS, FakeLinux
from tests.guest.windows.conftest import attach, look
from tests.guest.windows.fake_windows import (
    BASE,
    DATA,
    DRIVER,
    FIRST_PROCESS,
    GUID,
    KEY,
    LAYOUTS,
    NAMELESS,
    RODATA,
    SHARED,
    SIZE,
    SYSTEM_CALL,
    SYSTEM_CALL_SHADOW,
    TEXT,
    UNKNOWN,
    WRITER,
    FakeWindows,
    Layout,
    make_directory,
)
from vmexit.errors import VmexitError
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.running import Linux
from vmexit.guest.memory import PhysicalMemory, VirtualMemory
from vmexit.guest.recognise import recognise
from vmexit.guest.system import NotRecognisedError
from vmexit.guest.windows.locate import search_down
from vmexit.guest.windows.pe import Image, PeError
from vmexit.guest.windows.running import Windows

PROCESSES = ["System", "smss.exe", "a-long-program"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[layout.name for layout in LAYOUTS.values()])
def test_the_three_builds(layout: Layout) -> None:
    guest = FakeWindows(layout)
    found = look(guest)
    windows = found.system
    assert windows.describe() == f"{layout.name} x86_64, build {layout.build}, base {BASE:#x}, 19 symbols, 2 modules"
    assert windows.built == f"ntkrnlmp.pdb {KEY}"
    assert found.source == ("the guest's memory (exports); where processes are: its exported functions, and the table of builds")
    assert found.remarks == () and windows.extent == (BASE, BASE + SIZE)
    assert [task.comm for task in windows.tasks.processes().tasks] == PROCESSES
    task = windows.current(0, guest.registers(0))
    assert task is not None and str(task) == "a-long-program (process 4660, thread 4668)"
    assert windows.tasks.program(task) == "\\Device\\HarddiskVolume3\\Users\\a-long-program.exe"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[layout.name for layout in LAYOUTS.values()])
def test_by_the_functions_alone_and_by_the_table_alone(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [name for name in FakeWindows(layout).exports if name.startswith(("PsGet", "IoGet"))]
    by_table = attach(FakeWindows(layout, without=frozenset(named)))
    assert by_table.process_source == "the table of builds"
    monkeypatch.setattr("vmexit.guest.windows.layout.Table.offsets", lambda table, build: None)
    by_functions = attach(FakeWindows(layout))
    assert by_functions.process_source == "its exported functions"
    for windows in (by_table, by_functions):
        assert [task.comm for task in windows.tasks.processes().tasks] == PROCESSES
        last = windows.tasks.processes().tasks[-1]
        assert [task.tid for task in windows.tasks.threads(last).tasks] == [0x1238, 0x123C]
        assert windows.tasks.parent_id(last) == 0x1A4
        thread = windows.tasks.find_thread(0x123C)
        assert (thread is not None and windows.tasks.stack(thread) is not None) or windows is by_table
    # What functions do not tell stays unknown.
    thread = by_functions.tasks.find_thread(0x123C)
    assert thread is not None and by_functions.tasks.state(thread) == "?" and by_functions.tasks.program(thread) is None


def test_a_build_that_no_table_has_is_read_from_its_functions() -> None:
    guest = FakeWindows(UNKNOWN)
    found = look(guest)
    assert found.remarks == ()
    assert found.source.endswith("where processes are: its exported functions")
    assert found.system.describe().startswith("Windows x86_64, build 30000, base ")
    task = found.system.current(0, guest.registers(0))
    assert task is not None and (task.pid, task.tid, task.comm) == (0x1234, 0x123C, "a-long-program")


def test_an_unknown_build_says_so_and_the_rest_works() -> None:
    guest = FakeWindows(UNKNOWN, without=frozenset({"PsGetProcessId"}))
    found = look(guest)
    (remark,) = found.remarks
    assert remark == (
        "the processes of this Windows are not known: build 30000 is none that vmexit knows; "
        f"give its PDB, ntkrnlmp.pdb {KEY} (guest pdb FILE, or --pdb FILE)"
    )
    windows = found.system
    assert windows.current(0, guest.registers(0)) is None
    for ask in (windows.tasks.processes, lambda: windows.tasks.find(4), lambda: windows.recipe):
        with pytest.raises(Exception, match="build 30000 is none that vmexit knows; give its PDB"):
            print(ask())
    assert str(windows.name_of(guest.address(WRITER + 2))) == "KeWriteMsr+0x2 [nt]"
    assert [module.name for module in windows.modules] == ["NDIS", "my_filter"]
    assert len(list(found.stacks.frames(guest.registers(0)))) >= 1


def test_a_table_that_the_functions_contradict_is_not_believed() -> None:
    """A build that calls itself 22H2, and is laid out otherwise."""
    guest = FakeWindows(UNKNOWN)
    guest.write(SHARED + 0x260, struct.pack("<I", 19045))
    windows = attach(guest)
    assert windows.build == 19045 and windows.process_source == "its exported functions"
    # With fewer functions the table would be all there is; what it says does not fit.
    guest = FakeWindows(UNKNOWN, without=frozenset({"PsGetProcessId", "PsGetThreadProcess"}))
    guest.write(SHARED + 0x260, struct.pack("<I", 19045))
    assert "give its PDB" in look(guest).remarks[0]


def test_a_kernel_that_has_made_no_process_yet() -> None:
    guest = FakeWindows()
    guest.u64(guest.address(FIRST_PROCESS), 0)
    found = look(guest)
    assert found.remarks == ("Windows has not made its first process yet",)
    assert found.system.current(0, guest.registers(0)) is None
    guest.u64(guest.address(FIRST_PROCESS), guest.processes[4])
    assert found.system.current(0, guest.registers(0)) is None  # nobody has said that the machine has run
    found.system.forget()
    assert found.system.current(0, guest.registers(0)) is not None


def blind(guest: FakeWindows) -> None:
    """Nothing leads to the kernel but LSTAR."""
    for registers in guest.cores:
        registers |= {"gs_base": 0, "kernel_gs_base": 0}


@pytest.mark.parametrize("base", [BASE, BASE + 0x1_3000])
@pytest.mark.parametrize("entry", [SYSTEM_CALL, SYSTEM_CALL_SHADOW])
def test_by_lstar(base: int, entry: int) -> None:
    guest = FakeWindows(base=base)
    blind(guest)
    assert look(guest, lstar=base + entry).system.extent[0] == base
    with pytest.raises(NotRecognisedError, match=r"no Windows: no ntoskrnl\.exe lies below what GS or LSTAR leads to"):
        look(guest)


def test_by_the_interrupt_table() -> None:
    guest = FakeWindows()
    assert look(guest, 1).system.extent[0] == BASE
    guest.enter_program(0)
    assert look(guest).system.extent[0] == BASE


def test_by_another_vcpu() -> None:
    guest = FakeWindows()
    guest.cores[0] |= {"gs_base": 0x7F00_0000_0000, "kernel_gs_base": 0}
    assert look(guest).system.extent[0] == BASE
    registers = guest.registers

    def only_the_first(core: int) -> Mapping[str, int]:
        if core:
            raise VmexitError("vCPU 1 runs")
        return registers(core)

    guest.registers = only_the_first  # type: ignore[method-assign]
    with pytest.raises(NotRecognisedError, match="no Windows"):
        look(guest)
    assert look(guest, lstar=BASE + SYSTEM_CALL).system.extent[0] == BASE


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[layout.name for layout in LAYOUTS.values()])
def test_from_a_program_with_kva_shadow(layout: Layout) -> None:
    """CR3 maps the entry code and little else; the kernel's own tables are where the entry code takes them from."""
    guest = FakeWindows(layout)
    guest.enter_program(0, shadow=True)
    windows = look(guest).system
    assert windows.memory.root == guest.root
    task = windows.current(0, guest.registers(0))
    assert task is not None and task.tid == 0x123C


def test_the_page_tables_of_system_are_what_is_kept() -> None:
    """The tables that the kernel was found through may be a program's, which ends."""
    guest = FakeWindows()
    own = guest._new_page()
    guest.pages[own // 4096][:] = guest.pages[guest.root // 4096]
    guest.cores[0]["cr3"] = own
    windows = attach(guest)
    assert windows.memory.root == guest.root
    guest.pages[own // 4096][:] = bytes(4096)
    windows.forget()
    assert windows.is_still_there() and windows.current(0, guest.registers(0)) is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda guest: guest.write(guest.base, b"ZM"),
        lambda guest: guest.write(guest.base + 0x100, b"XX"),
        lambda guest: guest.write(guest.base + 0x104, b"\x4c\x01"),
        lambda guest: guest.write(guest.base + 0x3C, b"\xff\xff\xff\xff"),
        lambda guest: guest.write(guest.base + 0x118 + 56, struct.pack("<I", 0xFFFF_FFFF)),
        lambda guest: guest.write(guest.base + RODATA, make_directory("win32k.sys", {"NtClose": TEXT}, RODATA)),
    ],
    ids=["no MZ", "no PE", "32-bit", "header elsewhere", "impossible size", "another image"],
)
def test_what_is_no_kernel(spoil: Callable[[FakeWindows], None]) -> None:
    guest = FakeWindows()
    spoil(guest)
    with pytest.raises(NotRecognisedError, match="no Windows"):
        look(guest)


def test_other_images_below_an_address_are_passed_over() -> None:
    guest = FakeWindows()
    memory = VirtualMemory(PhysicalMemory(guest), guest.root, 4)
    assert search_down(memory, DRIVER + 0x1000) is None
    found = search_down(memory, guest.address(DATA))
    assert found is not None and found.base == BASE
    assert search_down(memory, BASE - 0x1000) is None and search_down(memory, 0x1000) is None
    with pytest.raises(PeError, match="no image begins"):
        Image(memory, guest.address(TEXT))


def test_the_image() -> None:
    guest = FakeWindows()
    image = Image(VirtualMemory(PhysicalMemory(guest), guest.root, 4), BASE)
    assert image.name == "ntoskrnl.exe" and image.exports == guest.exports
    assert image.codeview is not None and image.codeview == (GUID, 1, "ntkrnlmp.pdb")
    assert [section.name for section in image.sections] == [".rdata", ".data", ".text", "KVASCODE"]
    assert image.is_code(WRITER) and not image.is_code(RODATA)
    assert image.function_at(WRITER + 0x3F) is not None and image.function_at(WRITER + 0x40) is None
    assert image.function_at(NAMELESS) is not None and image.function_at(0) is None


@pytest.mark.parametrize("start", [0, TEXT - 0x100, TEXT + 0x100, TEXT + 0x1_0000, 0x40_8000, 0xFFFF_FFF0])
@pytest.mark.parametrize("size", [0, 0x80, 0x1000, 0x10_0000, 0xFFFF_FFFF])
def test_code_where_sections_overlap(start: int, size: int) -> None:
    guest = FakeWindows()
    # The first section of the image, made code.
    guest.write(BASE + 0x210, struct.pack("<II", size, start))
    guest.write(BASE + 0x208 + 36, struct.pack("<I", 0x2000_0000))
    image = Image(VirtualMemory(PhysicalMemory(guest), guest.root, 4), BASE)
    assert (image.sections[0].start, image.sections[0].size, image.sections[0].is_code) == (start, size, True)
    code = [range(section.start, section.start + section.size) for section in image.sections if section.is_code]
    for edge in {edge for section in code for edge in (section.start, section.stop)}:
        for rva in (edge - 1, edge, edge + 1):
            assert image.is_code(rva) == any(rva in section for section in code)


def test_either_system_by_the_same_way_in(cache: Cache) -> None:
    linux, windows = recognise(FakeLinux(), cache=cache), recognise(FakeWindows(), cache=cache)
    assert isinstance(linux.system, Linux) and isinstance(windows.system, Windows)
    assert (linux.system.kernel_name, windows.system.kernel_name) == ("kernel", "nt")
    for found in (linux, windows):
        assert found.system.symbol_count and found.system.describe() and found.system.built
        assert found.system.tasks.processes().broken is None


def test_neither_system(cache: Cache) -> None:
    guest = FakeWindows()
    blind(guest)
    with pytest.raises(NotRecognisedError) as raised:
        recognise(guest, cache=cache)
    assert str(raised.value) == (
        "the guest is not known: no Linux: nothing is mapped where its kernel would be; "
        "no Windows: no ntoskrnl.exe lies below what GS or LSTAR leads to"
    )
    # A kernel that certainly is Linux is not looked for again.
    linux = FakeLinux()
    linux.write(linux.address(KALLSYMS), bytes(0x2_0000))
    with pytest.raises(NotRecognisedError, match=r"^(?!.*no Windows)"):
        recognise(linux, cache=cache)
    guest.cores[0] |= {"cr0": 0x11, "efer": 0}
    with pytest.raises(NotRecognisedError, match="firmware or an early kernel"):
        recognise(guest, cache=cache)
