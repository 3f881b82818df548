"""Runs one case once, in a process of its own, and prints the sample as JSON: `python -m benchmarks.worker CASE ...`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.common import ROOT, BenchmarkError, Sample
from benchmarks.loop import HIGH, MSR, Loop
from benchmarks.machine import QEMU, MemoryWatch, PlainMachine, children_cpu_seconds, most_memory, stopwatch

if TYPE_CHECKING:
    # What is not measured is not loaded either: each case has its process's memory to itself.
    from vmexit import Debugger

EVERY_MSR = range(1 << 32)
_BOOTED = "benchmark-init"


def boot_init() -> str:
    """The end of the init script of the boot's cases: says that it is there, and switches off."""
    return f"echo {_BOOTED}\npoweroff -f\n"


def _check_boot(status: int | None, output: str) -> None:
    if status != 0 or _BOOTED not in output:
        raise BenchmarkError(f"Linux did not come to its end (status {status}): {output.strip()[-80:]!r}")


# ---- without vmexit ----


def _plain(arguments: list[str], check: Callable[[int, str], None], events: int) -> Sample:
    with PlainMachine(arguments) as machine:
        watch = MemoryWatch(machine.process.pid)
        with stopwatch() as seconds:
            machine.resume()
            status = machine.wait()
    check(status, machine.output)
    return Sample(events, seconds[0], vmm_bytes=watch.stop(), vmm_cpu_seconds=children_cpu_seconds())


def plain(count: int, _: list[str]) -> Sample:
    """QEMU as it comes."""
    loop = Loop(count)
    return _plain(loop.arguments, loop.check_end, count)


def boot_plain(_: int, arguments: list[str]) -> Sample:
    """Linux under QEMU as it comes."""
    return _plain(arguments, _check_boot, 0)


def boot_idle(_: int, arguments: list[str]) -> Sample:
    """Linux under QEMU with a plugin that looks at translated code and does nothing."""
    with tempfile.TemporaryDirectory(prefix="vmexit-bench-") as folder:
        return _plain([*arguments, "-plugin", _idle_plugin(Path(folder))], _check_boot, 0)


def _idle_plugin(folder: Path) -> str:
    """The library, built for the first version of the plugin interface that this QEMU takes."""
    for api in range(1, 9):
        path = folder / f"idle-{api}.so"
        flags = ("-O2", "-shared", "-fPIC", f"-DPLUGIN_API={api}")
        subprocess.run(["gcc", *flags, str(ROOT / "benchmarks" / "idle_plugin.c"), "-o", str(path)], check=True)
        probe = [QEMU, "-accel", "tcg", "-machine", "none", "-display", "none", "-plugin", str(path), "-device", "help"]
        if subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0:
            return str(path)
    raise BenchmarkError("QEMU takes no plugin")


# ---- vmexit ----


def _attached(
    arguments: list[str], check: Callable[[int | None, str], None], set_up: Callable[[Debugger], Callable[[], int]]
) -> Sample:
    """``set_up`` makes events and gives what checks that they saw what they should have seen, and tells how much that is."""
    import vmexit

    printed: list[bytes] = []
    with vmexit.launch(arguments, output=lambda _, data: printed.append(data)) as debugger:
        check_seen = set_up(debugger)
        watch = MemoryWatch(debugger.target.pid)
        cpu = time.process_time()
        with stopwatch() as seconds:
            stop = debugger.run()
        cpu = time.process_time() - cpu
        memory = most_memory()
    check(stop.exit_status, b"".join(printed).decode(errors="replace"))
    if debugger.dropped():
        raise BenchmarkError(f"{debugger.dropped()} records were dropped")
    return Sample(check_seen(), seconds[0], watch.stop(), memory, children_cpu_seconds(), cpu)


def other_msr(count: int, _: list[str]) -> Sample:
    """An event on an MSR that the loop does not write."""
    loop = Loop(count)

    def set_up(debugger: Debugger) -> Callable[[], int]:
        event = debugger.on_msr_write(MSR + 1)

        def check() -> int:
            if debugger.hits(event) or debugger.summary.total:
                raise BenchmarkError("an event on another MSR was triggered")
            return count

        return check

    return _attached(loop.arguments, loop.check_end, set_up)


