"""The guest that every case but the boot runs: a loop of WRMSRs (tests/guests/loop.S)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import BenchmarkError
from tests.guests.build import OK_STATUS, build, qemu_arguments, symbols

MSR = 0xC0000081  # STAR
HIGH = 0x5A5A5A5A
"""The upper half of every value that is written."""


class Loop:
    """The loop, with a number of writes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.image = build("loop", COUNT=count)
        # The firmware of this machine is done in some milliseconds and accesses no MSR.
        self.arguments = ["-accel", "tcg", *qemu_arguments(self.image, machine="microvm")]
        self.checksum = count * (count + 1) // 2
        """The sum of EAX over all writes."""

    def address(self, label: str) -> int:
        """Of a label of loop.S."""
        return symbols(self.image)[label]

    def check_end(self, status: int | None, output: str) -> None:
        """Raises BenchmarkError unless the guest has run to its end and wrote what it was to write."""
        found = re.search(r"^sum=(\w{16}) last=(\w{16})\s*$", output, re.MULTILINE)
        if status != OK_STATUS or found is None:
            raise BenchmarkError(f"the guest did not come to its end (status {status}): {output.strip()[-80:]!r}")
        if (int(found[1], 16), int(found[2], 16)) != (self.checksum, HIGH << 32 | 1):
            raise BenchmarkError(f"the guest's sum is {found[1]} and its last value {found[2]}: something has changed its writes")

    def check_seen(self, count: int, checksum: int | None = None) -> None:
        """Raises BenchmarkError unless a tool saw every write, and EAX as it was at each, where it tells a checksum of that."""
        if count != self.count:
            raise BenchmarkError(f"{count} of {self.count} writes were seen")
        if checksum is not None and checksum != self.checksum:
            raise BenchmarkError(f"the values that were seen come to {checksum:#x}, not {self.checksum:#x}")

    def segments(self) -> Iterator[tuple[int, bytes, int]]:
        """What of the image is to be loaded: address, bytes, and the length with what is zero behind them (ELF64, PT_LOAD)."""
        return load_segments(self.image)


def load_segments(image: Path) -> Iterator[tuple[int, bytes, int]]:
    """The loadable segments of a 64-bit ELF image (System V ABI, chapter 5)."""
    data = image.read_bytes()
    table, size, number = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for i in range(number):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", data, table + i * size)
        if kind == 1:
            yield address, data[offset : offset + in_file], in_memory
