"""PDBs: what they say of a kernel, one that LLVM has written where it is at hand, damaged ones, and the wrong one."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.guest.windows.conftest import look
from tests.guest.windows.fake_pdb import Types, kernel_types, make_msf, make_pdb
from tests.guest.windows.fake_windows import (
    CALLER,
    DATA,
    GUID,
    KEY,
    LAYOUTS,
    LEAF,
    NAMELESS,
    TEXT,
    UNKNOWN,
    WRITER,
    FakeWindows,
    Layout,
)
from vmexit.guest.linux.btf import BtfError
from vmexit.guest.linux.types import render
from vmexit.guest.store import Store
from vmexit.guest.windows.pdb import PdbError, parse_pdb, read_pdb
from vmexit.guest.windows.running import Windows
from vmexit.guest.windows.tpi import TypesError, read_types

SYMBOLS = {
    "KiWriteMsr": CALLER,
    "KiLeaf": LEAF,
    "KeWriteMsr": WRITER,
    "PsGetProcessId": TEXT + 0x40,
    "KiProcessorBlock": DATA + 0x100,
}
PDB = make_pdb(UNKNOWN, SYMBOLS)


@pytest.fixture
def pdb(tmp_path: Path) -> Path:
    """That of the unknown build."""
    path = tmp_path / "ntkrnlmp.pdb"
    path.write_bytes(PDB)
    return path


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), UNKNOWN], ids=lambda layout: str(layout.build))
@pytest.mark.parametrize("block", [512, 4096])
def test_what_it_says(layout: Layout, block: int) -> None:
    profile = parse_pdb(make_pdb(layout, SYMBOLS, block=block))
    assert profile.key == KEY
    assert profile.offsets == {
        "_EPROCESS.UniqueProcessId": layout.pid,
        "_EPROCESS.ActiveProcessLinks": layout.pid + 8,
        "_EPROCESS.ImageFileName": layout.image_name,
        "_EPROCESS.InheritedFromUniqueProcessId": layout.parent,
        "_EPROCESS.SeAuditProcessCreationInfo": layout.path,
        "_EPROCESS.Peb": layout.peb,
        "_KPROCESS.DirectoryTableBase": 0x28,
        "_KPROCESS.ThreadListHead": 0x30,
        "_KTHREAD.ThreadListEntry": layout.thread_links,
        "_KTHREAD.Process": layout.thread_process,
        "_KTHREAD.State": layout.state,
        "_KTHREAD.Teb": 0xF0,
        "_KTHREAD.StackBase": 0x38,
        "_KTHREAD.StackLimit": 0x30,
        "_ETHREAD.Cid": layout.cid,
        "_KPRCB.CurrentThread": 8,
    }
    assert [(symbol.name, symbol.address, symbol.kind) for symbol in profile.symbols] == sorted(
        ((name, rva, "T" if rva >= TEXT and rva < DATA else "D") for name, rva in SYMBOLS.items()), key=lambda row: row[1]
    )


def test_its_types() -> None:
    types = parse_pdb(PDB).types

    def shown(name: str, data: bytes | None = None) -> list[str]:
        found = types.find(name)
        assert found is not None
        return [" ".join(line.split()) for line in render(types, found, None, data)]

    assert shown("_LIST_ENTRY") == [
        "struct _LIST_ENTRY, 0x10 bytes",
        "+0x0000 Flink struct _LIST_ENTRY *",
        "+0x0008 Blink struct _LIST_ENTRY *",
    ]
    assert shown("_EPROCESS")[1:3] == ["+0x0000 Pcb struct _KPROCESS", "+0x01e8 UniqueProcessId void *"]
    assert f"+{UNKNOWN.image_name:#06x} ImageFileName unsigned char[15]" in shown("_EPROCESS")
    data = bytearray(0x430)
    data[0x188:0x18C] = struct.pack("<I", 5 << 3 | 2)
    thread = shown("_KTHREAD", bytes(data))
    assert "+0x0188 Kind:3 unsigned long = 0x2" in thread and "+0x0188 Rest:29 unsigned long = 0x5" in thread
    assert "+0x0230 Process struct _KPROCESS * = 0x0000000000000000" in thread
    assert shown("enum _KTHREAD_STATE")[1:] == ["Initialized = 0x0", "Ready = 0x1", "Running = 0x2"]
    assert types.offset("_ETHREAD", "Cid.UniqueThread") == UNKNOWN.cid + 8
    assert types.find("__unnamed_12") is None


def test_a_pdb_makes_an_unknown_build_known(pdb: Path, store: Store) -> None:
    guest = FakeWindows(UNKNOWN, without=frozenset({"PsGetProcessId", "KeQueryPrcbAddress"}))
    assert "give its PDB" in look(guest).remarks[0]
    found = look(guest, pdb=pdb, store=store)
    assert found.remarks == () and found.source == f"{pdb}; where processes are: its PDB"
    windows = found.system
    assert isinstance(windows, Windows)
    task = windows.current(0, guest.registers(0))
    assert task is not None and str(task) == "a-long-program (process 4660, thread 4668)"
    assert windows.tasks.state(task) == "R" and windows.tasks.program(task) is not None
    assert windows.known.bases == tuple(guest.kpcrs)  # by KiProcessorBlock
    assert str(windows.name_of(guest.address(CALLER + 5))) == "KiWriteMsr+0x5 [nt]"
    assert str(windows.name_of(guest.address(LEAF))) == "KiLeaf [nt]"
    assert str(windows.name_of(guest.address(NAMELESS))) == f"nt+{NAMELESS:#x} [nt]"
    # What only the exports have is found, too.
    assert windows.address_of("nt!NtClose") == guest.address(guest.exports["NtClose"])
    assert windows.types.find("_EPROCESS") is not None
    # The next session needs no PDB.
    pdb.unlink()
    again = look(guest, store=store)
    assert again.source == "a PDB given before; where processes are: its PDB"
    assert again.system.describe() == windows.describe() and again.system.address_of("KiWriteMsr") == guest.address(CALLER)
    assert again.system.types.offset("_ETHREAD", "Cid") == UNKNOWN.cid


def test_without_a_pdb_there_are_no_types() -> None:
    with pytest.raises(Exception, match=rf"the types of Windows are in its PDB: ntkrnlmp\.pdb {KEY}"):
        print(look(FakeWindows()).system.types)
    with pytest.raises(BtfError, match="has no types"):
        print(parse_pdb(make_pdb(UNKNOWN, SYMBOLS, types=b"")).types)


def test_the_wrong_pdb_is_noticed(tmp_path: Path, store: Store) -> None:
    guest = FakeWindows()
    path = tmp_path / "other.pdb"
    for guid, age, key in ((GUID[::-1], 1, "0C0D0E0F"), (GUID, 2, KEY[:-1] + "2")):
        path.write_bytes(make_pdb(guest.layout, SYMBOLS, guid=guid, age=age))
        found = look(guest, pdb=path, store=store)
        assert found.remarks[0].startswith(f"{path} is not of the kernel that runs here: it is {key}")
        assert found.remarks[0].endswith(f"the kernel's is ntkrnlmp.pdb {KEY}")
        assert found.system.current(0, guest.registers(0)) is not None
    path.write_bytes(b"not at all")
    assert look(guest, pdb=path).remarks == (f"{path} is of no use: it is no PDB (MSF 7.00)",)
    assert look(guest, pdb=tmp_path).remarks == (f"{tmp_path} is of no use: Is a directory",)
    assert not store.folder.exists()


def test_a_pdb_that_says_what_does_not_fit(tmp_path: Path) -> None:
    """Its key is right; the functions are believed instead."""
    guest = FakeWindows()
    path = tmp_path / "forged.pdb"
    path.write_bytes(make_pdb(UNKNOWN, SYMBOLS))
    found = look(guest, pdb=path)
    assert found.source == f"{path}; where processes are: its exported functions, and the table of builds"
    assert found.system.current(0, guest.registers(0)) is not None


def test_an_image_that_was_rearranged() -> None:
    """OMAP: the symbols are those of the image before it was."""
    moved = [(0, 0), (TEXT, TEXT + 0x4000), (LEAF, 0), (LEAF + 0x40, LEAF + 0x40), (DATA, DATA)]
    symbols = parse_pdb(make_pdb(UNKNOWN, SYMBOLS, moved=moved)).symbols
    assert symbols.find("KiWriteMsr") == CALLER + 0x4000
    assert symbols.find("KiLeaf") is None and symbols.find("KiProcessorBlock") == DATA + 0x100


def need_llvm() -> str:
    tool = shutil.which("llvm-pdbutil") or shutil.which("llvm-pdbutil-14")
    if tool is None:
        pytest.skip("llvm-pdbutil is missing (Debian: apt install llvm)")
    return tool


YAML = """
PdbStream: {Age: 1, Guid: '{03020100-0504-0706-0809-0A0B0C0D0E0F}', Signature: 1, Features: [ VC140 ], Version: VC70}
DbiStream: {VerHeader: V70, Age: 1, BuildNumber: 36363, PdbDllVersion: 0, PdbDllRbld: 0, Flags: 0, MachineType: Amd64}
TpiStream:
  Version: VC80
  Records:
    - Kind: LF_FIELDLIST
      FieldList:
        - {Kind: LF_NESTTYPE, NestedType: {Type: 116, Name: inner}}
        - {Kind: LF_STMEMBER, StaticDataMember: {Attrs: 3, Type: 116, Name: shared}}
        - {Kind: LF_ONEMETHOD, OneMethod: {Type: 116, Attrs: 3, VFTableOffset: -1, Name: plain}}
        - {Kind: LF_ONEMETHOD, OneMethod: {Type: 116, Attrs: 19, VFTableOffset: 8, Name: virtual}}
        - {Kind: LF_MEMBER, DataMember: {Attrs: 3, Type: 1539, FieldOffset: 1088, Name: UniqueProcessId}}
        - {Kind: LF_MEMBER, DataMember: {Attrs: 3, Type: 116, FieldOffset: 70000, Name: far_away}}
    - Kind: LF_STRUCTURE
      Class:
        {MemberCount: 2, Options: [ None ], FieldList: 4096, Name: _EPROCESS, UniqueName: '', DerivationList: 0, VTableShape: 0,
         Size: 80000}
