"""Tests of what is offered while a command is being typed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from tests.commands.fakes import Typist
from vmexit.commands import registry
from vmexit.console.completion import CommandCompleter, candidates
from vmexit.guest import registers


@pytest.fixture(scope="module")
def typist() -> Iterator[Typist]:
    typist = Typist()
    for _ in range(17):
        typist.types("!msrwrite 10")
    typist.types("events c 3")
    yield typist
    typist.close()


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("!msr", ["!msrwrite", "!msrread"]),
        ("!MSRW", ["!msrwrite"]),
        (".", [".process", ".thread", ".attach", ".detach", ".status", ".script", ".cls", ".help", ".exit"]),
        ("  ev", ["events", "eval"]),
        ("zz", []),
        ("zz ", []),
        ("g ", []),
        ("!msrwrite ", "asm buffer changed code condition core imm log mask output pid sc script stage value".split()),
        ("!msrwrite c0000082 s", ["sc", "script", "stage"]),
        ("!msrwrite log SC on core 1 ", "asm buffer changed code condition imm mask output pid script stage value".split()),
        ("!msrwrite stage ", ["pre", "post", "all"]),
        ("!msrwrite STAGE P", ["pre", "post"]),
        ("!msrwrite core ", ["0", "1"]),
        ("!msrwrite imm ", ["yes", "no"]),
        ("!msrread sc ", ["on", "off"]),
        ("!msrwrite pid ", ["all"]),
        ("events ", ["e", "d", "c", "sc"]),
        ("events d ", [*"012", *(f"{n:x}" for n in range(4, 17)), "all"]),
        ("events d 1", ["1", "10"]),
        ("events sc ", ["on", "off"]),
        ("events d 1 ", []),
        ("r cr", ["cr0", "cr2", "cr3", "cr4", "cr8"]),
        ("r @cr0=kern", ["kernel_gs_base"]),
        ("r cr0 = kern", ["kernel_gs_base"]),
        ("r cr0 = rax+kern", ["kernel_gs_base"]),
        ("r cr0 ", []),
        ("db kern", ["kernel_gs_base"]),
        ("!dq 10+kern", ["kernel_gs_base"]),
        ("dq rsp + kern", ["kernel_gs_base"]),
        ("db rsp ", ["l"]),
        ("db rsp l ", []),
        ("u rsp ", ["l"]),
        ("~ ", ["0", "1"]),
        ("~ 0 ", []),
        ("core ", ["0", "1"]),
        ("settings ", ["code-failures", "overflow", "recognition", "script-stack", "script-steps", "sdk-socket", "syntax"]),
        ("settings sdk-socket ", ["off"]),
        ("settings sdk-socket off ", []),
        ("!msrwrite efer value ", []),
        ("rdmsr ", []),
        ("rdmsr lst", ["lstar"]),
        ("rdmsr lstar ", ["core"]),
        ("rdmsr lstar core ", ["0", "1"]),
        ("rdmsr lstar core 1 ", []),
        ("wrmsr LST", ["lstar"]),
        ("wrmsr lstar 5 ", ["core"]),
        ("settings script-steps ", []),
        ("settings OVERFLOW ", ["wait", "drop"]),
        ("settings syntax a", ["att"]),
        ("settings syntax att ", []),
        ("settings nonsense ", []),
        ("help !msrw", ["!msrwrite"]),
        ("help g ", []),
        ("!msrwrite /* core */ st", ["stage", "star"]),
        ("!msrwrite lst", ["lstar"]),
        ("!MSRWRITE LST", ["lstar"]),
        ("!msrread log IA32_SYSENTER_E", ["ia32_sysenter_esp", "ia32_sysenter_eip"]),
        ("!msrwrite lstar,fma", ["lstar,fmask"]),
        ("!msrwrite 200-mtrr_physmask9", ["mtrr_physmask9"]),
        ("!msrwrite lstar, fma", ["fmask"]),
        ("!msrwrite lstar lst", []),
        ("!msrwrite stage lst", []),
        ("!msrwrite lstar,", []),
        ("msr tsc_d", ["tsc_deadline"]),
        ("msr ", []),
        ("msr efer e", []),
        ('!msrwrite "', []),
    ],
)
def test_offers(typist: Typist, text: str, offered: list[str]) -> None:
    assert candidates(typist.session, text)[1] == offered


def test_all_commands_and_all_registers(typist: Typist) -> None:
    assert candidates(typist.session, "")[1] == list(registry.names())
    assert candidates(typist.session, "help ")[1] == list(registry.names())
    assert candidates(typist.session, "r ")[1] == list(registers.ALL)
    assert candidates(typist.session, "db ")[1] == [*registers.ALL, "l"]


def test_what_is_offered_replaces_the_unfinished_word(typist: Typist) -> None:
    def after(text: str) -> list[tuple[str, str]]:
        completer = CommandCompleter(typist.session)
        found = completer.get_completions(Document(text), CompleteEvent())
        return [(text[: len(text) + one.start_position] + one.text, one.display_meta_text) for one in found]

    assert after("!MSRW") == [("!msrwrite", "trap the guest's writes to MSRs")]
    assert after("db rsp+kern") == [("db rsp+kernel_gs_base", "")]
    assert after("events s") == [("events sc", "")]


def test_whatever_stands_before_the_cursor(typist: Typist) -> None:
    for name in registry.names():
        for rest in ("", " ", " x ", " = ", " + ", ' "', " {", " l l l ", " sc sc ", " \\"):
            candidates(typist.session, name + rest)
