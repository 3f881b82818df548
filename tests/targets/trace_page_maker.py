"""Trace pages as the kernel would have made them, and an instance that gives them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmexit.targets.trace_pages import EventFormat, PageFormat, parse_event_format, parse_page_format

DATA = 4080
HEADER = """\
	field: u64 timestamp;	offset:0;	size:8;	signed:0;
	field: local_t commit;	offset:8;	size:8;	signed:1;
	field: int overwrite;	offset:8;	size:1;	signed:1;
	field: char data;	offset:16;	size:4080;	signed:0;
"""
_COMMON = """\
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

"""
_HOST = """\
	field:unsigned msr;	offset:8;	size:4;	signed:0;
	field:u64 val;	offset:16;	size:8;	signed:0;
	field:int failed;	offset:24;	size:4;	signed:1;
"""
_KVM = """\
	field:unsigned write;	offset:8;	size:4;	signed:0;
	field:u32 ecx;	offset:12;	size:4;	signed:0;
	field:u64 data;	offset:16;	size:8;	signed:0;
	field:u8 exception;	offset:24;	size:1;	signed:0;
"""
WRITE_MSR, READ_MSR, KVM_MSR = 2153, 2152, 99
FORMATS = {
    "events/msr/write_msr": f"name: write_msr\nID: {WRITE_MSR}\n{_COMMON}{_HOST}",
    "events/msr/read_msr": f"name: read_msr\nID: {READ_MSR}\n{_COMMON}{_HOST}",
    "events/kvm/kvm_msr": f"name: kvm_msr\nID: {KVM_MSR}\n{_COMMON}{_KVM}",
}
LAYOUT: PageFormat = parse_page_format(HEADER)


def host_data(number: int, msr: int, value: int, *, thread: int = 1, failed: int = 0) -> bytes:
    """What msr:write_msr and msr:read_msr leave."""
    return struct.pack("<HBBiIIQiI", number, 0, 0, thread, msr, 0, value, failed, 0)


def kvm_data(write: int, msr: int, value: int, *, thread: int = 1, exception: int = 0) -> bytes:
    """What kvm:kvm_msr leaves."""
    return struct.pack("<HBBiIIQB7x", KVM_MSR, 0, 0, thread, write, msr, value, exception)


def entry(data: bytes, delta: int = 0) -> bytes:
    """An event, so many nanoseconds after what came before; long ones as the kernel stores them."""
    if 0 < len(data) <= 28 * 4:
        return struct.pack("<I", delta << 5 | len(data) // 4) + data
    return struct.pack("<II", delta << 5, len(data) + 4) + data


def time_extend(delta: int) -> bytes:
    return struct.pack("<II", (delta & (1 << 27) - 1) << 5 | 30, delta >> 27)


def time_stamp(time: int) -> bytes:
    return struct.pack("<II", (time & (1 << 27) - 1) << 5 | 31, (time >> 27) & 0xFFFF_FFFF)


def taken_back(size: int, delta: int = 1) -> bytes:
    """An event that was discarded: so many bytes with its header."""
    return struct.pack("<II", delta << 5 | 29, size - 4).ljust(size, b"\xff")


def page(*entries: bytes, time: int = 1000, lost: int | None = None, told: bool = True, size: int | None = None) -> bytes:
    """``lost``: events before it; ``told``: how many of them is on it. ``size``: what its header says, if that is a lie."""
    data = b"".join(entries)
    commit = len(data) if size is None else size
    if lost is not None:
        commit |= 1 << 31 | (told << 30)
        data += struct.pack("<Q", lost) if told else b""
    return struct.pack("<QQ", time, commit) + data.ljust(DATA, b"\0")[:DATA]


class MadeUpInstance:
    """Gives pages that a test has put in, and remembers what is written to its files."""

    def __init__(self, cpus: int = 2) -> None:
        self.layout = LAYOUT
        self.pipes = dict.fromkeys(range(cpus), -1)
        self.pages: dict[int, list[bytes]] = {cpu: [] for cpu in range(cpus)}
        self.files: dict[str, str] = {}
        self.refuses: set[str] = set()

    def event_format(self, system: str, name: str, *needed: str) -> EventFormat:
        return parse_event_format(FORMATS[f"events/{system}/{name}"], *needed)

    def write(self, path: str, text: str) -> None:
        if text in self.refuses:
            raise OSError(22, "Invalid argument")
        self.files[path] = text

    def read_page(self, cpu: int) -> bytes:
        return self.pages[cpu].pop(0) if self.pages[cpu] else b""

    def put(self, cpu: int, pages: Sequence[bytes]) -> None:
        self.pages[cpu] += pages
