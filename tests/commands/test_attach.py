"""``.attach``, ``.detach`` and the ``pid`` option: which process events are about, and what is said while none is known."""

from __future__ import annotations

import struct

import pytest

from tests.commands.fakes import Typist, linux_guest
from vmexit.link import wire
from vmexit.link.wire import EventFlag

DD = 94


def processes(typist: Typist) -> list[int]:
    """What the agent was told that its events are about."""
    return [wire.unpack("event", data).process for data in typist.link.events]


def test_attached(typist: Typist) -> None:
    assert typist.types(".attach") == "no process is attached: events are about all of them"
    said = typist.types(".attach 5e")
    assert (
        said
        == "events that do not say 'pid' are about process 5e (0n94) from now on; they wait until the guest's processes are known"
    )
    assert typist.types(".attach") == "process 5e (0n94) is attached"
    assert "process  5e is attached; those that run here are not known" in typist.types(".status")
    assert typist.types("!msrwrite 10").endswith("(stage pre, all cores, process 5e (0n94))")
    typist.types("!msrwrite 10 pid all")
    typist.types("!msrwrite 10 pid 7 pid 0n8")
    assert typist.debugger.on_msr_write(0x10).process == DD
    assert typist.debugger.on_msr_write(0x10, pid="all").process is None
    assert typist.debugger.on_msr_write(0x10, pid=9).process == 9
    assert typist.types(".detach") == "process 5e is detached: events are about all processes"
    typist.types("!msrwrite 10")
    everyone = wire.ALL_PROCESSES
    assert processes(typist) == [DD, everyone, 8, DD, everyone, 9, everyone]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (".attach zz", "'zz' is no process number"),
        (".attach pid", "a process number is missing"),
        (".attach 1 2", "one process can be attached at a time"),
        (".attach 400001", "400001 is too big: the biggest process number is 400000"),
        (".detach", "no process is attached"),
        (".detach 1", "'.detach' takes no arguments"),
    ],
)
def test_what_is_wrong(typist: Typist, line: str, message: str) -> None:
    assert typist.fails(line).startswith(message)
    assert typist.debugger.attached is None


def test_a_process_that_is_not_there(typist: Typist) -> None:
    typist.boot(linux_guest())
    assert typist.fails(".attach 5f").startswith("there is no process 5f (0n95)")
    assert typist.types(".attach pid 0n94") == "events that do not say 'pid' are about process 5e (0n94, dd) from now on"
    assert "process  5e is attached\n" in typist.types(".status")
    typist.types("g")
    assert "5f" in typist.types(".attach 5f")  # it runs: nobody can look


def test_an_event_waits_for_the_guests_processes(typist: Typist) -> None:
    typist.put(cr0=0)
    typist.types("!msrwrite 10 pid 5e")
    waits = "[process 5e; waits: the guest's processes are not known yet]"
    assert typist.types("events").endswith(f"!msrwrite 10 pid 5e  // 10 TSC  {waits}")
    assert typist.link.recipes == []
    typist.boot(linux_guest())
    view = typist.session.guest
    assert view.known is not None
    assert typist.types("events").endswith("[process 5e]")
    (recipe,) = typist.link.recipes
    head = wire.unpack("recipe", recipe[: wire.size("recipe")])
    assert struct.unpack(f"<{head.base_count}Q", recipe[wire.size("recipe") :]) == tuple(sorted(linux_guest().areas))
    view.reset()
    assert typist.link.recipes == [recipe, b""]
    assert "waits" in typist.types("events")


def test_what_is_shown_tells_its_process(typist: Typist) -> None:
    typist.types("!msrwrite 10 log")
    typist.types("!msrwrite 10")
    typist.types("!msrwrite 10 script { x = $pid; }")
    typist.types("!msrwrite 10 script { x = $msr; }")
    typist.debugger.on_msr_write(0x10)
    typist.debugger.on_msr_write(0x10, with_process=True)
    flags = [wire.unpack("event", data).flags for data in typist.link.events]
    assert [bool(each & EventFlag.WITH_PROCESS) for each in flags] == [True, True, True, False, False, True]
