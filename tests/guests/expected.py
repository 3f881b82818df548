"""The trap logs that are right for the guests: every access to an MSR by code of the guest, in program order.

The firmware's accesses before it, at addresses outside of the image, are not in here. Values are those in
EDX:EAX: what is to be written, or what has been read. `hang`, which has no end, is only in its own header.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .build import symbols

EFER = 0xC0000080
STAR = 0xC0000081
LSTAR = 0xC0000082
PKRS = 0x6E1
LEFT_OUT = frozenset({0xC0000102, 0x48, 0x49, 0xE7, 0xE8})
"""The MSRs that are not meant when an event names none."""

SEQUENCE = (
    ("star", STAR, 0x1122334455667788),
    ("lstar", LSTAR, 0xFFFF923344556677),
    ("cstar", 0xC0000083, 0xFFFFA23344556677),
    ("fmask", 0xC0000084, 0x47700),
    ("sysenter_cs", 0x174, 0x8877),
    ("sysenter_sp", 0x175, 0xFFFF813344556677),
    ("sysenter_ip", 0x176, 0x00007F3344556677),
    ("fs_base", 0xC0000100, 0x00007E3344556677),
    ("gs_base", 0xC0000101, 0xFFFF833344556677),
    ("kernel_gs", 0xC0000102, 0xFFFF843344556677),
    ("pat", 0x277, 0x0100070405060706),
    ("rex_w", STAR, 0x0000000100000001),
    ("rex", STAR, 0x0000000200000002),
    ("ds", STAR, 0x0000000300000003),
    ("data16", STAR, 0x0000000400000004),
    ("addr32", STAR, 0x0000000500000005),
    ("fs", STAR, 0x0000000600000006),
    ("data16_rex", STAR, 0x0000000700000007),
    ("longest", STAR, 0x0000000800000008),
    ("two_pages", STAR, 0x0000000900000009),
    ("garbage", STAR, 0xA1B2C3D4E5F60718),
)
"""Label, MSR and value of the writes of `sequence` that an RDMSR at the label NAME_end reads back."""
SEQUENCE_UNREAD = (("spec_ctrl", 0x48, 0), ("pred_cmd", 0x49, 0), ("mperf", 0xE7, 0), ("aperf", 0xE8, 0))
"""Those that follow, without an RDMSR."""

SELFCHECK_CASES = (
    *("none", "add", "adc", "sub", "sbb", "neg", "inc", "dec", "and", "xor"),
    *("shl", "shr", "sar", "rol", "imul", "mul", "bt", "stc", "popf"),
)
"""The cases of `selfcheck` in their order."""

ALIAS_OFFSETS = (0, 0x40000000, 0xFFFF800000000000)
"""How far above the image `alias` executes its WRMSR, in turn."""


@dataclass(frozen=True)
class Access:
    """One execution of a WRMSR or RDMSR; `faults` says that it ends in #GP, with nothing written or read."""

    kind: Literal["wrmsr", "rdmsr"]
    rip: int
    msr: int
    value: int
    core: int = 0
    faults: bool = False


def boot(image: Path, core: int = 0) -> list[Access]:
    """What every vCPU does first."""
    at = symbols(image)
    return [
        Access("rdmsr", at["boot_efer_read"], EFER, 0, core),
        Access("wrmsr", at["boot_efer"], EFER, 0x100, core),
    ]


def loop(image: Path, count: int, msr: int = STAR, high: int = 0x5A5A5A5A) -> list[Access]:
    """`loop`, built with these defines."""
    at = symbols(image)
    values = [high << 32 | i for i in range(count, 0, -1)]
    return [
        *boot(image),
        *(Access("wrmsr", at["loop_wrmsr"], msr, value) for value in values),
        Access("rdmsr", at["loop_rdmsr"], msr, values[-1]),
    ]


def sequence(image: Path) -> list[Access]:
    """`sequence`. A processor may refuse the last four with #GP; TCG does not."""
    at = symbols(image)
    log = boot(image)
    for name, msr, value in SEQUENCE:
        log.append(Access("wrmsr", at[name], msr, value))
        log.append(Access("rdmsr", at[f"{name}_end"], msr, value))
    return log + [Access("wrmsr", at[name], msr, value) for name, msr, value in SEQUENCE_UNREAD]


