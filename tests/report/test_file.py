"""The file of a recording: what is written is read, whatever happens to it in between."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers

from tests.report.traps import boot, of_process, record, records_of, trap
from vmexit.link.rings import Records, joined
from vmexit.link.wire import RECORD
from vmexit.report import fileformat
from vmexit.report.fileformat import DamagedError, RecordingError
from vmexit.report.reader import Chunk, RecordingFile
from vmexit.report.recorder import Recorder

WIDTHS = ("<u1", "<u2", "<u4", "<u8")


def chunks(path: Path) -> tuple[list[Chunk], RecordingFile]:
    with RecordingFile(path) as file:
        return list(file.chunks()), file


def many(count: int, start: int = 0) -> Records:
    """Records with all kinds of values."""
    source = random.Random(start)
    return records_of(
        (trap(source.choice((0x10, 0x174, 0xC000_0082)), source.getrandbits(64), vcpu=source.randrange(4)) for _ in range(count)),
        start=start,
    )


# ---- columns and blocks ----


@given(st.data())
def test_columns_come_back(data: st.DataObject) -> None:
    """Of any width, with any numbers, constant and rising ones among them."""
    count = data.draw(st.integers(1, 40))
    columns = {}
    for place, width in enumerate(data.draw(st.lists(st.sampled_from(WIDTHS), max_size=6))):
        values = data.draw(numbers.arrays(width, count))
        columns[f"c{place}"] = np.full(count, values[0]) if data.draw(st.booleans()) else values
    columns["sequence"] = np.arange(count, dtype=np.uint64) + np.uint64(data.draw(st.integers(0, 1 << 63)))
    columns["time_ns"] = data.draw(numbers.arrays("<u8", count))
    made = fileformat.traps_block(columns, lost=data.draw(st.integers(0, (1 << 64) - 1)))
    head = fileformat.Head.unpack(made)
    payload = made[fileformat.BLOCK.size :]
    head.check(payload)
    chunk = fileformat.ChunkHead.unpack(payload)
    assert (chunk.count, chunk.first_ns, chunk.last_ns) == (count, columns["time_ns"].min(), columns["time_ns"].max())
    found = fileformat.read_traps(payload)
    assert list(found) == list(columns)
    for name, values in columns.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@given(st.binary(max_size=300))
def test_payloads_of_anything(payload: bytes) -> None:
    """Whatever has the right checksum is read, or refused as damaged."""
    for reads in (fileformat.read_traps, fileformat.read_text, fileformat.Head.unpack):
        with contextlib.suppress(DamagedError):
            reads(payload)


@given(st.integers(0, 5_000), st.integers(0, 255))
def test_a_payload_with_a_wrong_byte(place: int, byte: int) -> None:
    """Even where the checksum is right all the same."""
    made = fileformat.traps_block({name: boot()[name] for name in RECORD.names or ()}, 0)[fileformat.BLOCK.size :]
    place %= len(made)
    changed = made[:place] + bytes([byte]) + made[place + 1 :]
    try:
        found = fileformat.read_traps(changed)
    except DamagedError:
        return
    assert len({len(values) for values in found.values()}) == 1


def test_a_block_that_claims_too_much() -> None:
    """Nothing is unpacked that would take gigabytes."""
    for count, columns in (((1 << 32) - 1, 0), (0, 1), (1, 65)):
        payload = fileformat.CHUNK.pack(count, 0, 0, 0, columns)
        with pytest.raises(DamagedError):
            fileformat.read_traps(payload)
    head = fileformat.BLOCK.pack(fileformat.MARK, fileformat.TRAPS, 1 << 30, 0, 0)[:-4]
    with pytest.raises(DamagedError, match="header"):
        fileformat.Head.unpack(head + struct.pack("<I", zlib.crc32(head)))


def test_what_is_known_is_merged() -> None:
    known: dict[str, Any] = {"events": {"0": {"text": "a"}}, "vmexit": "1"}
    fileformat.merge(known, {"events": {"1": {"text": "b"}}, "vmexit": "2", "clock": {"started_ns": 5}})
    assert known == {"events": {"0": {"text": "a"}, "1": {"text": "b"}}, "vmexit": "2", "clock": {"started_ns": 5}}


# ---- whole files ----


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=8))
def test_what_is_recorded_is_read(tmp_path: Path, sizes: list[int]) -> None:
    parts, total = [], 0
    for size in sizes:
        parts.append(many(size, total))
        total += size
    found, file = chunks(record(tmp_path / "r", *parts, lost=3))
    assert file.is_whole and file.total == sum(map(len, found)) == total
    assert file.end == {"traps": total, "lost": 3, "reason": "the machine ended", "exit_status": 0}
    assert file.lost == 3 and file.info["machine"]["name"] == "QEMU 7.2.22"
    if total:
        wanted = joined(parts)
        read = joined([chunk.records() for chunk in found])
        for name in set(RECORD.names or ()) - {"action", "script", "text"}:
            np.testing.assert_array_equal(read[name], wanted[name], name)
        assert file.times == (wanted["time_ns"][0], wanted["time_ns"][-1])


def test_columns_that_only_some_records_have(tmp_path: Path) -> None:
    """Processes, where records tell them; their names are asked for, once more where a name is another later on."""
    names = iter(["init", "init", "sh"])
    path = tmp_path / "r"
    recorder = Recorder(path)
    recorder.name_of = lambda pid, tid: next(names) if (pid, tid) == (1, 7) else None
    recorder.begin({})
    for start in range(3):
        recorder.add(records_of([trap(0x10, 1, **of_process(1, 7)), trap(0x10, 2)], start=2 * start))
        before = recorder.traps
        while recorder.traps == before:
            time.sleep(0.01)
    recorder.close({"reason": ""})
    found, file = chunks(path)
    assert [chunk.pids().tolist() for chunk in found] == [[1, 0xFFFF_FFFF]] * 3
    assert found[0]["thread"].tolist() == [7, 0] and found[0]["nothing"].tolist() == [0, 0]
    assert file.info["processes"] == {"1": "sh"}


def test_many_traps_make_several_blocks(tmp_path: Path) -> None:
    part = np.tile(boot(), 10_000)
    part["sequence"] = np.arange(len(part))
    path = record(tmp_path / "r", part, part)
    found, file = chunks(path)
    assert max(map(len, found)) == 65_536 and len(found) >= 3 and file.total == 180_000
    assert path.stat().st_size < 180_000 * 8


# ---- damage ----


def blocks_of(data: bytes) -> list[tuple[int, int]]:
    """Where each block begins and ends."""
    found, place = [], fileformat.START.size
    while place < len(data):
        end = place + fileformat.BLOCK.size + fileformat.Head.unpack(data[place:]).length
        found.append((place, end))
        place = end
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a recording with three blocks of 100 traps."""
    path = tmp_path_factory.mktemp("three") / "r"
    recorder = Recorder(path)
    recorder.begin({"vmexit": "0.1.0"})
    for start in range(0, 300, 100):
        recorder.add(many(100, start))
        while recorder.traps < start + 100:
            time.sleep(0.01)
    recorder.close({"reason": "the machine ended"})
    return path.read_bytes()


