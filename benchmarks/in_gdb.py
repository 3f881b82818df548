"""Runs inside gdb: counts the stops at the loop's WRMSR, reading ECX and EAX at each, until the guest has ended."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

# Only there inside gdb.
gdb: Any = importlib.import_module("gdb")


class Counter(gdb.Breakpoint):  # type: ignore[misc]
    """A hardware breakpoint that never lets gdb come to a prompt."""

    def __init__(self, address: int) -> None:
        super().__init__(f"*{address:#x}", type=gdb.BP_HARDWARE_BREAKPOINT)
        self.seen = 0
        self.checksum = 0
        self.msrs: set[int] = set()

    def stop(self) -> bool:
        """Asked by gdb at each stop; False lets the guest go on."""
        frame = gdb.selected_frame()
        self.msrs.add(int(frame.read_register("rcx")) & 0xFFFF_FFFF)
        self.checksum += int(frame.read_register("rax")) & 0xFFFF_FFFF
        self.seen += 1
        return False


def main() -> None:
    """Leaves [start of the clock, stops, MSRs, checksum] in a file."""
    for setting in ("confirm off", "pagination off", "architecture i386:x86-64"):
        gdb.execute(f"set {setting}")
    gdb.execute(f"target remote {os.environ['BENCH_STUB']}", to_string=True)
    counter = Counter(int(os.environ["BENCH_ADDRESS"]))
    started = time.monotonic()
    # The guest's end closes the connection.
    with contextlib.suppress(gdb.error):
        gdb.execute("continue", to_string=True)
    told = [started, counter.seen, sorted(counter.msrs), counter.checksum]
    Path(os.environ["BENCH_TOLD"]).write_text(json.dumps(told))


main()
