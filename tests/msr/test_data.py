"""The data files: complete, consistent, and quick to read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from vmexit import msr
from vmexit.commands import event_options, registry
from vmexit.commands.tokens import parse_number
from vmexit.msr.fields import parse_field
from vmexit.msr.table import DATA, VENDORS

FILES = sorted(DATA.glob("[0-9]*.txt"))
ALL = msr.everything()
NAMES = [name for one in ALL for name in (one.name, *one.aliases)]


def definitions() -> list[str]:
    """The lines that make MSRs."""
    return [line for path in FILES for line in path.read_text().splitlines() if line and line[0] not in "# "]


def test_there_are_enough_of_them() -> None:
    # A line that makes many counts once.
    assert len(definitions()) >= 400
    assert len({one.address for one in ALL}) >= 1000


def test_enough_of_them_have_fields() -> None:
    with_fields = {re.sub(r"\d+", "#", one.name) for one in ALL if one.fields}
    assert len(with_fields) >= 60


OFTEN_WRITTEN = """
    EFER STAR LSTAR CSTAR FMASK FS_BASE GS_BASE KERNEL_GS_BASE TSC_AUX APIC_BASE X2APIC_TPR X2APIC_EOI X2APIC_LDR X2APIC_SIVR
    X2APIC_ICR X2APIC_LVT_TIMER X2APIC_LVT_LINT0 X2APIC_INIT_COUNT X2APIC_DIV_CONF X2APIC_SELF_IPI SPEC_CTRL PRED_CMD
    FLUSH_CMD ARCH_CAPABILITIES PAT MTRR_CAP MTRR_PHYSBASE0 MTRR_PHYSMASK9 MTRR_FIX64K_00000 MTRR_FIX4K_F8000 MTRR_DEF_TYPE
    MISC_ENABLE DEBUGCTL LASTBRANCHFROMIP LBR_SELECT ARCH_LBR_CTL PERFEVTSEL0 PERFEVTSEL7 PERF_GLOBAL_CTRL PERF_GLOBAL_STATUS
    PERF_GLOBAL_OVF_CTRL FIXED_CTR_CTRL PEBS_ENABLE DS_AREA TSC TSC_ADJUST TSC_DEADLINE MCG_CAP MCG_STATUS MC0_CTL MC31_STATUS
    MC0_CTL2 THERM_INTERRUPT THERM_STATUS HWP_REQUEST PM_ENABLE ENERGY_PERF_BIAS PKG_POWER_LIMIT RAPL_POWER_UNIT
    FEATURE_CONTROL SMI_COUNT VMX_BASIC VMX_MISC VMX_EPT_VPID_CAP XSS U_CET S_CET PL0_SSP PL3_SSP RTIT_CTL RTIT_STATUS BNDCFGS
    UMWAIT_CONTROL TSX_CTRL MCU_OPT_CTRL SYSENTER_CS SYSENTER_ESP SYSENTER_EIP SYSCFG HWCR VM_CR VM_HSAVE_PA PSTATE_CTL
    PSTATE_DEF0 CPPC_REQ CPPC_ENABLE DE_CFG LS_CFG BU_CFG PERF_CTL0 PERF_LEGACY_CTL0 GHCB SEV_STATUS KVM_SYSTEM_TIME_NEW
    KVM_ASYNC_PF_EN KVM_STEAL_TIME KVM_PV_EOI_EN HV_GUEST_OS_ID HV_HYPERCALL HV_SINT0 HV_STIMER0_CONFIG HV_VP_ASSIST_PAGE
    HV_REFERENCE_TSC
