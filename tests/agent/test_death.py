"""The debugger dies, or writes garbage where it may write: the guest runs on, and the next debugger begins anew."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Action, EventFlag, Stage, Status

from .build import unusable
from .conftest import StartHost
from .host import HLT, PLAIN, FakeHost, Variant, collect, column, event, eventually, loop, quiet, wrmsr

AT = 0x1000
END = f"halted 0 {AT + 18:x}"
MANY = 300
CAPACITY = 512
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[Variant(1), Variant(6, sanitizer="address"), Variant(1, sanitizer="thread")], ids=str)
def host(request: pytest.FixtureRequest, start_host: StartHost) -> FakeHost:
    """Two vCPUs, small rings, and a main loop that takes its time with halting."""
    return start_host(request.param, vcpus=2, max_vcpus=MANY, log=1, slow_stop=20)


def begins_anew(host: FakeHost, sequence: int | None = None) -> Link:
    """A new debugger finds no event and no record of before, and gets its own."""
    link = host.connect()
    assert link.rings.counters() == (0, 0) and link.rings.hits(0) == 0
    executed = len(host.executed())
    host.run(wrmsr(0x77, 1), address=0x5000)
    assert len(host.executed()) == executed + 1
    quiet(link, 0.01)
    link.set_events([event(1)])
    host.run(wrmsr(0x77, 2), address=0x5000)
    records = collect(link, 1)
    assert column(records, "value", "event") == [(2, 1)]
    if sequence is not None:
        assert column(records, "sequence") == [(sequence,)]
    return link


def at_question(host: FakeHost, link: Link, stages: Stage = Stage.PRE, flags: EventFlag = PLAIN) -> None:
    """vCPU 0 waits for an answer."""
    link.set_events([event(5, actions=Action.RECORD | Action.ASK, stages=stages, flags=flags), event(6, stages=Stage.POST)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    eventually(lambda: link.rings.hits(4) == 1)
    time.sleep(0.01)


# ---- closing ----


@pytest.mark.parametrize("stages", [Stage.PRE, Stage.POST])
def test_while_a_vcpu_waits_for_an_answer(host: FakeHost, stages: Stage) -> None:
    link = host.connect()
    at_question(host, link, stages)
    link.close()
    host.expect(END)
    assert host.msr(0x10) == 1
    begins_anew(host)


def test_while_a_vcpu_waits_for_room(host: FakeHost) -> None:
    link = host.connect()
    link.set_events([event(5)])
    host.load(AT, loop(4 * CAPACITY, wrmsr(0x10, 1)) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu)
    eventually(lambda: link.rings.counters()[1] == 2)
    link.close()
    for vcpu in (0, 1):
        host.expect(f"halted {vcpu} {AT + 5 + 17 + 4 + 1:x}")
    assert len(host.executed()) == 8 * CAPACITY
    begins_anew(host, 2 * CAPACITY)


def test_while_a_vcpu_waits_for_room_for_its_question(host: FakeHost) -> None:
    link = host.connect()
    link.set_overflow(True)
    link.set_events([event(5), event(6, (0x20, 0x20), actions=Action.ASK)])
    host.load(AT, loop(CAPACITY, wrmsr(0x10, 1)) + wrmsr(0x20, 1) + HLT)
    host.start(AT)
    eventually(lambda: link.rings.counters()[1] == 1)
    link.close()
    host.expect(f"halted 0 {AT + 5 + 17 + 4 + 17 + 1:x}")
    assert host.msr(0x20) == 1
    begins_anew(host, CAPACITY)


@pytest.mark.parametrize("stages", [Stage.PRE, Stage.POST])
@pytest.mark.parametrize("at_once", [True, False])
def test_while_the_machine_is_halted_at_a_break(host: FakeHost, stages: Stage, at_once: bool) -> None:
    """Also when it dies before QEMU's main loop has carried the halt out."""
    link = host.connect()
    link.set_events([event(5, actions=Action.BREAK, stages=stages)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    collect(link, 1)
    if not at_once:
        host.expect("STOP")
    link.close()
    host.expect(END)
    assert len(host.executed()) == 1
    begins_anew(host)
    assert host.said.count("STOP") == host.said.count("RESUME") <= 1


def test_while_the_machine_is_halted_by_a_person(host: FakeHost) -> None:
    link = host.connect()
    host.tell("stop")
    host.expect("STOP")
    link.hold(True)
    link.close()
    host.expect("RESUME")
    begins_anew(host)


def test_a_machine_that_others_have_halted_stays_halted(host: FakeHost) -> None:
    link = host.connect()
    link.hold(True)
    link.hold(False)
    host.tell("stop")
    host.expect("STOP")
    link.close()
    host.connect()
    time.sleep(0.05)
    assert "RESUME" not in host.said
    host.tell("cont")


def test_policy_and_events_end_with_the_debugger(host: FakeHost) -> None:
    first = host.connect()
    first.set_overflow(True)
    first.set_events([event(5, flags=EventFlag.SHORT_CIRCUIT)])
    first.close()
    link = begins_anew(host)
    host.load(AT, loop(2 * CAPACITY, wrmsr(0x10, 1)) + HLT)
    host.start(AT)
    eventually(lambda: link.rings.counters()[1] == 1)
    assert link.rings.counters()[0] == 0
    assert len(collect(link, 2 * CAPACITY)) == 2 * CAPACITY


def test_one_debugger_after_the_other_in_full_traffic(host: FakeHost) -> None:
    """No record, question or break of one reaches the next."""
    host.tell("handlers 0 0")
    host.load(AT, loop(200, wrmsr(0x10, 1)) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu, times=30)
    for number in range(1, 25):
        link = host.connect()
        action = [Action.RECORD, Action.ASK, Action.RECORD | Action.ASK][number % 3]
        link.set_events([event(number, slot=number, actions=action)])
        deadline = time.monotonic() + 5
        while link.rings.hits(number) == 0 and not all_done(host) and time.monotonic() < deadline:
            time.sleep(0.001)
        records = link.rings.drain()
        assert set(np.unique(records["event"])) <= {number}
        link.close()
    eventually(lambda: all_done(host))
    assert len(host.executed()) == 2 * 30 * 200
    begins_anew(host)


def all_done(host: FakeHost) -> bool:
    """Whether both vCPUs have come to the end of their programs."""
    return all(f"halted {vcpu} {AT + 27:x}" in host.said for vcpu in (0, 1))


# ---- killing ----

SCRIPT = """
import sys, time
from pathlib import Path
from tests.agent.host import collect, event
from vmexit.link.client import Link
from vmexit.link.wire import Action
link = Link(Path(sys.argv[1]))
link.set_events([event(5, actions=Action(int(sys.argv[2])))])
print("ready", flush=True)
if int(sys.argv[2]) == Action.BREAK:
    collect(link, 1)
    print("broke", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("action", [Action.RECORD, Action.ASK, Action.BREAK])
def test_killed(start_host: StartHost, action: Action) -> None:
    host = start_host(Variant(1), vcpus=2, max_vcpus=MANY, log=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), *sys.path) if path)}
    arguments = [sys.executable, "-c", SCRIPT, str(host.path), str(int(action))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as debugger:
        assert debugger.stdout is not None
        assert debugger.stdout.readline() == b"ready\n"
        host.load(AT, loop(3 * CAPACITY, wrmsr(0x10, 1)) + HLT)
        host.start(AT)
        host.start(AT, 1)
        if action == Action.BREAK:
            assert debugger.stdout.readline() == b"broke\n"
            host.expect("STOP")
        else:
            time.sleep(0.1)
        assert not all_done(host)
        debugger.kill()
    for vcpu in (0, 1):
        host.expect(f"halted {vcpu} {AT + 27:x}")
    assert len(host.executed()) == 6 * CAPACITY
    begins_anew(host)


# ---- garbage in the shared memory ----


class Memory:
    """The shared memory as a hostile debugger sees it."""

    def __init__(self, link: Link) -> None:
        self.words = link.rings._words
        self.bytes: mmap.mmap = link.rings._memory
        self._link = link

    def place(self, field: str, vcpu: int = 0) -> int:
        """Index of a field of a vCPU's ring."""
        return (wire.size("shared") + vcpu * wire.size("ring") + wire.offset("ring", field)) // 8

    def question(self, field: str) -> int:
        """Index of a field of the first vCPU's question."""
        return self.place("question") + wire.offset("question", field) // 8


@pytest.mark.parametrize("ahead", [1, 1 << 31, 1 << 63, (1 << 64) - CAPACITY])
@pytest.mark.parametrize("drop", [False, True])
def test_tail_ahead_of_head(host: FakeHost, ahead: int, drop: bool) -> None:
    link = host.connect()
    memory = Memory(link)
    link.set_events([event(5)])
    host.run(wrmsr(0x10, 0))
    collect(link, 1)
    link.set_overflow(drop)
    memory.words[memory.place("tail")] = (1 + ahead) % (1 << 64)
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)
    if drop:
        host.expect(END, 2)
        assert link.rings.counters() == (1, 0)
    else:
        eventually(lambda: link.rings.counters()[1] == 1)
        time.sleep(0.01)
        assert len(host.executed()) == 1
        link.close()
        host.expect(END, 2)
    link.close()
    assert host.msr(0x10) == 1
    begins_anew(host, 1)


@pytest.mark.parametrize(
    "garbage",
    [
        {"changed": 1 << 18, "skip": 0},
        {"changed": 1 << 31 | 1, "skip": 0},
        {"changed": 0xFFFFFFFF, "skip": 1},
        {"changed": 1, "skip": 7},
        {"changed": 0, "skip": 2},
        {"changed": 1, "script": 2},
        {"changed": 1, "again": 2},
    ],
)
def test_unsound_answer(host: FakeHost, garbage: dict[str, int]) -> None:
    """It changes nothing, and the vCPU goes on."""
    link = host.connect()
    memory = Memory(link)
    at_question(host, link)
    sequence = int(collect(link, 2, answer=lambda *_: None)["sequence"][1])
    for number in range(wire.ASKED_REGISTERS):
        memory.words[memory.question("registers") + number] = 0xDEAD
    where = (wire.size("shared") + wire.offset("ring", "question"), wire.size("question"))
    before = wire.unpack("question", memory.bytes[where[0] : where[0] + where[1]])
    for field, value in garbage.items():
        setattr(before, field, value)
    memory.bytes[where[0] : where[0] + where[1]] = bytes(wire.ffi.buffer(before))
    memory.words[memory.question("answered")] = sequence + 1
    os.eventfd_write(link.rings._vcpu_fds[0], 1)
    host.expect(END)
    assert host.executed() == [("wrmsr", 0, 0x10, 1, AT + 15)]
    assert column(collect(link, 1), "event", "stage") == [(6, Stage.POST)]


@pytest.mark.parametrize("wrong", [0, 1, 1 << 63, (1 << 64) - 1])
def test_answer_to_another_question(host: FakeHost, wrong: int) -> None:
    """Is none; the right one is still taken."""
    link = host.connect()
    memory = Memory(link)
    at_question(host, link)
    sequence = int(collect(link, 2, answer=lambda *_: None)["sequence"][1])
    memory.words[memory.question("answered")] = wrong
    os.eventfd_write(link.rings._vcpu_fds[0], 1)
    time.sleep(0.15)  # longer than the vCPU sleeps at a time
    assert host.executed() == []
    link.rings.answer(0, sequence, [], 0, True)
    host.expect(END)
    assert host.executed() == []


def test_forged_question_does_not_open_a_running_vcpu(host: FakeHost) -> None:
    link = host.connect()
    memory = Memory(link)
    memory.words[memory.question("asked")] = 1
    for ask in (lambda: link.registers(0), lambda: link.read_memory(0, AT, 1)):
        with pytest.raises(RequestError) as error:
            ask()
        assert error.value.status == Status.RUNNING


def test_garbage_everywhere(start_host: StartHost) -> None:
    """Random words all over the shared memory, in full traffic."""
    seed = 20240229
    sanitizer = "" if unusable("address") else "address"
    host = start_host(Variant(1, sanitizer=sanitizer), vcpus=2, max_vcpus=4, log=0)
    rng = random.Random(seed)
    host.load(AT, loop(100, wrmsr(0x10, 1)) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu, times=1 << 40)
    control = (wire.size("shared") + 4 * wire.size("ring")) // 8
    interesting: list[Callable[[], int]] = [
        lambda: 0,
        lambda: (1 << 64) - 1,
        lambda: rng.getrandbits(64),
        lambda: rng.randrange(1 << 16),
    ]
    for _ in range(12):
        link = host.connect()
        memory = Memory(link)
        actions = rng.choice([Action.RECORD, Action.ASK, Action.RECORD | Action.ASK])
        link.set_events([event(1, actions=actions, stages=rng.choice([Stage.PRE, Stage.ALL])), event(2)])
        link.set_overflow(rng.random() < 0.5)
        for _ in range(2000):
            memory.words[rng.randrange(control)] = rng.choice(interesting)()
        for fd in link.rings._vcpu_fds.values():
            os.eventfd_write(fd, 1)
        for vcpu in (0, 1):
            memory.words[memory.place("tail", vcpu)] = rng.choice(interesting)()
        assert link.capabilities
        link.set_events([])
        link.close()
    link = host.connect()
    link.set_events([event(1)])
    records = collect(link, 5000)
    assert np.array_equal(np.diff(records["sequence"]), np.ones(len(records) - 1))
    assert set(column(records, "event", "msr", "value")) == {(1, 0x10, 1)}


def test_garbage_does_not_outlive_its_debugger(host: FakeHost) -> None:
    link = host.connect()
    memory = Memory(link)
    end = (wire.size("shared") + 4 * wire.size("ring")) // 8
    for word in range(end):
        memory.words[word] = 0xDEAD_BEEF_DEAD_BEEF
    link.close()
    begins_anew(host, 0)
