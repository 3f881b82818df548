"""What outputs write of traps: JSON that any reader takes, and traces as Perfetto's own definitions have them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.commands.fakes import record
from tests.guests.build import symbols
from tests.machines import guest
from tests.outputs.peers import STAR, finish, wait_until
from vmexit import Stage, Trap
from vmexit.link.rings import Records, joined
from vmexit.link.wire import Access, Action, RecordFlag
from vmexit.names import TrapNames
from vmexit.outputs import rows
from vmexit.outputs.encoders import JsonEncoder
from vmexit.outputs.rows import Gatherer, Item
from vmexit.trap import traps_of

EVERY_MSR = range(1 << 32)


def item(*records: Any, texts: list[bytes] | None = None, waits: bool = True, faults: dict[int, str] | None = None) -> Item:
    return Item(joined(records), texts, faults or {}, len(records), waits)


def of_script(action: Action, core: int = 0, **more: Any) -> Any:
    return record(action=action, core=core, **more)


class TestGathering:
    """Records of one trap become one row."""

    def gathered(self, *items: Item) -> list[tuple[int, int, bytes]]:
        gatherer = Gatherer()
        found = [row for each in items for row in gatherer.add(each)]
        found += gatherer.rest(all_of_them=True)
        return [(row.trap.core, row.actions, row.text) for row in found]

    def test_prints_belong_to_the_record_before_them_on_their_core(self) -> None:
        one = item(
            of_script(Action.RECORD, 0, sequence=0),
            of_script(Action.RECORD, 1, sequence=1),
            of_script(Action.PRINT, 0, sequence=2),
            of_script(Action.PRINT, 1, sequence=3),
            of_script(Action.PRINT, 0, sequence=4),
            texts=[b"", b"", b"a", b"x", b"b"],
        )
        assert self.gathered(one) == [(0, 17, b"ab"), (1, 17, b"x")]

    def test_also_where_they_come_later(self) -> None:
        first = item(of_script(Action.RECORD))
        second = item(of_script(Action.PRINT), of_script(Action.RECORD), texts=[b"a", b""])
        assert self.gathered(first, second) == [(0, 17, b"a"), (0, 1, b"")]

    def test_a_break_belongs_to_its_trap_and_the_next_to_another(self) -> None:
        one = item(of_script(Action.RECORD), of_script(Action.BREAK), of_script(Action.BREAK))
        assert self.gathered(one) == [(0, 5, b""), (0, 4, b"")]

    def test_another_place_is_another_trap(self) -> None:
        one = item(of_script(Action.RECORD, rip=1), of_script(Action.PRINT, rip=2), texts=[b"", b"a"])
        assert self.gathered(one) == [(0, 1, b""), (0, 16, b"a")]

    def test_what_nothing_is_expected_of_is_not_held(self) -> None:
        gatherer = Gatherer()
        assert len(list(gatherer.add(item(of_script(Action.RECORD), waits=False)))) == 1 and not gatherer.held

    def test_nothing_is_held_for_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gatherer = Gatherer()
        monkeypatch.setattr(rows, "_HOLD_S", 3600.0)
        list(gatherer.add(item(of_script(Action.RECORD))))
        assert not list(gatherer.rest(all_of_them=False)) and gatherer.held == 1
        monkeypatch.setattr(rows, "_HOLD_S", 0.0)
        time.sleep(0.001)
        assert len(list(gatherer.rest(all_of_them=False))) == 1 and not gatherer.held


class TestJson:
    """``jsonl``."""

    def objects(self, *items: Item) -> list[dict[str, Any]]:
        encoder = JsonEncoder()
        return [json.loads(message) for message in [*encoder.encode(items), *encoder.rest(all_of_them=True)]]

    def test_every_field_of_a_trap_is_there(self) -> None:
        (found,) = self.objects(item(record(7, value=0xFFFF_FFFF_8000_1234, core=3, event=2, length=2, flags=1)))
        assert set(Trap._fields) - {"caller_number"} <= set(found)
        assert found["value"] == "0xffffffff80001234" and found["msr"] == "0xc0000082" and found["name"] == "LSTAR"
        assert (found["sequence"], found["core"], found["event"], found["length"]) == (7, 3, 2, 2)
        assert (found["access"], found["stage"], found["action"], found["flags"]) == ("wrmsr", "pre", ["record"], ["skipped"])

    def test_places_are_named(self) -> None:
        class Named(TrapNames):
            def of(self, address: int) -> str:
                return 'odd "name"+0x4 [kernel]' if address == 0xFFFF_FFFF_8100_0004 else ""

            def thread_name(self, pid: int, tid: int) -> str:
                return ""

            def callers(self, records: Records) -> npt.NDArray[np.uint64]:
                return np.array([self.caller_of(trap) for trap in traps_of(records)], np.uint64)

            def caller_of(self, trap: Trap) -> int:
                return {1: 0xFFFF_FFFF_8100_0004, 2: 0xFFFF_FFFF_8200_0000}.get(trap.caller_number, 0)

        several = joined([record(rip=0xFFFF_FFFF_8100_0004), record(), record()])
        several["caller"] = [2, 1, 0]
        several["flags"][1] = RecordFlag.CALLER_GUESSED
        encoder = JsonEncoder(Named())
        found = [json.loads(message) for message in [*encoder.encode([item(several)]), *encoder.rest(all_of_them=True)]]
        assert [(one["symbol"], one["caller"], one["caller_symbol"], one["flags"]) for one in found] == [
            ('odd "name"+0x4 [kernel]', "0xffffffff82000000", None, []),
            (None, "0xffffffff81000004", 'odd "name"+0x4 [kernel]', ["caller_guessed"]),
            (None, None, None, []),
        ]
        (unnamed,) = self.objects(item(record()))
        assert unnamed["symbol"] is unnamed["caller"] is unnamed["caller_symbol"] is None

    def test_what_is_not_known_is_null(self) -> None:
        (read, looked) = self.objects(
            item(record(access=Access.RDMSR)), item(record(stage=Stage.POST, rip=0, length=0, msr=0x7FFF_0000))
        )
        assert read["value"] is None and looked["rip"] is None and looked["name"] is None

    def test_the_time_is_that_of_the_clock_on_the_wall(self) -> None:
        now = datetime.now(UTC).timestamp()
        (found,) = self.objects(item(record(time_ns=time.monotonic_ns())))
        assert abs(datetime.fromisoformat(found["time"][:26] + "+00:00").timestamp() - now) < 300

    def test_any_text_is_a_text(self) -> None:
        texts = [b"", b'"\\\n\xff\x00']
        (found,) = self.objects(item(record(), record(action=Action.PRINT), texts=texts))
        assert found["text"] == '"\\\n\ufffd\x00' and found["fault"] is None

    def test_faults(self) -> None:
        (found,) = self.objects(item(record(), record(action=Action.FAULT), texts=[b"", b""], faults={1: 'no "x"'}))
        assert found["fault"] == 'no "x"' and found["action"] == ["record", "fault"]


def test_json_of_a_real_guest(tmp_path: Path) -> None:
    path = tmp_path / "traps"
    with guest("sequence") as (debugger, image, _):
        debugger.outputs.create("j", "jsonl", str(path))
        debugger.outputs.open("j")
        debugger.on_msr_write(EVERY_MSR, script="if ($msr == 0xc0000082) { print($msr); print($value); }", outputs=("j",))
        every = debugger.on_msr_write(EVERY_MSR)
        finish(debugger)
        debugger.close()
        assert every.recording is not None
        expected = [(f"{trap.msr:#x}", f"{trap.value:#x}", f"{trap.rip:#x}") for trap in every.recording]
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(each["msr"], each["value"], each["rip"]) for each in found] == expected
        (one,) = [each for each in found if each["rip"] == f"{symbols(image)['lstar']:#x}"]
        assert one["text"] == f"c0000082\n{one['value'][2:]}\n" and one["action"] == ["record", "print"]
        assert debugger.outputs["j"].sent == len(found)


# ---- Perfetto ----


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and value or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            assert key & 7 == 2
            size = varint()
            assert at + size <= len(data)
            yield key >> 3, data[at : at + size]
            at += size


class Trace:
    """What a trace says: tracks by name, and on each the events (time, name, arguments). Numbers: Perfetto's .proto files."""

    def __init__(self, data: bytes) -> None:
        names: dict[int, str] = {}
        arguments: dict[int, str] = {}
        self.tracks: dict[int, str] = {}
        self.parents: dict[int, int] = {}
        self.processes: dict[int, str] = {}
        self.clocks: dict[int, int] = {}
        self.events: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
        cleared = False
        for number, packet in fields(data):
            assert number == 1
            parts = dict(fields(packet))
            assert parts[10]  # trusted_packet_sequence_id
            cleared |= parts[13] == 1
            if 6 in parts:
                self.clocks = {clock[1]: clock[2] for clock in (dict(fields(each)) for _, each in fields(parts[6]))}
            if 12 in parts:
                for kind, entry in fields(parts[12]):
                    known = dict(fields(entry))
                    {2: names, 3: arguments}[kind][known[1]] = known[2].decode()
            if 60 in parts:
                track = dict(fields(parts[60]))
                if 3 in track:
                    self.processes[track[1]] = dict(fields(track[3]))[6].decode()
                else:
                    self.tracks[track[1]], self.parents[track[1]] = track[2].decode(), track[5]
            if 11 in parts:
                assert cleared and parts[13] == 2
                event: dict[int, Any] = {}
                found: dict[str, Any] = {}
                for key, value in fields(parts[11]):
                    if key == 4:
                        annotation = dict(fields(value))
                        name = arguments[annotation.pop(1)]
                        ((kind, content),) = annotation.items()
                        found[name] = content.decode() if kind == 6 else content
                    else:
                        event[key] = value
                assert event[9] == 3  # an instant
                self.events.setdefault(self.tracks[event[11]], []).append((parts[8], names[event[10]], found))


