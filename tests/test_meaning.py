"""Tests of what is shown of an MSR besides numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.commands.fakes import record
from vmexit import meaning
from vmexit.link.rings import joined
from vmexit.link.wire import Access, Stage
from vmexit.meaning import Meanings
from vmexit.trap import traps_of

_RECORDS = st.lists(
    st.builds(
        record,
        access=st.sampled_from([Access.WRMSR, Access.RDMSR]),
        stage=st.sampled_from([Stage.PRE, Stage.POST]),
        msr=st.sampled_from([0xC0000080, 0xC0000082, 0x277, 0x10, 0xDEAD0, 0xDEAD1]),
        value=st.sampled_from([0, 1, 0xD01, 0x0007040600070406, (1 << 64) - 1]),
    ),
    min_size=1,
    max_size=40,
)


@given(_RECORDS)
def test_many_at_once_mean_what_each_means(records: list[object]) -> None:
    together = joined(records)  # type: ignore[arg-type]
    meanings = Meanings()
    texts, chosen = meanings.of_all(together)
    assert [texts[number] for number in chosen] == [meanings.of(trap) for trap in traps_of(together)]


def test_a_value_that_is_not_there_means_nothing() -> None:
    meanings = Meanings()
    read = record(msr=0xC0000080, value=0xD01, access=Access.RDMSR)
    (before,) = traps_of(read)
    (after,) = traps_of(record(msr=0xC0000080, value=0xD01, access=Access.RDMSR, stage=Stage.POST))
    assert (meanings.of(before), meanings.of(after)) == ("EFER", "EFER SCE LME LMA NXE")
    assert meanings.text(0xDEAD0, 1) == meanings.name(0xDEAD0) == ""
    assert meanings.text(0xC0000082, 1) == meanings.name(0xC0000082) == "LSTAR"


def test_what_is_remembered_is_bounded() -> None:
    meanings = Meanings()
    for value in range(meaning._MOST + 10):
        meanings.text(0x277, value)
        meanings.name(value)
    assert len(meanings._texts) <= meaning._MOST
    assert len(meanings._msrs) <= meaning._MOST
    assert meanings.text(0x277, 6).startswith("PAT PA0=WB ")