def recorded(count: int, _: list[str]) -> Sample:
    """Every write of every MSR recorded, and counted by MSR."""
    loop = Loop(count)

    def set_up(debugger: Debugger) -> Callable[[], int]:
        event = debugger.on_msr_write(EVERY_MSR)

        def check() -> int:
            rows = debugger.summary.rows()
            if debugger.summary.total != sum(row.count for row in rows) or debugger.hits(event) != debugger.summary.total:
                raise BenchmarkError(f"{debugger.hits(event)} hits, {debugger.summary.total} records")
            mine = [row for row in rows if row.msr == MSR]
            loop.check_seen(mine[0].count if mine else 0)
            if (mine[0].first, mine[0].last) != (HIGH << 32 | count, HIGH << 32 | 1):
                raise BenchmarkError(f"the first value is {mine[0].first:x} and the last one {mine[0].last:x}")
            return count

        return check

    return _attached(loop.arguments, loop.check_end, set_up)


def script(count: int, _: list[str]) -> Sample:
    """A script that compares the MSR and counts."""
    loop = Loop(count)

    def set_up(debugger: Debugger) -> Callable[[], int]:
        event = debugger.on_msr_write(EVERY_MSR, script=f"if (@rcx == {MSR:#x}) {{ .cnt = .cnt + 1; }}")

        def check() -> int:
            loop.check_seen(int(debugger.evaluate("print(.cnt);"), 16))
            if event.faults:
                raise BenchmarkError(f"{event.faults} runs of the script were ended")
            return count

        return check

    return _attached(loop.arguments, loop.check_end, set_up)


