"""Commands on a machine that is only looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands.fakes import Typist
from vmexit.console.render import stop_text
from vmexit.debugger import Stop, StopReason
from vmexit.events.msrs import UNNAMED_READS, UNNAMED_WRITES
from vmexit.guest.disassembly import Syntax
from vmexit.link.wire import Action, Capability, Stage
from vmexit.targets.base import OnlyLooks
from vmexit.targets.host_threads import HostThreads

REASON = "it is behind glass"
NOISE = (0x6E0, 0x830)


@pytest.fixture
def visitor() -> Iterator[Typist]:
    """Somebody who types at a machine that cannot be touched."""
    typist = Typist()
    typist.target.only_looks = OnlyLooks(REASON, NOISE, HostThreads())
    typist.link.capabilities = Capability.RECORD | Capability.POST
    yield typist
    typist.close()


def test_the_stage_need_not_be_named(visitor: Typist) -> None:
    said = visitor.types("!msrwrite 1a0 core 1 pid 0n4711 log")
    assert said.endswith("(stage post, core 1, process 1267 (0n4711))")
    (event,) = visitor.debugger.events
    assert (event.stage, event.core, event.process, event.action) == (Stage.POST, 1, 4711, Action.RECORD)


@pytest.mark.parametrize(("command", "unnamed"), [("!msrwrite", UNNAMED_WRITES), ("!msrread", UNNAMED_READS)])
def test_noise_is_left_out_and_that_is_told(visitor: Typist, command: str, unnamed: tuple[int, ...]) -> None:
    said = visitor.types(f"{command} log")
    (event,) = visitor.debugger.events
    assert event.msrs.left_out == tuple(sorted((*unnamed, *NOISE)))
    assert f"left out, unless an event names them: {' '.join(f'{msr:x}' for msr in sorted((*unnamed, *NOISE)))}" in said


def test_noise_that_is_named_is_seen(visitor: Typist) -> None:
    visitor.types("!msrwrite 6e0 log")
    (event,) = visitor.debugger.events
    assert 0x6E0 in event.msrs


@pytest.mark.parametrize(
    ("line", "what", "marked"),
    [
        ("!msrwrite 10 log stage pre", "stage pre", "stage pre"),
        ("!msrwrite 10 stage all log", "stage pre", "stage all"),
        ("!msrwrite 10", "breaking", "!msrwrite"),
        ("!msrread 10 script { print(1); }", "a script", "script { print(1); }"),
        ("!msrread 10 log condition { 90 }", "'condition'", "condition { 90 }"),
        ("!msrread 10 code { 90 } log", "'code'", "code { 90 }"),
        ("!msrread 10 log buffer 10", "'buffer'", "buffer 10"),
        ("!msrwrite 10 log changed", "'changed'", "changed"),
    ],
)
def test_what_is_refused(visitor: Typist, line: str, what: str, marked: str) -> None:
    message, source, mark = visitor.fails(line).split("\n")
    assert message.startswith(f"{what} is not possible here: {REASON}")
    assert source[mark.index("^") : len(mark)] == marked
    assert not len(visitor.debugger.events)


@pytest.mark.parametrize("command", ["!msrwrite", "!msrread"])
def test_values_can_be_named(visitor: Typist, command: str) -> None:
    assert visitor.types(f"{command} 10 mask 1 value 1 log").endswith("(stage post, all cores, value 1 in 1)")


def test_how_to_do_without_a_break_is_told(visitor: Typist) -> None:
    assert "'log' prints each access" in visitor.fails("!msrwrite 10")


def test_a_process_of_the_host_cannot_be_named_for_a_guest(visitor: Typist) -> None:
    visitor.target.only_looks = OnlyLooks(REASON, NOISE)
    assert "'pid' is not possible here: it is behind glass" in visitor.fails("!msrwrite 10 log pid 4")


def test_letting_go(visitor: Typist) -> None:
    assert visitor.types("detach") == "nothing is watched any more"


def test_it_is_not_said_to_be_halted(visitor: Typist) -> None:
    said = stop_text(visitor.debugger, Stop(StopReason.PAUSED), Syntax.INTEL)
    assert said == "paused: nothing is watched until 'g'; what was watched runs on"
