"""Compiled scripts in the agent under sanitizers: two vCPUs, tables that change, code that comes and goes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from vmexit.link.client import Link
from vmexit.link.wire import Action, EventFlag, RecordFlag
from vmexit.prints import printed
from vmexit.script.compile import CompiledScript, Compiler
from vmexit.script.runtime import sealed_file
from vmexit.usercode.buffer import Buffer

from .build import unusable
from .host import HLT, FakeHost, Variant, collect, event, eventually, wrmsr

AT = 0x4000


@pytest.fixture(params=["address", "thread"])
def host(request: pytest.FixtureRequest) -> Iterator[FakeHost]:
    """Two vCPUs under a sanitizer."""
    host = FakeHost(Variant(1, sanitizer="" if unusable(request.param) else request.param), vcpus=2)
    yield host
    host.close()


def add(link: Link, number: int, script: CompiledScript) -> None:
    file = sealed_file(script.code, script.constants)
    try:
        link.add_script(number, file, script.entry, len(script.code), len(script.constants))
    finally:
        os.close(file)


def test_two_vcpus_print_count_and_change_events(host: FakeHost) -> None:
    compiler = Compiler()
    script = compiler.compile(
        """
        interlocked_increment(&.n);
        spinlock_lock(&.lock); .m = .m + 1; spinlock_unlock(&.lock);
        printf("%llx %s\\n", $value, "text");
        if ($value & 1) { event_disable(1); } else { event_enable(1); }
        long there[4]; there[2] = @rbx; @rbx = there[2] + 1;
        """
    )
    link = host.connect()
    add(link, 1, script)
    link.set_events([event(1, actions=Action.SCRIPT, script=1), event(2)], 0)
    host.load(AT, wrmsr(0x10, 1) + wrmsr(0x11, 2) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu, times=50)
    found = collect(link, 200)
    texts = [each for each in found if each["action"] == Action.PRINT]
    while len(texts) < 200:
        texts += [each for each in collect(link, 1) if each["action"] == Action.PRINT]
    eventually(lambda: int(link.rings.globals[0]) == 200)
    names = {variable.name: variable.index for variable in script.globals}
    assert int(link.rings.globals[names["m"]]) == 200
    eventually(lambda: link.rings.changes == 200)  # the last thing that a run does; its other effects may be seen before


def test_code_that_comes_and_goes(host: FakeHost) -> None:
    compiler = Compiler()
    link = host.connect()
    host.load(AT, wrmsr(0x10, 1) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu, times=300)
    for number in range(1, 40):
        add(link, number, compiler.compile(f".n = .n + {number:x};"))
        link.set_events([event(number, actions=Action.SCRIPT, script=number)], 0)
    link.set_events([], 0)
    for vcpu in (0, 1):
        host.expect(f"halted {vcpu} {AT + len(wrmsr(0x10, 1)) + 1:x}")


def test_a_fault_is_left_with_its_place(host: FakeHost) -> None:
    script = Compiler().compile("x = 1;\nprint(x / ($value - $value));")
    link = host.connect()
    add(link, 5, script)
    link.set_events([event(1, actions=Action.SCRIPT, script=5)], 0)
    host.run(wrmsr(0x10, 1))
    (one,) = printed(collect(link, 1), link.rings, {5: script})
    assert one.fault is not None and (one.fault.message, one.fault.line, one.fault.column) == ("division by zero", 2, 9)


def test_the_debugger_goes_while_scripts_print(host: FakeHost) -> None:
    link = host.connect()
    add(link, 1, Compiler().compile('printf("%s\\n", "a text of some length that fills the ring after a while");'))
    link.set_events([event(1, actions=Action.SCRIPT, script=1)], 0)
    host.load(AT, wrmsr(0x10, 1) + HLT)
    for vcpu in (0, 1):
        host.start(AT, vcpu, times=20_000)
    eventually(lambda: link.rings.counters()[1] == 2)
    link.close()
    for vcpu in (0, 1):
        host.expect(f"halted {vcpu} {AT + len(wrmsr(0x10, 1)) + 1:x}")


def test_a_condition_lets_an_event_act_and_leaves_no_trace_of_itself(host: FakeHost) -> None:
    compiler = Compiler()
    link = host.connect()
    add(link, 1, compiler.compile("@rbx = 77; @rax = $value == 2;"))
    link.set_events([event(1, condition=1), event(2)], 0)
    host.run(wrmsr(0x10, 1) + wrmsr(0x10, 2) + wrmsr(0x10, 3))
    found = collect(link, 4)
    assert [(int(one["event"]), int(one["value"])) for one in found] == [(2, 1), (1, 2), (2, 2), (2, 3)]
    assert [link.rings.hits(slot) for slot in (0, 1)] == [3, 3]


@pytest.mark.parametrize("runs_script", [False, True])
@pytest.mark.parametrize("asks_again", [False, True])
def test_an_event_that_asks_first(host: FakeHost, runs_script: bool, asks_again: bool) -> None:
    compiler = Compiler()
    link = host.connect()
    buffer = Buffer(8)
    script = compiler.compile("eq($buffer, poi($buffer) + @rax); @rax = 30;")
    file = sealed_file(script.code, script.constants)
    link.add_script(1, file, script.entry, len(script.code), len(script.constants), (buffer.fileno(), buffer.size))
    os.close(file)
    flags = EventFlag.ASK_FIRST | EventFlag.SHORT_CIRCUIT  # which is for the answer to say
    link.set_events([event(1, actions=Action.ASK | Action.SCRIPT, flags=flags, script=1), event(2)], 0)
    asked: list[tuple[int, int]] = []

    def answer(link: Link, record: np.void) -> None:
        registers = link.rings.question_registers(0)
        asked.append((int(record["flags"]), registers[0]))
        again = bool(record["flags"] & RecordFlag.AGAIN)
        registers[0] += 4
        script, another = (False, False) if again else (runs_script, asks_again)
        link.rings.answer(0, int(record["sequence"]), registers, 1, False, script=script, again=another)

    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT, 0)
    found = collect(link, 2 + asks_again, answer=answer)
    after_script = 0x30 if runs_script else 5
    assert asked == [(0, 1), (int(RecordFlag.AGAIN), after_script)][: 1 + asks_again]
    assert int(found[-1]["value"]) == after_script + 4 * asks_again
    assert int.from_bytes(bytes(buffer), "little") == (5 if runs_script else 0)
    host.expect(f"halted 0 {AT + len(wrmsr(0x10, 1)) + 1:x}")
    assert host.register("rax") == after_script + 4 * asks_again
