"""Tests of the commands that look into the guest, on a made-up Linux: guest, ps, .process, .thread, k, lm, x, dt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.fakes import Typist, linux_guest
from tests.guest.linux.fake_linux import SLIDE, FakeLinux, make_bzimage, make_image, make_vmlinux, member
from vmexit.commands.layout import address_text
from vmexit.guest.system import NotRecognisedError

GUEST = linux_guest()
LINE = f"Linux 6.1.0-fake-amd64 x86_64, slide {SLIDE:#x}, 1218 symbols, 1 module"


def at(address: int) -> str:
    return address_text(address)


@pytest.fixture
def booted(typist: Typist) -> Typist:
    """On a machine that runs the made-up Linux."""
    typist.boot(GUEST)
    return typist


def test_guest(booted: Typist) -> None:
    assert booted.types("guest").split("\n") == [
        LINE,
        "from     the guest's memory",
        "built    1 SMP Fake 6.1.0-1 (2026-01-01)",
        "core 0   worker (process 94, thread 95)",
        "core 1   swapper/0 (process 0)",
    ]
    booted.put(0, gs_base=0)
    assert booted.types("guest again").split("\n")[3] == "core 0   not known what it executes"


def test_help_for_guest(booted: Typist, tmp_path: Path) -> None:
    (tmp_path / "my kernel").write_bytes(make_bzimage(make_vmlinux(bytes(make_image())), lambda data: data))
    (tmp_path / "System.map").write_text("")
    assert booted.types(f'guest image "{tmp_path}/my kernel"').split("\n")[1] == f"from     {tmp_path}/my kernel"
    shown = booted.types(f"guest map {tmp_path}/System.map")
    assert f"from     {tmp_path}/my kernel" in shown  # which goes first, and is right
    lines = booted.types("guest image /bin/sh").split("\n")
    assert lines[0] == LINE and lines[-2:] == [
        "note: /bin/sh is of no use: there is no kernel in this ELF file",
        f"note: {tmp_path}/System.map is of no use: this is no System.map of an x86-64 kernel",
    ]


def test_guest_before_there_is_one(typist: Typist) -> None:
    reason = "the guest is not known: the guest's firmware or an early kernel: not in 64-bit mode yet, or a 32-bit system"
    assert typist.types("guest") == reason
    for line in ("ps", ".process", ".thread", "k", "lm", "x *", "dt list_head"):
        with pytest.raises(NotRecognisedError) as raised:
            typist.types(line)
        assert str(raised.value) == reason


def test_ps(booted: Typist) -> None:
    init, kthreadd, dd = (at(GUEST.tasks[pid]) for pid in (1, 2, 94))
    assert booted.types("ps").split("\n") == [
        "    pid   decimal  parent  s  task               name             program",
        f"      1       0n1       0  R  {init}  init             /bin/init",
        f"      2       0n2       0  R  {kthreadd}  kthreadd         (kernel)",
        f"     5e      0n94       0  R  {dd}  dd               /bin/dd",
    ]
    assert booted.types(".process list") == booted.types("ps")


def test_a_list_that_is_not_whole(typist: Typist) -> None:
    guest = FakeLinux()
    guest.u64(guest.tasks[2] + member("task_struct.tasks"), 0)
    typist.boot(guest)
    lines = typist.types("ps").split("\n")
    assert len(lines) == 4 and lines[-1] == "the guest's list is not whole: the list leads to what is no task"


def test_process(booted: Typist) -> None:
    shown = booted.types(".process").split("\n")
    assert shown[1].split()[:2] == ["5e", "0n94"]  # the process of the thread that runs
    assert shown[2].startswith("page tables at ffff8880`")
    assert shown[3] == "threads: 2" and [line.split()[0] for line in shown[4:]] == ["5e", "5f"]
    assert booted.types(".process pid 0n94") == booted.types(".process pid 5e") == booted.types("process")
    assert booted.types(".process pid 2").split("\n")[2] == "threads: 1"


def test_thread(booted: Typist) -> None:
    shown = booted.types(".thread").split("\n")
    assert shown[1].split()[:4] == ["5f", "0n95", "5e", "R"] and shown[1].endswith("  worker")
    assert shown[2].startswith("kernel stack from ffff8880`")
    assert booted.types(".thread tid 5f") == booted.types("thread")
    assert booted.types(".thread list").split("\n")[1:] == booted.types(".thread list pid 5e").split("\n")[1:]
    assert len(booted.types(".thread list").split("\n")) == 3


def test_stack(booted: Typist) -> None:
    rsp = GUEST.cores[0]["rsp"]
    assert booted.types("k").split("\n") == [
        "stack              address",
        f"{at(rsp)}  {at(GUEST.address(0x2002))}  native_write_msr+0x2 [kernel]",
        f"{at(rsp + 0x48)}  {at(GUEST.address(0x3005))}  ? native_write_msr_safe+0xfc5 [kernel]",
    ]


def test_modules(booted: Typist) -> None:
    lines = booted.types("lm").split("\n")
    assert lines[0] == "begin              end                 symbols  module"
    assert lines[1] == f"{at(GUEST.address(0))}  {at(GUEST.address(4 << 20))}      1218  kernel"
    assert lines[2].endswith("         2  msr") and len(lines) == 3


def test_find_symbols(booted: Typist) -> None:
    assert booted.types("x *WRITE_msr*").split("\n") == [
        f"{at(GUEST.address(0x2000))}  t  kernel!native_write_msr",
        f"{at(GUEST.address(0x2040))}  t  kernel!native_write_msr_safe",
    ]
    assert [line.split("  ")[2] for line in booted.types("x msr!*").split("\n")] == ["msr!msr_open", "msr!msr_write"]
    many = booted.types("x sys_filler*").split("\n")
    assert len(many) == 1001 and many[-1] == "there are more than 1000; name more of it"


def test_types(booted: Typist) -> None:
    assert booted.types("dt struct list_head").split("\n") == [
        "struct list_head, 0x10 bytes",
        "  +0x0000  next                          void *",
        "  +0x0008  prev                          void *",
    ]
    shown = booted.types(f"dt task_struct {GUEST.tasks[94]:x}")
    assert '  +0x00c0  comm                          char[16]                         = "dd"' in shown.split("\n")
    assert booted.types("dt task_struct.thread.sp") == "  +0x0108  thread.sp                     unsigned long"
    assert booted.types("dt task_struct.pid init_task+0").endswith("= 0x0")
    assert booted.types("dt module_state").split("\n")[1] == "  MODULE_STATE_LIVE = 0x0"


def test_symbols_are_addresses_everywhere(booted: Typist) -> None:
    first = booted.types("u native_write_msr+2 l 2").split("\n")
    assert first == [
        "native_write_msr+0x2 [kernel]:",
        f"{at(GUEST.address(0x2002))} 0F 30                               wrmsr",
    ]
    for name in ("nt!native_write_msr", "kernel!native_write_msr"):
        assert booted.types(f"u {name}+2 l 2").split("\n") == first
    assert booted.types("db linux_banner l 5").endswith("Linux")
    assert booted.types("r rax = msr!msr_open + 1").startswith("rax=ffff8880")
    # A number is one, whatever symbols there are, and a register likewise.
    assert booted.types("r rax = add") == "rax=0000000000000add"


def test_the_kernels_memory_is_shown_whatever_tables_the_core_uses(booted: Typist) -> None:
    address = GUEST.address(0x2000)
    del booted.link.pages[False, address >> 12]
    assert booted.fails(f"db {address:x} l 2").startswith("nothing is mapped")
    booted.types("guest")
    assert booted.types(f"db {address:x} l 2").startswith(at(address))


@pytest.mark.parametrize(
    ("line", "message", "column", "width"),
    [
        ("guest what", "'what' is no kind of help (it is image, map, pdb or again)", 6, 4),
        ("guest image", "a file's name is missing", 11, 0),
        ("guest map /nowhere", "there is no file /nowhere", 10, 8),
        ("guest again 5", "'guest' takes 1 argument at most", 12, 1),
        ("ps x", "'ps' takes no arguments", 3, 1),
        ("lm x", "'lm' takes no arguments", 3, 1),
        ("k 5", "'k' takes no arguments", 2, 1),
        ("x", "a pattern is missing (x *msr*)", 1, 0),
        ("x nothing*", "no symbol matches 'nothing*'", 2, 8),
        ("x none!*", "no symbol matches 'none!*'", 2, 6),
        (".process 5", "'5' is no way to name processes (it is list or pid)", 9, 1),
        (".process pid", "a process number is missing", 12, 0),
        (".process pid 5f", "there is no process 5f (0n95)", 13, 2),
        (".process pid fffffff", "fffffff is too big: the biggest process number is 400000", 13, 7),
        (".process list 5", "'.process' takes 1 argument at most", 14, 1),
        (".thread tid 60", "there is no thread 60 (0n96)", 12, 2),
        (".thread tid", "a thread number is missing", 11, 0),
        (".thread list pid", "a process number is missing", 16, 0),
        (".thread list tid", "'tid' is no way to name a process: did you mean 'pid'?", 13, 3),
        (".thread list pid 7", "there is no process 7 (0n7)", 17, 1),
        ("dt", "a type is missing (dt task_struct)", 2, 0),
        ("dt nothing", "this kernel has no type 'nothing'", 3, 7),
        ("dt task_struct.nothing", "'task_struct' has no member 'nothing'", 3, 19),
        ("dt list_head 1000", "0x10 bytes cannot be read at 00000000`00001000", 13, 4),
        ("dt list_head nonsense", "'nonsense' is neither a number nor a register, nor a symbol that is known", 13, 8),
    ],
)
def test_errors(booted: Typist, line: str, message: str, column: int, width: int) -> None:
    assert booted.fails(line) == f"{message}\n{line}\n{' ' * column}^{'~' * (width - 1)}"


def test_what_a_core_executes_may_not_be_known(booted: Typist) -> None:
    booted.put(0, gs_base=0)
    assert booted.fails(".process").startswith("it is not known what core 0 executes\n")
    assert booted.fails(".thread").startswith("it is not known what core 0 executes\n")
    assert booted.fails(".thread list").startswith("core 0 executes no process that is known\n")
    booted.types("~ 1")
    assert booted.types(".thread").split("\n")[1].endswith("swapper/0")
    assert booted.fails(".thread list").startswith("core 1 executes no process that is known\n")


def test_they_need_a_halted_machine(booted: Typist) -> None:
    booted.types("g")
    for line in ("guest", "ps", ".process", ".thread", "k", "lm", "x *", "dt list_head"):
        assert "needs a halted machine" in booted.fails(line)
