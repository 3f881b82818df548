"""The demonstration: a real Linux boots, its MSR writes are trapped, one is rewritten and one is blocked."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import vmexit
from vmexit.console.record import RecordTo, Tape
from vmexit.console.render import summary_table
from vmexit.debugger import Debugger, Stop, StopReason
from vmexit.errors import VmexitError
from vmexit.lines import Columns
from vmexit.setup.initramfs import PRELUDE, READ_MSR, build_initramfs
from vmexit.setup.kernel import Kernel, find_kernel
from vmexit.targets.qemu import Qemu
from vmexit.trap import LiveTrap, Trap

VCPUS = 2
MISC_ENABLE = 0x1A0
REWRITTEN, BLOCKED = 0x1111, 0x2222
INSTEAD = 0xCAFE_F00D
_TIME_S = 90.0
_PROGRESS_S = {True: 0.1, False: 1.0}  # on a terminal, and into a file

_INIT = f"""\
{PRELUDE}{READ_MSR}
echo "init runs on $(uname -sr), $(nproc) CPUs, LSTAR is $(read_msr 0 0xc0000082)"
if [ -e /dev/cpu/0/msr ]; then
    write_msr 0 {MISC_ENABLE:#x} {REWRITTEN:016x}
    echo "init wrote {REWRITTEN:x} to MSR {MISC_ENABLE:x} on CPU 0 and reads $(read_msr 0 {MISC_ENABLE:#x})"
    write_msr 1 {MISC_ENABLE:#x} {BLOCKED:016x}
    echo "init wrote {BLOCKED:x} to MSR {MISC_ENABLE:x} on CPU 1 and reads $(read_msr 1 {MISC_ENABLE:#x})"
else
    echo "this kernel has no driver for /dev/cpu/N/msr (CONFIG_X86_MSR), so init writes no MSR"
fi
poweroff -f
"""


class _Screen:
    """Standard output, with a progress line that is always the last one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_terminal = sys.stdout.isatty()
        self._shown = ""
        self._next = 0.0

    def print(self, text: str) -> None:
        """Whole lines."""
        with self._lock:
            erase, redraw = ("\r\033[K", self._shown) if self._shown else ("", "")
            sys.stdout.write(f"{erase}{text}\n{redraw}")
            sys.stdout.flush()

    def progress(self, text: str) -> None:
        """Shows how far it is, not too often; in a file as a line of its own."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PROGRESS_S[self._is_terminal]
        if not self._is_terminal:
            self.print(text)
            return
        with self._lock:
            self._shown = text
            sys.stdout.write(f"\r\033[K{text}")
            sys.stdout.flush()

    def end_progress(self) -> None:
        """Takes the progress line away."""
        with self._lock:
            if self._shown:
                sys.stdout.write("\r\033[K")
                sys.stdout.flush()
            self._shown = ""


class _Demo:
    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._columns = Columns()
        self._guest = b""
        self._started = time.monotonic()
        self.said: list[str] = []
        """The lines that the guest has printed."""

    def on_output(self, stream: str, data: bytes) -> None:
        """What the guest prints, line by line."""
        *lines, self._guest = (self._guest + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self.said.append(text)
            self._screen.print(f"guest | {text}")

    def on_traps(self, traps: list[Trap]) -> None:
        """Records, as they come."""
        self._screen.print("\n".join(self._columns.line(trap) for trap in traps))

    def meddle(self, trap: LiveTrap) -> None:
        """Rewrites one write and blocks another."""
        if trap.value == REWRITTEN:
            self._screen.print(f"vmexit| rewrites it: {INSTEAD:x} goes into MSR {trap.msr:x} instead of {trap.value:x}")
            trap.value = INSTEAD
        elif trap.value == BLOCKED:
            self._screen.print(f"vmexit| blocks it: the guest goes on without having written MSR {trap.msr:x}")
            trap.skip()

    def show_progress(self, debugger: Debugger) -> bool:
        """To be asked while the machine runs; False: let it run on."""
        seconds = time.monotonic() - self._started
        self._screen.progress(f"... {seconds:4.1f} s, {debugger.summary.total} MSR writes trapped")
        return False

    def run(self, debugger: Debugger) -> Stop:
        """Traps everything from the first instruction to the last."""
        self._columns = Columns(names=debugger.names)
        debugger.recognition.on_line = lambda line: self._screen.print(f"vmexit| {line}")
        self.everything = debugger.on_msr_write(immediate=True, with_process=True)
        debugger.on_msr_write(MISC_ENABLE, self.meddle)
        debugger.listeners.append(self.on_traps)
        self._screen.print(self._columns.heading())
        self._started = time.monotonic()
        return debugger.run(until=lambda: self.show_progress(debugger), timeout=_TIME_S)


@contextlib.contextmanager
def _arguments(kernel: Kernel) -> Iterator[list[str]]:
    """What QEMU is told; the initramfs exists as long as the block lasts."""
    modules = sorted(kernel.modules.glob("*.ko")) if kernel.modules else []
    with tempfile.NamedTemporaryFile(prefix="vmexit-demo-", suffix=".cpio") as initramfs:
        initramfs.write(build_initramfs(_INIT, modules=modules))
        initramfs.flush()
        yield [
            *("-accel", "tcg,thread=multi", "-smp", str(VCPUS), "-m", "256"),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(kernel.image), "-initrd", initramfs.name),
            *("-append", "console=ttyS0 quiet panic=-1 tsc=reliable cryptomgr.notests msr.allow_writes=on"),
        ]


def run(kernel: Path | None = None, record: Path | None = None) -> int:
    """Runs it with this kernel, $VMEXIT_KERNEL or Debian's; 0 if the guest ran to its end and saw what it should.

    ``record``: a file that all of it is recorded into. Raises VmexitError, with one line for the user, where it cannot be run.
    """
    found = find_kernel(kernel)
    screen = _Screen()
    demo = _Demo(screen)
    with contextlib.ExitStack() as held:
        tape = Tape(RecordTo(record)) if record else None
        if tape is not None:
            held.callback(tape.close)
        arguments = held.enter_context(_arguments(found))
        debugger = held.enter_context(Debugger(Qemu(arguments, output=demo.on_output)))
        if tape is not None:
            tape.watch(debugger, target="run", arguments=tuple(arguments))
        machine = f"Linux {found.release} on {VCPUS} vCPUs of {debugger.target.name}"
        screen.print(
            f"vmexit {vmexit.__version__}: {machine}; every WRMSR is trapped but for five that are written all the time\n"
        )
        try:
            stop = demo.run(debugger)
        finally:
            screen.end_progress()
        screen.print("")
        screen.print(summary_table([row for row in debugger.summary.rows() if row.event == demo.everything.number], "writes"))
        _check(stop, demo.said)
        total, lost = debugger.summary.total, debugger.dropped()
        screen.print(f"\n{total} records, {lost} lost. The guest has ended; status {stop.exit_status}.")
        if tape is not None:
            screen.print(f"{tape.end('the machine ended', stop.exit_status)}; 'vmexit report {record}' shows it")
    return 0


def _check(stop: Stop, said: list[str]) -> None:
    """Raises VmexitError unless the guest ran to its end and saw what the demonstration promises."""
    if stop.reason is not StopReason.ENDED:
        raise VmexitError(f"the guest did not come to its end within {_TIME_S:g} s")
    if stop.exit_status != 0:
        raise VmexitError(f"QEMU ended with status {stop.exit_status}")
    guest = "\n".join(said)
    if "init runs" not in guest:
        raise VmexitError("this kernel did not get as far as running its init; what it printed is above")
    if f"init wrote {REWRITTEN:x}" in guest and f"reads {INSTEAD:016x}" not in guest:
        raise VmexitError("the guest did not read back what was written instead")
    if f"init wrote {BLOCKED:x}" in guest and f"reads {BLOCKED:016x}" in guest:
        raise VmexitError("the write that was to be blocked has taken place")
