"""Tests of the commands that look into the guest, on a made-up Windows: guest, ps, .process, .thread, k, lm, x, u, dt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.fakes import Typist
from tests.guest.windows.fake_pdb import make_pdb
from tests.guest.windows.fake_windows import BASE, CALLER, DRIVER, KEY, OUTER, SIZE, SYSTEM_CALL, UNKNOWN, WRITER, FakeWindows
from vmexit.commands.layout import address_text as at
from vmexit.errors import VmexitError

GUEST = FakeWindows()
LINE = f"Windows 10 22H2 x86_64, build 19045, base {BASE:#x}, 19 symbols, 2 modules"


@pytest.fixture
def booted(typist: Typist) -> Typist:
    """On a machine that runs the made-up kernel."""
    typist.boot(GUEST)
    return typist


def test_guest(booted: Typist) -> None:
    assert booted.types("guest").split("\n") == [
        LINE,
        "from     the guest's memory (exports); where processes are: its exported functions, and the table of builds",
        f"built    ntkrnlmp.pdb {KEY}",
        "core 0   a-long-program (process 4660, thread 4668)",
        "core 1   Idle (process 0, thread 0)",
    ]


def test_an_unknown_build_and_its_pdb(typist: Typist, tmp_path: Path) -> None:
    guest = FakeWindows(UNKNOWN, without=frozenset({"PsGetProcessId"}))
    typist.boot(guest)
    lines = typist.types("guest").split("\n")
    assert lines[3:5] == ["core 0   not known what it executes", "core 1   not known what it executes"]
    assert lines[5].startswith(
        "note: the processes of this Windows are not known: build 30000 is none that vmexit knows; give its PDB"
    )
    with pytest.raises(VmexitError, match="give its PDB"):
        typist.types("ps")
    assert "nt!KeWriteMsr" in typist.types("x KeWriteMsr") and "NDIS" in typist.types("lm")
    (tmp_path / "ntkrnlmp.pdb").write_bytes(make_pdb(UNKNOWN, {"KiWriteMsr": CALLER}))
    assert typist.types(f"guest pdb {tmp_path}/ntkrnlmp.pdb").split("\n")[1:4] == [
        f"from     {tmp_path}/ntkrnlmp.pdb; where processes are: its PDB",
        f"built    ntkrnlmp.pdb {KEY}",
        "core 0   a-long-program (process 4660, thread 4668)",
    ]
    assert "smss.exe" in typist.types("ps") and typist.types("u nt!KiWriteMsr l 1").startswith("KiWriteMsr [nt]:")
    shown = typist.types(f"dt _EPROCESS.UniqueProcessId {guest.processes[4]:x}")
    assert shown.split()[:2] == ["+0x01e8", "UniqueProcessId"] and shown.endswith("= 0x0000000000000004")


def test_ps(booted: Typist) -> None:
    system, smss, program = (at(GUEST.processes[pid]) for pid in (4, 0x1A4, 0x1234))
    assert booted.types("ps").split("\n") == [
        "    pid   decimal  parent  s  task               name             program",
        f"      4       0n4       0  -  {system}  System           (kernel)",
        f"    1a4     0n420       4  -  {smss}  smss.exe         \\Device\\HarddiskVolume3\\Windows\\System32\\smss.exe",
        f"   1234    0n4660     1a4  -  {program}  a-long-program   \\Device\\HarddiskVolume3\\Users\\a-long-program.exe",
    ]


def test_process_and_thread(booted: Typist) -> None:
    shown = booted.types(".process").split("\n")
    assert shown[1].split()[:2] == ["1234", "0n4660"]
    assert shown[2] == f"physical page tables at {at(GUEST.root)}, PEB at {at(0x7FF6_0123_4000)}"
    assert shown[3] == "threads: 2" and [line.split()[0] for line in shown[4:]] == ["1238", "123c"]
    assert booted.types(".process pid 1234") == "\n".join(shown)
    shown = booted.types(".thread").split("\n")
    assert shown[1].split()[:5] == ["123c", "0n4668", "1234", "R", at(GUEST.threads[0x123C])]
    assert shown[2].startswith("kernel stack from ffffb50f`")
    assert booted.types(".thread tid 123c") == "\n".join(shown)
    assert len(booted.types(".thread list pid 4").split("\n")) == 3
    with pytest.raises(VmexitError, match="there is no process 5"):
        booted.types(".process pid 5")


def test_symbols(booted: Typist) -> None:
    assert booted.types("lm").split("\n")[1:] == [
        f"{at(BASE)}  {at(BASE + SIZE)}        19  nt",
        f"{at(DRIVER)}  {at(DRIVER + 0x4000)}         2  NDIS",
        f"{at(DRIVER + 0x10_0000)}  {at(DRIVER + 0x10_3000)}         0  my_filter",
    ]
    assert booted.types("x nt!KeWrite*") == f"{at(GUEST.address(WRITER))}  T  nt!KeWriteMsr"
    assert booted.types("u nt!KeWriteMsr+2 l 1").split("\n")[0] == "KeWriteMsr+0x2 [nt]:"
    assert "wrmsr" in booted.types("u KeWriteMsr+2 l 1")
    with pytest.raises(VmexitError, match="the types of Windows are in its PDB"):
        booted.types("dt _EPROCESS")


def test_stack(typist: Typist) -> None:
    guest = FakeWindows()
    rsp = guest.cores[0]["rsp"]
    guest.u64(rsp, guest.address(CALLER + 0xA))
    guest.u64(rsp + 0x38, guest.address(OUTER + 0xC))
    typist.boot(guest)
    assert typist.types("k").split("\n") == [
        "stack              address",
        f"{at(rsp)}  {at(guest.address(WRITER + 2))}  KeWriteMsr+0x2 [nt]",
        f"{at(rsp + 8)}  {at(guest.address(CALLER + 0xA))}  nt+{CALLER + 0xA:#x} [nt]",
        f"{at(rsp + 0x40)}  {at(guest.address(OUTER + 0xC))}  KeBugCheckEx+0xc [nt]",
    ]


def test_at_lstar_it_is_recognised_once(booted: Typist) -> None:
    view = booted.session.guest
    assert view.at_lstar(0, BASE + SYSTEM_CALL) == LINE
    assert view.at_lstar(1, BASE + SYSTEM_CALL) is None
    assert str(view.name_of(GUEST.address(WRITER))) == "KeWriteMsr [nt]"
    assert view.address_of("nt!NtClose") == GUEST.address(GUEST.exports["NtClose"])
    assert view.read_kernel(GUEST.address(WRITER + 2), 2) == b"\x0f\x30"
    with pytest.raises(VmexitError, match="no Linux: it is Windows 10 22H2"):
        print(view.linux)
