"""What happens at a trap: records, order, skipping, questions, breaks and post stages, in several QEMUs and under sanitizers."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Access, Action, EventFlag, RecordFlag, Stage, Status

from .conftest import StartHost
from .host import (
    ALIAS,
    FAULTING_MSR,
    HLT,
    INC_EAX,
    INTERRUPTING_MSR,
    IRET,
    NOP,
    PLAIN,
    RDMSR,
    WRMSR,
    FakeHost,
    Variant,
    bits,
    collect,
    column,
    event,
    load_msr,
    loop,
    move,
    quiet,
    wrmsr,
)

RAX, RCX, RDX, RBX, RSP, RIP, RFLAGS = 0, 1, 2, 3, 4, 16, 17
ZERO_FLAG = 0x40
UNKNOWN_LAYOUT = 24
TOP = 1 << 20
"""The first vCPU's stack begins this far up, less 256; each further one 256 lower."""
AT = 0x1000
"""Where programs are put; their first WRMSR is 15 bytes further on."""

VARIANTS = [
    Variant(1),
    Variant(4, single=True),
    Variant(6),
    Variant(5, sanitizer="address"),
    Variant(1, general_registers=24, sanitizer="address"),
    Variant(1, sanitizer="thread"),
]


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each test of this file is done in each of these."""
    assert isinstance(request.param, Variant)
    return request.param


@pytest.fixture
def host(variant: Variant, start_host: StartHost) -> FakeHost:
    """Two vCPUs that say what they execute."""
    return start_host(variant, vcpus=2, log=1)


@pytest.fixture
def link(host: FakeHost) -> Link:
    """A debugger's link to that host."""
    return host.connect()


class Answers:
    """Answers each question the same way, and keeps the registers that it came with."""

    def __init__(self, *, skip: bool = False, halt: bool = False, **changes: int) -> None:
        self.skip, self.halt = skip, halt
        self.changes = {wire.constant(name.upper()): value for name, value in changes.items()}
        self.registers: list[list[int]] = []

    def __call__(self, link: Link, record: np.void) -> None:
        vcpu = int(record["vcpu"])
        registers = link.rings.question_registers(vcpu)
        self.registers.append(list(registers))
        for number, value in self.changes.items():
            registers[number] = value
        link.rings.answer(vcpu, int(record["sequence"]), registers, bits(list(self.changes)), self.skip, self.halt)


def resume(host: FakeHost, link: Link) -> None:
    """Lets a machine run on, the way a debugger does it."""
    link.hold(False)
    host.tell("cont")


# ---- records ----


def test_records_say_what_was_executed(host: FakeHost, link: Link) -> None:
    link.set_events([event(7, access=Access.WRMSR | Access.RDMSR)])
    before = time.monotonic_ns()
    host.run(wrmsr(0xC0000082, 0x1122_3344_5566_7788) + wrmsr(0x10, 5, b"\x48") + wrmsr(0xFFFFFFFF, 1, b"\x66" * 12) + RDMSR)
    records = collect(link, 4)
    after = time.monotonic_ns()
    assert column(records, "access", "msr", "value", "rip", "length") == [
        (1, 0xC0000082, 0x1122_3344_5566_7788, AT + 15, 2),
        (1, 0x10, 5, AT + 32, 3),
        (1, 0xFFFFFFFF, 1, AT + 50, 14),
        (2, 0xFFFFFFFF, 1, AT + 64, 2),
    ]
    assert (
        column(records, "event", "vcpu", "stage", "action", "flags", "rsp")
        == [(7, 0, Stage.PRE, Action.RECORD, 0, TOP - 256)] * 4
    )
    assert [sequence for (sequence,) in column(records, "sequence")] == [0, 1, 2, 3]
    times = [int(record["time_ns"]) for record in records]
    assert times == sorted(times) and before <= times[0] and times[-1] <= after
    assert [kind for kind, *_ in host.executed()] == ["wrmsr", "wrmsr", "wrmsr", "rdmsr"]