def test_cut_off_anywhere(three: bytes, tmp_path: Path) -> None:
    """At each byte: all whole blocks of before it are read, and that something is missing is said."""
    path = tmp_path / "cut"
    places = blocks_of(three)
    traps = places[1:4]
    for length in range(fileformat.START.size, len(three), 7):
        path.write_bytes(three[:length])
        found, file = chunks(path)
        assert sum(map(len, found)) == 100 * sum(end <= length for _, end in traps)
        (note,) = file.notes()
        assert note.startswith("it was cut off, or its recorder was killed") and not file.is_whole
        assert (f"at byte {max(end for _, end in [(0, fileformat.START.size), *places] if end <= length):,} of" in note) == (
            length not in {fileformat.START.size, *(end for _, end in places)}
        )
    path.write_bytes(three)
    assert chunks(path)[1].is_whole


def test_damaged_anywhere(three: bytes, tmp_path: Path) -> None:
    """A wrong byte costs one block, or what is behind a block's header, and is said; nothing that is wrong is ever shown."""
    path = tmp_path / "damaged"
    right = {chunk["value"].tobytes() for chunk in chunks(_written(path, three))[0]}
    source = random.Random(1)
    for place in range(fileformat.START.size, len(three), 11):
        wrong = bytes([three[place] ^ 1 << source.randrange(8)])
        found, file = chunks(_written(path, three[:place] + wrong + three[place + 1 :]))
        assert {chunk["value"].tobytes() for chunk in found} <= right
        assert not file.is_whole and file.notes()
        (start,) = [start for start, end in blocks_of(three) if start <= place < end]
        if place - start >= fileformat.BLOCK.size:
            assert file.damaged == {start}
            if file.end is not None:
                assert file.notes() == [f"1 damaged block left out, the first at byte {start:,}"]


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_blocks_of_later_versions_are_passed_over(three: bytes, tmp_path: Path) -> None:
    (_, end), *_ = blocks_of(three)
    path = _written(tmp_path / "r", three[:end] + fileformat.block(b"NEWS", b"what?") + three[end:])
    found, file = chunks(path)
    assert sum(map(len, found)) == 300 and file.is_whole


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no recording of vmexit"),
        (b"\x89VMXIT\r", "is no recording of vmexit"),
        (b"MZ" * 50, "is no recording of vmexit"),
        (fileformat.START.pack(fileformat.MAGIC, 2), "is of version 2 of recordings; this vmexit reads version 1"),
    ],
)
def test_what_is_no_recording(content: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=why):
        RecordingFile(_written(tmp_path / "r", content))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("none", "No such file"), ("fifo", "is no regular file"), (".", "is no regular file")):
        with pytest.raises(RecordingError, match=why):
            RecordingFile(tmp_path / name)


