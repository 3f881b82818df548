"""Runs the agent in the fake host, and programs for the host's vCPUs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmexit.link import wire
from vmexit.link.client import Link
from vmexit.link.rings import Records
from vmexit.link.wire import Access, Action, EventFlag, Stage

from .build import build_agent, build_host

PATIENCE_S = 60.0
"""How long anything may take that takes milliseconds."""

ALIAS = 0xFFFF_8000_0000_0000
"""All memory is there a second time."""
FAULTING_MSR = 0xBAD
"""Writing it is #GP."""
INTERRUPTING_MSR = 0x1A7
"""An interrupt arrives right after the instruction that writes it."""
PLAIN = EventFlag(0)

HLT = b"\xf4"
IRET = b"\xcf"
NOP = b"\x90"
RDMSR = b"\x0f\x32"
WRMSR = b"\x0f\x30"
INC_EAX = b"\xff\xc0"


def move(register: str, value: int) -> bytes:
    """``mov eax|ecx|edx|ebx, value``."""
    return bytes([0xB8 + ("eax", "ecx", "edx", "ebx").index(register)]) + value.to_bytes(4, "little")


def load_msr(msr: int, value: int = 0) -> bytes:
    """Puts MSR and value where WRMSR wants them; 15 bytes."""
    return move("ecx", msr) + move("eax", value & 0xFFFF_FFFF) + move("edx", value >> 32)


def wrmsr(msr: int, value: int, prefixes: bytes = b"") -> bytes:
    """Writes an MSR; the instruction itself is 15 bytes in."""
    return load_msr(msr, value) + prefixes + WRMSR


def loop(count: int, body: bytes) -> bytes:
    """Executes ``body`` so many times; it must leave EBX alone."""
    tail = b"\xff\xcb\x75"  # dec ebx; jnz body
    back = -(len(body) + len(tail) + 1)
    return move("ebx", count) + body + tail + back.to_bytes(1, "little", signed=True)


def event(
    identity: int = 1,
    *ranges: tuple[int, int],
    slot: int | None = None,
    access: Access = Access.WRMSR,
    stages: Stage = Stage.PRE,
    actions: Action = Action.RECORD,
    flags: EventFlag = PLAIN,
    enabled: bool = True,
    core: int = wire.ALL_CORES,
    process: int = wire.ALL_PROCESSES,
    script: int = 0,
    condition: int = 0,
    value: int = 0,
    mask: int = 0,
    changes: int = 0,
) -> bytes:
    """A packed event; without ranges it is about every MSR."""
    ranges = ranges or ((0, 0xFFFF_FFFF),)
    return wire.pack(
        "event",
        id=identity,
        slot=identity - 1 if slot is None else slot,
        access=int(access),
        stages=int(stages),
        actions=int(actions),
        flags=int(flags | (EventFlag.ENABLED if enabled else 0)),
        core=core,
        process=process,
        script=script,
        condition=condition,
        range_count=len(ranges),
        ranges=[{"first": first, "last": last} for first, last in ranges],
        value=value,
        mask=mask,
        changes=changes,
    )


@dataclass(frozen=True)
class Variant:
    """Which QEMU the fake host plays, and how both are compiled."""

    api: int = 1
    internals: bool = True
    halt: bool = True
    general_registers: int | None = None
    single: bool = False
    sanitizer: str = ""

    @property
    def layout(self) -> int:
        """General registers that the CPU's state has room for: 32 since QEMU 11; the agent knows no other than 16 and 32."""
        return self.general_registers or (32 if self.api >= 6 else 16)

    def __str__(self) -> str:
        words = [f"api{self.api}"]
        words += [] if self.internals else ["plain"]
        words += [] if self.halt else ["unhaltable"]
        words += [] if self.general_registers is None else [f"layout{self.general_registers}"]
        words += ["single"] if self.single else []
        words += [self.sanitizer] if self.sanitizer else []
        return "-".join(words)


OLDEST = Variant()
"""Debian 12's QEMU, as far as the agent can tell."""