def test_no_event_no_record(host: FakeHost, link: Link) -> None:
    host.run(wrmsr(0x10, 1))
    link.set_events([event(1), event(2, enabled=False)])
    host.run(wrmsr(0x10, 2))
    link.set_events([])
    host.run(wrmsr(0x10, 3))
    assert column(collect(link, 1), "event", "value") == [(1, 2)]
    quiet(link)


def test_exactly_the_named_msr(host: FakeHost, link: Link) -> None:
    edges = [0, 0x1FFF, 0x2000, 0x40000000, 0xBFFFFFFF, 0xC0000000, 0xC0001FFF, 0xC0002000, 0xFFFFFFFF]
    for msr in edges:
        link.set_events([event(1, (msr, msr))])
        neighbours = [number for number in (msr - 1, msr + 1) if 0 <= number <= 0xFFFFFFFF]
        host.run(b"".join(wrmsr(number, number) for number in (*neighbours, msr)))
        assert column(link.rings.drain(), "msr") == [(msr,)]


def test_several_ranges_and_cores(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (0x10, 0x11), (0xC0000080, 0xC0000084)), event(2, core=1), event(3, core=7)])
    program = wrmsr(0x11, 1) + wrmsr(0x12, 2) + wrmsr(0xC0000084, 3)
    host.run(program, vcpu=0)
    host.run(program, vcpu=1)
    records = collect(link, 7)
    assert column(records, "event", "vcpu", "value") == [
        *[(1, 0, 1), (1, 0, 3)],
        *[(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 1, 3), (2, 1, 3)],
    ]
    assert column(records[2:], "rsp") == [(TOP - 512,)] * 5


@pytest.mark.parametrize("others", [(), (event(9, stages=Stage.POST),)], ids=["recording", "with a post stage"])
def test_overlapping_ranges_are_one_event(host: FakeHost, link: Link, others: tuple[bytes, ...]) -> None:
    """Also behind an event that does not match, and where its last range is the one that does."""
    link.set_events(
        [
            event(1, (0x50, 0x60), (0x70, 0x80)),
            event(2, (0x10, 0x20), (0x15, 0x30), (0x15, 0x15), (0x18, 0x18)),
            event(3, (0x90, 0x90), (0x18, 0x18)),
            *others,
        ]
    )
    host.run(wrmsr(0x15, 1) + wrmsr(0x18, 2) + wrmsr(0x30, 3) + wrmsr(0x31, 4))
    records = link.rings.drain()
    assert column(records[records["stage"] == Stage.PRE], "event", "value") == [(2, 1), (2, 2), (3, 2), (2, 3)]
    assert [link.rings.hits(slot) for slot in range(3)] == [0, 3, 1]


def test_hits_are_counted_in_the_slot(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, slot=255), event(2, (0x20, 0x20), slot=3)])
    host.run(loop(10, wrmsr(0x10, 1)) + wrmsr(0x20, 2), vcpu=0)
    host.run(wrmsr(0x20, 2), vcpu=1)
    assert (link.rings.hits(255), link.rings.hits(3), link.rings.hits(0)) == (12, 2, 0)
    assert len(collect(link, 14)) == 14


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("bases", [(0, ALIAS), (ALIAS, 0)])
def test_one_page_at_two_addresses(variant: Variant, start_host: StartHost, shared: int, bases: tuple[int, int]) -> None:
    """With CF_PCREL a block that was translated for one address executes at the other, and it is the other that must be told."""
    host = start_host(variant, log=1, pcrel=shared)
    link = host.connect()
    link.set_events([event(1, access=Access.WRMSR | Access.RDMSR, stages=Stage.ALL)])
    host.load(AT, wrmsr(0x10, 1) + RDMSR + NOP + HLT)
    for base in (*bases, *bases):
        end = f"halted 0 {AT + base + 21:x}"
        count = host.said.count(end) + 1
        host.start(AT + base)
        host.expect(end, count)
    records = collect(link, 16)
    expected = [
        (access, stage, AT + base + at) for base in (*bases, *bases) for access, at in ((1, 15), (2, 17)) for stage in (1, 2)
    ]
    assert column(records, "access", "stage", "rip") == expected
    assert [rip for *_, rip in host.executed()] == [rip for _, stage, rip in expected if stage == 1]


