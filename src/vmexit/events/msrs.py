"""Sets of MSR addresses, as an event names them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LAST_MSR = 0xFFFF_FFFF

# Left out where no MSR is named: IA32_KERNEL_GS_BASE, IA32_MPERF, IA32_APERF, and for writes IA32_SPEC_CTRL and IA32_PRED_CMD
# (HyperDbg, commands !msrread and !msrwrite). Each can be named.
UNNAMED_READS = (0xC000_0102, 0xE7, 0xE8)
UNNAMED_WRITES = (*UNNAMED_READS, 0x48, 0x49)


@dataclass(frozen=True, slots=True)
class MsrSet:
    """MSRs by address: sorted, disjoint, inclusive ranges within 0 to ffffffffh."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, *msrs: int) -> MsrSet:
        """Just these. Raises ValueError for an address of more than 32 bits."""
        return cls.of_ranges((msr, msr) for msr in msrs)

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int]]) -> MsrSet:
        """The union of inclusive ranges. Raises ValueError for one that is empty or goes beyond 32 bits."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if not 0 <= first <= last <= LAST_MSR:
                raise ValueError(f"an MSR is a number from 0 to {LAST_MSR:x}h; {first:x}h to {last:x}h is no range of them")
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    @classmethod
    def all_but(cls, left_out: Iterable[int]) -> MsrSet:
        """Every MSR except these."""
        ranges, first = [], 0
        for msr in sorted(set(left_out)):
            if first < msr:
                ranges.append((first, msr - 1))
            first = msr + 1
        if first <= LAST_MSR:
            ranges.append((first, LAST_MSR))
        return cls(tuple(ranges))

    def __contains__(self, msr: int) -> bool:
        return any(first <= msr <= last for first, last in self.ranges)

    @property
    def left_out(self) -> tuple[int, ...] | None:
        """What is missing where this is "every MSR except a few"; None for any other set."""
        gaps = [(a[1] + 1, b[0] - 1) for a, b in zip(self.ranges, self.ranges[1:], strict=False)]
        if not self.ranges or self.ranges[0][0] != 0 or self.ranges[-1][1] != LAST_MSR:
            return None
        return tuple(msr for first, last in gaps for msr in range(first, min(last, first + 16) + 1))

    def __str__(self) -> str:
        if self.left_out is not None:
            return "all" if not self.left_out else "all but " + " ".join(f"{msr:x}" for msr in self.left_out)
        return ",".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in self.ranges)
