"""Records kept, and sums over them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmexit.link.rings import Records
from vmexit.link.wire import RECORD, Access, Stage
from vmexit.recording import MsrSummary, Recording, Summary

accesses = st.tuples(
    st.integers(0, 3),  # event
    st.sampled_from([0x10, 0x174, 0xC0000082]),
    st.integers(0, 2),  # core
    st.sampled_from([1, 2]),  # access
    st.sampled_from([1, 2]),  # stage
    st.integers(0, (1 << 64) - 1),
)


def records_of(rows: list[tuple[int, int, int, int, int, int]], first_sequence: int = 0) -> Records:
    records = np.zeros(len(rows), RECORD)
    for i, (event, msr, core, access, stage, value) in enumerate(rows):
        record = records[i]
        record["sequence"], record["event"], record["msr"], record["vcpu"] = first_sequence + i, event + 1, msr, core
        record["access"], record["stage"], record["value"], record["action"] = access, stage, value, 1
    return records


@given(st.lists(st.lists(accesses, max_size=12), max_size=6))
def test_sums_are_those_of_a_simple_count(batches: list[list[tuple[int, int, int, int, int, int]]]) -> None:
    summary = Summary()
    wanted: dict[tuple[int, int, int, int], MsrSummary] = {}
    total = 0
    for batch in batches:
        summary.add(records_of(batch, total))
        for event, msr, core, access, stage, value in batch:
            key = (event, msr, access, stage)
            row = wanted.setdefault(key, MsrSummary(event, Access(access), Stage(stage), msr, 0, first=value))
            row.count += 1
            row.cores.add(core)
            row.last = value
        total += len(batch)
    assert summary.total == total
    assert summary.rows() == [wanted[key] for key in sorted(wanted)]


def test_a_recording_keeps_the_newest() -> None:
    recording = Recording(10)
    for batch in range(10):
        recording.add(records_of([(0, batch, 0, 1, 1, batch)] * 4, batch * 4))
    assert len(recording) + recording.forgotten == 40
    assert len(recording) >= 10
    assert [trap.msr for trap in recording][-10:] == [7, 7, 8, 8, 8, 8, 9, 9, 9, 9]
    assert [trap.sequence for trap in recording] == list(range(recording.forgotten, 40))


def test_a_batch_that_is_larger_than_what_is_kept() -> None:
    recording = Recording(1)
    recording.add(records_of([(0, 1, 0, 1, 1, 1)] * 100))
    assert len(recording) == 100 and recording.forgotten == 0
    recording.add(records_of([(0, 1, 0, 1, 1, 1)]))
    assert len(recording) == 1 and recording.forgotten == 100


def test_an_empty_batch() -> None:
    recording, summary = Recording(5), Summary()
    recording.add(records_of([]))
    summary.add(records_of([]))
    assert (len(recording), list(recording), summary.rows(), summary.total) == (0, [], [], 0)
