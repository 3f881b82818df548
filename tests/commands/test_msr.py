"""Tests of !msrwrite and !msrread: what they make, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from tests.commands.fakes import EVERYTHING, Typist
from vmexit.events.event import Event
from vmexit.events.filters import ValueFilter
from vmexit.events.msrs import LAST_MSR, UNNAMED_READS, UNNAMED_WRITES, MsrSet
from vmexit.link import wire
from vmexit.link.wire import Access, Action, Capability, Stage
from vmexit.targets.base import Untrappable


def made(typist: Typist, line: str) -> Event:
    """The only event that a command makes."""
    before = set(typist.debugger.events)
    typist.types(line)
    (event,) = set(typist.debugger.events) - before
    return event


def same(event: Event, **expected: object) -> bool:
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    wanted = {
        "access": Access.WRMSR,
        "stage": Stage.PRE,
        "core": None,
        "action": Action.BREAK,
        "callback": None,
        "short_circuit": False,
        "immediate": True,
        "enabled": True,
        **expected,
    }
    return all(fields[name] == value for name, value in wanted.items())


def test_by_default_it_breaks_before_each_write_on_all_cores(typist: Typist) -> None:
    event = made(typist, "!msrwrite c0000082")
    assert same(event, msrs=MsrSet.of(0xC0000082), text="!msrwrite c0000082", number=0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("!msrwrite 0xC0000082", {}),
        ("!msrwrite \\xc0000082", {}),
        ("!msrwrite 0n3221225602", {}),
        ("!msrwrite c000`0082", {}),
        ("!MsrWrite C0000082 CORE 1", {"core": 1}),
        ("!msrwrite core 0x1 c0000082", {"core": 1}),
        ("!msrwrite c0000082 core 0n1", {"core": 1}),
        ("!msrwrite imm no c0000082", {"immediate": False}),
        ("!msrwrite imm yes c0000082", {}),
        ("!msrwrite Sc On c0000082", {"short_circuit": True}),
        ("!msrwrite sc off c0000082", {}),
        ("!msrwrite c0000082 stage post", {"stage": Stage.POST}),
        ("!msrwrite c0000082 STAGE ALL", {"stage": Stage.ALL}),
        ("!msrwrite stage pre c0000082", {}),
        ("!msrwrite log c0000082", {"action": Action.RECORD}),
        ("!msrwrite pid all c0000082", {}),
        ("!msrwrite c0000082 stage post stage pre core 0 core 1", {"core": 1}),
        ("!msrwrite sc on sc off stage all c0000082", {"stage": Stage.ALL}),
        (
            "  !msrwrite   imm no  log sc on stage pre core 1  c0000082 /* ! */ // x",
            {"immediate": False, "action": Action.RECORD, "short_circuit": True, "core": 1},
        ),
        ('!msrwrite "c0000082" "stage" "post"', {"stage": Stage.POST}),
    ],
)
def test_options_in_any_order_and_letter_case(typist: Typist, line: str, expected: dict[str, object]) -> None:
    if '"' in line:
        # An MSR is a number or a name, not a text.
        assert "typed without quotes and braces" in typist.fails(line)
        return
    event = made(typist, line)
    assert same(event, msrs=MsrSet.of(0xC0000082), text=line.strip(), **expected)


@pytest.mark.parametrize(
    ("rest", "expected", "told"),
    [
        ("value 0n16", ValueFilter(value=16), "value 10"),
        ("MASK 1 VALUE 0", ValueFilter(value=0, mask=1), "value 0 in 1"),
        ("value 1 log mask ff core 1 value 3", ValueFilter(value=3, mask=0xFF), "core 1, value 3 in ff"),
        ("changed", ValueFilter(changed=True), "what changes"),
        ("Changed mask 100", ValueFilter(mask=0x100, changed=True), "what changes in 100"),
        ("value 1`0 changed", ValueFilter(value=0x10, changed=True), "what changes, value 10"),
        ("value ffffffffffffffff", ValueFilter(value=(1 << 64) - 1), "value ffffffffffffffff"),
    ],
)
def test_filters_by_value(typist: Typist, rest: str, expected: ValueFilter, told: str) -> None:
    event = made(typist, f"!msrwrite efer,star {rest}")
    assert event.filter == expected
    assert f", {told})" in typist.shown[0]
    lowered = wire.unpack("event", typist.link.events[-1])
    assert {name: getattr(lowered, name) for name in ("value", "mask", "changes")} == expected.wire()


def test_lists_and_ranges_with_filters(typist: Typist) -> None:
    event = made(typist, "!msrwrite lstar,fmask changed")
    assert event.msrs == MsrSet.of(0xC0000082, 0xC0000084)
    assert made(typist, "!msrread 200-20f value 6 mask f stage post").msrs == MsrSet.of_ranges([(0x200, 0x20F)])


def test_values_and_keywords_may_be_quoted_as_in_hyperdbg(typist: Typist) -> None:
    assert same(made(typist, '!msrwrite 10 "stage" "post"'), stage=Stage.POST)


@pytest.mark.parametrize(
    ("command", "access", "unnamed"),
    [("!msrwrite", Access.WRMSR, UNNAMED_WRITES), ("!msrread", Access.RDMSR, UNNAMED_READS)],
)
def test_no_msr_means_all_but_a_few(typist: Typist, command: str, access: Access, unnamed: tuple[int, ...]) -> None:
    event = made(typist, f"{command} log")
    assert event.access == access
    assert event.msrs == MsrSet.all_but(unnamed)
    assert 0x10 in event.msrs and LAST_MSR in event.msrs
    for msr in unnamed:
        assert msr not in event.msrs
        assert msr in made(typist, f"{command} {msr:x}").msrs


def test_it_says_what_it_made(typist: Typist) -> None:
    assert typist.types("!msrwrite c0000082") == "event 0 breaks at each wrmsr of c0000082 LSTAR (stage pre, all cores)"
    assert typist.types("!msrread 10 stage post core 1 log") == "event 1 prints each rdmsr of 10 TSC (stage post, core 1)"
    assert typist.types("!msrwrite sc on") == (
        "event 2 breaks at each wrmsr of every MSR (stage pre, all cores, short-circuited)\n"
        "left out, unless an event names them: 48 49 e7 e8 c0000102"
    )
    assert typist.types("!msrread").endswith("left out, unless an event names them: e7 e8 c0000102")


def test_it_holds_at_once(typist: Typist) -> None:
    typist.types("!msrwrite 1")
    typist.types("!msrwrite 2")
    assert len(typist.link.events) == 2
    typist.types("g")
    typist.types("!msrwrite 3")
    assert len(typist.link.events) == 3


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "!msrwrite stge post",
            """
            'stge' is neither an MSR nor an option: did you mean 'stage'?
            !msrwrite stge post
                      ^~~~
            """,
        ),
        (
            "!msrwrite c0000082 ! log",
            """
            '!' is neither an MSR nor an option
            !msrwrite c0000082 ! log
                               ^
            """,
        ),
        (
            "!msrwrite 10 log 20",
            """
            an event names its MSRs in one list (write 10,20, or make another event for this one)
            !msrwrite 10 log 20
                             ^~
            """,
        ),
        (
            "!msrwrite 100000000",
            """
            100000000 is too big: the biggest MSR number is ffffffff
            !msrwrite 100000000
                      ^~~~~~~~~
            """,
        ),
        (
            "!msrwrite core",
            """
            a value for 'core' is missing (core NUMBER)
            !msrwrite core
                          ^
            """,
        ),
        (
            "!msrwrite log stage   // nothing",
            """
            a value for 'stage' is missing (stage pre|post|all)
            !msrwrite log stage   // nothing
                               ^
            """,
        ),
        (
            "!msrwrite core zz",
            """
            'zz' is no core number (a number is hexadecimal; decimal ones begin with 0n)
            !msrwrite core zz
                           ^~
            """,
        ),
        (
            "!msrwrite core 100000000",
            """
            100000000 is too big: the biggest core number is ffffffff
            !msrwrite core 100000000
                           ^~~~~~~~~
            """,
        ),
        (
            "!msrwrite core 2 log",
            """
            there is no core 2; this machine has cores 0 to 1
            !msrwrite core 2 log
                      ^~~~~~
            """,
        ),
        (
            "!msrwrite stage past",
            """
            'past' is no value of 'stage': did you mean 'post'?
            !msrwrite stage past
                            ^~~~
            """,
        ),
        (
            "!msrwrite imm maybe",
            """
            'maybe' is no value of 'imm' (it is yes or no)
            !msrwrite imm maybe
                          ^~~~~
            """,
        ),
        (
            "!msrwrite sc 1",
            """
            '1' is no value of 'sc' (it is on or off)
            !msrwrite sc 1
                         ^
            """,
        ),
        (
            "!msrwrite sc on 10 stage all",
            """
            'sc on' needs 'stage pre': what has been executed cannot be short-circuited any more
            !msrwrite sc on 10 stage all
                      ^~~~~
            """,
        ),
        (
            "!msrwrite 10 { x }",
            """
            these braces belong to no option (before them stands script, condition, code or output)
            !msrwrite 10 { x }
                         ^~~~~
            """,
        ),
    ],
)
def test_what_is_wrong_is_marked(typist: Typist, line: str, shown: str) -> None:
    expected = "\n".join(text.removeprefix(" " * 12) for text in shown.strip("\n").splitlines()[:-1])
    assert typist.fails(line) == expected
    assert not list(typist.debugger.events)
    assert not typist.link.events


@pytest.mark.parametrize(
    ("rest", "marked"),
    [
        ("output { one, two }", "output { one, two }"),
    ],
)
def test_what_is_not_available_yet(typist: Typist, rest: str, marked: str) -> None:
    line = f"!msrwrite 10 {rest}"
    message, source, mark = typist.fails(line).split("\n")
    assert message == f"'{marked.split()[0]}' is not yet available"
    assert source == line
    assert mark == " " * line.index(marked) + "^" + "~" * (len(marked) - 1)
    assert not list(typist.debugger.events)


@pytest.mark.parametrize(
    ("rest", "message", "marked"),
    [
        ("pid zz", "'zz' is no process ID", "zz"),
        ("pid 100000000", "100000000 is too big: the biggest process ID", "100000000"),
        ("buffer all", "'all' is no buffer size in bytes", "all"),
        ("script", "'script' needs something in braces behind it", "script"),
        ("script {  }", "the braces of 'script' are empty", "{  }"),
        ("code { nop }", "'nop' is no machine code, which is written as hexadecimal digits", "nop"),
        ("condition {9x}", "'9x' is no machine code", "9x"),
        ("code { 90 9 }", "'9' has an odd number of digits", "9"),
        ("asm code { nop; foo eax }", "invalid instruction mnemonic 'foo'", "f"),
        ("asm code { je away }", "there is no label 'away'", "away"),
        ("asm core 1 code { nop }", "'asm' stands before 'code' or 'condition'", "asm"),
        ("asm script { x }", "'asm' stands before 'code' or 'condition'", "asm"),
        ("code { 90 } buffer 1000001", "a buffer has 1 to 1000000 bytes, not 1000001", "buffer 1000001"),
        ("code { 90 } buffer 0", "a buffer has 1 to 1000000 bytes, not 0", "buffer 0"),
        ("condition { 90 } buffer 0", "a buffer has 1 to 1000000 bytes, not 0", "buffer 0"),
        ("condition { 90 } sc on stage post", "'sc on' needs 'stage pre'", "sc on"),
        ("buffer 0 script { .x = 1; }", "a buffer has 1 to 1000000 bytes, not 0", "buffer 0"),
        ("asm condition { nop } asm", "'asm' stands before 'code' or 'condition'", "asm"),
        ("output {a,,b}", "a name is missing between the commas", "{a,,b}"),
        ("output {a,b,c,d,e,f}", "an event has 5 outputs at most, not 6", "{a,b,c,d,e,f}"),
        ("asm", "'asm' stands before 'code' or 'condition'", "asm"),
        ("value", "a value for 'value' is missing (value NUMBER)", ""),
        ("value x", "'x' is no value of an MSR", "x"),
        ("mask 0n18446744073709551616 value 1", "'0n18446744073709551616' is no mask of an MSR's bits", "0n18446744073709551616"),
        ("mask 1 stage post", "'mask' says which bits 'value' or 'changed' looks at", "mask 1"),
        ("mask 0 value 0 stage post", "a mask of 0 looks at no bit at all", "mask 0"),
        ("mask 1 value 2 stage post", "2 has bits that the mask 1 leaves out: it would never be met", "value 2"),
        ("value 2", "before a read there is no value to compare; 'stage post' has one", "value 2"),
        ("value 2 stage all", "before a read there is no value to compare; 'stage post' has one", "value 2"),
        ("changed stage post", "'changed' is for writes: a read changes nothing", "changed"),
        ("script {x} stage past", "'past' is no value of 'stage'", "past"),
        ("pid 4 zz", "'zz' is neither an MSR nor an option", "zz"),
    ],
)
def test_a_wrong_value_is_told_before_that_it_is_not_available(typist: Typist, rest: str, message: str, marked: str) -> None:
    line = f"!msrread 10 {rest}"
    first, _, mark = typist.fails(line).split("\n")
    assert first.startswith(message)
    assert mark == " " * line.rindex(marked) + "^" + "~" * (len(marked) - 1)


ASK, BREAK, RECORD, SCRIPT = Action.ASK, Action.BREAK, Action.RECORD, Action.SCRIPT


@pytest.mark.parametrize(
    ("rest", "verb", "way", "action"),
    [
        ("code { 90 }", "runs code at", "emulated", ASK),
        ("buffer 10 asm code { nop }", "runs code at", "emulated", ASK),
        ("code { \\x90\\x90 } log", "prints and runs code at", "emulated", ASK | RECORD),
        ("condition { 488b00 }", "where its condition holds breaks at", "emulated", ASK),
        ("condition { 488b01 }", "where its condition holds breaks at", "lifted", BREAK),
        ("condition { 488b01 } sc on", "where its condition holds breaks at", "lifted", BREAK),
        ("condition { 488b01 } script { .n = 1; }", "where its condition holds runs a script at", "lifted", SCRIPT),
        ("condition { 488b00 } script { .n = 1; }", "where its condition holds runs a script at", "emulated", ASK | SCRIPT),
        (
            "condition { 90 } log script { .n = 1; }",
            "where its condition holds prints and runs a script at",
            "lifted",
            RECORD | SCRIPT,
        ),
        ("asm condition { nop; ret } log", "where its condition holds prints", "lifted", RECORD),
        (
            "CONDITION core 1 { 0x90 } asm CODE { nop }",
            "where its condition holds runs code at",
            "condition lifted, code emulated",
            ASK,
        ),
        ("script { .n = 1; } code { 90 }", "runs a script and code at", "emulated", ASK | SCRIPT),
        ("code { 90 } script { .n = 1; } buffer 8", "runs code and a script at", "emulated", ASK | SCRIPT),
    ],
)
def test_machine_code(typist: Typist, rest: str, verb: str, way: str, action: Action) -> None:
    assert typist.types(f"!msrwrite 10 {rest}").startswith(f"event 0 {verb} each wrmsr of 10 ")
    (event,) = typist.debugger.events
    assert event.action == action
    assert f"[{way}]" in typist.types("events")


def test_a_buffer_needs_no_code(typist: Typist) -> None:
    assert typist.types("!msrwrite 10 buffer 8 script { .n = poi($buffer); }").startswith(
        "event 0 runs a script at each wrmsr of 10 "
    )
    (event,) = typist.debugger.events
    assert event.buffer is not None and event.buffer.size == 8


@pytest.mark.parametrize(
    ("line", "missing", "message", "marked"),
    [
        ("!msrwrite 10", Capability.BREAK, "breaking is not possible", "!msrwrite"),
        ("!msrwrite 10 log stage post", Capability.POST, "stage post is not possible", "stage post"),
        ("!msrwrite 10 log sc on", Capability.SKIP, "short-circuiting is not possible", "sc on"),
    ],
)
def test_what_the_machine_cannot_do(typist: Typist, line: str, missing: Capability, message: str, marked: str) -> None:
    typist.link.capabilities = EVERYTHING & ~missing
    first, _, mark = typist.fails(line).split("\n")
    assert first.startswith(message)
    assert mark == " " * line.index(marked) + "^" + "~" * (len(marked) - 1)


def test_what_a_machine_never_lets_trap_is_told_once_and_refused_when_named(typist: Typist) -> None:
    typist.target.untrappable = (Untrappable(0x6E0, 0x6E0, "too quick"), Untrappable(0x800, 0x8FF, "too private"))
    shown = typist.types("!msrwrite log")
    assert "never trapped in this machine: 6e0 (too quick)\nnever trapped in this machine: 800 to 8ff (too private)" in shown
    assert "never trapped" not in typist.types("!msrread log")
    assert "MSR 830 cannot be trapped in FakeMachine 1.0: too private" in typist.fails("!msrwrite 830")
    made(typist, "!msrwrite 6e1")
