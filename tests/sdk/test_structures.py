"""The structures have the layout that a C compiler gives the same declarations (hyperdbg.h); the codes are the same numbers."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from tests.sdk.build import compile_c
from vmexit import sdk
from vmexit.sdk.structures import fields_of

STRUCTURES = {
    "DEBUGGER_EVENT_OPTIONS": sdk.EventOptions,
    "DEBUGGER_GENERAL_EVENT_DETAIL": sdk.GeneralEventDetail,
    "DEBUGGER_GENERAL_ACTION": sdk.GeneralAction,
    "DEBUGGER_EVENT_AND_ACTION_RESULT": sdk.EventAndActionResult,
    "DEBUGGER_MODIFY_EVENTS": sdk.ModifyEvents,
    "DEBUGGER_SHORT_CIRCUITING_EVENT": sdk.ShortCircuitingEvent,
    "DEBUGGER_READ_AND_WRITE_ON_MSR": sdk.ReadAndWriteOnMsr,
}
IN_C = {"CommandsEventListFlink": "CommandsEventList.Flink", "CommandsEventListBlink": "CommandsEventList.Blink"}
CODES = {
    "IOCTL_DEBUGGER_REGISTER_EVENT": sdk.Ioctl.REGISTER_EVENT,
    "IOCTL_DEBUGGER_ADD_ACTION_TO_EVENT": sdk.Ioctl.ADD_ACTION_TO_EVENT,
    "IOCTL_DEBUGGER_MODIFY_EVENTS": sdk.Ioctl.MODIFY_EVENTS,
    "IOCTL_DEBUGGER_READ_OR_WRITE_MSR": sdk.Ioctl.READ_OR_WRITE_MSR,
    "IOCTL_MANUAL_REGISTER_EVENT": sdk.Ioctl.REGISTER_EVENT_MANUAL,
    "IOCTL_MANUAL_ADD_ACTION_TO_EVENT": sdk.Ioctl.ADD_ACTION_TO_EVENT_MANUAL,
    "RDMSR_INSTRUCTION_EXECUTION": sdk.EventType.RDMSR_INSTRUCTION_EXECUTION,
    "WRMSR_INSTRUCTION_EXECUTION": sdk.EventType.WRMSR_INSTRUCTION_EXECUTION,
    "RUN_SCRIPT": sdk.ActionType.RUN_SCRIPT,
    "RUN_CUSTOM_CODE": sdk.ActionType.RUN_CUSTOM_CODE,
    "VMM_CALLBACK_CALLING_STAGE_POST_EVENT_EMULATION": sdk.CallingStage.POST,
    "VMM_CALLBACK_CALLING_STAGE_ALL_EVENT_EMULATION": sdk.CallingStage.ALL,
    "DEBUGGER_MODIFY_EVENTS_QUERY_STATE": sdk.ModifyType.QUERY_STATE,
    "DEBUGGER_MODIFY_EVENTS_CLEAR": sdk.ModifyType.CLEAR,
    "DEBUGGER_MODIFY_EVENTS_APPLY_TO_ALL_TAG": sdk.ALL_EVENTS,
    "DEBUGGER_MSR_WRITE": sdk.MsrAction.WRITE,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says: a structure's size, "structure.field" (offset), "structure.field=" (size), a code's value."""
    folder: Path = tmp_path_factory.mktemp("sdk")
    lines = []
    for name, kind in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in fields_of(kind):
            in_c = IN_C.get(field, field)
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {in_c}));')
            lines.append(f'printf("{name}.{field}= %zu\\n", sizeof((({name} *)0)->{in_c}));')
    lines += [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in CODES]
    source = folder / "layout.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "hyperdbg.h"\nint main(void)\n{\n' + "\n".join(lines) + "\n}\n"
    )
    said = subprocess.run([compile_c(source, folder / "layout")], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


@pytest.mark.parametrize("name", STRUCTURES)
def test_layout(compiled: dict[str, int], name: str) -> None:
    kind = STRUCTURES[name]
    assert ctypes.sizeof(kind) == compiled[name]
    fields = fields_of(kind)
    assert fields
    for field, (offset, size) in fields.items():
        assert (offset, size) == (compiled[f"{name}.{field}"], compiled[f"{name}.{field}="]), field


@pytest.mark.parametrize("name", CODES)
def test_codes(compiled: dict[str, int], name: str) -> None:
    assert CODES[name] == compiled[name]


def test_every_byte_has_its_place() -> None:
    """As it is sent: little-endian, with the compiler's gaps as zeros."""
    event = sdk.GeneralEventDetail.of(0x1122334455667788, 0xC0000082, core=3, stage=sdk.CallingStage.ALL, condition_size=9)
    expected = bytearray(168)
    for offset, data in {
        16: b"\x03\0\0\0",
        20: b"\xff\xff\xff\xff",
        24: b"\x01",
        28: b"\x03",
        88: bytes.fromhex("8877665544332211"),
        96: b"\x0d",
        104: bytes.fromhex("820000c0"),
        160: b"\x09",
    }.items():
        expected[offset : offset + len(data)] = data
    assert bytes(event) == expected


@pytest.mark.parametrize("kind", STRUCTURES.values(), ids=list(STRUCTURES))
def test_packed_and_unpacked(kind: type[ctypes.LittleEndianStructure]) -> None:
    size = ctypes.sizeof(kind)
    data = bytes(number % 251 for number in range(size))
    unpacked = sdk.unpack(kind, data + b"what follows")
    assert bytes(unpacked) == data
    with pytest.raises(ValueError, match="too small"):
        sdk.unpack(kind, data[:-1])
