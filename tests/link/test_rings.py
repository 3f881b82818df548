"""Draining and answering, on shared memory that the tests write in the agent's place."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.link.layout import header
from vmexit.errors import LinkError
from vmexit.link import wire
from vmexit.link.rings import Records, Rings

CAPACITY = 8


def mark(sequence: int, vcpu: int) -> int:
    """The value of the record with this number, so that it is known again."""
    return (sequence * 0x9E3779B97F4A7C15 + vcpu) % 2**64


class Agent:
    """Writes the shared memory as the agent does."""

    def __init__(self, vcpus: int = 2, *, first: int = 0, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.header = header(vcpus, capacity)
        self.records_offset = self.header["records_offset"]
        self.memory = mmap.mmap(-1, self.header["size"])
        self.heads = [0] * vcpus
        self.sequence = first
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def open(self, **changed: int) -> Rings:
        """What the debugger makes of it."""
        self.memory[: wire.size("shared")] = wire.pack("shared", **{**self.header, **changed})
        return Rings(self.memory, self.wake_fd, self.sequence)

    def word(self, vcpu: int, field: str) -> int:
        """Reads a word of a ring."""
        at = wire.size("shared") + vcpu * wire.size("ring") + wire.offset("ring", field)
        return int.from_bytes(self.memory[at : at + 8], "little")

    def set_word(self, vcpu: int, field: str, value: int, index: int = 0) -> None:
        """Writes a word of a ring."""
        at = wire.size("shared") + vcpu * wire.size("ring") + wire.offset("ring", field) + 8 * index
        self.memory[at : at + 8] = value.to_bytes(8, "little")

    def has_room(self, vcpu: int) -> bool:
        """Whether a record can be put into this ring."""
        return self.heads[vcpu] - self.word(vcpu, "tail") < self.capacity

    def put(self, vcpu: int, sequence: int, action: wire.Action = wire.Action.RECORD) -> None:
        """Writes a record whose value tells where it comes from."""
        assert self.has_room(vcpu)
        at = self.records_offset + (vcpu * self.capacity + self.heads[vcpu] % self.capacity) * wire.size("record")
        self.memory[at : at + wire.size("record")] = wire.pack(
            "record", sequence=sequence, vcpu=vcpu, value=mark(sequence, vcpu), action=action
        )
        self.heads[vcpu] += 1
        self.set_word(vcpu, "head", self.heads[vcpu])

    def publish(self, *vcpus: int) -> None:
        """One record after the other, each in the ring of the vCPU that is named."""
        for vcpu in vcpus:
            self.put(vcpu, self.sequence)
            self.sequence += 1


StartAgent = Callable[..., tuple[Agent, Rings]]


@pytest.fixture
def start() -> Iterator[StartAgent]:
    """Gives an agent and the debugger's rings on its memory, which are closed after the test."""
    opened: list[Rings] = []

    def begin(*arguments: int, **options: int) -> tuple[Agent, Rings]:
        agent = Agent(*arguments, **options)
        rings = agent.open()
        opened.append(rings)
        return agent, rings

    yield begin
    for rings in opened:
        rings.close()


def sequences(records: Records) -> list[int]:
    """The records' sequence numbers; and each record is the one that was written under its number."""
    assert all(int(record["value"]) == mark(int(record["sequence"]), int(record["vcpu"])) for record in records)
    return [int(sequence) for sequence in records["sequence"]]


def test_nothing_to_drain(start: StartAgent) -> None:
    _, rings = start(3)
    for final in (False, True):
        records = rings.drain(final=final)
        assert len(records) == 0 and records.dtype == wire.RECORD
    assert rings.vcpus == 3 and rings.counters() == (0, 0)


def test_one_ring(start: StartAgent) -> None:
    agent, rings = start(2)
    agent.publish(1, 1, 1)
    assert sequences(rings.drain()) == [0, 1, 2]
    assert agent.word(1, "tail") == 3 and agent.word(0, "tail") == 0
    assert len(rings.drain()) == 0
    agent.publish(1)
    assert sequences(rings.drain()) == [3]


