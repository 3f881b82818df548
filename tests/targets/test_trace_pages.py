"""Taking the kernel's trace pages apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.targets.trace_page_maker import (
    DATA,
    FORMATS,
    HEADER,
    LAYOUT,
    WRITE_MSR,
    entry,
    host_data,
    page,
    taken_back,
    time_extend,
    time_stamp,
)
from vmexit.targets.trace_pages import Field, FormatError, Page, parse_event_format, parse_page_format, read_page

FORMAT = parse_event_format(FORMATS["events/msr/write_msr"], "msr", "val", "failed")
LONG = 40 * 4


def data(value: int) -> bytes:
    return host_data(WRITE_MSR, 0x6E0, value)


def seen(read: Page) -> list[tuple[int, int]]:
    """Times and values."""
    found = []
    for entries in read.entries:
        values = entries.column(FORMAT.fields["val"])
        if values is not None:
            found += list(zip(entries.times.tolist(), values.tolist(), strict=True))
    return found


class TestFormats:
    def test_page(self) -> None:
        assert (LAYOUT.timestamp, LAYOUT.commit, LAYOUT.data) == (Field(0, 8), Field(8, 8), Field(16, DATA))
        assert LAYOUT.size == 4096

    def test_event(self) -> None:
        assert FORMAT.number == WRITE_MSR
        assert (FORMAT.fields["msr"], FORMAT.fields["val"]) == (Field(8, 4), Field(16, 8))

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "common_type"),
            (FORMATS["events/msr/write_msr"].replace("u64 val", "u64 value"), "'val'"),
            (FORMATS["events/msr/write_msr"].replace("offset:16;\tsize:8", "offset:16;\tsize:3"), "'val'"),
            (FORMATS["events/msr/write_msr"].replace("ID:", "Id:"), "ID"),
        ],
    )
    def test_strange_events_are_refused(self, text: str, complaint: str) -> None:
        with pytest.raises(FormatError, match=complaint):
            parse_event_format(text, "msr", "val")

    @pytest.mark.parametrize("text", ["", HEADER.replace("commit", "committed"), HEADER.replace("offset:16", "offset:18")])
    def test_strange_pages_are_refused(self, text: str) -> None:
        with pytest.raises(FormatError):
            parse_page_format(text)

    @given(st.text())
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        for parse in (parse_page_format, parse_event_format):
            try:
                parse(text)
            except FormatError:
                continue


class TestPages:
    def test_events_of_one_length(self) -> None:
        read = read_page(page(*(entry(data(i), 3) for i in range(100)), time=1000), LAYOUT)
        assert seen(read) == [(1003 + 3 * i, i) for i in range(100)]
        assert len(read.entries) == 1
        assert (read.lost, read.damaged) == (0, False)

    def test_events_of_other_lengths_between_them(self) -> None:
        others = [entry(b"\x05" * 8, 1), entry(data(2), 1), entry(b"\x06" * LONG, 1), entry(data(4) + bytes(8), 1)]
        assert seen(read_page(page(entry(data(1), 1), *others, entry(data(5), 1)), LAYOUT))[0:2] == [(1001, 1), (1003, 2)]
        read = seen(read_page(page(entry(data(1), 1), *others, entry(data(5), 1)), LAYOUT))
        assert [(time, value) for time, value in read if value < 10] == [(1001, 1), (1003, 2), (1005, 4), (1006, 5)]

    def test_long_pauses(self) -> None:
        pause = 5_000_000_000
        read = read_page(page(entry(data(1), 1), time_extend(pause), entry(data(2), 0), entry(data(3), 2)), LAYOUT)
        assert seen(read) == [(1001, 1), (1001 + pause, 2), (1003 + pause, 3)]

    def test_absolute_times(self) -> None:
        start = (3 << 59) + 17
        read = read_page(page(entry(data(1), 1), time_stamp(start + 1000), entry(data(2), 5), time=start), LAYOUT)
        assert seen(read) == [(start + 1, 1), (start + 1005, 2)]

    def test_events_that_were_taken_back(self) -> None:
        read = read_page(page(entry(data(1), 1), taken_back(36, 4), entry(data(2), 1)), LAYOUT)
        assert seen(read) == [(1001, 1), (1006, 2)]

    def test_what_is_behind_the_padding_does_not_count(self) -> None:
        read = read_page(page(entry(data(1), 1), (29).to_bytes(4, "little"), entry(data(2), 1)), LAYOUT)
        assert seen(read) == [(1001, 1)]
        assert not read.damaged

    def test_what_is_behind_the_end_does_not_count(self) -> None:
        assert seen(read_page(page(entry(data(1), 1), entry(data(2), 1), size=36), LAYOUT)) == [(1001, 1)]

    @pytest.mark.parametrize(("told", "lost", "counted"), [(True, 123, 123), (False, 123, 1), (True, 0, 1)])
    def test_lost_events(self, told: bool, lost: int, counted: int) -> None:
        read = read_page(page(entry(data(1), 1), lost=lost, told=told), LAYOUT)
        assert (read.lost, seen(read)) == (counted, [(1001, 1)])

    def test_a_field_beyond_the_data_is_missed(self) -> None:
        (entries,) = read_page(page(entry(data(1)[:16], 1)), LAYOUT).entries
        assert entries.column(FORMAT.fields["val"]) is None
        assert entries.column(FORMAT.fields["msr"]) is not None

    @pytest.mark.parametrize(
        "broken",
        [
            page(entry(data(1), 1), entry(data(2), 1)[:20]),
            page(entry(data(1), 1), b"\x00\x00\x00\x00\x00\x00\x00\x00"),
            page(entry(data(1), 1), b"\x00\x00\x00\x00\xff\xff\xff\xff"),
            page(entry(data(1), 1), b"\x1e\x00\x00\x00"),
            page(entry(data(1), 1), size=0xFFFFF),
            page(entry(data(1), 1), entry(data(2), 1))[:70],
        ],
    )
    def test_what_comes_before_the_damage_is_there(self, broken: bytes) -> None:
        read = read_page(broken, LAYOUT)
        assert seen(read) == [(1001, 1)]
        assert read.damaged

    @given(st.binary(max_size=5000))
    def test_any_bytes_are_taken_apart(self, broken: bytes) -> None:
        read = read_page(broken, LAYOUT)
        seen(read)
        assert sum(len(entries.times) for entries in read.entries) <= len(broken) // 8 + 1

    @given(st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), max_size=8), st.integers(0, 4096))
    def test_damaged_pages(self, damages: list[tuple[int, bytes]], size: int) -> None:
        whole = bytearray(page(*(entry(data(i), 7) for i in range(113)), lost=5))
        for place, rubbish in damages:
            whole[place : place + len(rubbish)] = rubbish
        read = read_page(bytes(whole[:size]), LAYOUT)
        assert len(seen(read)) <= 4096 // 8
        assert 0 <= read.lost < 1 << 47
