"""The layout that Python reads out of wire.h is the one that the C compiler gives it."""

from __future__ import annotations

import enum
import re
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from vmexit.link import wire

AGENT = Path(str(resources.files("vmexit.agent")))
HEADER = (AGENT / "wire.h").read_text()
STRUCTS = re.findall(r"^struct vmexit_(\w+) \{$", HEADER, re.MULTILINE)
CONSTANTS = re.findall(r"^#define VMEXIT_(\w+) \w", HEADER, re.MULTILINE)
CACHE_LINE = 64


def fields(struct: str) -> list[str]:
    """The names of a struct's fields."""
    return [name for name, _ in wire.ffi.typeof(f"struct vmexit_{struct}").fields]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says: "struct", "struct.field" (offset), "struct.field=" (size) and "#CONSTANT"."""
    folder = tmp_path_factory.mktemp("wire")
    lines = []
    for struct in STRUCTS:
        name = f"struct vmexit_{struct}"
        lines.append(f'printf("{struct} %zu\\n", sizeof({name}));')
        for field in fields(struct):
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof({name}, {field}));')
            lines.append(f'printf("{struct}.{field}= %zu\\n", sizeof((({name} *)0)->{field}));')
    lines += [f'printf("#{name} %llu\\n", (unsigned long long)VMEXIT_{name});' for name in CONSTANTS]
    text = '#include <stddef.h>\n#include <stdio.h>\n#include "wire.h"\nint main(void)\n{\n' + "\n".join(lines) + "\n}\n"
    (folder / "layout.c").write_text(text)
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-Wpadded", f"-I{AGENT}", "layout.c", "-o", "layout"]
    subprocess.run(command, cwd=folder, check=True)
    said = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


def test_everything_is_read() -> None:
    assert set(STRUCTS) == {
        *(
            "range",
            "event",
            "record",
            "text",
            "question",
            "ring",
            "shared",
            "message",
            "script_file",
            "step",
            "recipe",
            "code",
            "frames",
            "hello",
        )
    }
    assert {"WIRE_MAGIC", "MAX_EVENTS", "CAN_MEMORY_WRITE", "WRONG_VERSION", "READ_PHYSICAL"} <= set(CONSTANTS)


@pytest.mark.parametrize("struct", STRUCTS)
def test_layout(compiled: dict[str, int], struct: str) -> None:
    """-Wpadded with -Werror has seen already that there is no padding."""
    assert wire.size(struct) == compiled[struct]
    for field in fields(struct):
        assert wire.offset(struct, field) == compiled[f"{struct}.{field}"]
    # Fields of a union have the same offset.
    sizes = {compiled[f"{struct}.{field}"]: compiled[f"{struct}.{field}="] for field in fields(struct)}
    assert sum(sizes.values()) == wire.size(struct)


def test_constants(compiled: dict[str, int]) -> None:
    for name in CONSTANTS:
        assert wire.constant(name) == compiled[f"#{name}"], name
    with pytest.raises(AttributeError):
        wire.constant("NO_SUCH")


def test_what_is_written_by_different_sides_lies_in_different_cache_lines() -> None:
    assert wire.size("record") == CACHE_LINE
    assert wire.size("shared") % CACHE_LINE == wire.size("ring") % CACHE_LINE == 0
    for struct, field in (("ring", "tail"), ("ring", "waiting"), ("ring", "question"), ("ring", "hits"), ("shared", "sleeping")):
        assert wire.offset(struct, field) % CACHE_LINE == 0, field


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        *[(wire.Access, ""), (wire.Stage, ""), (wire.Action, ""), (wire.EventFlag, ""), (wire.RecordFlag, "")],
        *[(wire.Capability, "CAN_"), (wire.MessageType, ""), (wire.Status, "")],
    ],
)
def test_enumerations(compiled: dict[str, int], kind: type[enum.IntEnum], prefix: str) -> None:
    for name, member in kind.__members__.items():
        if name != "ALL":
            assert int(member) == compiled[f"#{prefix}{name}"]


def test_records_for_numpy(compiled: dict[str, int]) -> None:
    assert wire.RECORD.itemsize == compiled["record"]
    names = wire.RECORD.names
    assert names is not None and set(names) == set(fields("record")) - {"reserved"}
    for name in names:
        dtype, offset = wire.RECORD.fields[name][:2]  # type: ignore[index]
        assert (offset, dtype.itemsize, dtype.kind) == (compiled[f"record.{name}"], compiled[f"record.{name}="], "u")
    data = wire.pack("record", sequence=2**64 - 1, msr=0xC0000082, vcpu=65535, length=15, value=1 << 63)
    (record,) = np.frombuffer(data, wire.RECORD)
    assert [int(record[name]) for name in ("sequence", "msr", "vcpu", "length", "value", "rip")] == [
        *[2**64 - 1, 0xC0000082, 65535, 15, 1 << 63, 0]
    ]


def test_pack_and_unpack() -> None:
    ranges = [{"first": 1, "last": 2}, {"first": 0xC0000080, "last": 0xFFFFFFFF}]
    data = wire.pack("event", id=7, slot=255, access=3, core=wire.ALL_CORES, range_count=2, ranges=ranges)
    assert len(data) == wire.size("event")
    event = wire.unpack("event", data)
    assert (event.id, event.slot, event.access, event.stages, event.core, event.range_count) == (7, 255, 3, 0, 0xFFFFFFFF, 2)
    assert [(event.ranges[i].first, event.ranges[i].last) for i in range(3)] == [(1, 2), (0xC0000080, 0xFFFFFFFF), (0, 0)]
    del data
    assert event.ranges[1].last == 0xFFFFFFFF
    assert wire.pack("message", type=258)[4:6] == b"\x02\x01"


@pytest.mark.parametrize(("field", "value"), [("id", 1 << 32), ("id", -1), ("access", 256), ("nothing", 1)])
def test_what_does_not_fit_is_not_packed(field: str, value: int) -> None:
    with pytest.raises((OverflowError, KeyError)):
        wire.pack("event", **{field: value})