def test_a_question_alone(start: StartAgent) -> None:
    agent, rings = start(2)
    for number in range(3 * agent.capacity):
        assert rings.drain_question() is None
        agent.put(1, number, wire.Action.ASK)
        record = rings.drain_question()
        assert record is not None and sequences(np.frombuffer(record, wire.RECORD)) == [number]
        assert agent.word(1, "tail") == number + 1
    assert rings.drain_question() is None and len(rings.drain()) == 0


@pytest.mark.parametrize(
    "records",
    [
        [(0, 0, wire.Action.RECORD)],
        [(0, 0, wire.Action.ASK), (0, 1, wire.Action.RECORD)],
        [(0, 0, wire.Action.ASK), (1, 1, wire.Action.ASK)],
    ],
)
def test_what_is_no_question_alone(start: StartAgent, records: list[tuple[int, int, wire.Action]]) -> None:
    agent, rings = start(2)
    for vcpu, number, action in records:
        agent.put(vcpu, number, action)
    assert rings.drain_question() is None
    assert sequences(rings.drain()) == [number for _, number, _ in records]


def test_a_question_behind_a_gap(start: StartAgent) -> None:
    agent, rings = start(2)
    agent.put(0, 1, wire.Action.ASK)
    assert rings.drain_question() is None and len(rings.drain()) == 0
    agent.put(1, 0, wire.Action.ASK)
    assert rings.drain_question() is None and sequences(rings.drain()) == [0, 1]


def test_rings_are_merged_by_sequence(start: StartAgent) -> None:
    agent, rings = start(3)
    agent.publish(2, 0, 1, 1, 0, 2, 2)
    records = rings.drain()
    assert sequences(records) == [0, 1, 2, 3, 4, 5, 6]
    assert [int(vcpu) for vcpu in records["vcpu"]] == [2, 0, 1, 1, 0, 2, 2]


def test_around_the_end_of_a_ring(start: StartAgent) -> None:
    agent, rings = start(1)
    drained = []
    for count in (5, 8, 1, 7, 8, 8, 3):
        agent.publish(*[0] * count)
        drained += sequences(rings.drain())
    assert drained == list(range(40))


def test_drained_records_are_copies(start: StartAgent) -> None:
    agent, rings = start(1)
    agent.publish(*[0] * CAPACITY)
    records = rings.drain()
    agent.publish(*[0] * CAPACITY)
    assert sequences(records) == list(range(CAPACITY))


def test_a_gap_holds_back_what_follows(start: StartAgent) -> None:
    agent, rings = start(3)
    agent.put(0, 0)
    agent.put(1, 2)
    agent.put(2, 3)
    assert sequences(rings.drain()) == [0]
    assert agent.word(1, "tail") == 1  # its room is free all the same
    assert len(rings.drain()) == 0
    agent.put(1, 5)
    assert len(rings.drain()) == 0
    agent.put(0, 1)
    assert sequences(rings.drain()) == [1, 2, 3]
    agent.put(0, 4)
    assert sequences(rings.drain()) == [4, 5]


def test_a_gap_in_one_ring_alone(start: StartAgent) -> None:
    """Another vCPU has taken the number and not written its record yet."""
    agent, rings = start(2)
    agent.put(0, 1)
    agent.put(0, 2)
    assert len(rings.drain()) == 0
    agent.put(1, 0)
    assert sequences(rings.drain()) == [0, 1, 2]


def test_the_last_drain_waits_for_nothing(start: StartAgent) -> None:
    agent, rings = start(2)
    agent.put(0, 0)
    agent.put(1, 2)
    agent.put(0, 5)
    assert sequences(rings.drain()) == [0]
    assert sequences(rings.drain(final=True)) == [2, 5]
    assert len(rings.drain(final=True)) == 0


