"""Events as the agent gets them."""

from __future__ import annotations

import pytest

from vmexit import program
from vmexit.errors import VmexitError
from vmexit.events import Event, MsrSet
from vmexit.link import wire
from vmexit.link.wire import Access, Action, Capability, EventFlag, Stage

EVERYTHING = Capability((1 << 8) - 1)


def event(**options: object) -> Event:
    made = Event(access=Access.WRMSR, msrs=MsrSet.of_ranges([(1, 5), (9, 9)]), **options)  # type: ignore[arg-type]
    made.number, made.slot = 7, 3
    return made


def test_lowered() -> None:
    lowered = wire.unpack("event", program.lower(event(stage=Stage.ALL, core=2, immediate=True, enabled=True)))
    assert (lowered.id, lowered.slot, lowered.access, lowered.stages, lowered.actions) == (8, 3, 1, 3, Action.BREAK)
    assert lowered.flags == EventFlag.ENABLED | EventFlag.IMMEDIATE
    assert (lowered.core, lowered.range_count) == (2, 2)
    assert [(r.first, r.last) for r in lowered.ranges[0:2]] == [(1, 5), (9, 9)]


def test_every_core_and_disabled() -> None:
    lowered = wire.unpack("event", program.lower(event(enabled=False, immediate=False, short_circuit=True)))
    assert (lowered.core, lowered.flags) == (wire.ALL_CORES, EventFlag.SHORT_CIRCUIT)


@pytest.mark.parametrize(
    ("options", "missing", "says"),
    [
        ({"stage": Stage.POST}, Capability.POST, "stage post"),
        ({"short_circuit": True}, Capability.SKIP, "short-circuiting"),
        ({}, Capability.BREAK, "breaking"),
        ({"action": Action.ASK, "callback": print}, Capability.READ, "a callback"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(options: dict[str, object], missing: Capability, says: str) -> None:
    program.check(event(**options), EVERYTHING, 2, "QEMU")
    with pytest.raises(VmexitError, match=f"{says} is not possible in QEMU 7"):
        program.check(event(**options), EVERYTHING & ~missing, 2, "QEMU 7")


@pytest.mark.parametrize(("core", "vcpus", "says"), [(1, 1, "only core 0"), (16, 16, "cores 0 to f")])
def test_a_core_that_is_not_there(core: int, vcpus: int, says: str) -> None:
    with pytest.raises(VmexitError, match=f"no core {core:x}; this machine has {says}"):
        program.check(event(core=core), EVERYTHING, vcpus, "QEMU")


def test_too_many_ranges() -> None:
    made = event()
    made.msrs = MsrSet.of(*range(0, 2 * wire.MAX_RANGES + 2, 2))
    with pytest.raises(VmexitError, match=f"{wire.MAX_RANGES} separate ranges"):
        program.check(made, EVERYTHING, 1, "QEMU")