def fault(image: Path, count: int = 3, fault_msr: int = PKRS, fault_value: int = 0x123456789ABCDEF0) -> list[Access]:
    """`fault`, built with these defines, without what it tries at privilege level 3: see `fault_ring3`."""
    at = symbols(image)
    log = boot(image)
    for i in range(1, count + 1):
        log.append(Access("wrmsr", at["bad_wrmsr"], fault_msr, fault_value, faults=True))
        log.append(Access("wrmsr", at["good_wrmsr"], STAR, i << 32 | i))
    last = count << 32 | count
    return [
        *log,
        Access("rdmsr", at["good_rdmsr"], STAR, last),
        Access("rdmsr", at["last_rdmsr"], STAR, last),
    ]


def fault_ring3(image: Path, count: int = 3) -> list[Access]:
    """What `fault` tries at privilege level 3, just before its last access.

    A processor refuses it by privilege before a hypervisor could see it, so it belongs into no trap log.
    """
    at = symbols(image)
    log = []
    for i in range(1, count + 1):
        value = 0xFFFFFFFF << 32 | i
        log.append(Access("wrmsr", at["ring3_wrmsr"], STAR, value, faults=True))
        log.append(Access("rdmsr", at["ring3_rdmsr"], STAR, value, faults=True))
    return log


def smp(image: Path, count: int = 1000, cores: int = 2, msr: int = STAR) -> list[list[Access]]:
    """`smp`, built with these defines: a log for each vCPU. Only vCPU 0's boot comes before the others."""
    at = symbols(image)
    logs = []
    for core in range(cores):
        values = [core << 32 | i for i in range(count, 0, -1)]
        logs.append(boot(image, core))
        logs[core] += [Access("wrmsr", at["smp_wrmsr"], msr, value, core) for value in values]
        logs[core].append(Access("rdmsr", at["smp_rdmsr"], msr, values[-1], core))
    return logs


def irq(image: Path, writes: int, irqs: int, msr: int = STAR) -> tuple[list[Access], list[Access]]:
    """`irq`, which printed these counts: the log of its boot and loop, and that of its interrupt handler.

    The handler's pairs come anywhere between two accesses of the loop.
    """
    at = symbols(image)

    def pairs(name: str, msr: int, high: int, count: int) -> Iterable[Access]:
        for i in range(1, count + 1):
            yield Access("wrmsr", at[f"{name}_wrmsr"], msr, high << 32 | i)
            yield Access("rdmsr", at[f"{name}_rdmsr"], msr, high << 32 | i)

    return [*boot(image), *pairs("main", msr, 0xAAAAAAAA, writes)], list(pairs("irq", LSTAR, 0xFFFFBBBB, irqs))


def selfcheck(image: Path) -> list[Access]:
    """`selfcheck` with DUMP 0."""
    at = symbols(image)
    log = boot(image)
    for number, case in enumerate(SELFCHECK_CASES, 1):
        value = 0x0000000FFFFFFFF0 if case == "mul" else 0x40000004 << 32 | number
        log.append(Access("wrmsr", at[f"check_{case}"], STAR, value))
        log.append(Access("rdmsr", at["check_rdmsr"], STAR, value))
    return log


def dump(image: Path) -> list[Access]:
    """`selfcheck` with DUMP 1, if the debugger changes nothing."""
    at = symbols(image)
    value = 0x4000000440000001
    return [
        *boot(image),
        Access("wrmsr", at["dump_wrmsr"], STAR, value),
        Access("rdmsr", at["dump_rdmsr"], STAR, value),
    ]


def alias(image: Path, count: int = 4) -> list[Access]:
    """`alias`, built with this define."""
    at = symbols(image)
    log = boot(image)
    for i in range(1, 3 * count + 1):
        rip = at["alias_wrmsr"] + ALIAS_OFFSETS[(i - 1) % 3]
        value = i << 32 | (~i & 0xFFFFFFFF)
        log.append(Access("wrmsr", rip, STAR, value))
        log.append(Access("rdmsr", at["alias_rdmsr"], STAR, value))
    return log
