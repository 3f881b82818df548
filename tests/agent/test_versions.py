"""What the agent makes of a QEMU of each plugin API version, with its internals exported or not, and of what is no QEMU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vmexit.link.client import Link, RequestError
from vmexit.link.wire import Access, Action, Capability, EventFlag, Stage, Status

from .conftest import StartHost
from .host import HLT, PATIENCE_S, RDMSR, FakeHost, Variant, bits, collect, column, event, eventually, loop, wrmsr

AT = 0x1000
RAX, RCX, RIP = 0, 1, 16
ALL = Capability(255)


@pytest.mark.parametrize("single", [False, True], ids=["threads", "single"])
@pytest.mark.parametrize("api", range(1, 7))
def test_everything_in_every_version(start_host: StartHost, api: int, single: bool) -> None:
    host = start_host(Variant(api, single=single), vcpus=2, log=1, pcrel=int(api > 1))
    link = host.connect()
    assert (link.plugin_api, link.door, link.capabilities) == (api, "tcg", ALL)
    assert f"installed {api}" in host.said
    link.set_events([
        event(1, (0x10, 0x1F), access=Access.WRMSR | Access.RDMSR, stages=Stage.ALL),
        event(2, (0x11, 0x11), flags=EventFlag.SHORT_CIRCUIT),
        event(3, (0x12, 0x12), stages=Stage.ALL, actions=Action.ASK),
        event(4, (0x13, 0x13), actions=Action.BREAK),
    ])  # fmt: skip
    host.load(AT, wrmsr(0x10, 1) + RDMSR + wrmsr(0x11, 2) + wrmsr(0x12, 3) + wrmsr(0x13, 4) + HLT)
    end = f"halted 1 {AT + 4 * 17 + 3:x}"

    def answer(link: Link, record: np.void) -> None:
        registers = link.rings.question_registers(1)
        assert registers[RIP] == AT + 36 + 15 + (0 if record["stage"] == Stage.PRE else 2)
        assert link.registers(1)[:16] == registers[:16]
        registers[RAX] += 1
        link.rings.answer(1, int(record["sequence"]), registers, bits([RAX]), False)

    # The other vCPU runs as well, so that with one thread for both the one that executes is not always the one that is meant.
    host.load(0x2000, loop(100, wrmsr(0x50, 1)) + HLT)
    host.start(0x2000, 0)
    host.start(AT, 1)
    records = collect(link, 12, answer=answer)
    host.expect("STOP")
    assert link.registers(1)[RIP] == AT + 53 + 15
    link.set_register(1, RCX, 0x14)
    link.hold(False)
    host.tell("cont")
    host.expect(end)
    pre, post = Stage.PRE, Stage.POST
    assert column([*records, *collect(link, 1)], "event", "access", "stage", "msr", "value") == [  # type: ignore[arg-type]
        *[(1, 1, pre, 0x10, 1), (1, 1, post, 0x10, 1), (1, 2, pre, 0x10, 1), (1, 2, post, 0x10, 1)],
        *[(1, 1, pre, 0x11, 2), (2, 1, pre, 0x11, 2)],
        *[(1, 1, pre, 0x12, 3), (3, 1, pre, 0x12, 3), (1, 1, post, 0x12, 4), (3, 1, post, 0x12, 4)],
        *[(1, 1, pre, 0x13, 4), (4, 1, pre, 0x13, 4), (1, 1, post, 0x14, 4)],
    ]


@pytest.mark.parametrize("pcrel", [0, 1])
@pytest.mark.parametrize("api", range(1, 7))
def test_one_thread_and_one_translation_for_two_vcpus(start_host: StartHost, api: int, pcrel: int) -> None:
    """Newer QEMUs then tell a callback the vCPU that the code was translated for: whichever executes it is to be found out."""
    host = start_host(Variant(api, single=True), vcpus=2, log=1, pcrel=pcrel)
    link = host.connect()
    link.set_events([
        event(1, (0x10, 0x1F), access=Access.WRMSR | Access.RDMSR, stages=Stage.ALL),
        event(2, (0x11, 0x11), flags=EventFlag.SHORT_CIRCUIT, core=1),
        event(3, (0x12, 0x12), actions=Action.ASK),
    ])  # fmt: skip
    host.load(AT, wrmsr(0x10, 1) + RDMSR + wrmsr(0x11, 2) + wrmsr(0x12, 3) + HLT)

    def answer(link: Link, record: np.void) -> None:
        vcpu = int(record["vcpu"])
        registers = link.rings.question_registers(vcpu)
        registers[RAX] += 1 + vcpu
        link.rings.answer(vcpu, int(record["sequence"]), registers, bits([RAX]), False)

    for vcpu, times in ((0, 1), (1, 1), (1, 2), (0, 2)):
        host.start(AT, vcpu)
        records = collect(link, 9, answer=answer)
        host.expect(f"halted {vcpu} {AT + 3 * 17 + 3:x}", times)
        assert set(column(records, "vcpu")) == {(vcpu,)}
        second = (2, 1, 0x11, 2) if vcpu else (1, 2, 0x11, 2)  # the one skips it, the other has a post stage
        assert column(records, "event", "stage", "msr", "value") == [
            *[(1, stage, 0x10, 1) for stage in (1, 2, 1, 2)],
            *[(1, 1, 0x11, 2), second],
            *[(1, 1, 0x12, 3), (3, 1, 0x12, 3), (1, 2, 0x12, 4 + vcpu)],
        ]


@pytest.mark.parametrize("api", range(2, 7))
def test_without_internals_it_can_record(start_host: StartHost, api: int) -> None:
    host = start_host(Variant(api, internals=False), log=1)
    link = host.connect()
    assert (link.plugin_api, link.capabilities) == (api, Capability.RECORD)
    link.set_events([event(1, access=Access.WRMSR | Access.RDMSR)])
    host.run(wrmsr(0xC0000082, 0xFFFF_8000_1234_5678) + RDMSR)
    host.tell("set 0 cs 33")
    host.load(AT, wrmsr(0x10, 2))
    host.start(AT)
    host.expect(f"fault 0 {AT + 15:x}")
    assert column(collect(link, 2), "access", "msr", "value", "rip", "rsp") == [
        (access, 0xC0000082, 0xFFFF_8000_1234_5678, rip, (1 << 20) - 256) for access, rip in ((1, AT + 15), (2, AT + 17))
    ]
    assert len(link.rings.drain()) == 0


@pytest.mark.parametrize(
    "refused",
    [
        event(2, actions=Action.ASK),
        event(2, actions=Action.BREAK),
        event(2, actions=Action.RECORD | Action.BREAK),
        event(2, stages=Stage.POST),
        event(2, stages=Stage.ALL),
        event(2, flags=EventFlag.SHORT_CIRCUIT),
        event(2, flags=EventFlag.SHORT_CIRCUIT, enabled=False),
    ],
)
def test_events_beyond_what_it_can_are_refused(start_host: StartHost, refused: bytes) -> None:
    host = start_host(Variant(5, internals=False), log=1)
    link = host.connect()
    link.set_events([event(1)])
    for events in ([refused], [event(1), refused]):
        with pytest.raises(RequestError, match="does not let the agent") as error:
            link.set_events(events)
        assert error.value.status == Status.UNAVAILABLE
    host.run(wrmsr(0x10, 1))
    assert column(collect(link, 1), "event") == [(1,)]
    assert len(host.executed()) == 1


def test_requests_beyond_what_it_can_are_refused(start_host: StartHost) -> None:
    host = start_host(Variant(5, internals=False))
    link = host.connect()
    requests: list[Callable[[], object]] = [
        lambda: link.registers(0),
        lambda: link.set_register(0, 0, 1),
        lambda: link.read_memory(0, AT, 1),
        lambda: link.write_memory(0, AT, b"x"),
    ]
    for request in requests:
        with pytest.raises(RequestError) as error:
            request()
        assert error.value.status == Status.UNAVAILABLE
    with pytest.raises(RequestError) as error:
        link.decide(0, True)
    assert error.value.status == Status.REFUSED
    link.hold(True)


def test_a_qemu_that_cannot_be_halted_has_all_but_breaks(start_host: StartHost) -> None:
    host = start_host(Variant(1, halt=False), log=1)
    link = host.connect()
    assert link.capabilities == ALL & ~Capability.BREAK
    with pytest.raises(RequestError) as error:
        link.set_events([event(1, actions=Action.BREAK)])
    assert error.value.status == Status.UNAVAILABLE
    link.set_events([event(1, actions=Action.ASK, stages=Stage.ALL)])
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT)

    def answer(link: Link, record: np.void) -> None:
        # It asks for a halt, which this QEMU cannot do: the machine goes on.
        link.rings.answer(0, int(record["sequence"]), [], 0, False, halt=True)

    assert column(collect(link, 2, answer=answer), "stage", "action") == [(1, Action.ASK), (2, Action.ASK)]
    host.expect(f"halted 0 {AT + 18:x}")
    assert len(host.executed()) == 1


@pytest.mark.parametrize(
    ("variant", "is_fast"), [(Variant(1), True), (Variant(6), True), (Variant(1, general_registers=24), False)], ids=str
)
def test_registers_are_read_the_fast_way_where_that_is_proven(start_host: StartHost, variant: Variant, is_fast: bool) -> None:
    host = start_host(variant)
    link = host.connect()
    link.set_events([event(1)])
    host.run(wrmsr(0x10, 1))
    before = host.register_reads()
    host.run(loop(1000, wrmsr(0x10, 0x1_0000_0001)), address=0x2000)
    reads = host.register_reads() - before
    assert reads < 20 if is_fast else reads >= 4000
    records = collect(link, 1001)
    assert set(column(records[1:], "msr", "value", "rip")) == {(0x10, 0x1_0000_0001, 0x2000 + 20)}


# ---- what is no host for it ----


def failed(host: FakeHost) -> str:
    """What it said before it gave up."""
    assert host.process.wait(PATIENCE_S) == 1
    said = host.errors()
    host.discard()
    assert said.endswith("the plugin could not be installed\n")
    return said.removesuffix("the plugin could not be installed\n")


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (
            Variant(1, internals=False),
            {},
            "this QEMU offers no way to read registers: neither its plugin interface nor exported internals",
        ),
        (Variant(1), {"target": "aarch64"}, "only x86 system emulation has MSRs to trap"),
        (Variant(6), {"user": 1}, "only x86 system emulation has MSRs to trap"),
    ],
    ids=["no registers", "no x86", "no system"],
)
def test_what_it_cannot_serve_it_refuses(variant: Variant, options: dict[str, Any], message: str) -> None:
    assert failed(FakeHost(variant, wait=False, **options)) == f"vmexit agent: {message}\n"


@pytest.mark.parametrize("link", ["", "x", "-1", "0", "2", "999999"])
def test_without_a_socket_it_says_how_it_is_started(link: str) -> None:
    message = "vmexit agent: no link=DESCRIPTOR of a listening socket given; it is started by 'vmexit run'\n"
    assert failed(FakeHost(wait=False, link=link)) == message


def test_the_32_bit_qemu_will_do(start_host: StartHost) -> None:
    host = start_host(target="i386")
    link = host.connect()
    link.set_events([event(1)])
    host.run(wrmsr(0x10, 1))
    assert len(collect(link, 1)) == 1


# ---- vCPUs that come and go ----


def test_a_vcpu_that_comes_later(start_host: StartHost) -> None:
    host = start_host(vcpus=1, max_vcpus=3)
    link = host.connect()
    assert link.rings.vcpus == 3
    link.set_events([event(1, actions=Action.ASK)])
    with pytest.raises(RequestError) as error:
        link.registers(2)
    assert error.value.status == Status.RUNNING
    host.tell("up 2")
    host.expect("up 2")
    host.load(AT, wrmsr(0x10, 1) + HLT)
    host.start(AT, 2)
    registers = []

    def answer(link: Link, record: np.void) -> None:
        link.handle_notices()
        registers.append(link.registers(2))
        link.rings.answer(2, int(record["sequence"]), [], 0, False)

    assert column(collect(link, 1, answer=answer), "vcpu", "rip") == [(2, AT + 15)]
    host.expect(f"halted 2 {AT + 18:x}")
    assert registers[0][RCX] == 0x10
    host.tell("down 2")
    host.sync()
    with pytest.raises(RequestError) as error:
        link.registers(2)
    assert error.value.status == Status.RUNNING


def test_many_vcpus(start_host: StartHost) -> None:
    """The rings become small; and a debugger is told of each vCPU when it comes, though so much does not fit into the socket."""
    host = start_host(vcpus=300)
    link = host.connect()
    time.sleep(0.02)
    link.set_events([event(1)])

    def all_are_told() -> bool:
        link.handle_notices()
        return link.rings.vcpus_up == 300

    eventually(all_are_told)
    host.load(AT, loop(5, wrmsr(0x10, 1)) + HLT)
    for vcpu in range(300):
        host.start(AT, vcpu)
    records = collect(link, 1500)
    assert np.array_equal(records["sequence"], np.arange(1500))
    assert np.array_equal(np.bincount(records["vcpu"]), [5] * 300)
