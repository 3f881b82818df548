"""The way to the current thread: in a guest that tells the truth and in one that lies; and recipes that are none."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vmexit.guest.linux.recipe import CPU, Check, Recipe, Step
from vmexit.link import wire
from vmexit.link.client import Link
from vmexit.link.rings import Records
from vmexit.link.wire import Action, EventFlag, MessageType, RecordFlag, Status
from vmexit.processes import ThreadNames, pack
from vmexit.script.compile import Compiler

from .build import unusable
from .host import HLT, FakeHost, Variant, collect, event, exchange, greet, wrmsr
from .test_scripts import add

KERNEL = 0xFFFF_8880_0000_0000
ROOT, TABLE, AREAS, TASKS, ELSEWHERE = 0x8_0000, 0x8_3000, 0x9_0000, 0x9_2000, 0xE_0000
SELF, CURRENT, TID, PID, NAME, LEADER, STACK = 0x10, 0x18, 0x20, 0x24, 0x30, 0x40, 0x48
PRESENT, LARGE = 1, 1 << 7
AT = 0x4000
STACKS = 0x100
KNOWN = int(RecordFlag.PROCESS_KNOWN)
UNKNOWN = (0, 0, 0)

STEPS = (
    Step("self", CPU, SELF, 8, Check.SELF),
    Step("task", CPU, CURRENT, 8, Check.KERNEL_POINTER),
    Step("tid", "task", TID, 4, Check.PID),
    Step("pid", "task", PID, 4, Check.PID),
    Step("comm", "task", NAME, 16),
    Step("leader", "task", LEADER, 8, Check.KERNEL_POINTER_OR_NULL),
    Step("stack", "task", STACK, 8),
)


def area(cpu: int) -> int:
    return KERNEL + 0x1000 * cpu


def task(number: int) -> int:
    """Two in a page."""
    return KERNEL + 0x2000 + 0x800 * number


RECIPE = Recipe((area(0), 0, area(1)), STEPS, ROOT, 4, STACKS)


class Guest:
    """A fake host whose memory holds page tables, two per-CPU areas and some threads."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.link: Link = host.connect()
        self.names = ThreadNames()
        tables = [ROOT, ROOT + 0x1000, ROOT + 0x2000, TABLE]
        for table, below, shift in zip(tables, tables[1:], (39, 30, 21), strict=False):
            self.word(table + (KERNEL >> shift & 511) * 8, below | PRESENT)
        for page in range(8):
            self.word(tables[3] + page * 8, AREAS + page * 0x1000 | PRESENT)
        for cpu in (0, 1):
            self.word(AREAS + 0x1000 * cpu + SELF, area(cpu))
        for number in range(4):
            self.make_task(number, 0x50 + number, 0x50 + number // 2, f"thread {number}")
        self.switch(0, 0)
        self.switch(1, 2)
        host.load(AT, wrmsr(0x10, 1) + HLT)

    def word(self, physical: int, value: int) -> None:
        self.host.tell(f"load {physical:x} {struct.pack('<Q', value).hex()}")

    def make_task(self, number: int, tid: int, pid: int, name: str) -> None:
        at = TASKS + 0x800 * number
        self.word(at + TID, pid << 32 | tid)
        self.host.tell(f"load {at + NAME:x} {name.encode().ljust(16, bytes(1)).hex()}")
        self.word(at + LEADER, task(number & ~1))
        self.word(at + STACK, 0x10_0000 - 0x100 * (number + 1))

    def switch(self, cpu: int, number: int) -> None:
        """A CPU executes another thread."""
        self.word(AREAS + 0x1000 * cpu + CURRENT, task(number))

    def bases(self, vcpu: int, gs: int, other: int) -> None:
        self.host.tell(f"set {vcpu} gs_base {gs:x}", f"set {vcpu} k_gs_base {other:x}")

    def tell(self, recipe: Recipe | None = RECIPE) -> None:
        self.link.set_recipe(pack(recipe) if recipe else b"")

    def trap(self, vcpu: int = 0) -> Records:
        """What one WRMSR leaves, names taken out."""
        count = len(self.host.said)
        self.host.start(AT, vcpu)
        self.host.expect(f"halted {vcpu} {AT + 18:x}", self.host.said[:count].count(f"halted {vcpu} {AT + 18:x}") + 1)
        found = self.link.rings.drain()
        for record in found[found["action"] == Action.NAME]:
            self.names.learn(np.array([record]), self.link.rings)
        left: Records = found[found["action"] != Action.NAME]
        return left

    def who(self, vcpu: int = 0) -> tuple[int, int, int]:
        """Process, thread, and whether they are known, by the first record of one WRMSR."""
        record = self.trap(vcpu)[0]
        return int(record["process"]), int(record["thread"]), int(record["flags"]) & KNOWN


@pytest.fixture(params=["address", "thread"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Two vCPUs under a sanitizer, each in the kernel, and an event that wants to know who it is."""
    host = FakeHost(Variant(1, sanitizer="" if unusable(request.param) else request.param), vcpus=2)
    guest = Guest(host)
    guest.bases(0, area(0), 0)
    guest.bases(1, area(1), 0)
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    yield guest
    host.close()


def test_it_is_known_as_soon_as_the_way_is(guest: Guest) -> None:
    assert guest.who() == UNKNOWN
    guest.tell()
    assert [guest.who(0), guest.who(1)] == [(0x50, 0x50, KNOWN), (0x51, 0x52, KNOWN)]
    assert guest.names.get(0x50, 0x50) == "thread 0" and guest.names.get(0x51, 0x52) == "thread 2"
    guest.switch(0, 1)
    assert guest.who() == (0x50, 0x51, KNOWN) and guest.names.get(0x50, 0x51) == "thread 1"
    guest.tell(None)
    assert guest.who() == UNKNOWN


def test_a_name_is_told_once_and_when_it_changes(guest: Guest) -> None:
    guest.tell()

    def told() -> int:
        start = guest.link.rings._next
        guest.trap()
        return guest.link.rings._next - start - 1

    assert [told(), told()] == [1, 0]
    guest.switch(0, 3)
    assert [told(), told()] == [1, 0]
    guest.switch(0, 0)
    assert told() == 0
    guest.make_task(0, 0x50, 0x50, "another name")
    assert [told(), told()] == [1, 0] and guest.names.get(0x50, 0x50) == "another name"
    guest.host.hang_up()
    guest.link = guest.host.connect()
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    assert guest.who() == UNKNOWN
    guest.tell()
    assert told() == 1


def test_only_one_process(guest: Guest) -> None:
    events = [event(1, process=0x50), event(2, process=0x51), event(3, process=0), event(4)]
    guest.link.set_events(events)

    def matched(vcpu: int) -> list[int]:
        return [int(record["event"]) for record in guest.trap(vcpu)]

    assert matched(0) == [4]
    guest.tell()
    assert [matched(0), matched(1)] == [[1, 4], [2, 4]]
    guest.switch(0, 2)
    assert matched(0) == [2, 4]
    guest.make_task(2, 0, 0, "idle")
    assert matched(0) == [3, 4]
    guest.link.set_events([event(1, (0x10, 0x10), (0x12, 0x12), process=0x50), event(2, (0x10, 0x10))])
    assert matched(0) == [2]
    guest.switch(0, 1)
    assert matched(0) == [1, 2]


def test_the_machine_is_left_alone_where_nobody_asks(guest: Guest) -> None:
    guest.tell()
    guest.link.set_events([event(1), event(2, (0x11, 0x11), process=0x50)])
    guest.trap()
    reads = guest.host.register_reads()
    guest.trap()
    assert guest.host.register_reads() == reads


def test_scripts(guest: Guest) -> None:
    script = Compiler().compile('.a = $pid; .b = $tid; .c = $proc; .d = $thread; .e = strcmp($pname, "thread 1"); .f = $peb;')
    blind = Compiler().compile(".g = 1;")
    assert script.asks_process and not blind.asks_process
    add(guest.link, 1, script)
    guest.link.set_events([event(1, actions=Action.SCRIPT, script=1, flags=EventFlag.WITH_PROCESS)])
    index = {variable.name: variable.index for variable in script.globals}

    def values() -> list[int]:
        guest.trap()
        return [int(guest.link.rings.globals[index[name]]) for name in "abcdf"]

    assert values() == [0, 0, 0, 0, 0]
    guest.tell()
    guest.switch(0, 1)
    assert values() == [0x50, 0x51, task(0), task(1), 0]
    assert int(guest.link.rings.globals[index["e"]]) == 0
    guest.tell(None)
    assert values() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("gs", "other", "who"),
    [
        (area(0), 0x7F00_0000_0000, (0x50, 0x50, KNOWN)),
        (0x7F00_0000_0000, area(0), (0x50, 0x50, KNOWN)),
        (area(0), area(0), (0x50, 0x50, KNOWN)),
        # The program's GS names the other CPU's area: the stack tells.
        (area(0), area(1), (0x50, 0x50, KNOWN)),
        (area(1), area(0), (0x50, 0x50, KNOWN)),
        (0, 0, UNKNOWN),
        (area(0) + 8, 0, UNKNOWN),
        (KERNEL + 0x2000, KERNEL + 0x2800, UNKNOWN),
    ],
)
def test_which_area_is_the_cpus_own(guest: Guest, gs: int, other: int, who: tuple[int, int, int]) -> None:
    guest.tell()
    guest.host.tell(f"set 0 rsp {0x10_0000 - 0x80:x}")
    guest.bases(0, gs, other)
    assert guest.who() == guest.who() == who


def test_an_area_stays_the_vcpus_own(guest: Guest) -> None:
    guest.tell()
    assert guest.who() == (0x50, 0x50, KNOWN)
    guest.bases(0, area(1), area(0))
    assert guest.who() == (0x50, 0x50, KNOWN)
    guest.bases(0, area(1), 0)
    assert guest.who() == UNKNOWN
    guest.host.tell("reset")
    assert guest.who() == (0x51, 0x52, KNOWN)


def test_without_a_list_of_areas_the_checks_tell(guest: Guest) -> None:
    guest.tell(replace(RECIPE, bases=()))
    guest.bases(0, KERNEL + 0x3000, area(0))
    assert guest.who() == (0x50, 0x50, KNOWN)
    guest.bases(0, KERNEL + 0x3000, 0x1000)
    assert guest.who() == UNKNOWN


def test_not_in_long_mode(guest: Guest) -> None:
    guest.tell()
    guest.host.tell("set 0 efer 0")
    assert guest.who() == UNKNOWN
    guest.host.tell("set 0 efer 500")
    assert guest.who() == (0x50, 0x50, KNOWN)


def test_memory_that_cannot_be_reached_directly(guest: Guest) -> None:
    """Page tables, and then a thread, where QEMU is asked for every read."""
    for level, (table, shift) in enumerate(zip((ELSEWHERE, ELSEWHERE + 0x1000, ELSEWHERE + 0x2000), (39, 30, 21), strict=True)):
        guest.word(table + (KERNEL >> shift & 511) * 8, ELSEWHERE + 0x1000 * (level + 1) | PRESENT)
    for page in range(8):
        guest.word(ELSEWHERE + 0x3000 + page * 8, AREAS + page * 0x1000 | PRESENT)
    guest.tell(replace(RECIPE, root=ELSEWHERE))
    assert guest.who() == guest.who() == (0x50, 0x50, KNOWN)
    guest.tell()
    guest.word(TABLE + 2 * 8, ELSEWHERE + 0x8000 | PRESENT)
    assert guest.who() == (0, 0, KNOWN)


def test_pages_that_move(guest: Guest) -> None:
    guest.tell()
    assert guest.who() == (0x50, 0x50, KNOWN)
    guest.word(0x9_8000 + TID, 7 << 32 | 8)
    guest.word(TABLE + 2 * 8, 0x9_8000 | PRESENT)
    assert guest.who() == (7, 8, KNOWN)
    guest.word(TABLE + 2 * 8, 0)
    assert guest.who() == UNKNOWN
    guest.word(TABLE + 2 * 8, TASKS | PRESENT)
    assert guest.who() == (0x50, 0x50, KNOWN)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *[(AREAS + CURRENT, value) for value in (0, 8, task(0) + 1, 0x7F00_0000_0000, KERNEL + 0x10_0000, 2**64 - 8, 2**64 - 1)],
        *[(TASKS + TID, value) for value in (0x50 << 32 | 0x40_0001, 0x40_0001 << 32 | 0x50, 2**64 - 1)],
        *[(AREAS + SELF, value) for value in (0, area(1), 2**64 - 1)],
        *[(TASKS + LEADER, value) for value in (5, 0x1000)],
        # Tables that lead to themselves, out of memory, to large pages that are not there.
        *[(ROOT + (KERNEL >> 39 & 511) * 8, value | PRESENT) for value in (ROOT, 1 << 40, 0xF_FFFF_FFFF_F000, LARGE)],
        (ROOT + 0x1000 + (KERNEL >> 30 & 511) * 8, 1 << 40 | LARGE | PRESENT),
        (ROOT + 0x2000 + (KERNEL >> 21 & 511) * 8, 1 << 40 | LARGE | PRESENT),
        (TABLE, 1 << 45 | PRESENT),
    ],
)
def test_lies(guest: Guest, where: int, value: int) -> None:
    """Both when the way is followed for the first time and when it was known."""
    guest.tell()
    assert guest.who() == (0x50, 0x50, KNOWN)
    guest.word(where, value)
    assert guest.who() == UNKNOWN
    guest.tell(None)
    guest.tell()
    assert guest.who() == UNKNOWN


def test_random_lies_harm_nobody(guest: Guest) -> None:
    dice = random.Random(5)
    places = [ROOT + (KERNEL >> 39 & 511) * 8, ROOT + 0x2000, TABLE, TABLE + 16, AREAS + CURRENT, TASKS + TID]
    guest.tell()
    for _ in range(60):
        value = dice.choice(
            [dice.getrandbits(64), dice.getrandbits(20), task(dice.randrange(4)), ROOT | PRESENT, TABLE | PRESENT]
        )
        guest.word(dice.choice(places), value)
        process, thread, _ = guest.who()
        assert process <= 4 << 20 and thread <= 4 << 20


def test_recipes_that_come_and_go_while_vcpus_trap(guest: Guest) -> None:
    for vcpu in (0, 1):
        guest.host.start(AT, vcpu, times=400)
    found = 0
    while found < 800:
        for recipe in (RECIPE, replace(RECIPE, steps=STEPS[:4], stack_bytes=0), None):
            guest.tell(recipe)
            records = collect(guest.link, 0)
            for record in records[records["action"] == Action.NAME]:
                guest.names.learn(np.array([record]), guest.link.rings)
            records = records[records["action"] == Action.RECORD]
            found += len(records)
            for record in records:
                who = int(record["process"]), int(record["thread"]), int(record["flags"]) & KNOWN
                assert who in (UNKNOWN, [(0x50, 0x50, KNOWN), (0x51, 0x52, KNOWN)][int(record["vcpu"])])


# ---- recipes that are none ----

_HEAD = wire.size("recipe")
_STEP = wire.offset("recipe", "steps")


def changed(offset: int, data: bytes) -> bytes:
    sound = pack(RECIPE)
    return sound[:offset] + data + sound[offset + len(data) :]


def in_step(number: int, field: str, value: int) -> bytes:
    return changed(_STEP + number * wire.size("step") + wire.offset("step", field), bytes([value]))


def in_head(field: str, value: int) -> bytes:
    return changed(wire.offset("recipe", field), struct.pack("<I", value))


WRONG = [
    *[in_head("levels", value) for value in (0, 3, 6, 100, 0xFFFF_FFFF)],
    *[in_head("step_count", value) for value in (0, 3, 8, 17, 0xFFFF_FFFF)],
    *[in_head("base_count", value) for value in (0, 1, 3, 4097, 0xFFFF_FFFF)],
    in_head("stack_bytes", 0),
    *[in_step(1, "result", value) for value in (0, 4, 16, 255)],
    *[in_step(2, "source", value) for value in (2, 3, 16, 255)],
    in_step(5, "source", wire.constant("FOUND_NAME")),
    *[in_step(2, "size", value) for value in (0, 3, 5, 7, 9, 16, 255)],
    *[in_step(4, "size", value) for value in (0, 17, 255)],
    in_step(4, "check", 1),
    *[in_step(2, "check", value) for value in (5, 255)],
    changed(_HEAD, struct.pack("<Q", 0)),
    changed(_HEAD, struct.pack("<Q", area(1))),
    changed(_HEAD, struct.pack("<Q", area(1) + 8)),
    b"\0",
    bytes(_HEAD - 1),
    bytes(_HEAD),
    b"\xff" * _HEAD,
    pack(RECIPE) + bytes(8),
    pack(RECIPE)[:-1],
]


def test_recipes_that_are_refused() -> None:
    host = FakeHost(Variant(1, sanitizer="" if unusable("address") else "address"))
    raw = host.raw()
    greet(raw)
    sound = pack(RECIPE)
    for wrong in WRONG:
        assert exchange(raw, MessageType.SET_RECIPE, wrong) == (Status.REFUSED, b"")
    assert exchange(raw, MessageType.SET_RECIPE, sound) == (Status.OK, b"")
    dice = random.Random(7)
    for _ in range(300):
        at = dice.randrange(_HEAD)
        status, _ = exchange(raw, MessageType.SET_RECIPE, sound[:at] + dice.randbytes(1) + sound[at + 1 :])
        assert status in (Status.OK, Status.REFUSED)
    most = replace(RECIPE, bases=tuple(KERNEL + 8 * n for n in range(4096)))
    assert exchange(raw, MessageType.SET_RECIPE, pack(most)) == (Status.OK, b"")
    assert exchange(raw, MessageType.SET_RECIPE) == (Status.OK, b"")
    host.close()


def test_a_host_that_gives_no_memory() -> None:
    host = FakeHost(Variant(2, internals=False))
    link = host.connect()
    link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    link.set_recipe(pack(RECIPE))
    host.run(wrmsr(0x10, 1))
    (record,) = collect(link, 1)
    assert int(record["process"]) == int(record["thread"]) == int(record["flags"]) & KNOWN == 0
    host.close()