def test_what_is_no_access_is_not_trapped(host: FakeHost, link: Link) -> None:
    """WRMSR in ring 3 is #GP by privilege; with LOCK it is #UD (which this host does not play)."""
    link.set_events([event(1)])
    host.run(wrmsr(0x10, 1, b"\xf0"))
    host.tell("set 0 cs 33")
    host.load(AT, wrmsr(0x10, 2))
    host.start(AT)
    host.expect(f"fault 0 {AT + 15:x}")
    host.expect(f"halted 0 {AT + 15:x}")
    host.tell("set 0 cs 10")
    host.run(wrmsr(0x10, 3))
    assert column(collect(link, 1), "value") == [(3,)]


# ---- short-circuiting ----


def test_skip(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (0x10, 0x10), flags=EventFlag.SHORT_CIRCUIT), event(2, stages=Stage.POST)])
    host.run(wrmsr(0x10, 1) + wrmsr(0x11, 2))
    assert [(msr, value) for _, _, msr, value, _ in host.executed()] == [(0x11, 2)]
    assert host.msr(0x10) is None
    assert column(collect(link, 2), "event", "stage", "msr", "flags") == [
        (1, Stage.PRE, 0x10, RecordFlag.SKIPPED),
        (2, Stage.POST, 0x11, 0),
    ]


@pytest.mark.parametrize(("first", "second", "executed"), [(1, 0, 1), (0, 1, 0)])
def test_the_last_event_decides_about_skipping(host: FakeHost, link: Link, first: int, second: int, executed: int) -> None:
    flags = [EventFlag(0), EventFlag.SHORT_CIRCUIT]
    link.set_events([event(1, flags=flags[first]), event(2, flags=flags[second])])
    host.run(wrmsr(0x10, 1))
    assert len(host.executed()) == executed
    assert column(collect(link, 2), "event", "flags") == [(1, first), (2, second)]


# ---- questions ----


def test_question_carries_the_registers(variant: Variant, host: FakeHost, link: Link) -> None:
    link.set_events([event(1, actions=Action.ASK)])
    answers = Answers()
    host.load(AT, move("ebx", 1) + b"\xff\xcb" + NOP + wrmsr(0x10, 0x1_0000_0002) + HLT)
    host.start(AT)
    records = collect(link, 1, answer=answers)
    host.expect(f"halted 0 {AT + 8 + 17 + 1:x}")
    (registers,) = answers.registers
    assert registers[:5] == [2, 0x10, 1, 0, TOP - 256]
    assert registers[RIP] == AT + 8 + 15 == int(records["rip"][0])
    if variant.layout != UNKNOWN_LAYOUT:
        assert registers[RFLAGS] == ZERO_FLAG | 2
    assert host.msr(0x10) == 0x1_0000_0002
    assert len(host.executed()) == 1


def test_changed_registers_are_what_is_written(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (0x10, 0x10), actions=Action.ASK), event(2), event(3, stages=Stage.POST)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    records = collect(link, 3, answer=Answers(rcx=0x20, rax=0xAAAA_BBBB, rdx=0xCCCC_DDDD, rbx=0x1234))
    host.expect(f"halted 0 {AT + 18:x}")
    assert [(msr, value) for _, _, msr, value, _ in host.executed()] == [(0x20, 0xCCCC_DDDD_AAAA_BBBB)]
    assert host.register("rbx") == 0x1234
    assert column(records, "event", "msr", "value") == [
        *[(1, 0x10, 1), (2, 0x20, 0xCCCC_DDDD_AAAA_BBBB), (3, 0x20, 0xCCCC_DDDD_AAAA_BBBB)],
    ]