class FakeHost:
    """A running fake host with the agent inside."""

    def __init__(self, variant: Variant = OLDEST, *, wait: bool = True, link: str | None = None, **options: int | str) -> None:
        """``options`` are the host's own. Waits until its vCPUs are up unless told otherwise."""
        self.said: list[str] = []
        self._told = threading.Condition()
        self._over = False
        self._links: list[Link] = []
        self._connections: list[socket.socket] = []
        self._folder = tempfile.TemporaryDirectory(prefix="vmexit-test-")
        self.path = Path(self._folder.name, "agent")
        binary = build_host(
            variant.api,
            internals=variant.internals,
            halt=variant.halt,
            general_registers=variant.layout,
            sanitizer=variant.sanitizer,
        )
        agent = build_agent(variant.sanitizer)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {
            **os.environ,
            "ASAN_OPTIONS": "abort_on_error=0:exitcode=99:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "exitcode=99:atexit_sleep_ms=0",
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(str(self.path))
            listening.listen()
            arguments = [f"{name}={value}" for name, value in options.items()]
            arguments += ["single=1"] if variant.single else []
            self.process = subprocess.Popen(
                [binary, agent, f"plugin:link={listening.fileno() if link is None else link}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=[listening.fileno()],
                env=environment,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                for vcpu in range(int(options.get("vcpus", 1))):
                    self.expect(f"up {vcpu}")
            except BaseException:
                self.discard()
                raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._told:
                self.said.append(line.decode().rstrip("\n"))
                self._told.notify_all()
        with self._told:
            self._over = True
            self._told.notify_all()

    def errors(self) -> str:
        """What it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def tell(self, *commands: str) -> None:
        """Commands for the host; see fake_host.c."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{command}\n" for command in commands).encode())
        self.process.stdin.flush()

    def expect(self, line: str, count: int = 1, patience: float = PATIENCE_S) -> None:
        """Waits until it has said this line so many times in all."""
        with self._told:
            self._told.wait_for(lambda: self.said.count(line) >= count or self._is_over(), patience)
        assert self.said.count(line) >= count, f"{line!r} did not come; said {self.said[-20:]}, errors {self.errors()!r}"

    def _is_over(self) -> bool:
        return self._over

    def sync(self) -> None:
        """Waits until the commands so far are carried out and what they say is here."""
        word = f"sync{len(self.said)}"
        self.tell(f"echo {word}")
        self.expect(word)

    def load(self, address: int, code: bytes) -> None:
        """Puts a program into memory."""
        for start in range(0, len(code), 2000):
            self.tell(f"load {address + start:x} {code[start : start + 2000].hex()}")

    def start(self, address: int, vcpu: int = 0, times: int = 1) -> None:
        """Lets a vCPU run the program there, to its HLT."""
        self.tell(f"run {vcpu} {address:x} {times}")

    def run(self, code: bytes, vcpu: int = 0, address: int = 0x1000) -> None:
        """Runs a program (HLT is put behind it) to its end on one vCPU."""
        end = f"halted {vcpu} {address + len(code) + 1:x}"
        count = self.said.count(end) + 1
        self.load(address, code + HLT)
        self.start(address, vcpu)
        self.expect(end, count)

    def register(self, name: str, vcpu: int = 0) -> int:
        """A register of a vCPU that is halted."""
        return int(self._ask(f"get {vcpu} {name}", f"{name} {vcpu} "), 16)

    def register_reads(self) -> int:
        """How many registers the agent has read by calling a function."""
        return int(self._ask("reads", "reads "))

    def msr(self, number: int, vcpu: int = 0) -> int | None:
        """What the guest has in an MSR; None: it was never accessed."""
        said = self._ask(f"msr {vcpu} {number:x}", f"msr {vcpu} {number:x} ", optional=True)
        return int(said, 16) if said else None

    def _ask(self, command: str, prefix: str, optional: bool = False) -> str:
        before = len(self.said)
        self.tell(command)
        self.sync()
        answers = [line for line in self.said[before:] if line.startswith(prefix)]
        assert answers or optional, f"no answer to {command!r}"
        return answers[-1].removeprefix(prefix) if answers else ""

    def executed(self) -> list[tuple[str, int, int, int, int]]:
        """With log=1: (kind, vCPU, MSR, value, RIP) of each access that the guest carried out."""
        lines = [line.split() for line in self.said if line.startswith(("wrmsr ", "rdmsr "))]
        return [(kind, int(vcpu), int(msr, 16), int(value, 16), int(rip, 16)) for kind, vcpu, msr, value, rip in lines]

    def connect(self) -> Link:
        """A debugger's link; it is closed with the host at the latest."""
        link = Link(self.path)
        self._links.append(link)
        return link

    def raw(self) -> socket.socket:
        """A connection to the agent that nobody has greeted on; it is closed with the host at the latest."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connections.append(connection)
        connection.settimeout(PATIENCE_S)
        connection.connect(str(self.path))
        return connection

    def hang_up(self) -> None:
        """Ends every connection."""
        while self._links:
            self._links.pop().close()
        while self._connections:
            self._connections.pop().close()

    def close(self) -> None:
        """Ends it. Fails if anything went wrong inside: a crash, an assertion, a sanitizer's report."""
        try:
            self.hang_up()
            if self.process.poll() is None:
                self.tell("quit")
                self.process.wait(PATIENCE_S)
            assert self.process.returncode == 0, f"exit {self.process.returncode}: {self.errors()}"
            assert self.errors() == ""
        finally:
            self.discard()

    def discard(self) -> None:
        """Ends it however it is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()


Answer = Callable[[Link, np.void], None]


def collect(
    link: Link, enough: int | Callable[[Records], bool], *, answer: Answer | None = None, patience: float = PATIENCE_S
) -> Records:
    """Drains until there are ``enough`` records (or it says so of those so far); ``answer`` gets each question."""
    parts: list[Records] = []
    deadline = time.monotonic() + patience
    while True:
        new = link.rings.drain()
        parts.append(new)
        for record in new[new["action"] == Action.ASK]:
            assert answer is not None, "nobody expected a question"
            answer(link, record)
        records = np.concatenate(parts)
        if enough(records) if callable(enough) else len(records) >= enough:
            return records
        assert time.monotonic() < deadline, f"only {len(records)} records"
        if link.rings.before_sleep():
            select.select([link.rings.wake_fd, link.fileno()], [], [], 0.02)
        link.rings.after_sleep()
        link.handle_notices()


def quiet(link: Link, seconds: float = 0.05) -> None:
    """Sees that no record comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert len(link.rings.drain()) == 0
        time.sleep(0.005)


def column(records: Records, *names: str) -> list[tuple[int, ...]]:
    """Fields of the records, as integers."""
    return [tuple(int(record[name]) for name in names) for record in records]


def eventually(condition: Callable[[], bool], patience: float = PATIENCE_S) -> None:
    """Waits for something that is to become true."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def request(
    connection: socket.socket,
    kind: int,
    payload: bytes = b"",
    *,
    magic: int = wire.MAGIC,
    length: int | None = None,
    fields: Iterable[tuple[str, int]] = (),
    files: Sequence[int] = (),
) -> None:
    """Sends one message, and files with it; its length field tells the truth unless ``length`` is given."""
    header = {"magic": magic, "type": kind, "serial": 7, "length": len(payload) if length is None else length, **dict(fields)}
    socket.send_fds(connection, [wire.pack("message", **header) + payload], files)


def reply(connection: socket.socket) -> tuple[int, bytes]:
    """(status, payload) of the next answer; notices are passed over."""
    while True:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        for fd in fds:
            os.close(fd)
        if not data:
            raise EOFError("the agent has closed the connection")
        header = wire.unpack("message", data)
        if header.type != wire.MessageType.VCPU or header.serial:
            return int(header.status), data[wire.size("message") :]


def exchange(connection: socket.socket, kind: int, payload: bytes = b"", **fields: int) -> tuple[int, bytes]:
    """Sends one sound message and gives its answer."""
    request(connection, kind, payload, fields=fields.items())
    return reply(connection)


def greet(connection: socket.socket) -> None:
    """Shakes hands on a raw connection."""
    status, payload = exchange(connection, wire.MessageType.HELLO, wire.VERSION.to_bytes(4, "little"))
    assert status == wire.Status.OK and len(payload) == wire.size("hello")


def bits(numbers: Sequence[int]) -> int:
    """A set of bits."""
    return sum(1 << number for number in numbers)