def test_a_trace_of_two_cores(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"something older")
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with guest("smp", 2, COUNT=50) as (debugger, _, _):
        debugger.outputs.create("p", "perfetto", str(path))
        debugger.outputs.open("p")
        event = debugger.on_msr_write(STAR, outputs=("p",))
        debugger.on_msr_write(STAR, script="print($value);", stage=Stage.POST, outputs=("p",))
        finish(debugger)
        debugger.close()
        assert event.recording is not None
        expected = [trap for trap in event.recording if trap.core == 1]
        trace = Trace(path.read_bytes())
        assert set(trace.tracks.values()) == {"core 0", "core 1"}
        ((process, name),) = trace.processes.items()
        assert set(trace.parents.values()) == {process} and name == debugger.target.name
        pre = [each for each in trace.events["core 1"] if each[2]["stage"] == "pre"]
        assert [each[2]["value"] for each in pre] == [trap.value for trap in expected] and len(pre) == 50
        for when, title, arguments in pre:
            assert before < when < time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            assert title == "wrmsr STAR" and arguments["MSR"] == STAR and arguments["name"] == "STAR"
            assert arguments["RIP"] == expected[0].rip and arguments["event"] == event.number
        post = [each[2] for each in trace.events["core 0"] if each[2]["stage"] == "post"]
        assert [each["text"] for each in post] == [f"{each['value']:x}\n" for each in post]
        assert set(trace.clocks) == {1, 3, 6}


def test_a_trace_that_was_cut_off_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with guest("loop", COUNT=100) as (debugger, _, _):
        debugger.outputs.create("p", "perfetto", str(path))
        debugger.outputs.open("p")
        debugger.on_msr_write(STAR, outputs=("p",))
        finish(debugger)
    packets = [len(packet) for _, packet in fields(path.read_bytes())]
    kept = sum(size + (2 if size < 128 else 3) for size in packets[:50])
    assert len(Trace(path.read_bytes()[:kept]).events["core 0"]) > 40


def test_a_file_that_is_made_again_tells_everything_anew(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with guest("smp", 2, COUNT=2000) as (debugger, _, _):
        output = debugger.outputs.create("p", "perfetto", str(path))
        debugger.outputs.open("p")
        debugger.on_msr_write(STAR, outputs=("p",))
        debugger.run(until=lambda: output.sent > 10, timeout=60)
        wait_until(lambda: output.sent > 10, "some to be written")
        path.rename(tmp_path / "old")
        wait_until(path.exists, "a new file")
        finish(debugger)
        debugger.close()
        counts = [sum(map(len, Trace(each.read_bytes()).events.values())) for each in (tmp_path / "old", path)]
        assert sum(counts) == 4000 == output.sent and counts[0] > 10