"""


def test_what_llvm_writes(tmp_path: Path) -> None:
    source, path = tmp_path / "types.yaml", tmp_path / "types.pdb"
    source.write_text(YAML)
    made = subprocess.run([need_llvm(), "yaml2pdb", f"-pdb={path}", str(source)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    profile = read_pdb(path)
    assert profile.key == KEY and profile.offsets == {"_EPROCESS.UniqueProcessId": 1088}
    assert profile.types.offset("_EPROCESS", "far_away") == 70000


# ---- damaged ones ----


@pytest.mark.parametrize(
    "data",
    [b"", PDB[:40], PDB[:512], PDB[:2000], PDB[: len(PDB) // 2], b"\0" + PDB[1:], make_msf([b""] * 3), make_msf([b""] * 5)],
)
def test_what_is_no_pdb(data: bytes) -> None:
    with pytest.raises(PdbError):
        parse_pdb(data)


@pytest.mark.parametrize("at", [32, 44, 52])
@pytest.mark.parametrize("value", [0, 1, 3, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_superblock_that_lies(at: int, value: int) -> None:
    with pytest.raises(PdbError):
        parse_pdb(PDB[:at] + struct.pack("<I", value) + PDB[at + 4 :])


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(PDB) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=10))
def test_damaged_files_are_read_or_refused(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(PDB)
    for at, content in changes:
        data[at : at + len(content)] = content
    try:
        profile = parse_pdb(bytes(data))
        names = profile.types.names
    except (PdbError, BtfError):
        return
    for name in names:
        found = profile.types.find(name)
        assert found is not None
        try:
            lines = list(render(profile.types, found))
        except BtfError:
            continue
        assert lines


TPI = kernel_types(UNKNOWN)


@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.integers(0, len(TPI)).map(lambda length: TPI[:length])))
@example(data=TPI[:56])
def test_damaged_types_are_read_or_refused(data: bytes) -> None:
    try:
        types, offsets = read_types(data, ["_EPROCESS.UniqueProcessId"])
    except TypesError:
        return
    assert len(types) >= 0 and set(offsets) <= {"_EPROCESS.UniqueProcessId"}


def test_types_made_of_themselves() -> None:
    types = Types()
    types.fields([("", 0x1001, 0), ("x", 0x1001, 8)], 0x1000)  # and its list continues itself
    types.structure("_EPROCESS", 16, 0x1000)
    types.structure("_ETHREAD", 0, 0, forward=True)
    data, offsets = read_types(types.stream(), ["_EPROCESS.x", "_EPROCESS.nothing", "_ETHREAD.Cid"])
    assert offsets == {"_EPROCESS.x": 8} and data
