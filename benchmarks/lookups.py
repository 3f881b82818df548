"""How long it takes to name an address that was not asked for before, in any system; and a Windows to ask, made up for that."""

from __future__ import annotations

import random
import statistics
import struct
import time

import numpy as np

from benchmarks.common import BenchmarkError
from tests.guest.windows.fake_windows import SIZE, TEXT, FakeWindows
from vmexit.guest.memory import PhysicalMemory
from vmexit.guest.symbols import Symbols
from vmexit.guest.system import System
from vmexit.guest.windows.locate import find_kernel
from vmexit.guest.windows.profile import Profile
from vmexit.guest.windows.running import Windows

LOOKUPS = 20_000
_AT_ONCE = 50
"""That are timed together: a clock costs nearly as much as a look-up."""
_FUNCTIONS = 30_000
"""About as many as the kernel of a Windows 10 has, each with its symbol."""
_TABLE = 0x50_0000
_TABLE_ENTRY, _TEXT_SIZE = 0x1A0, 0x260
"""Where the made-up image's header says where its function table is, and how long its code."""


def first_time(system: System, start: int, end: int, count: int = LOOKUPS) -> float:
    """Seconds to name one of so many random addresses, each for the first time: the median, in runs of 50."""
    system.name_of(start)
    addresses = random.sample(range(start, end), count)
    runs = []
    for at in range(0, count, _AT_ONCE):
        some = addresses[at : at + _AT_ONCE]
        begin = time.perf_counter()
        for address in some:
            system.name_of(address)
        runs.append((time.perf_counter() - begin) / len(some))
    return statistics.median(runs)


def made_up_windows() -> Windows:
    """A kernel with as many symbols and functions as a real one has, in the memory of the machine that the tests make up."""
    guest = FakeWindows()
    step = (SIZE - TEXT) // _FUNCTIONS
    begins = range(TEXT, TEXT + step * _FUNCTIONS, step)
    rows = b"".join(struct.pack("<III", begin, begin + step - 16, TEXT) for begin in begins)
    guest.write(guest.base + _TABLE, rows)
    guest.write(guest.base + _TABLE_ENTRY, struct.pack("<II", _TABLE, len(rows)))
    guest.write(guest.base + _TEXT_SIZE, struct.pack("<I", SIZE - TEXT))
    kernel = find_kernel(PhysicalMemory(guest), guest.registers(0))
    if kernel is None:
        raise BenchmarkError("the made-up Windows is not found in its memory")
    names = [f"KiMadeUpFunction{index:x}" for index in range(_FUNCTIONS)]
    symbols = Symbols.of(np.array(begins, np.uint64), names, "T" * len(names))
    return Windows(kernel, Profile("", {}, symbols))