def test_only_what_is_marked_as_changed_is_taken(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, actions=Action.ASK), event(2)])

    def answer(link: Link, record: np.void) -> None:
        link.rings.answer(0, int(record["sequence"]), [0xDEAD] * 18, bits([RDX]), False)

    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    records = collect(link, 2, answer=answer)
    host.expect(f"halted 0 {AT + 18:x}")
    assert [(msr, value) for _, _, msr, value, _ in host.executed()] == [(0x10, 0xDEAD_0000_0001)]
    assert column(records, "event", "msr", "value", "rsp") == [(1, 0x10, 1, TOP - 256), (2, 0x10, 0xDEAD_0000_0001, TOP - 256)]


def test_answer_skips(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, actions=Action.ASK)])
    host.load(AT, wrmsr(0x10, 1) + INC_EAX + HLT)
    host.start(AT)
    collect(link, 1, answer=Answers(skip=True))
    host.expect(f"halted 0 {AT + 20:x}")
    assert host.executed() == []
    assert host.register("rax") == 2


def test_answer_overrules_the_event(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, actions=Action.ASK, flags=EventFlag.SHORT_CIRCUIT)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    collect(link, 1, answer=Answers(skip=False))
    host.expect(f"halted 0 {AT + 18:x}")
    assert host.msr(0x10) == 1


def test_changed_flags_and_changed_rip(variant: Variant, host: FakeHost, link: Link) -> None:
    if variant.layout == UNKNOWN_LAYOUT:
        pytest.skip("the translator's own flags are out of reach where the layout of the CPU's state is not known")
    link.set_events([event(1, (0x10, 0x11), actions=Action.ASK)])
    # jnz is taken because the answer clears the zero flag; the second WRMSR is jumped over because the answer moves RIP.
    program = move("ebx", 1) + b"\xff\xcb" + wrmsr(0x10, 1) + b"\x75\x01" + HLT + load_msr(0x11, 2) + WRMSR + wrmsr(0x12, 3) + HLT
    host.load(AT, program)
    host.start(AT)
    collect(link, 1, answer=Answers(rflags=2))
    collect(link, 1, answer=Answers(rip=AT + 44))
    host.expect(f"halted 0 {AT + len(program):x}")
    assert [msr for _, _, msr, _, _ in host.executed()] == [0x10, 0x12]


def test_answer_halts_the_machine(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (0x10, 0x10), actions=Action.ASK)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    records = collect(link, 2, answer=Answers(halt=True, rax=9))
    host.expect("STOP")
    assert column(records, "action", "value") == [(Action.ASK, 1), (Action.BREAK, 9)]
    assert host.executed() == []
    resume(host, link)
    host.expect(f"halted 0 {AT + 18:x}")
    assert host.msr(0x10) == 9 and len(host.executed()) == 1
    quiet(link)


# ---- breaks ----


def stopped_at_break(host: FakeHost, link: Link, *others: bytes, flags: EventFlag = PLAIN, stops: int = 1) -> None:
    """Lets vCPU 0 run into a break on MSR 10h; what follows writes 11h."""
    link.set_events([event(1, (0x10, 0x10), actions=Action.BREAK, flags=flags), *others])
    executed = len(host.executed())
    host.load(AT, wrmsr(0x10, 1) + wrmsr(0x11, 2) + HLT)
    host.start(AT)
    records = collect(link, 1)
    host.expect("STOP", stops)
    assert column(records, "action", "rip") == [(Action.BREAK, AT + 15)]
    assert len(host.executed()) == executed


END = f"halted 0 {AT + 35:x}"


