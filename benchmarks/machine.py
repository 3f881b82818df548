"""Starting a QEMU without vmexit, and looking at a QEMU's memory while it runs."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import BenchmarkError

QEMU = "qemu-system-x86_64"
_LOOK_S = 0.02


def most_memory(pid: int | str = "self") -> int | None:
    """The most memory, in bytes, that the process has had resident since it began to run its program; None: it has ended."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None


class MemoryWatch:
    """Looks at a process every now and then until it ends; `bytes` is what most_memory() said last."""

    def __init__(self, pid: int) -> None:
        self.bytes = most_memory(pid)
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S) and (now := most_memory(self._pid)) is not None:
            self.bytes = now

    def stop(self) -> int | None:
        """Ends it and gives `bytes`."""
        self._over.set()
        self._thread.join()
        return self.bytes


def children_cpu_seconds() -> float:
    """Processor time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class PlainMachine:
    """A QEMU as it comes, halted before its first instruction. A context manager; nothing of it is left behind."""

    def __init__(self, arguments: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        self._monitor = ours.makefile("rw", encoding="utf-8", newline="\n")
        with theirs:
            monitor = ("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control")
            self.process = subprocess.Popen(
                [shutil.which(QEMU) or QEMU, *arguments, *monitor, "-S"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        ours.close()
        self.output = ""

    def __enter__(self) -> PlainMachine:
        self._monitor.readline()
        self._ask("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._monitor.close()
        if self.process.stdout:
            self.process.stdout.close()

    def _ask(self, command: str) -> None:
        self._monitor.write(json.dumps({"execute": command}) + "\n")
        self._monitor.flush()
        while True:
            line = self._monitor.readline()
            if not line:
                raise BenchmarkError(f"{QEMU} ended before it was told to run")
            if "return" in json.loads(line):
                return

    def resume(self) -> None:
        """Lets it run."""
        self._ask("cont")

    def wait(self) -> int:
        """Waits until it has ended and gives its exit status; what it printed is in `output`."""
        assert self.process.stdout
        self.output = self.process.stdout.read().decode(errors="replace")
        return self.process.wait()


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Gives a list into which the seconds go that the block has taken."""
    seconds: list[float] = []
    start = time.monotonic()
    try:
        yield seconds
    finally:
        seconds.append(time.monotonic() - start)