""".split()
# Their value is one number: an address, a count, a mask without names.
ONE_NUMBER = set(
    """LSTAR CSTAR FS_BASE GS_BASE KERNEL_GS_BASE SYSENTER_ESP SYSENTER_EIP X2APIC_EOI LASTBRANCHFROMIP DS_AREA TSC TSC_ADJUST
    TSC_DEADLINE MC0_CTL PL0_SSP PL3_SSP BU_CFG""".split()
)


@pytest.mark.parametrize("name", OFTEN_WRITTEN)
def test_what_systems_write_most_is_there_with_its_fields(name: str) -> None:
    found = msr.find(name)
    assert found is not None
    assert bool(found.fields) == (name not in ONE_NUMBER)


def test_no_name_stands_twice() -> None:
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []


def test_no_address_has_two_meanings_for_the_same_processors() -> None:
    counted = Counter((one.address, one.vendor) for one in ALL)
    assert [(f"{address:x}", vendor) for (address, vendor), count in counted.items() if count > 1] == []
    for one in ALL:
        # Intel and AMD can differ; what both have is nobody's else.
        assert one.vendor != "both" or not {other.vendor for other in msr.at(one.address)} & {"intel", "amd"}, one


def test_every_name_can_be_typed() -> None:
    assert [name for name in NAMES if not re.fullmatch("[A-Z][A-Z0-9_]*", name)] == []
    # Numbers are read first, and options too, so that a name that is one could never be meant.
    assert [name for name in NAMES if parse_number(name) is not None] == []
    assert not {name.lower() for name in NAMES} & {*event_options.ALL, *registry.names()}


def test_a_name_and_its_alias_find_the_same() -> None:
    for one in ALL:
        for name in (one.name, *one.aliases):
            found = msr.find(name)
            assert found is not None and (found.address, found.name) == (one.address, one.name), name


def test_fields_lie_apart_within_64_bits() -> None:
    for one in ALL:
        seen = 0
        for field in one.fields:
            assert 0 <= field.low <= field.high <= 63, (one, field)
            assert not seen & field.mask, (one, field)
            seen |= field.mask
            assert re.fullmatch("[A-Z][A-Z0-9_]*", field.name), (one, field)
        assert len({field.name for field in one.fields}) == len(one.fields), one
        assert list(one.fields) == sorted(one.fields, key=lambda field: field.low), one


def test_the_names_of_a_fields_values_fit_it() -> None:
    for one in ALL:
        for field in one.fields:
            assert all(value <= field.mask >> field.low for value in field.values), (one, field)
            assert len(set(field.values.values())) == len(field.values), (one, field)
            assert all(re.fullmatch(r"[A-Za-z0-9+-]+", name) for name in field.values.values()), (one, field)


def test_each_has_a_source_a_vendor_and_a_meaning() -> None:
    for one in ALL:
        assert one.sources and all(one.sources), one
        assert one.vendor.partition("-")[0] in VENDORS, one
        assert one.text and one.text[-1] not in ".:", one
        assert one.address <= 0xFFFF_FFFF


def test_every_source_is_used() -> None:
    used = {key for line in definitions() for key in line.split()[3].split(",")}
    lines = (DATA / "sources.txt").read_text().splitlines()
    assert {line.split()[0] for line in lines if line and line[0] != "#"} == used


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_lines_are_what_the_readme_says(path: Path) -> None:
    before = ""
    for line in path.read_text(encoding="ascii").splitlines():
        assert line == line.rstrip() and "\t" not in line
        if line.startswith(" "):
            assert before and before[0] != "#", f"a field of nothing: {line}"
            assert re.fullmatch(r"  (like [A-Z0-9_]+|\d+(:\d+@?)? +[A-Z].*)", line), line
        elif line and line[0] != "#":
            assert re.fullmatch(r"[0-9a-f]+(\+[0-9a-f]+\*[0-9]+)?  [A-Z0-9_,#]+  [a-z0-9-]+  [a-z0-9,-]+  .+", line), line
            assert ("+" in line.split()[0]) == ("#" in line.split()[1]), line
        before = line or before


@pytest.mark.parametrize("bad", ["", "x", "8", "64 NAME", "3:4 NAME", "like"])
def test_a_line_that_is_no_field(bad: str) -> None:
    with pytest.raises(ValueError, match=r"no field|none of them"):
        parse_field(bad)