def test_break_stops_before_the_instruction(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link)
    registers = link.registers(0)
    assert registers[: RSP + 1] == [1, 0x10, 0, 0, TOP - 256]
    assert registers[RIP] == AT + 15
    assert registers[wire.constant("CS")] == 0x10 and registers[wire.constant("EFER")] == 0x500
    assert link.registers(1)[RSP] == TOP - 512
    resume(host, link)
    host.expect(END)
    assert [(msr, value) for _, _, msr, value, _ in host.executed()] == [(0x10, 1), (0x11, 2)]
    quiet(link)


def test_decision_at_a_break(host: FakeHost, link: Link) -> None:
    choices = [(by_event, by_person) for by_event in (True, False) for by_person in (None, True, False)]
    for number, (by_event, by_person) in enumerate(choices, 1):
        before = len(host.executed())
        stopped_at_break(host, link, flags=EventFlag.SHORT_CIRCUIT if by_event else PLAIN, stops=number)
        if by_person is not None:
            link.decide(0, by_person)
        resume(host, link)
        host.expect(END, number)
        skipped = by_event if by_person is None else by_person
        assert [msr for _, _, msr, _, _ in host.executed()[before:]] == ([0x11] if skipped else [0x10, 0x11])


def test_later_events_act_after_a_break_and_keep_the_decision(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link, event(2, (0x10, 0x10)), event(3, (0x10, 0x11), stages=Stage.POST))
    quiet(link, 0.02)
    link.decide(0, True)
    resume(host, link)
    host.expect(END)
    assert column(collect(link, 2), "event", "msr", "flags") == [(2, 0x10, RecordFlag.SKIPPED), (3, 0x11, 0)]
    assert [msr for _, _, msr, _, _ in host.executed()] == [0x11]


def test_events_made_at_a_break_hold_from_the_next_instruction_on(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link)
    link.set_events([event(1, (0x10, 0x10), actions=Action.BREAK), event(2, (0x10, 0x11))])
    resume(host, link)
    host.expect(END)
    assert column(collect(link, 1), "event", "msr") == [(2, 0x11)]
    quiet(link, 0.02)


def test_registers_changed_at_a_break(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link)
    link.set_register(0, RCX, 0x30)
    link.set_register(0, RAX, 0x77)
    assert link.registers(0)[RCX] == 0x30
    resume(host, link)
    host.expect(END)
    assert [(msr, value) for _, _, msr, value, _ in host.executed()] == [(0x30, 0x77), (0x11, 2)]


def test_rip_and_rsp_changed_at_a_break(host: FakeHost, link: Link) -> None:
    """A moved stack is followed; where RIP was moved away the instruction is a new one when it comes again."""
    stopped_at_break(host, link)
    link.set_register(0, RSP, 0x8000)
    resume(host, link)
    host.expect(END)
    assert [msr for _, _, msr, _, _ in host.executed()] == [0x10, 0x11]
    host.start(AT)
    collect(link, 1)
    host.expect("STOP", 2)
    link.set_register(0, RIP, AT)
    with pytest.raises(RequestError, match="refused"):
        link.decide(0, True)
    resume(host, link)
    assert column(collect(link, 1), "rip") == [(AT + 15,)]
    host.expect("STOP", 3)
    link.set_register(0, RIP, AT + 17)
    resume(host, link)
    host.expect(END, 2)
    assert [msr for _, _, msr, _, _ in host.executed()] == [0x10, 0x11, 0x11]


def test_reset_at_a_break_forgets_it(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link)
    host.tell("reset")
    host.sync()
    with pytest.raises(RequestError) as refused:
        link.decide(0, True)
    assert refused.value.status == Status.REFUSED
    resume(host, link)
    collect(link, 1)
    host.expect("STOP", 2)
    resume(host, link)
    host.expect(END)