def test_what_an_earlier_debugger_left_is_passed_over(start: StartAgent) -> None:
    agent, rings = start(2, first=100)
    agent.put(0, 98)
    agent.put(1, 99)
    agent.put(1, 100)
    assert sequences(rings.drain()) == [100]
    agent.put(0, 97)
    assert len(rings.drain()) == 0
    agent.put(0, 101)
    assert sequences(rings.drain()) == [101]


def test_large_sequence_numbers(start: StartAgent) -> None:
    first = 2**63 - 2
    agent, rings = start(2, first=first)
    agent.publish(0, 1, 0, 1)
    assert sequences(rings.drain()) == [first + i for i in range(4)]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), vcpus=st.integers(1, 4), steps=st.integers(1, 80))
def test_nothing_is_lost_or_doubled(seed: int, vcpus: int, steps: int) -> None:
    """vCPUs take their numbers at one time, write at another, and the debugger drains whenever it likes."""
    rng = random.Random(seed)
    agent = Agent(vcpus, first=rng.choice([0, 1000]))
    rings = agent.open()
    first = agent.sequence
    taken: list[int | None] = [None] * vcpus
    drained: list[int] = []
    try:
        for _ in range(steps):
            vcpu = rng.randrange(vcpus)
            number = taken[vcpu]
            if rng.random() < 0.2:
                drained += sequences(rings.drain())
            elif number is not None:
                agent.put(vcpu, number)
                taken[vcpu] = None
            elif agent.has_room(vcpu):
                taken[vcpu] = agent.sequence
                agent.sequence += 1
        missing = {number for number in taken if number is not None}
        drained += sequences(rings.drain())
        assert drained == list(range(first, min(missing, default=agent.sequence)))
        drained += sequences(rings.drain(final=True))
        assert drained == [number for number in range(first, agent.sequence) if number not in missing]
    finally:
        rings.close()


# ---- waking ----


