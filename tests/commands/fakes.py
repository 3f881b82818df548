"""A machine without QEMU, and a session on it whose output is kept."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import cast

import numpy as np

from tests.guest.linux.fake_linux import FakeLinux
from tests.guest.windows.fake_windows import FakeWindows
from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.debugger import Debugger
from vmexit.errors import CommandError, TargetError
from vmexit.guest.linux.cache import Cache
from vmexit.guest.registers import find
from vmexit.guest_view import GuestView
from vmexit.link import wire
from vmexit.link.client import Link, RequestError
from vmexit.link.rings import Records, joined
from vmexit.link.wire import Access, Action, Capability, RecordFlag, Stage, Status
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks, Untrappable

PAGE = 0x1000
FULL_MSR, WRITE_ONLY_MSR = 0x200, 0x49
"""One that takes no value, and one that cannot be read."""
EVERYTHING = Capability(sum(Capability))


def record(
    sequence: int = 0,
    *,
    time_ns: int = 0,
    event: int = 0,
    core: int = 0,
    access: Access = Access.WRMSR,
    stage: Stage = Stage.PRE,
    action: Action = Action.RECORD,
    msr: int = 0xC0000082,
    value: int = 0xFFFFFFFF81A00080,
    rip: int = 0x101506,
    flags: int = 0,
    length: int = 2,
) -> Records:
    """One record, as the agent writes it."""
    made: Records = np.zeros(1, wire.RECORD)
    fields = {
        "sequence": sequence,
        "time_ns": time_ns,
        "rip": rip,
        "value": value,
        "msr": msr,
        "event": event + 1,
        "vcpu": core,
        "access": access,
        "stage": stage,
        "action": action,
        "flags": flags,
        "length": length,
    }
    for name, field in fields.items():
        made[name] = field
    return made


SKIPPED = int(RecordFlag.SKIPPED)


class FakeRings:
    """Records that a test puts in."""

    def __init__(self) -> None:
        self.records: list[Records] = []
        self.hits_of: dict[int, int] = {}
        self.dropped = 0
        self.changes = 0
        self.answered: list[tuple[int, int]] = []
        self.globals = np.zeros(wire.MAX_GLOBALS, np.uint64)
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def drain(self, *, final: bool = False) -> Records:
        records, self.records = self.records, []
        return joined(records) if records else np.zeros(0, wire.RECORD)

    def drain_question(self) -> bytearray | None:
        if len(self.records) == 1 and (self.records[0]["action"] == int(wire.Action.ASK)).all():
            return bytearray(self.records.pop().tobytes())
        return None

    def before_sleep(self) -> bool:
        return not self.records

    def after_sleep(self) -> None:
        pass

    def question_registers(self, vcpu: int) -> list[int]:
        return [0] * wire.ASKED_REGISTERS

    def answer(self, vcpu: int, sequence: int, registers: list[int], changed: int, skip: bool, *others: bool) -> None:
        assert not changed and not skip and not any(others)
        self.answered.append((vcpu, sequence))

    def calls(self) -> bool:
        return bool(self.records)

    def hits(self, slot: int) -> int:
        return self.hits_of.get(slot, 0)

    def clear_hits(self, slot: int) -> None:
        self.hits_of.pop(slot, None)

    def counters(self) -> tuple[int, int]:
        return self.dropped, 7


class FakeLink:
    """An agent that answers from dictionaries."""

    def __init__(self, target: FakeTarget) -> None:
        self._target = target
        self.rings = FakeRings()
        self.closed = False
        self.capabilities = EVERYTHING
        self.plugin_api = 1
        self.door = "tcg"
        self.events: list[bytes] = []
        self.own: list[bytes] = []
        self.scripts: list[int] = []
        self.limits = (0, 0)
        self.drop = False
        self.recipes: list[bytes] = []
        self.codes: list[bytes] = []
        self.decided: list[tuple[int, bool]] = []
        self.values = [dict.fromkeys(range(wire.REGISTERS), 0) for _ in range(target.vcpus)]
        self.pages: dict[tuple[bool, int], bytes] = {}
        known = {0xC0000080: 0x500, 0xC0000082: 0xFFFFFFFF81A00080, 0xC0000103: 0}
        self.msrs = {(core, msr): value for core in range(target.vcpus) for msr, value in known.items()}
        """By core and MSR."""

    def fileno(self) -> int:
        return self.rings.wake_fd

    def close(self) -> None:
        self.closed = True

    def handle_notices(self) -> None:
        pass

    def set_events(self, events: list[bytes], changes: int) -> None:
        assert changes == self.rings.changes
        # Of the debugger's own event no command knows.
        self.own = [event for event in events if wire.unpack("event", event).id == 0]
        self.events = events[len(self.own) :]

    def add_script(
        self, number: int, file: int, entry: int, code_size: int, constants_size: int, buffer: tuple[int, int] | None = None
    ) -> None:
        assert os.fstat(file).st_size >= code_size + constants_size and 0 <= entry < code_size
        self.scripts.append(number)

    def set_script_limits(self, steps: int, stack: int) -> None:
        self.limits = (steps, stack)

    def set_overflow(self, drop: bool) -> None:
        self.drop = drop

    def set_recipe(self, recipe: bytes) -> None:
        self.recipes.append(recipe)

    def set_code(self, code: bytes) -> None:
        self.codes.append(code)

    def decide(self, vcpu: int, skip: bool) -> None:
        self._check_halted()
        if not self._target.is_at_trap:
            raise RequestError(Status.REFUSED)
        self.decided.append((vcpu, skip))

    def _check_halted(self) -> None:
        if self._target.runs and not self._target.is_asking:
            raise RequestError(Status.RUNNING)

    def registers(self, vcpu: int) -> list[int]:
        self._check_halted()
        return list(self.values[vcpu].values())

    def register(self, vcpu: int, number: int) -> int:
        return self.registers(vcpu)[number]

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        self._check_halted()
        self.values[vcpu][number] = value

    def read_msr(self, vcpu: int, msr: int) -> int:
        self._check_halted()
        if (vcpu, msr) not in self.msrs:
            raise RequestError(Status.NO_MSR)
        return self.msrs[vcpu, msr]

    def write_msr(self, vcpu: int, msr: int, value: int) -> None:
        self._check_halted()
        if msr == FULL_MSR:
            raise RequestError(Status.NO_VALUE)
        if msr != WRITE_ONLY_MSR:
            self.read_msr(vcpu, msr)
            self.msrs[vcpu, msr] = value

    def read_memory(self, vcpu: int, address: int, length: int, *, physical: bool = False) -> bytes:
        self._check_halted()
        data = b""
        while len(data) < length:
            at = address + len(data)
            page = self.pages.get((physical, at // PAGE))
            if page is None:
                raise RequestError(Status.UNREADABLE)
            data += page[at % PAGE :][: length - len(data)]
        return data


class FakeTarget:
    """A machine that halts at once when it is asked to."""

    name = "FakeMachine 1.0"
    vmm = "QEMU"
    untrappable: tuple[Untrappable, ...] = ()
    found_running: bool | None = None
    wants_halted = False
    only_looks: OnlyLooks | None = None
    pid = 4711

    def __init__(self, vcpus: int = 2) -> None:
        self.vcpus = vcpus
        self.runs = False
        self.is_at_trap = False
        self.is_asking = False
        self.exit_status: int | None = None
        self.pending: list[Notice] = []
        self.fake_link = FakeLink(self)
        self.link = cast(Link, self.fake_link)

    def resume(self) -> None:
        if self.exit_status is not None:
            raise TargetError("it is dead")
        self.runs = True

    def halt(self) -> None:
        self.stopped()

    def stopped(self) -> None:
        """It halts, for whatever reason."""
        self.runs = False
        self.pending.append(Notice(NoticeKind.STOPPED))

    def ended(self, status: int) -> None:
        """Its VMM ends."""
        self.runs = False
        self.exit_status = status
        self.pending.append(Notice(NoticeKind.ENDED))

    def filenos(self) -> list[int]:
        return []

    def notices(self) -> list[Notice]:
        notices, self.pending = self.pending, []
        return notices

    def detach(self) -> None:
        self.link.close()

    def close(self) -> None:
        self.link.close()


class FakeDriver:
    """Notes what it is asked for."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self.done: list[str] = []

    def go(self) -> None:
        self.done.append("go")
        self._debugger.go()

    def pause(self) -> None:
        self.done.append("pause")
        self._debugger.pause()
        self._debugger.pump()

    def sleep(self, seconds: float) -> None:
        self.done.append(f"sleep {seconds:g}")

    def leave(self) -> None:
        self.done.append("leave")

    def clear(self) -> None:
        self.done.append("clear")