def test_break_on_two_cores_at_once(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (0x10, 0x10), actions=Action.BREAK)])
    host.load(AT, loop(20, wrmsr(0x10, 1)) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu)
    stops = breaks = 0
    while breaks < 40:
        breaks += len(collect(link, 1))
        stops += 1
        host.expect("STOP", stops)
        breaks += len(link.rings.drain())
        resume(host, link)
        host.expect("RESUME", stops)
    for vcpu in (0, 1):
        host.expect(f"halted {vcpu} {AT + 27:x}")
    assert breaks == 40 and len(host.executed()) == 40


# ---- the post stage ----


@pytest.mark.parametrize("last_of_block", [True, False])
def test_post_stage_of_a_read(host: FakeHost, link: Link, last_of_block: bool) -> None:
    """Where RDMSR is the last instruction of its page its block ends with it."""
    address = 0x3000 - 32 if last_of_block else AT
    link.set_events([event(1, access=Access.RDMSR, stages=Stage.ALL)])
    host.run(wrmsr(0x10, 0x5_0000_0006) + move("eax", 1) + move("edx", 2) + b"\x66\x66\x66" + RDMSR + INC_EAX, address=address)
    assert column(collect(link, 2), "stage", "value", "rip", "length", "flags") == [
        (Stage.PRE, 0x2_0000_0001, address + 27, 5, 0),
        (Stage.POST, 0x5_0000_0006, address + 27, 5, 0),
    ]
    assert host.register("rax") == 7


def test_post_stage_of_a_write(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, stages=Stage.POST, actions=Action.ASK)])
    answers = Answers()
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    records = collect(link, 1, answer=answers)
    host.expect(f"halted 0 {AT + 18:x}")
    assert column(records, "stage", "rip", "msr", "value", "flags") == [(Stage.POST, AT + 15, 0x10, 1, 0)]
    assert answers.registers[0][:3] == [1, 0x10, 0]
    assert answers.registers[0][RIP] == AT + 17
    assert answers.registers[0][RSP] == TOP - 256


@pytest.mark.parametrize("access", [Access.WRMSR, Access.RDMSR])
def test_registers_changed_in_the_post_stage(host: FakeHost, link: Link, access: Access) -> None:
    link.set_events([event(1, (0x10, 0x10), access=access, stages=Stage.POST, actions=Action.ASK)])
    host.load(AT, load_msr(0x10, 1) + (WRMSR if access == Access.WRMSR else RDMSR) + INC_EAX + move("ecx", 0x11) + WRMSR + HLT)
    host.start(AT)
    collect(link, 1, answer=Answers(rax=0x40, rbx=0x50))
    host.expect(f"halted 0 {AT + 27:x}")
    assert host.msr(0x11) == 0x41
    assert host.register("rbx") == 0x50


def test_a_changed_ecx_in_the_post_stage_is_not_what_was_executed(host: FakeHost, link: Link) -> None:
    link.set_events(
        [
            event(1, (0x10, 0x10), stages=Stage.POST, actions=Action.ASK),
            event(2, (0x10, 0x10), stages=Stage.POST),
            event(3, (0x99, 0x99), stages=Stage.POST),
        ]
    )
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    records = collect(link, 2, answer=Answers(rcx=0x99))
    host.expect(f"halted 0 {AT + 18:x}")
    assert column(records, "event", "msr") == [(1, 0x10), (2, 0x10)]
    assert host.register("rcx") == 0x99
    quiet(link, 0.01)


def test_no_post_stage_after_a_fault(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, stages=Stage.ALL)])
    host.load(0x2000, wrmsr(0x11, 2) + HLT)
    host.tell("handlers 0 2000")
    host.load(AT, wrmsr(FAULTING_MSR, 1) + HLT)
    host.start(AT)
    host.expect(f"halted 0 {0x2000 + 18:x}")
    assert column(collect(link, 3), "stage", "msr") == [(1, FAULTING_MSR), (1, 0x11), (2, 0x11)]
    quiet(link, 0.02)


