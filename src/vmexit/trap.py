"""A trap as the debugger and its callbacks see it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vmexit.errors import VmexitError
from vmexit.guest import registers as register_names
from vmexit.link.rings import Records
from vmexit.link.wire import RECORD, Access, Action, RecordFlag, Stage, constant, offset

if TYPE_CHECKING:
    from vmexit.guest.symbols import Place
    from vmexit.guest.system import Frame, Task
    from vmexit.guest_view import Caller, GuestView

_ACCESS = {int(access): access for access in Access}
_STAGE = {int(stage): stage for stage in Stage}
_ACTION = {int(action): action for action in Action}
_SKIPPED = {flags for flags in map(RecordFlag, range(int(~RecordFlag(0)) + 1)) if RecordFlag.SKIPPED in flags}
_FLAGS = [RecordFlag(flags) for flags in range(int(~RecordFlag(0)) + 1)]
_AGAIN = int(RecordFlag.AGAIN)
_MASK32, _MASK64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
_RAX, _RCX, _RDX = constant("RAX"), constant("RCX"), constant("RDX")


class Trap(NamedTuple):
    """One WRMSR or RDMSR that an event was triggered by."""

    sequence: int
    """Its place among all records of the session; without a gap."""
    time_ns: int
    """The host's CLOCK_MONOTONIC."""
    rip: int
    """Of the WRMSR or RDMSR itself, in both stages; 0 where only a tracepoint tells of it."""
    rsp: int
    value: int
    """EDX:EAX: what is about to be written (pre), was written, or was read (post of RDMSR)."""
    msr: int
    """ECX."""
    event: int
    """The number of the event."""
    core: int
    access: Access
    stage: Stage
    action: Action
    flags: RecordFlag
    length: int
    """Of the instruction, in bytes."""
    caller_number: int = 0
    """Of the place that the function with the instruction returns to (vmexit.callers has it by this); 0: not known."""
    pid: int = 0
    """The guest's number of the process that executed it, where that is known (RecordFlag.PROCESS_KNOWN); else 0."""
    tid: int = 0
    """Of the thread."""

    @property
    def skipped(self) -> bool:
        """Whether the event short-circuits the instruction."""
        return self.flags in _SKIPPED


# The fields of a record that make a trap, in the order of both.
_NAMES = (
    *("sequence", "time_ns", "rip", "rsp", "value", "msr", "event", "vcpu", "access", "stage", "action", "flags", "length"),
    *("caller", "process", "thread"),
)


def _layout() -> struct.Struct:
    described, end = "<", 0
    for name in _NAMES:
        described += f"{offset('record', name) - end}x" + {1: "B", 2: "H", 4: "I", 8: "Q"}[RECORD[name].itemsize]
        end = offset("record", name) + RECORD[name].itemsize
    return struct.Struct(f"{described}{RECORD.itemsize - end}x")


_RECORD = _layout()  # numpy takes ten times as long to make Python's numbers of one record


def _trap_of(fields: tuple[int, ...]) -> Trap:
    sequence, time, rip, rsp, value, msr, event, core, access, stage, action, flags, length, caller, pid, tid = fields
    return Trap(
        sequence,
        time,
        rip,
        rsp,
        value,
        msr,
        event - 1,
        core,
        _ACCESS[access],
        _STAGE[stage],
        _ACTION[action],
        _FLAGS[flags],
        length,
        caller,
        pid,
        tid,
    )


def trap_of(record: bytes | bytearray) -> Trap:
    """The trap that one record of the wire stands for."""
    return _trap_of(_RECORD.unpack(record))


def traps_of(records: Records) -> Iterator[Trap]:
    """The traps that records of the wire stand for."""
    return map(_trap_of, _RECORD.iter_unpack(records.tobytes()))


def record_of(trap: Trap) -> Records:
    """The record that a trap stands for: the one that ``traps_of`` takes for it."""
    record: Records = np.zeros(1, RECORD)
    for name, value in zip(_NAMES, trap._replace(event=trap.event + 1), strict=True):
        record[name] = int(value)
    return record


def first_questions(records: Records) -> Records:
    """Of questions those that are the first that their event tells of their trap."""
    # Mostly there is one, and for one numpy is slow.
    if len(records) == 1:
        return records[:0] if int(records["flags"][0]) & _AGAIN else records
    found: Records = records[(records["flags"] & _AGAIN) == 0]
    return found


class Memory(Protocol):
    """Guest memory as one vCPU sees it."""

    def read_memory(self, core: int, address: int, length: int, *, physical: bool = False) -> bytes: ...
    def write_memory(self, core: int, address: int, data: bytes, *, physical: bool = False) -> None: ...


