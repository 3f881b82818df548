"""Callers in records: of guests that tell the truth about their stacks and of those that lie; and code maps that are none."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vmexit.callers import Callers, pack
from vmexit.guest.system import CodeMap, CodePiece
from vmexit.link import wire
from vmexit.link.client import Link
from vmexit.link.rings import Records
from vmexit.link.wire import Action, EventFlag, MessageType, RecordFlag, Stage, Status
from vmexit.processes import pack as pack_recipe

from .build import unusable
from .host import HLT, FakeHost, Variant, collect, event, exchange, greet, wrmsr
from .test_tasks import AREAS, AT, ELSEWHERE, KERNEL, PRESENT, RECIPE, ROOT, TABLE, Guest

RIP = AT + 15
"""Of the WRMSR."""
GUESSED = int(RecordFlag.CALLER_GUESSED)
# Pages of guest memory: tables, a stack and code that calls. They are mapped below the kernel too, where tables reach RIP.
TABLES, STACK, CODE = 0x4000, 0x5000, 0x6000
CALLER, OTHER = KERNEL + CODE + 0x105, KERNEL + CODE + 0x202
RSP = KERNEL + STACK + 0x100
CALL, REGS = 2, 3
SP, BP, UNDEFINED = 5, 4, 0
CODES = CodeMap(
    (CodePiece(AT, AT + 0xFFF, TABLES, TABLES + 0x100, 3), CodePiece(KERNEL + CODE, KERNEL + CODE + 0xFFF)), SP, BP, CALL
)


class Calling(Guest):
    """A guest with a stack and tables about it."""

    def __init__(self, host: FakeHost) -> None:
        super().__init__(host)
        self.callers = Callers()
        self.word(ROOT, ROOT + 0x1000 | PRESENT)
        self.host.tell(f"load {AREAS + CODE + 0x100:x} e811223344", f"load {AREAS + CODE + 0x200:x} ffd0")
        self.table(8)
        for vcpu in (0, 1):
            self.bases(vcpu, RECIPE.bases[2 * vcpu], 0)
            self.register("rsp", RSP, vcpu)
        self.on_stack(0x100, CALLER)

    def register(self, name: str, value: int, vcpu: int = 0) -> None:
        self.host.tell(f"set {vcpu} {name} {value:x}")

    def on_stack(self, offset: int, value: int) -> None:
        self.word(AREAS + STACK + offset, value)

    def table(self, offset: int, register: int = SP, kind: int = CALL) -> None:
        """What is true of the WRMSR; before and behind it nothing is known."""
        for index, place in enumerate((AT, RIP, RIP + 2)):
            at = TABLES + 4 * index
            self.host.tell(f"load {AREAS + at:x} {struct.pack('<i', place - at).hex()}")
        entries = struct.pack("<hhHhhHhhH", 0, 0, 0, offset, -16, register | SP << 4 | kind << 8, 0, 0, 0)
        self.host.tell(f"load {AREAS + TABLES + 0x100:x} {entries.hex()}")

    def know(self, code: CodeMap | None = CODES) -> None:
        """Tells the agent anew, which forgets what it has remembered."""
        self.link.set_code(b"")
        self.link.set_code(pack(code) if code else b"")

    def records(self, vcpu: int = 0) -> Records:
        """What one WRMSR leaves, callers learned and taken out."""
        found = self.trap(vcpu)
        self.callers.learn(found[found["action"] == Action.CALLER])
        left: Records = found[found["action"] != Action.CALLER]
        return left

    def caller(self, vcpu: int = 0) -> tuple[int, int]:
        """Of the first record of one WRMSR, and whether it is a guess."""
        record = self.records(vcpu)[:1]
        return int(self.callers.of_all(record)[0]), int(record["flags"][0]) & GUESSED


@pytest.fixture(params=["address", "thread"])
def guest(request: pytest.FixtureRequest) -> Iterator[Calling]:
    """Two vCPUs under a sanitizer, and an event that wants to know who it is; so far the agent knows no code."""
    host = FakeHost(Variant(1, sanitizer="" if unusable(request.param) else request.param), vcpus=2)
    guest = Calling(host)
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    guest.tell()
    yield guest
    host.close()


def test_it_is_known_as_soon_as_the_code_is(guest: Calling) -> None:
    assert guest.caller() == (0, 0)
    guest.know()
    assert [guest.caller(0), guest.caller(1)] == [(CALLER, 0), (CALLER, 0)]
    guest.know(None)
    assert guest.caller() == (0, 0)
    guest.know()
    guest.tell(None)
    assert guest.caller() == (0, 0)


@pytest.mark.parametrize(
    ("stage", "actions"), [(Stage.PRE, Action.RECORD), (Stage.POST, Action.RECORD), (Stage.ALL, Action.RECORD)]
)
def test_each_stage(guest: Calling, stage: Stage, actions: Action) -> None:
    guest.know()
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS, stages=stage, actions=actions)])
    for _ in range(2):
        records = guest.records()
        assert len(records) == stage.bit_count() and (guest.callers.of_all(records) == CALLER).all()


def test_each_is_told_once_by_each_vcpu(guest: Calling) -> None:
    guest.know()

    def told(vcpu: int = 0) -> list[tuple[int, int]]:
        found = guest.trap(vcpu)
        told = found[found["action"] == Action.CALLER]
        assert found[-1]["action"] == Action.RECORD
        return [(int(number), int(value)) for number, value in zip(told["caller"], told["value"], strict=True)]

    assert [told(), told(), told(1), told(1)] == [[(1, CALLER)], [], [(1, CALLER)], []]
    guest.on_stack(0x100, OTHER)
    assert [told(), told(), told(1)] == [[(2, OTHER)], [], [(2, OTHER)]]
    guest.on_stack(0x100, CALLER)
    assert told() == []
    guest.know()
    assert told() == []
    guest.host.hang_up()
    guest.link = guest.host.connect()
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    assert told() == []
    guest.tell()
    guest.know()
    assert told() == [(1, CALLER)]


@pytest.mark.parametrize("register", ["rsp", "rbp"])
@pytest.mark.parametrize("offset", [-0x40, 0, 8, 0x88, 0x200])
def test_where_the_table_says(guest: Calling, register: str, offset: int) -> None:
    guest.table(offset, SP if register == "rsp" else BP)
    guest.know()
    guest.register("rsp", RSP + 0x400)
    guest.register(register, RSP)
    guest.on_stack(0x100, 0)
    guest.on_stack(0x100 + offset - 8, OTHER)
    assert guest.caller() == guest.caller() == (OTHER, 0)
    # Another event with a condition on the same trap goes another way through the agent.
    guest.link.set_events([event(1, flags=EventFlag.WITH_PROCESS | EventFlag.IMMEDIATE)])
    assert guest.caller() == (OTHER, 0)


def test_nobody_who_does_not_ask_is_told(guest: Calling) -> None:
    guest.know()
    guest.link.set_events([event(1), event(2, flags=EventFlag.WITH_PROCESS), event(3)])
    records = guest.records()
    assert [int(caller) for caller in records["caller"]] == [0, 1, 0]
    guest.link.set_events([event(1), event(2, (0x11, 0x11), flags=EventFlag.WITH_PROCESS), event(3, process=0x99)])
    guest.on_stack(0x100, OTHER)
    found = guest.trap()
    assert [(int(each["action"]), int(each["caller"])) for each in found] == [(Action.RECORD, 0)]


@pytest.mark.parametrize(
    ("register", "kind"), [(UNDEFINED, CALL), (7, CALL), (SP, REGS), (SP, 0), (15, 7)], ids=["undefined", "r", "regs", "end", "x"]
)
def test_what_a_table_does_not_say_is_not_guessed(guest: Calling, register: int, kind: int) -> None:
    guest.table(8, register, kind)
    guest.know()
    assert guest.caller() == (0, 0)


def test_before_the_first_and_behind_the_last_place(guest: Calling) -> None:
    guest.host.tell(f"load {AREAS + TABLES:x} {struct.pack('<iii', *(RIP + 1 - TABLES - 4 * n for n in range(3))).hex()}")
    guest.know()
    assert guest.caller() == (0, 0)
    guest.host.tell(f"load {AREAS + TABLES:x} {struct.pack('<iii', *(AT - TABLES - 4 * n for n in range(3))).hex()}")
    guest.host.tell(f"load {AREAS + TABLES + 0x10C:x} {struct.pack('<hhH', 8, 0, SP | CALL << 8).hex()}")
    guest.know()
    assert guest.caller() == (CALLER, 0)


def test_guesses(guest: Calling) -> None:
    """Code without a table: what lies at RSP, if it is behind a call, in code that is known."""
    bare = CodeMap(tuple(CodePiece(piece.first, piece.last) for piece in CODES.pieces))
    guest.know(bare)
    calls = {
        0x105: "e811223344",
        0x202: "ffd0",
        0x303: "41ffd2",
        0x304: "ff542408",
        0x316: "ff9311223344",
        0x327: "ff142511223344",
    }
    for offset, code in calls.items():
        guest.host.tell(f"load {AREAS + CODE:x} {bytes(0x800).hex()}")
        guest.host.tell(f"load {AREAS + CODE + offset - len(code) // 2:x} {code}")
        guest.on_stack(0x100, KERNEL + CODE + offset)
        assert guest.caller() == guest.caller() == (KERNEL + CODE + offset, GUESSED), code
    guest.host.tell(f"load {AREAS + CODE:x} {bytes(0x800).hex()}", f"load {AREAS + CODE + 0x200:x} ffc0")
    for value in (OTHER, KERNEL + CODE + 0x105, AT + 4, 0, 5):
        guest.on_stack(0x100, value)
        assert guest.caller() == (0, 0)
    # A call, but not in code that is known.
    guest.host.tell(f"load {AREAS + STACK + 0x200:x} ffd0")
    guest.on_stack(0x100, KERNEL + STACK + 0x202)
    assert guest.caller() == (0, 0)
    # Where the trap is in no code that is known, either: a program's or the firmware's.
    guest.on_stack(0x100, KERNEL + CODE + 0x327)
    guest.know(replace(bare, pieces=bare.pieces[1:]))
    assert guest.caller() == (0, 0)


def test_frame_pointers(guest: Calling) -> None:
    bare = (CodePiece(AT, AT + 0xFFF), CodePiece(KERNEL + CODE, KERNEL + CODE + 0xFFF))
    guest.know(CodeMap(bare, keeps_frame_pointers=True))
    guest.register("rbp", KERNEL + STACK + 0x200)
    for caller, is_one in ((OTHER, True), (CALLER + 1, False), (OTHER, True), (KERNEL + 0x9105, False), (0, False)):
        guest.on_stack(0x208, caller)
        assert guest.caller() == (caller if is_one else 0, 0)
    guest.on_stack(0x208, OTHER)
    guest.on_stack(0x308, CALLER)
    guest.register("rbp", KERNEL + STACK + 0x300)
    assert guest.caller() == (CALLER, 0)
    guest.register("rbp", 0)
    assert guest.caller() == (0, 0)


def test_a_caller_in_code_that_is_not_known_is_a_guess(guest: Calling) -> None:
    guest.know(replace(CODES, pieces=CODES.pieces[:1]))
    assert guest.caller() == (CALLER, GUESSED)
    guest.on_stack(0x100, CALLER + 1)
    assert guest.caller() == (0, 0)
    guest.on_stack(0x100, OTHER)
    assert guest.caller() == (OTHER, GUESSED)
    guest.know()
    assert guest.caller() == (OTHER, 0)


@pytest.mark.parametrize(
    "rsp",
    [
        *(0, 7, (1 << 64) - 1, (1 << 64) - 8, 1 << 47, 0xFFFF_7FFF_FFFF_FFF8, 0x7FFF_FFFF_FFFF_FFFF, 1 << 63),
        *(KERNEL - 4, KERNEL + 0x8000, KERNEL + 0x7FFC, KERNEL + 0x20_0000, 0xFFFF_FFFF_8100_0000),
    ],
    ids=hex,
)
def test_stacks_that_are_nowhere(guest: Calling, rsp: int) -> None:
    guest.know()
    guest.register("rsp", rsp)
    assert guest.caller() == guest.caller() == (0, 0)
    guest.register("rsp", RSP)
    assert guest.caller() == (CALLER, 0)


def test_a_stack_on_two_pages(guest: Calling) -> None:
    guest.know()
    guest.register("rsp", KERNEL + STACK + 0xFFC)
    both = struct.pack("<Q", CALLER)
    guest.host.tell(f"load {AREAS + STACK + 0xFFC:x} {both[:4].hex()}", f"load {AREAS + STACK + 0x1000:x} {both[4:].hex()}")
    assert guest.caller() == (CALLER, 0)
    guest.word(TABLE + 6 * 8, 0)
    assert guest.caller() == (0, 0)


def test_memory_that_is_not_there_is_not_read(guest: Calling) -> None:
    """A device, and the way to the stack through one; then the stack moves, and then it is gone."""
    guest.know()
    assert guest.caller() == (CALLER, 0)
    for place in (ELSEWHERE | PRESENT, 1 << 45 | PRESENT, 0):
        guest.word(TABLE + 5 * 8, place)
        assert guest.caller() == (0, 0)
    guest.word(0x9_8000 + 0x100, OTHER)
    guest.word(TABLE + 5 * 8, 0x9_8000 | PRESENT)
    assert guest.caller() == (OTHER, 0)
    guest.word(TABLE + 5 * 8, AREAS + STACK | PRESENT)
    assert guest.caller() == (CALLER, 0)
    # The way to the kernel's code, behind whose call a guess would have to be.
    guest.know(replace(CODES, pieces=CODES.pieces[:1]))
    guest.word(TABLE + 6 * 8, 0)
    assert guest.caller() == (0, 0)


@pytest.mark.parametrize(
    "piece",
    [
        *(replace(CODES.pieces[0], places=places) for places in (0, 0x8000, 1 << 63, (1 << 64) - 4, 0x7FFE)),
        *(replace(CODES.pieces[0], entries=entries) for entries in (0x8000, 1 << 63, (1 << 64) - 6, 0x7FFE)),
        *(replace(CODES.pieces[0], count=count) for count in (1, 0xFFFF_FFFF, 0x8000_0000)),
    ],
    ids=str,
)
def test_tables_that_lie(guest: Calling, piece: CodePiece) -> None:
    guest.know(replace(CODES, pieces=(piece, CODES.pieces[1])))
    assert guest.caller() == guest.caller() == (0, 0)


def test_random_lies_harm_nobody(guest: Calling) -> None:
    dice = random.Random(6)
    places = [
        *(AREAS + TABLES + 8 * n for n in range(2)),
        *(AREAS + TABLES + 0x100 + 8 * n for n in range(3)),
        *(AREAS + STACK + 0x100, TABLE + 4 * 8, TABLE + 5 * 8, ROOT, ROOT + 0x2000),
    ]
    for turn in range(80):
        value = dice.choice([dice.getrandbits(64), dice.getrandbits(20), CALLER, OTHER, TABLE | PRESENT, AREAS + STACK | PRESENT])
        guest.word(dice.choice(places), value)
        if turn % 3 == 0:
            guest.know()
        guest.register("rsp", dice.choice([RSP, dice.getrandbits(64), KERNEL + dice.getrandbits(16)]))
        address, guessed = guest.caller()
        # In the kernel's code, or behind something that looks like a call.
        assert guessed or address == 0 or KERNEL + CODE <= address < KERNEL + CODE + 0x1000


def test_maps_that_come_and_go_while_vcpus_trap(guest: Calling) -> None:
    for vcpu in (0, 1):
        guest.host.start(AT, vcpu, times=400)
    found = 0
    while found < 800:
        for code in (CODES, replace(CODES, pieces=CODES.pieces[:1]), None):
            guest.link.set_code(pack(code) if code else b"")
            records = collect(guest.link, 0)
            guest.callers.learn(records[records["action"] == Action.CALLER])
            records = records[records["action"] == Action.RECORD]
            found += len(records)
            told = {
                (int(address), int(flags) & GUESSED)
                for address, flags in zip(guest.callers.of_all(records), records["flags"], strict=True)
            }
            assert told <= {(0, 0), (CALLER, 0), (CALLER, GUESSED)}


# ---- maps that are none ----

_HEAD = wire.size("frames")


def in_head(field: str, value: int) -> bytes:
    sound, at = pack(CODES), wire.offset("frames", field)
    size = 4 if field == "count" else 1
    return sound[:at] + value.to_bytes(size, "little") + sound[at + size :]


def with_pieces(*pieces: tuple[int, int]) -> bytes:
    """As ``pack`` would not make it."""
    head = wire.pack("frames", rsp=SP, rbp=BP, call=CALL, count=len(pieces))
    return head + b"".join(wire.pack("code", first=first, last=last) for first, last in pieces)


WRONG = [
    *[in_head("rsp", value) for value in (BP, 16, 255)],
    *[in_head("rbp", value) for value in (SP, 16, 255)],
    *[in_head("call", value) for value in (8, 255)],
    *[in_head("count", value) for value in (0, 1, 3, wire.constant("MAX_CODES") + 1, 0xFFFF_FFFF)],
    with_pieces((2, 1)),
    with_pieces((1, 2), (2, 3)),
    with_pieces((5, 6), (1, 2)),
    with_pieces(*((n, n) for n in range(wire.constant("MAX_CODES") + 1))),
    *(b"\0", bytes(_HEAD - 1), bytes(_HEAD), b"\xff" * _HEAD, pack(CODES) + bytes(8), pack(CODES)[:-1]),
]


def test_maps_that_are_refused() -> None:
    host = FakeHost(Variant(1, sanitizer="" if unusable("address") else "address"))
    raw = host.raw()
    greet(raw)
    for wrong in WRONG:
        assert exchange(raw, MessageType.SET_CODE, wrong) == (Status.REFUSED, b"")
    assert exchange(raw, MessageType.SET_CODE, pack(CODES)) == (Status.OK, b"")
    most = with_pieces(*((2 * n, 2 * n + 1) for n in range(wire.constant("MAX_CODES"))))
    assert exchange(raw, MessageType.SET_CODE, most) == (Status.OK, b"")
    assert exchange(raw, MessageType.SET_CODE) == (Status.OK, b"")
    host.close()


def test_what_is_packed_is_taken() -> None:
    """Pieces of all kinds, of which those that overlap are left out, and no more than the agent takes."""
    dice = random.Random(8)
    host = FakeHost(Variant(1, sanitizer="" if unusable("address") else "address"))
    link = host.connect()
    for count in (0, 1, 50, 3000):
        pieces = []
        for _ in range(count):
            first = dice.getrandbits(dice.choice([8, 20, 63]))
            pieces.append(CodePiece(first, first + dice.randrange(-5, 5000), dice.getrandbits(64), dice.getrandbits(64), 9))
        link.set_code(pack(CodeMap(tuple(pieces))))
    host.close()


def test_a_host_that_gives_no_memory() -> None:
    host = FakeHost(Variant(2, internals=False))
    link: Link = host.connect()
    link.set_events([event(1, flags=EventFlag.WITH_PROCESS)])
    link.set_recipe(pack_recipe(RECIPE))
    link.set_code(pack(CODES))
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    (record,) = collect(link, 1)
    assert int(record["caller"]) == 0
    host.close()


def test_numbers_that_nobody_has_told() -> None:
    callers = Callers()
    records: Records = np.zeros(3, wire.RECORD)
    records["caller"] = [0, 1, 65535]
    records["vcpu"] = [0, 1, 1]
    assert callers.of_all(records).tolist() == [0, 0, 0]
    records["value"] = [0, CALLER, OTHER]
    callers.learn(records)
    assert callers.of_all(records).tolist() == [0, CALLER, OTHER]
    callers.learn(records[:0])
    records["vcpu"] = 0
    assert callers.of_all(records).tolist() == [0, 0, 0]