def test_interrupt_before_the_post_stage(host: FakeHost, link: Link) -> None:
    link.set_events([event(1, (INTERRUPTING_MSR, INTERRUPTING_MSR), stages=Stage.ALL)])
    host.load(0x2000, INC_EAX + IRET)
    host.tell("handlers 2000 0")
    host.run(wrmsr(INTERRUPTING_MSR, 1) + INC_EAX)
    assert column(collect(link, 2), "stage", "rip", "rsp", "flags") == [
        (Stage.PRE, AT + 15, TOP - 256, 0),
        (Stage.POST, AT + 15, TOP - 264, RecordFlag.INTERRUPTED),
    ]
    assert host.register("rax") == 3


@pytest.mark.parametrize("access", [Access.WRMSR, Access.RDMSR])
def test_break_in_the_post_stage(host: FakeHost, link: Link, access: Access) -> None:
    link.set_events([event(1, (0x10, 0x10), access=access, stages=Stage.POST, actions=Action.BREAK)])
    host.load(AT, load_msr(0x10, 1) + (WRMSR if access == Access.WRMSR else RDMSR) + INC_EAX + HLT)
    host.start(AT)
    assert column(collect(link, 1), "stage", "action", "rip") == [(Stage.POST, Action.BREAK, AT + 15)]
    host.expect("STOP")
    assert len(host.executed()) == 1
    assert link.registers(0)[RIP] == AT + 17
    with pytest.raises(RequestError):
        link.decide(0, True)
    resume(host, link)
    host.expect(f"halted 0 {AT + 20:x}")
    assert host.register("rax") == (2 if access == Access.WRMSR else 1)
    assert len(host.executed()) == 1


# ---- registers and memory ----


def test_memory_of_a_stopped_machine(host: FakeHost, link: Link) -> None:
    stopped_at_break(host, link)
    program = wrmsr(0x10, 1)
    for physical, address in ((True, AT), (False, AT), (False, ALIAS + AT)):
        assert link.read_memory(0, address, len(program), physical=physical) == program
    link.write_memory(1, ALIAS + AT + 17 + 6, (0x55).to_bytes(4, "little"))
    link.write_memory(0, 0x9000, bytes(range(256)) * 40, physical=True)
    assert link.read_memory(1, 0x9000 + 5000, 4999) == (bytes(range(256)) * 40)[5000:9999]
    for physical in (False, True):
        with pytest.raises(RequestError) as unreadable:
            link.read_memory(0, TOP, 1, physical=physical)
        assert unreadable.value.status == Status.UNREADABLE
    resume(host, link)
    host.expect(END)
    assert host.msr(0x11) == 0x55


def test_a_running_machine_is_not_looked_into(host: FakeHost, link: Link) -> None:
    for ask in (
        lambda: link.registers(0),
        lambda: link.set_register(0, 0, 1),
        lambda: link.read_memory(0, AT, 1),
        lambda: link.write_memory(0, AT, b"x", physical=True),
    ):
        with pytest.raises(RequestError) as refused:
            ask()
        assert refused.value.status == Status.RUNNING
    with pytest.raises(RequestError) as refused:
        link.decide(0, True)
    assert refused.value.status == Status.REFUSED


@pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
def test_a_vcpu_that_asks_can_be_looked_into(host: FakeHost, link: Link, stage: Stage) -> None:
    link.set_events([event(1, stages=stage, actions=Action.ASK)])
    seen = []

    def answer(link: Link, record: np.void) -> None:
        seen.append((link.registers(0)[RIP], link.read_memory(0, AT + 15, 2)))
        with pytest.raises(RequestError) as refused:
            link.set_register(0, RAX, 1)
        assert refused.value.status == Status.RUNNING
        with pytest.raises(RequestError) as refused:
            link.registers(1)
        assert refused.value.status == Status.RUNNING
        link.rings.answer(0, int(record["sequence"]), [], 0, False)

    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    collect(link, 1, answer=answer)
    host.expect(f"halted 0 {AT + 18:x}")
    assert seen == [(AT + (15 if stage == Stage.PRE else 17), WRMSR)]
