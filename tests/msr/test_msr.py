"""Finding MSRs, and what their values say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit import msr
from vmexit.errors import VmexitError
from vmexit.msr import Msr, changes, decode
from vmexit.msr.fields import parse_field

ALL = msr.everything()
any_msr = st.sampled_from([one for one in ALL if one.fields])
values = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)


def named(name: str) -> Msr:
    found = msr.find(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("LSTAR", 0xC0000082),
        ("lstar", 0xC0000082),
        ("Ia32_LStar", 0xC0000082),
        ("MSR_LSTAR", 0xC0000082),
        ("EFER", 0xC0000080),
        ("MSR_IA32_CR_PAT", 0x277),
        ("MSR_MTRRfix4K_C0000", 0x268),
        ("MSR_SYSCALL_MASK", 0xC0000084),
        ("SFMASK", 0xC0000084),
        ("MSR_IA32_MC0_CTL", 0x400),
        ("mc31_misc", 0x47F),
        ("IA32_MTRR_PHYSMASK9", 0x213),
        ("MSR_AMD64_SEV", 0xC0010131),
        ("MSR_K7_HWCR", 0xC0010015),
        ("MSR_KVM_STEAL_TIME", 0x4B564D03),
        ("HV_X64_MSR_SINT15", 0x4000009F),
        ("HV_MSR_EOM", 0x40000084),
        ("IA32_XFD", 0x1C4),
        ("MSR_IA32_XFD", 0x1C4),
        ("PMC0", 0xC1),
        ("IA32_A_PMC0", 0x4C1),
        ("DR1_ADDR_MASK", 0xC0011019),
    ],
)
def test_by_name(name: str, address: int) -> None:
    assert named(name).address == address
    assert msr.find(address) is not None


@pytest.mark.parametrize(
    "name", ["", "MSR_", "IA32_", "NOTHING", "MC32_CTL", "MC01_CTL", "MC_CTL", "MC#_CTL", "LSTAR ", "c0000082"]
)
def test_what_is_no_name(name: str) -> None:
    assert msr.find(name) is None


def test_one_address_can_mean_several_things() -> None:
    assert [one.name for one in msr.at(0x309)] == ["FIXED_CTR0", "P4_FLAME_PERFCTR1"]
    assert [one.name for one in msr.at(0xC0000082)] == ["LSTAR", "K6_WHCR"]

    def name_of(address: int, vendor: str | None) -> str | None:
        found = msr.find(address, vendor)
        return found.name if found else None

    assert name_of(0x8B, None) == "BIOS_SIGN_ID"
    assert name_of(0x8B, "intel") == "BIOS_SIGN_ID"
    assert name_of(0x8B, "amd") == "PATCH_LEVEL"
    assert name_of(0x8B, "kvm") == "BIOS_SIGN_ID"
    assert name_of(0x1B, "amd") == "APIC_BASE"
    assert name_of(0xDEAD, "amd") is None


def test_who_it_is_from() -> None:
    assert named("EFER").vendor_text == "Intel and AMD"
    assert named("P4_IQ_ESCR0").vendor_text == "Intel p4"
    assert "volume 4, table 2-2" in named("EFER").sources[0]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("EFER", 0xD01, "EFER = 0xd01 SCE LME LMA NXE"),
        ("EFER", 0, "EFER = 0x0"),
        ("EFER", 0x2, "EFER = 0x2 other=0x2"),
        ("LSTAR", 0xFFFFFFFF81A00080, "LSTAR = 0xffffffff81a00080"),
        ("STAR", 0x23001000000000, "STAR = 0x23001000000000 SYSCALL_CS=0x10 SYSRET_CS=0x23"),
        ("FMASK", 0x47700, "FMASK = 0x47700 TF IF DF IOPL=0x3 NT AC"),
        ("APIC_BASE", 0xFEE00900, "APIC_BASE = 0xfee00900 BSP EN BASE=0xfee00000"),
        ("PAT", 0x0407050600070106, "PAT = 0x407050600070106 PA0=WB PA1=WC PA2=UC- PA3=UC PA4=WB PA5=WP PA6=UC- PA7=WT"),
        ("MTRR_FIX64K_00000", 0x0606060606060606, "MTRR_FIX64K_00000 = 0x606060606060606 T0-T7=WB"),
        ("MTRR_FIX4K_C0000", 0x0606060606060500, "MTRR_FIX4K_C0000 = 0x606060606060500 T0=UC T1=WP T2-T7=WB"),
        ("MTRR_FIX4K_C0000", 0x0000060600000005, "MTRR_FIX4K_C0000 = 0x60600000005 T0=WP T1-T3=UC T4=WB T5=WB T6=UC T7=UC"),
        ("PERF_GLOBAL_CTRL", 0x70000000F, "PERF_GLOBAL_CTRL = 0x70000000f PMC0 PMC1 PMC2 PMC3 FIXED0 FIXED1 FIXED2"),
        ("MTRR_DEF_TYPE", 0xC06, "MTRR_DEF_TYPE = 0xc06 TYPE=WB FE E"),
        ("MTRR_DEF_TYPE", 0xC00, "MTRR_DEF_TYPE = 0xc00 TYPE=UC FE E"),
        ("MTRR_DEF_TYPE", 0xC02, "MTRR_DEF_TYPE = 0xc02 TYPE=0x2 FE E"),
        ("X2APIC_ICR", 0x1000000FB, "X2APIC_ICR = 0x1000000fb VECTOR=0xfb DEST=0x1"),
        ("X2APIC_ICR", 0x300000000C4500, "X2APIC_ICR = 0x300000000c4500 DELIVERY=INIT ASSERT TO=others DEST=0x300000"),
        ("GHCB", 0x7FFF0000, "GHCB = 0x7fff0000 DATA=0x7fff0000"),
        ("GHCB", 0x1234004, "GHCB = 0x1234004 REQUEST=cpuid-req DATA=0x1234000"),
    ],
)
def test_what_a_value_says(name: str, value: int, text: str) -> None:
    assert named(name).explain(value) == text


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("EFER", 0x500, 0xD01, "EFER 0x500 -> 0xd01 +SCE +NXE"),
        ("EFER", 0xD01, 0x500, "EFER 0xd01 -> 0x500 -SCE -NXE"),
        ("EFER", 0xD01, 0xD01, "EFER 0xd01 -> 0xd01"),
        ("EFER", 0x500, 0x502, "EFER 0x500 -> 0x502 other=0x0->0x2"),
        ("TSC", 1, 2, "TSC 0x1 -> 0x2"),
        ("STAR", 0, 0x23001000000000, "STAR 0x0 -> 0x23001000000000 SYSCALL_CS=0x0->0x10 SYSRET_CS=0x0->0x23"),
        ("X2APIC_LVT_TIMER", 0x400EC, 0x100EC, "X2APIC_LVT_TIMER 0x400ec -> 0x100ec +MASKED MODE=deadline->oneshot"),
        ("X2APIC_LVT_LINT0", 0x400, 0x10000, "X2APIC_LVT_LINT0 0x400 -> 0x10000 DELIVERY=NMI->fixed +MASKED"),
        ("APIC_BASE", 0xFEE00900, 0xFEE00D00, "APIC_BASE 0xfee00900 -> 0xfee00d00 +EXTD"),
    ],
)
def test_what_a_change_means(name: str, old: int, new: int, text: str) -> None:
    assert named(name).change(old, new) == text


@given(any_msr, values)
def test_a_value_taken_apart_can_be_put_together(one: Msr, value: int) -> None:
    decoded = decode(one.fields, value)
    assert decoded.encode() == value
    covered = 0
    for field, held in decoded.fields:
        assert field.insert(0, held) == value & field.mask
        covered |= field.mask
    assert decoded.rest == value & ~covered


@given(any_msr, values, st.data())
def test_a_field_is_put_in_alone(one: Msr, value: int, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(one.fields))
    held = data.draw(st.integers(0, field.mask >> field.low))
    changed = field.insert(value, held)
    assert field.extract(changed) == held
    assert changed & ~field.mask == value & ~field.mask
    # What is told of the change is that field, if it changed.
    words = changes(one.fields, value, changed)
    assert len(words) == (changed != value)
    assert all(word.lstrip("+-").partition("=")[0] == field.name for word in words)


@given(any_msr, values, values)
def test_changes_are_told_both_ways(one: Msr, old: int, new: int) -> None:
    there, back = changes(one.fields, old, new), changes(one.fields, new, old)
    assert len(there) == len(back)
    assert bool(there) == (old != new)
    assert [word.translate(str.maketrans("+-", "-+")) for word in there if word[0] in "+-"] == [w for w in back if w[0] in "+-"]


@given(any_msr, values)
def test_words_have_no_blanks(one: Msr, value: int) -> None:
    assert all(word and " " not in word for word in one.words(value))


def test_what_does_not_fit_a_field() -> None:
    field = parse_field("  10:8 DELIVERY how it arrives {0=(fixed) 4=NMI}")
    assert (field.bits, field.text, field.values, field.usual) == ("10:8", "how it arrives", {0: "fixed", 4: "NMI"}, 0)
    for bad in (8, -1):
        with pytest.raises(ValueError, match="does not fit"):
            field.insert(0, bad)


@pytest.mark.parametrize(
    ("start", "names"),
    [
        ("lst", ["lstar"]),
        ("IA32_LST", ["ia32_lstar"]),
        ("msr_ia32_sysenter_e", ["msr_ia32_sysenter_esp", "msr_ia32_sysenter_eip"]),
        ("hv_x64_msr_sim", ["hv_x64_msr_simp"]),
        ("sfm", ["sfmask"]),
        ("zzz", []),
    ],
)
def test_names_that_begin_like_this(start: str, names: list[str]) -> None:
    assert msr.beginning(start) == names


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lsttar", "LSTAR"), ("efr", "EFER"), ("IA32_EFR", "EFER"), ("gsbase", "GS_BASE"), ("physbase", "SMRR_PHYSBASE")],
)
def test_names_that_somebody_may_have_meant(word: str, meant: str) -> None:
    assert meant in msr.similar(word, 20)
    assert len(msr.similar(word, 1)) == 1


def test_the_address_of_a_name() -> None:
    assert msr.address_of("ia32_lstar") == 0xC0000082
    with pytest.raises(VmexitError, match="did you mean LSTAR, STAR, CSTAR"):
        msr.address_of("lsttar")
    with pytest.raises(VmexitError, match=r"there is no MSR ''$"):
        msr.address_of("")


def test_nothing_is_like_nonsense() -> None:
    assert msr.similar("!!!") == []
    assert msr.similar("qqqqqqqq") == []


@given(st.text(max_size=20))
def test_any_word_can_be_looked_up(word: str) -> None:
    found = msr.find(word)
    assert found is None or msr.find(found.name) is not None
    assert all(isinstance(name, str) for name in (*msr.beginning(word), *msr.similar(word)))