@functools.cache
def linux_guest() -> FakeLinux:
    """A made-up Linux with a module; not to be changed."""
    guest = FakeLinux()
    guest.add_module(b"msr", ["msr_open", "msr_write"])
    return guest


class Typist:
    """Somebody who types commands into a session on a fake machine."""

    def __init__(self, vcpus: int = 2) -> None:
        self.target = FakeTarget(vcpus)
        self.link = self.target.fake_link
        self.debugger = Debugger(self.target)
        self.driver = FakeDriver(self.debugger)
        self.shown: list[str] = []
        self.session = Session(self.debugger, self.shown.append, self.driver)

    def close(self) -> None:
        self.debugger.close()
        os.close(self.link.rings.wake_fd)

    def types(self, line: str) -> str:
        """Carries a command out; gives what it shows."""
        self.shown.clear()
        registry.execute(self.session, line)
        return "\n".join(self.shown)

    def fails(self, line: str) -> str:
        """Carries a command out that is wrong; gives what the error looks like."""
        self.shown.clear()
        try:
            registry.execute(self.session, line)
        except CommandError as error:
            assert not self.shown
            return error.render()
        raise AssertionError(f"{line!r} was accepted: {self.shown}")

    def put(self, core: int = 0, **registers: int) -> None:
        """Gives registers values."""
        for name, value in registers.items():
            self.link.values[core][find(name).number] = value

    def boot(self, guest: FakeLinux | FakeWindows, cache: Path | None = None) -> None:
        """Makes the guest's memory and registers those of a made-up system. ``cache``: what is kept of it, by default nothing."""
        for number, page in guest.pages.items():
            self.link.pages[True, number] = bytes(page)
            for virtual in guest.virtual(number * PAGE):
                self.link.pages[False, virtual // PAGE] = bytes(page)
        for core, registers in enumerate(guest.cores):
            self.put(core, **registers)
        self.debugger.guest = GuestView(self.debugger, cache=Cache(cache or Path("/dev/null/nowhere")))

    def map(self, address: int, data: bytes, *, physical: bool = False) -> None:
        """Makes memory from a page's start on; the rest of the last page is 0."""
        for offset in range(0, len(data), PAGE):
            self.link.pages[physical, (address + offset) // PAGE] = data[offset : offset + PAGE].ljust(PAGE, b"\0")
