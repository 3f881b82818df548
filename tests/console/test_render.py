"""Tests of how stops, errors and sums look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands.fakes import SKIPPED, Typist, linux_guest, record
from vmexit.console.render import error_text, exit_text, notice_text, stop_text, summary_table
from vmexit.debugger import Stop, StopReason
from vmexit.errors import CommandError, TargetError
from vmexit.guest.disassembly import Syntax
from vmexit.link.rings import joined
from vmexit.link.wire import Access, Action, RecordFlag, Stage
from vmexit.recording import Summary
from vmexit.targets.base import Notice, NoticeKind
from vmexit.trap import Trap, traps_of

S = 1_000_000_000


def trap(**fields: int) -> Trap:
    """One trap; the fields are those of fakes.record."""
    return next(traps_of(record(**fields)))  # type: ignore[arg-type]


@pytest.fixture
def stopped() -> Iterator[Typist]:
    """Core 1 stands at a WRMSR in 64-bit code."""
    typist = Typist()
    typist.map(0x101000, b"\x0f\x30\x48\x89\xd8")
    typist.put(1, rip=0x101000, cr0=0x80000001, efer=0x500)
    typist.debugger.core = 1
    yield typist
    typist.close()


def shown(typist: Typist, stop: Stop) -> list[str]:
    return stop_text(typist.debugger, stop, Syntax.INTEL).split("\n")


def test_a_break_in_a_kernel_that_is_known(booted: Typist) -> None:
    at = trap(rip=linux_guest().address(0x2002), core=0, action=Action.BREAK)
    lines = shown(booted, Stop(StopReason.BREAK, at))
    assert lines[3:] == [
        "in    native_write_msr+0x2 [kernel] <- ? native_write_msr_safe+0xfc5 [kernel]",
        "by    worker (process 94, thread 95)",
    ]


def test_a_break_before_the_instruction(stopped: Typist) -> None:
    at = trap(rip=0x101000, core=1, event=0x1A, action=Action.BREAK)
    assert shown(stopped, Stop(StopReason.BREAK, at)) == [
        "event 1a triggered (pre) on core 1: wrmsr, MSR c0000082, value ffffffff81a00080",
        "MSR   LSTAR = 0xffffffff81a00080",
        "RIP   00000000`00101000 0F 30                               wrmsr",
    ]
    at = trap(rip=0x101000, core=1, access=Access.RDMSR, flags=SKIPPED)
    assert shown(stopped, Stop(StopReason.BREAK, at))[:2] == [
        "event 0 triggered (pre) on core 1: rdmsr, MSR c0000082, value -, short-circuited",
        "MSR   LSTAR",
    ]
    at = trap(rip=0x101000, core=1, msr=0xC0000080, value=0xD01)
    assert shown(stopped, Stop(StopReason.BREAK, at))[1] == "MSR   EFER = 0xd01 SCE LME LMA NXE"
    at = trap(rip=0x101000, core=1, msr=0xC1234567)
    assert shown(stopped, Stop(StopReason.BREAK, at))[1].startswith("RIP   ")


def test_a_break_after_the_instruction(stopped: Typist) -> None:
    stopped.put(1, rip=0x101002)
    at = trap(rip=0x101000, core=1, stage=Stage.POST)
    assert shown(stopped, Stop(StopReason.BREAK, at)) == [
        "event 0 triggered (post) on core 1: wrmsr, MSR c0000082, value ffffffff81a00080",
        "MSR   LSTAR = 0xffffffff81a00080",
        "done  00000000`00101000 0F 30                               wrmsr",
        "RIP   00000000`00101002 48 89 D8                            mov rax, rbx   <- the guest goes on at RIP",
    ]
    interrupted = trap(rip=0x101000, core=1, stage=Stage.POST, flags=RecordFlag.INTERRUPTED)
    assert shown(stopped, Stop(StopReason.BREAK, interrupted))[3].endswith("<- an interrupt came first; RIP is at its handler")


def test_a_break_that_is_over_by_now_or_whose_code_cannot_be_read(stopped: Typist) -> None:
    at = trap(rip=0x555000, core=1)
    assert shown(stopped, Stop(StopReason.BREAK, at))[2] == "RIP   00000000`00555000"
    stopped.target.runs = True
    assert shown(stopped, Stop(StopReason.BREAK, at))[2] == "RIP   00000000`00555000"
    assert shown(stopped, Stop(StopReason.PAUSED)) == ["halted, core 1"]


def test_other_stops(stopped: Typist) -> None:
    assert shown(stopped, Stop(StopReason.PAUSED)) == [
        "halted, core 1",
        "RIP   00000000`00101000 0F 30                               wrmsr",
    ]
    assert shown(stopped, Stop(StopReason.SHUTDOWN)) == ["halted: the guest has shut down"]
    assert shown(stopped, Stop(StopReason.ENDED, exit_status=3)) == ["QEMU ended with status 3"]
    assert stop_text(stopped.debugger, Stop(StopReason.SHUTDOWN), Syntax.INTEL, colour=True) == (
        "\033[1mhalted: the guest has shut down\033[0m"
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "QEMU ended with status 0"),
        (33, "QEMU ended with status 33"),
        (-9, "QEMU was ended by signal 9 (SIGKILL)"),
        (-99, "QEMU was ended by signal 99"),
        (None, "QEMU has ended"),
    ],
)
def test_how_qemu_ended(status: int | None, text: str) -> None:
    assert exit_text(status) == text


def test_notices() -> None:
    assert notice_text(Notice(NoticeKind.RESET)) == "the machine was reset"
    assert notice_text(Notice(NoticeKind.SHUTDOWN, "guest-shutdown")) == "the guest has shut down (guest-shutdown)"
    assert notice_text(Notice(NoticeKind.PANICKED, "pause")) == "the guest has panicked (pause)"


def test_errors() -> None:
    error = CommandError("no", "g x", 2, 3)
    assert error_text(error) == "no\ng x\n  ^"
    assert error_text(error, "boot.vmx:3") == "boot.vmx:3: no\ng x\n  ^"
    assert error_text(error, "-x", colour=True) == "\033[31m-x: no\033[0m\ng x\n  ^"
    assert error_text(TargetError("gone")) == "gone"
    assert error_text(TargetError("gone"), colour=True) == "\033[31mgone\033[0m"


def test_the_table_of_sums() -> None:
    summary = Summary()
    summary.add(joined([record(0, value=1), record(1, value=2, core=1), record(2, msr=0x10, access=Access.RDMSR)]))
    assert summary_table(summary.rows(), "writes").splitlines()[:3] == [
        "     MSR  name          stage  writes  cores  first value       last value",
        "      10  TSC    rdmsr  pre         1  0      -                 -",
        "c0000082  LSTAR  wrmsr  pre         2  0 1    0000000000000001  0000000000000002",
    ]
    summary.add(joined([record(3 + i, event=1, stage=Stage.POST, value=i) for i in range(1000)]))
    assert summary_table(summary.rows()).splitlines()[3] == (
        "1      c0000082  LSTAR  wrmsr  post   1,000  0      0000000000000000  00000000000003e7"
    )