# ---- writing ----


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Unless it is a recording, or nothing."""
    image = _written(tmp_path / "disk.img", b"precious")
    with pytest.raises(RecordingError, match=r"disk\.img is there already and is no recording: it is not overwritten"):
        Recorder(image)
    assert image.read_bytes() == b"precious"
    for path in (_written(tmp_path / "empty", b""), record(tmp_path / "old", many(5))):
        assert chunks(record(path, many(2)))[1].total == 2
    with pytest.raises(RecordingError, match="Is a directory"):
        Recorder(tmp_path)
    with pytest.raises(RecordingError, match="No such file"):
        Recorder(tmp_path / "none" / "r")


def test_one_that_never_begins_leaves_nothing(tmp_path: Path) -> None:
    Recorder(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    old = record(tmp_path / "old", many(3))
    before = old.read_bytes()
    Recorder(old).close()
    assert old.read_bytes() == before


def test_two_at_once(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.begin({})
        with pytest.raises(RecordingError, match="is being recorded into by somebody else"):
            Recorder(tmp_path / "r")
        with RecordingFile(tmp_path / "r") as file:
            assert file.notes() == ["it is still being recorded: this is what there was when it was read"]


def test_records_are_in_the_file_soon(tmp_path: Path) -> None:
    """Without any help: whoever is killed later has written them."""
    with Recorder(tmp_path / "r") as recorder:
        recorder.begin({})
        recorder.add(many(10))
        deadline = time.monotonic() + 60
        while recorder.traps < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sum(map(len, chunks(tmp_path / "r")[0])) == 10


def test_a_file_that_grows_no_more(tmp_path: Path) -> None:
    """A limit stands in for a full disk: one line, and what is in the file is whole."""
    path = tmp_path / "r"
    script = f"""
import resource, signal
from pathlib import Path
from tests.report.test_file import many
from vmexit.report.fileformat import RecordingError
from vmexit.report.recorder import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(Path({str(path)!r}))
recorder.begin({{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    for start in range(0, 1_000_000, 1000):
        recorder.add(many(1000, start))
        recorder.check()
except RecordingError as error:
    print(error)
recorder.close()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    found, file = chunks(path)
    count = sum(map(len, found))
    assert file.problem is None and file.end is None
    told = f"; the {count:,} traps up to then are in it" if count else ""
    assert done.stdout == f"{path}: File too large{told}\n"
    assert path.stat().st_size <= 60_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(Path("/dev/full"))
    with pytest.raises(RecordingError, match=r"/dev/full: No space left on device$"):
        recorder.begin({})
    recorder.close()


def test_whoever_waits_for_room_is_let_go_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is a mistake of ours."""
    recorder = Recorder(tmp_path / "r")
    recorder.begin({})
    reached, may_go_on = threading.Event(), threading.Event()

    def fails(*_: Any) -> bytes:
        reached.set()
        may_go_on.wait(60)
        raise ValueError("a mistake")

    monkeypatch.setattr(fileformat, "traps_block", fails)
    recorder.add(many(10))
    assert reached.wait(60)
    full = np.tile(many(1000), 600)
    recorder.add(full)
    failed: list[RecordingError] = []

    def adds() -> None:
        try:
            recorder.add(full)
        except RecordingError as error:
            failed.append(error)

    waiting = threading.Thread(target=adds)
    waiting.start()
    may_go_on.set()
    waiting.join(60)
    assert not waiting.is_alive()
    assert str(failed[0]) == f"{tmp_path / 'r'}: internal error: ValueError: a mistake"
    with pytest.raises(RecordingError):
        recorder.close({"reason": ""})
