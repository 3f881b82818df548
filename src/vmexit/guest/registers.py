"""The names of x86 registers and flags, and the part of a whole register that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmexit.link.wire import constant


@dataclass(frozen=True, slots=True)
class Register:
    """A register, or a part of one: ``bits`` bits from bit ``shift`` of the whole register with the wire's ``number``."""

    name: str
    number: int
    whole: str
    bits: int = 64
    shift: int = 0
    writable: bool = True

    def extract(self, whole: int) -> int:
        """This part of the whole register's value."""
        return whole >> self.shift & ((1 << self.bits) - 1)

    def insert(self, whole: int, value: int) -> int:
        """The whole register's value with this part replaced; the rest stays (also for the 32-bit names, as in HyperDbg).

        Raises ValueError for a value that does not fit.
        """
        mask = (1 << self.bits) - 1
        if not 0 <= value <= mask:
            raise ValueError(f"{self.name} holds {self.bits} bit{'s' * (self.bits > 1)}; {value:#x} does not fit")
        return whole & ~(mask << self.shift) | value << self.shift


def _general() -> list[Register]:
    registers = []
    for letter in "acdb":
        whole, number = f"r{letter}x", constant(f"R{letter.upper()}X")
        registers += [
            Register(whole, number, whole),
            Register(f"e{letter}x", number, whole, 32),
            Register(f"{letter}x", number, whole, 16),
            Register(f"{letter}h", number, whole, 8, 8),
            Register(f"{letter}l", number, whole, 8),
        ]
    for stem in ("sp", "bp", "si", "di"):
        whole, number = f"r{stem}", constant(f"R{stem.upper()}")
        registers += [
            Register(whole, number, whole),
            Register(f"e{stem}", number, whole, 32),
            Register(stem, number, whole, 16),
            Register(f"{stem}l", number, whole, 8),
        ]
    for number in range(8, 16):
        whole = f"r{number}"
        registers += [
            Register(whole, number, whole),
            Register(f"{whole}d", number, whole, 32),
            Register(f"{whole}w", number, whole, 16),
            Register(f"{whole}l", number, whole, 8),
            Register(f"{whole}b", number, whole, 8),
        ]
    return registers


# Bit and width of each flag (Intel SDM volume 1, 3.4.3).
FLAGS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "cf": (0, 1),
        "pf": (2, 1),
        "af": (4, 1),
        "zf": (6, 1),
        "sf": (7, 1),
        "tf": (8, 1),
        "if": (9, 1),
        "df": (10, 1),
        "of": (11, 1),
        "iopl": (12, 2),
        "nt": (14, 1),
        "rf": (16, 1),
        "vm": (17, 1),
        "ac": (18, 1),
        "vif": (19, 1),
        "vip": (20, 1),
        "id": (21, 1),
    }
)


def _special() -> list[Register]:
    rip, rflags = constant("RIP"), constant("RFLAGS")
    registers = [
        Register("rip", rip, "rip"),
        Register("eip", rip, "rip", 32),
        Register("ip", rip, "rip", 16),
        Register("rflags", rflags, "rflags"),
        Register("eflags", rflags, "rflags", 32),
        Register("flags", rflags, "rflags", 16),
    ]
    registers += [Register(name, rflags, "rflags", bits, shift) for name, (shift, bits) in FLAGS.items()]
    registers += [Register(name, constant(name.upper()), name, 16) for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    registers += [
        Register(name, constant(name.upper()), name)
        for name in ("fs_base", "gs_base", "kernel_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer")
    ]
    return registers


ALL: Mapping[str, Register] = MappingProxyType({register.name: register for register in [*_general(), *_special()]})
"""Every name, in lower case."""

WHOLE: tuple[Register, ...] = tuple(sorted((r for r in ALL.values() if r.whole == r.name), key=lambda r: r.number))
"""Those that are no part of another, by wire number."""


def find(name: str) -> Register:
    """The register of that name, in any letter case. Raises KeyError."""
    return ALL[name.lower()]