def eventfd() -> int:
    """As the agent makes them."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def test_a_vcpu_that_waits_for_room_is_woken(start: StartAgent) -> None:
    agent, rings = start(2)
    fds = [eventfd(), eventfd()]
    for vcpu, fd in enumerate(fds):
        rings.vcpu_up(vcpu, fd)
    agent.publish(0, 1)
    agent.set_word(1, "waiting", 1)
    rings.drain()
    assert os.eventfd_read(fds[1]) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fds[0])


def test_a_vcpu_that_is_not_up_cannot_be_woken(start: StartAgent) -> None:
    agent, rings = start(1)
    agent.publish(0)
    agent.set_word(0, "waiting", 1)
    assert sequences(rings.drain()) == [0]


def test_a_vcpu_comes_up_twice(start: StartAgent) -> None:
    """It may be told once with the greeting and once by itself; the descriptor of before is closed."""
    _, rings = start(1)
    first, second = eventfd(), eventfd()
    rings.vcpu_up(0, first)
    rings.vcpu_up(0, second)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(first)
    os.fstat(second)
    assert rings.vcpus_up == 1


def test_sleeping(start: StartAgent) -> None:
    agent, rings = start(2)
    at = wire.offset("shared", "sleeping")
    assert rings.before_sleep()
    assert agent.memory[at] == 1
    os.eventfd_write(agent.wake_fd, 3)
    rings.after_sleep()
    assert agent.memory[at] == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(agent.wake_fd)
    rings.after_sleep()


def test_no_sleep_while_there_is_something_to_see(start: StartAgent) -> None:
    agent, rings = start(2)
    at = wire.offset("shared", "sleeping")
    agent.publish(*[1] * (CAPACITY // 2 - 1))
    assert rings.before_sleep()
    agent.publish(1)
    assert not rings.before_sleep()  # half full
    assert agent.memory[at] == 0
    rings.drain()
    agent.publish(0)
    assert rings.before_sleep()
    agent.set_word(0, "urgent", agent.heads[0])
    assert not rings.before_sleep()
    rings.drain()
    assert rings.before_sleep()


# ---- questions and counters ----


def test_questions_and_answers(start: StartAgent) -> None:
    agent, rings = start(2)
    others, fd = eventfd(), eventfd()
    rings.vcpu_up(0, others)
    rings.vcpu_up(1, fd)
    asked = [2**64 - 1 - number for number in range(wire.ASKED_REGISTERS)]
    question = wire.size("shared") + wire.size("ring") + wire.offset("ring", "question")

    def stored() -> tuple[int, list[int], int, int, int]:
        it = wire.unpack("question", agent.memory[question : question + wire.size("question")])
        return it.answered, list(it.registers), it.changed, it.skip, it.halt

    agent.memory[question : question + wire.size("question")] = wire.pack("question", asked=8, registers=asked)
    assert rings.question_registers(1) == asked
    rings.answer(1, 7, asked, 0, False)
    assert stored() == (8, asked, 0, 0, 0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)  # it looks out for the answer and need not be woken
    agent.set_word(1, "waiting", 1)
    changed = [number * 3 for number in range(wire.ASKED_REGISTERS)]
    rings.answer(1, 9, changed, 0x3FFFF, True, halt=True)
    assert stored() == (10, changed, 0x3FFFF, 1, 1)
    rings.answer(1, 11, changed, 1 << 17, False, halt=True)
    assert stored() == (12, changed, 1 << 17, 0, 1)
    rings.answer(1, 12, [], 0, True)
    assert stored() == (13, changed, 0, 1, 0)
    assert os.eventfd_read(fd) == 3
    with pytest.raises(BlockingIOError):
        os.eventfd_read(others)


def test_counters_and_hits_are_summed(start: StartAgent) -> None:
    agent, rings = start(3)
    for vcpu in range(3):
        agent.set_word(vcpu, "dropped", 10 + vcpu)
        agent.set_word(vcpu, "waits", 100 + vcpu)
        agent.set_word(vcpu, "hits", 1000 + vcpu, index=255)
    assert rings.counters() == (33, 303)
    assert (rings.hits(255), rings.hits(254)) == (3003, 0)
    rings.clear_hits(255)
    assert rings.hits(255) == 0


# ---- opening and closing ----


@pytest.mark.parametrize(
    "header",
    [
        {"magic": 0},
        {"version": wire.VERSION + 1},
        {"vcpus": 1000},
        {"vcpus": 0xFFFFFFFF},
        {"ring_records": 0x80000000},
        {"records_offset": 0},
        {"records_offset": 1 << 60},
        {"records_offset": 2**64 - 4096},
        {"size": 1 << 40},
        {"size": 0},
    ],
)
def test_memory_of_another_layout(header: dict[str, int]) -> None:
    agent = Agent(2)
    with pytest.raises(LinkError, match="shared memory is not what this version"):
        agent.open(**header)
    os.close(agent.wake_fd)


def test_closing_lets_go_of_everything() -> None:
    agent = Agent(2)
    rings = agent.open()
    fd = eventfd()
    rings.vcpu_up(1, fd)
    agent.publish(0, 1)
    agent.set_word(0, "dropped", 5)
    records = rings.drain()
    rings.close()
    for closed in (fd, agent.wake_fd):
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(closed)
    assert agent.memory.closed
    assert sequences(records) == [0, 1]
    assert rings.counters() == (5, 0)


def test_records_survive_what_is_written_behind_them() -> None:
    """Nothing that was handed out looks into the shared memory."""
    agent = Agent(1)
    rings = agent.open()
    agent.publish(0, 0)
    records = rings.drain()
    agent.memory[agent.records_offset :] = b"\xff" * (len(agent.memory) - agent.records_offset)
    assert sequences(records) == [0, 1]
    rings.close()