def printf(count: int, _: list[str]) -> Sample:
    """A script that prints each write into a file, by the command line; from the start of vmexit to its end."""
    loop = Loop(count)
    command = f'!msrwrite {MSR:x} imm no script {{ printf("%llx %llx\\n", $msr, $value); }}'
    with tempfile.TemporaryFile() as file:
        with stopwatch() as seconds:
            done = subprocess.run(
                [sys.executable, "-m", "vmexit", "run", "--batch", "-x", command, "--", *loop.arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.PIPE,
                check=False,
            )
        file.seek(0)
        lines = file.read().decode(errors="replace").splitlines()
    loop.check_end(done.returncode, "\n".join(lines[-2:]))
    values = [int(line.split()[1], 16) & 0xFFFF_FFFF for line in lines if line.startswith(f"{MSR:x} ")]
    loop.check_seen(len(values), sum(values))
    return Sample(count, seconds[0], vmm_cpu_seconds=children_cpu_seconds())


def callback(count: int, _: list[str]) -> Sample:
    """A Python callback that looks at MSR and value of each write."""
    loop = Loop(count)

    def set_up(debugger: Debugger) -> Callable[[], int]:
        seen = checksum = 0

        def on_write(trap: Any) -> None:
            nonlocal seen, checksum
            if trap.msr == MSR:
                seen += 1
                checksum += trap.value & 0xFFFF_FFFF

        debugger.on_msr_write(MSR, on_write)

        def check() -> int:
            loop.check_seen(seen, checksum)
            return seen

        return check

    return _attached(loop.arguments, loop.check_end, set_up)


def boot_recorded(_: int, arguments: list[str]) -> Sample:
    """Linux with every read and every write of every MSR recorded."""

    def set_up(debugger: Debugger) -> Callable[[], int]:
        events = [debugger.on_msr_write(EVERY_MSR), debugger.on_msr_read(EVERY_MSR)]

        def check() -> int:
            hits = sum(map(debugger.hits, events))
            if not hits or hits != debugger.summary.total:
                raise BenchmarkError(f"{hits} hits, {debugger.summary.total} records")
            return hits

        return check

    return _attached(arguments, _check_boot, set_up)


# ---- others ----


def gdb(count: int, _: list[str]) -> Sample:
    """gdb at QEMU's gdbstub, with a hardware breakpoint at the WRMSR whose Python `stop` reads ECX and EAX."""
    loop = Loop(count)
    with tempfile.TemporaryDirectory(prefix="vmexit-bench-") as folder:
        path = Path(folder, "gdb")
        stub = ("-chardev", f"socket,id=gdb,path={path},server=on,wait=off", "-gdb", "chardev:gdb")
        with PlainMachine([*loop.arguments, *stub]) as machine:
            told = Path(folder, "told")
            command = [shutil.which("gdb") or "gdb", "-nx", "-batch", "-x", str(ROOT / "benchmarks" / "in_gdb.py")]
            named = {"BENCH_STUB": str(path), "BENCH_ADDRESS": str(loop.address("loop_wrmsr")), "BENCH_TOLD": str(told)}
            client = subprocess.Popen(
                command,
                env={**os.environ, **named},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            try:
                errors = client.communicate()[1]
            finally:
                client.kill()
                client.wait()
            if not told.exists():
                raise BenchmarkError(f"gdb failed: {errors.decode(errors='replace').strip()[-200:]}")
            started, seen, msrs, checksum = json.loads(told.read_text())
            loop.check_end(machine.wait(), machine.output)
            seconds = time.monotonic() - started
    loop.check_seen(seen, checksum)
    if msrs != [MSR]:
        raise BenchmarkError(f"gdb saw other MSRs: {msrs}")
    return Sample(count, seconds)


def unicorn(count: int, _: list[str]) -> Sample:
    """The loop's own bytes in Unicorn, with a hook on the WRMSR that reads ECX, EAX and EDX."""
    # It has no types.
    api: Any = importlib.import_module("unicorn")
    names: Any = importlib.import_module("unicorn.x86_const")
    ecx, eax, edx, rbx = names.UC_X86_REG_ECX, names.UC_X86_REG_EAX, names.UC_X86_REG_EDX, names.UC_X86_REG_RBX
    loop = Loop(count)
    seen = checksum = 0

    def on_write(machine: Any, address: int, size: int, _: object) -> None:
        nonlocal seen, checksum
        msr, low, high = machine.reg_read(ecx), machine.reg_read(eax), machine.reg_read(edx)
        if msr == MSR and high == HIGH:
            seen += 1
            checksum += low

    machine = api.Uc(api.UC_ARCH_X86, api.UC_MODE_64)
    for address, data, length in loop.segments():
        start = address & ~0xFFF
        machine.mem_map(start, (address + length - start + 0xFFF) & ~0xFFF)
        machine.mem_write(address, data)
    where = loop.address("loop_wrmsr")
    machine.hook_add(api.UC_HOOK_CODE, on_write, begin=where, end=where)
    with stopwatch() as seconds:
        machine.emu_start(loop.address("main"), loop.address("loop_rdmsr"))
    loop.check_seen(seen, checksum)
    if machine.reg_read(rbx) != loop.checksum:
        raise BenchmarkError("the guest's sum in Unicorn is wrong")
    return Sample(count, seconds[0])


RUNNERS: dict[str, Callable[[int, list[str]], Sample]] = {
    "plain": plain,
    "other": other_msr,
    "recorded": recorded,
    "script": script,
    "printf": printf,
    "callback": callback,
    "gdb": gdb,
    "unicorn": unicorn,
    "boot-plain": boot_plain,
    "boot-idle": boot_idle,
    "boot-recorded": boot_recorded,
}


class _OutOfTime(BaseException):
    """Not an Exception: nothing between here and the top may take it for a case's own."""


def _end(number: int, _: FrameType | None) -> NoReturn:
    raise _OutOfTime("the time is over" if number == signal.SIGALRM else "it was told to end")


def main() -> int:
    """Prints the sample in one line and returns 0; 1 and a line on standard error where there is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker")
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("case", choices=RUNNERS)
    parser.add_argument("count", type=int)
    parser.add_argument("qemu", nargs="*")
    given = parser.parse_args()
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _end)
    signal.setitimer(signal.ITIMER_REAL, given.limit)
    try:
        sample = RUNNERS[given.case](given.count, given.qemu)
    except (Exception, _OutOfTime) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(asdict(sample)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
