"""Filters of an event by value: what is written or was read, and whether a write changes anything."""

from __future__ import annotations

from dataclasses import dataclass

from vmexit.errors import VmexitError
from vmexit.link.wire import Access, Stage

_ALL_BITS = 0xFFFF_FFFF_FFFF_FFFF


class FilterError(VmexitError):
    """A filter that makes no sense; ``option`` is the one that is to blame: value, mask or changed."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True, slots=True)
class ValueFilter:
    """Which values an event is triggered by. Both conditions have to hold where both are given."""

    value: int | None = None
    """Only this one, in the bits of ``mask``; None: any."""
    mask: int | None = None
    """The bits that are looked at; None: all of them."""
    changed: bool = False
    """Only writes of something else than what the MSR holds, in the bits of ``mask``."""

    @classmethod
    def of(cls, value: int | None, mask: int | None, changed: bool) -> ValueFilter | None:
        """The filter that these make; None for none of them. Raises FilterError."""
        if value is None and mask is None and not changed:
            return None
        made = cls(value, mask, changed)
        made._check_bits()
        return made

    def _check_bits(self) -> None:
        for option, bits in (("value", self.value), ("mask", self.mask)):
            if bits is not None and not 0 <= bits <= _ALL_BITS:
                raise FilterError(option, f"an MSR has 64 bits; {bits:#x} is no {option}")
        if self.mask is not None and self.value is None and not self.changed:
            raise FilterError("mask", "'mask' says which bits 'value' or 'changed' looks at; neither of them is there")
        if self.mask == 0:
            raise FilterError("mask", "a mask of 0 looks at no bit at all")
        if self.value is not None and self.mask is not None and self.value & ~self.mask:
            raise FilterError("value", f"{self.value:x} has bits that the mask {self.mask:x} leaves out: it would never be met")

    def check(self, access: Access, stage: Stage) -> None:
        """Raises FilterError where such an event has no value to look at."""
        if not access & Access.RDMSR:
            return
        if self.changed:
            raise FilterError("changed", "'changed' is for writes: a read changes nothing")
        if stage != Stage.POST:
            raise FilterError("value", "before a read there is no value to compare; 'stage post' has one")

    def wire(self) -> dict[str, int]:
        """Its fields in struct vmexit_event."""
        mask = _ALL_BITS if self.mask is None else self.mask
        return {
            "value": self.value or 0,
            "mask": 0 if self.value is None else mask,
            "changes": mask if self.changed else 0,
        }

    def __str__(self) -> str:
        """As a command line has it: "changed mask 1 value 0"."""
        words = ["changed"] if self.changed else []
        words += [] if self.mask is None else [f"mask {self.mask:x}"]
        words += [] if self.value is None else [f"value {self.value:x}"]
        return " ".join(words)
