"""Machine code of events that reaches the memory of a real guest: pages of every size, and the manual's examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guests.build import OK_STATUS, symbols
from tests.machines import Output, guest
from vmexit import Debugger
from vmexit.events.event import Event

STAR = 0xC0000081
HALF = 0xFFFF_8000_0000_0000
LARGE, SMALL, FIXED, NOTHING = (HALF + offset for offset in (0x4000_0000, 0x4020_0000, 0x4020_2000, 0x4020_3000))
# What pages.S prints where nobody has changed anything.
WORDS = {
    "tags": 0x47424448 * 4,
    "huge": 0x1111111111111111,
    "large": 0x2222222222222222,
    "small": 0x3333333333333333,
    "fixed": 0x8888888888888888,
    "mixed": 0x5555555544444444,
    "edge": 0x7777777766666666,
}
MASK = 0xFFFF_FFFF_FFFF_FFFF
# The manual's examples as it prints them (how-to-create-a-condition, how-to-create-an-action).
PROCESS = "65488B042588010000488B80B8000000488B805004000048B9737663686F73742E4839C874054831C0EB0748C7C001000000C3"
CHANGE = "488B5A404881FB484442477402EB0848C7424048444232C3"


@contextmanager
def pages() -> Iterator[tuple[Debugger, dict[str, int], Output, list[str]]]:
    """The guest, its labels, what it prints, and what is told of runs that were ended."""
    with guest("pages", cpu="max") as (debugger, image, output):
        told: list[str] = []
        debugger.print_listeners.append(lambda printed: told.append(printed.text.decode()))
        yield debugger, symbols(image), output, told


def words(output: Output) -> dict[str, int]:
    """What the guest has printed in the end."""
    return {name: int(value, 16) for name, value in re.findall(r"^(\w+)=([0-9a-f]{16})$", output.text, re.MULTILINE)}


def at(address: int, then: str) -> str:
    """Assembly that has an address in RCX and does something there."""
    return f"mov rcx, {address:#x}; {then}"


def finish(debugger: Debugger, event: Event, faults: int = 0) -> None:
    """Runs the guest to its end, which has to be a good one."""
    stop = debugger.run(timeout=60)
    assert stop.exit_status == OK_STATUS
    assert (debugger.hits(event), event.faults) == (4, faults)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("large", LARGE + 8),
        ("small", SMALL + 8),
        ("fixed", FIXED + 8),
        ("mixed", SMALL - 4),
        ("edge", SMALL + 0xFFC),
        ("huge", HALF),
    ],
)
def test_a_word_is_read_and_written_wherever_it_lies(name: str, address: int) -> None:
    with pages() as (debugger, labels, output, told):
        if name == "huge":
            address += labels["huge_word"]
        # It is read at the last write, when EAX is 1, into R8; and each of the four writes turns it over.
        code = at(address, "cmp dword ptr [rdx], 1; jne over; mov rax, [rcx]; mov [rdx+0x40], rax; over: not qword ptr [rcx]")
        event = debugger.on_msr_write(STAR, code=code)
        finish(debugger, event)
        assert told == []
        read = WORDS[name] ^ MASK
        assert words(output) == {**WORDS, "tags": (0x47424448 * 3 + read) & MASK}


def test_each_byte_of_a_word_across_an_edge_is_its_own() -> None:
    with pages() as (debugger, _, output, told):
        then = "cmp dword ptr [rdx], 1; jne over; xor byte ptr [rcx+3], 0xff; xor byte ptr [rcx+4], 0xff; over: nop"
        event = debugger.on_msr_write(STAR, code=at(SMALL - 4, then))
        finish(debugger, event)
        assert told == []
        assert words(output) == {**WORDS, "mixed": 0x555555AABB444444}


@pytest.mark.parametrize(
    ("address", "then", "why"),
    [
        (NOTHING, "mov rax, [rcx]", "it reads in page ffff800040203000, which is not mapped in the guest"),
        (NOTHING, "mov [rcx], rax", "it writes in page ffff800040203000, which is not mapped in the guest"),
        (NOTHING - 4, "mov rax, [rcx]", "it reads in page ffff800040203000, which is not mapped in the guest"),
        (NOTHING - 4, "not qword ptr [rcx]", "it reads in page ffff800040203000, which is not mapped in the guest"),
        (
            HALF + 0x3000_0000,
            "inc dword ptr [rcx]",
            "page ffff800030000000, which is not mapped in the guest",
        ),  # by tables, but no RAM
        (LARGE, "inc dword ptr [rcx]; mov rcx, 0x7fff00000000; mov al, [rcx]", "page 7fff00000000, which"),
        (1 << 63, "mov rax, [rcx]", "it reads in page 8000000000000000, which is not mapped in the guest"),
    ],
)
def test_what_is_not_mapped_ends_the_run_and_leaves_all_as_it_was(address: int, then: str, why: str) -> None:
    with pages() as (debugger, _, output, told):
        code = f"mov qword ptr [rdx+0x40], 0; mov rbx, {SMALL + 8:#x}; not qword ptr [rbx]; " + at(address, then)
        event = debugger.on_msr_write(STAR, code=code)
        finish(debugger, event, faults=4)
        assert len(told) == 4
        assert all(why in line for line in told), told
        assert words(output) == WORDS


def test_the_manuals_condition_on_the_name_of_the_process_on_a_running_guest() -> None:
    with pages() as (debugger, _, _output, told):
        event = debugger.on_msr_write(STAR, condition=bytes.fromhex(PROCESS))
        assert event.way == "emulated"
        finish(debugger, event)
        assert event.recording is not None
        assert [trap.value for trap in event.recording] == [3, 1]
        assert told == []


@pytest.mark.parametrize("condition", [PROCESS, None])
def test_the_manuals_code_that_changes_a_register_on_a_running_guest(condition: str | None) -> None:
    with pages() as (debugger, _, output, told):
        event = debugger.on_msr_write(
            STAR, condition=None if condition is None else bytes.fromhex(condition), code=bytes.fromhex(CHANGE)
        )
        finish(debugger, event)
        changed = 4 if condition is None else 2
        assert words(output)["tags"] == 0x32424448 * changed + 0x47424448 * (4 - changed)
        assert told == []


def test_segments_are_those_of_the_trap() -> None:
    with pages() as (debugger, labels, output, told):
        # The KPCR's pointer by GS and by its address are one.
        code = at(HALF + labels["pcr"], "mov rax, gs:[0x188]; sub rax, [rcx+0x188]; mov [rdx+0x40], rax")
        event = debugger.on_msr_write(STAR, code=code)
        finish(debugger, event)
        assert words(output)["tags"] == 0
        assert told == []