class Registers(MutableMapping[str, int]):
    """A vCPU's registers by name (rax, eax, al, rip, rflags, zf ...), to be read and written.

    Names are those of guest.registers, in lower case; KeyError for any other. A value that does not fit is ValueError.
    """

    def __init__(self, values: Sequence[int], write: Callable[[int, int], None]) -> None:
        """``values``: the first of the wire's registers, by number; ``write(number, value)`` changes one for good."""
        self._values = list(values)
        self._write = write

    def __getitem__(self, name: str) -> int:
        register = register_names.find(name)
        if register.number >= len(self._values):
            raise KeyError(name)
        return register.extract(self._values[register.number])

    def __setitem__(self, name: str, value: int) -> None:
        register = register_names.find(name)
        whole = register.insert(self[register.whole], value)
        self._write(register.number, whole)
        self._values[register.number] = whole

    def __delitem__(self, name: str) -> None:
        raise TypeError("a register cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return (register.name for register in register_names.WHOLE[: len(self._values)])

    def __len__(self) -> int:
        return len(self._values)


class LiveTrap:
    """A trap whose vCPU is stopped for a callback. Of no use after the callback has returned."""

    def __init__(self, trap: Trap, values: list[int], memory: Memory, guest: GuestView | None = None) -> None:
        self._trap = trap
        self._memory = memory
        self._guest = guest
        self.values = values
        """The first registers of the wire (16 general ones, RIP, RFLAGS) as the guest will find them."""
        self.changed = 0
        """Bit n set: values[n] is not what the guest had."""
        self.short_circuit = trap.skipped
        self.halting = False
        self.runs_script = False
        """The event's script is to be run once the callback has returned; only with Event.asks_first."""
        self.asks_again = False
        """Then the callback is to be called once more (RecordFlag.AGAIN); only with Event.asks_first."""
        self._registers: Registers | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trap, name)

    def _write(self, number: int, value: int) -> None:
        self.values[number] = value
        self.changed |= 1 << number

    def change(self, number: int, value: int) -> None:
        """Gives the guest another value of one of the wire's registers that are in ``values``."""
        self._write(number, value)
        self._registers = None  # it has the old value

    @property
    def registers(self) -> Registers:
        """The vCPU's general registers, RIP and RFLAGS, to be read and written."""
        if self._registers is None:
            self._registers = Registers(self.values, self._write)
        return self._registers

    @property
    def trap(self) -> Trap:
        """What was trapped, as it was before the callback."""
        return self._trap

    @property
    def core(self) -> int:
        """The vCPU."""
        return self._trap.core

    @property
    def stage(self) -> Stage:
        """Before or after the instruction."""
        return self._trap.stage

    @property
    def rip(self) -> int:
        """Of the instruction, in both stages; ``registers["rip"]`` is where the guest goes on."""
        return self._trap.rip

    @property
    def msr(self) -> int:
        """ECX. Setting it makes the guest's instruction access another MSR; RCX's upper half becomes 0."""
        return self.values[_RCX] & _MASK32

    @msr.setter
    def msr(self, msr: int) -> None:
        if not 0 <= msr <= 0xFFFF_FFFF:
            raise ValueError(f"an MSR is a number from 0 to ffffffffh, not {msr:#x}")
        self.change(_RCX, msr)

    @property
    def value(self) -> int:
        """EDX:EAX. Setting it (0 to 2^64-1) changes what is written, or in the post stage of RDMSR what was read."""
        return (self.values[_RDX] & _MASK32) << 32 | self.values[_RAX] & _MASK32

    @value.setter
    def value(self, value: int) -> None:
        if not 0 <= value <= _MASK64:
            raise ValueError(f"an MSR holds 64 bits; {value:#x} is no such value")
        self.change(_RAX, value & _MASK32)
        self.change(_RDX, value >> 32)

    @property
    def symbol(self) -> Place | None:
        """Where in the guest's kernel it is; None: not known. As text: "native_write_msr+0x4 [kernel]"."""
        return self._guest.name_of(self.rip) if self._guest else None

    @property
    def frames(self) -> list[Frame]:
        """Who called whom, the function with the instruction first; empty: not known. A frame may be a guess (``is_guess``)."""
        return self._guest.frames(self.core) if self._guest and self._guest.known else []

    @property
    def caller(self) -> Caller | None:
        """What the function with the instruction returns to; None: not known."""
        return self._guest.caller(self.core) if self._guest else None

    @property
    def task(self) -> Task | None:
        """The thread of the guest's that executes it; None: not known."""
        return self._guest.current(self.core) if self._guest else None

    def skip(self) -> None:
        """Short-circuits the instruction: it is not executed, the guest goes on behind it. Only in stage pre (VmexitError)."""
        if self._trap.stage != Stage.PRE:
            raise VmexitError("the instruction has been executed; only stage pre can skip it")
        self.short_circuit = True

    def halt(self) -> None:
        """Halts the machine here, as an event that breaks does, once the callback has returned."""
        self.halting = True

    def execute(self) -> None:
        """Has the instruction executed after all, whatever the event's own short-circuit state says."""
        self.short_circuit = False

    def read_memory(self, address: int, length: int, *, physical: bool = False) -> bytes:
        """Guest memory by this vCPU's page tables. RequestError where any of it is not mapped."""
        return self._memory.read_memory(self.core, address, length, physical=physical)

    def write_memory(self, address: int, data: bytes, *, physical: bool = False) -> None:
        """Changes guest memory."""
        self._memory.write_memory(self.core, address, data, physical=physical)
