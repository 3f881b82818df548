"""Makes a PDB: an MSF file with the types, public symbols and section headers that a kernel's has."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.guest.windows.fake_windows import DATA, GUID, RODATA, TEXT, Layout

MAGIC = b"Microsoft C/C++ MSF 7.00\r\n\x1aDS\0\0\0"
UCHAR, ULONG, QUAD, VOID_POINTER, LONG = 0x20, 0x22, 0x23, 0x0603, 0x12
MEMBER, ENUMERATE, POINTER, ARRAY, STRUCTURE, UNION, ENUM, FIELDS, BITFIELD = (
    0x150D,
    0x1502,
    0x1002,
    0x1503,
    0x1505,
    0x1506,
    0x1507,
    0x1203,
    0x1205,
)


def number(value: int) -> bytes:
    """A number of a record, in the shortest form."""
    if 0 <= value < 0x8000:
        return struct.pack("<H", value)
    if -128 <= value < 0:
        return struct.pack("<Hb", 0x8000, value)
    return struct.pack("<HH", 0x8002, value) if 0 <= value < 0x1_0000 else struct.pack("<HI", 0x8004, value)


@dataclass
class Types:
    """The records of a TPI stream."""

    records: list[bytes] = field(default_factory=list)

    def add(self, leaf: int, content: bytes) -> int:
        """A record; gives its number."""
        content += bytes(-(len(content) + 2) % 4)
        self.records.append(struct.pack("<HH", len(content) + 2, leaf) + content)
        return 0x1000 + len(self.records) - 1

    def fields(self, members: Sequence[tuple[str, int, int]], more: int = 0) -> int:
        """A list of members (name, type, offset), continued by another one."""
        content = b""
        for name, kind, offset in members:
            content += struct.pack("<HHI", MEMBER, 3, kind) + number(offset) + name.encode() + b"\0"
            pad = -len(content) % 4
            content += bytes(0xF0 + left for left in range(pad, 0, -1))
        if more:
            content += struct.pack("<HHI", 0x1404, 0, more)
        return self.add(FIELDS, content)

    def structure(self, name: str, size: int, fields: int, *, leaf: int = STRUCTURE, forward: bool = False) -> int:
        """A struct or union."""
        rest = number(size) + name.encode() + b"\0"
        behind = struct.pack("<II", 0, 0) if leaf == STRUCTURE else b""
        return self.add(leaf, struct.pack("<HHI", 0, 0x80 if forward else 0, fields) + behind + rest)

    def stream(self) -> bytes:
        """All of it."""
        data = b"".join(self.records)
        head = struct.pack("<IIIII", 20040203, 56, 0x1000, 0x1000 + len(self.records), len(data))
        tail = struct.pack("<HHII", 0xFFFF, 0xFFFF, 4, 0x3FFFF) + bytes(24)
        return head + tail + data


def kernel_types(layout: Layout) -> bytes:
    """Those of a kernel, as far as vmexit reads them, and some of each other kind."""
    types = Types()
    link = types.structure("_LIST_ENTRY", 0, 0, forward=True)
    link_pointer = types.add(POINTER, struct.pack("<II", link, 0x1_000C))
    own = types.structure("_LIST_ENTRY", 16, types.fields([("Flink", link_pointer, 0), ("Blink", link_pointer, 8)]))
    name = types.add(ARRAY, struct.pack("<II", UCHAR, QUAD) + number(15) + b"\0")
    process = types.structure("_KPROCESS", 0, 0, forward=True)
    process_pointer = types.add(POINTER, struct.pack("<II", process, 0x1_000C))
    process_fields = types.fields([("DirectoryTableBase", QUAD, 0x28), ("ThreadListHead", own, 0x30)])
    types.structure("_KPROCESS", 0x438, process_fields)
    later = types.fields([("ImageFileName", name, layout.image_name), ("SeAuditProcessCreationInfo", QUAD, layout.path)])
    members = [("Pcb", process, 0), ("UniqueProcessId", VOID_POINTER, layout.pid), ("ActiveProcessLinks", own, layout.pid + 8)]
    members += [("InheritedFromUniqueProcessId", VOID_POINTER, layout.parent), ("Peb", VOID_POINTER, layout.peb)]
    types.structure("_EPROCESS", 0xA40, types.fields(members, later))
    low = types.add(BITFIELD, struct.pack("<IBB", ULONG, 3, 0))
    high = types.add(BITFIELD, struct.pack("<IBB", ULONG, 29, 3))
    flags = types.structure("__unnamed_12", 4, types.fields([("Kind", low, 0), ("Rest", high, 0)]), leaf=UNION)
    thread = [
        ("StackLimit", VOID_POINTER, 0x30),
        ("StackBase", VOID_POINTER, 0x38),
        ("State", UCHAR, layout.state),
        ("Teb", VOID_POINTER, 0xF0),
    ]
    thread += [("", flags, 0x188), ("Process", process_pointer, layout.thread_process)]
    thread_number = types.structure("_KTHREAD", 0x430, types.fields([*thread, ("ThreadListEntry", own, layout.thread_links)]))
    client = types.structure(
        "_CLIENT_ID", 16, types.fields([("UniqueProcess", VOID_POINTER, 0), ("UniqueThread", VOID_POINTER, 8)])
    )
    types.structure("_ETHREAD", 0x898, types.fields([("Tcb", thread_number, 0), ("Cid", client, layout.cid)]))
    thread_pointer = types.add(POINTER, struct.pack("<II", thread_number, 0x1_000C))
    types.structure("_KPRCB", 0x8000, types.fields([("CurrentThread", thread_pointer, 8), ("Number", ULONG, 0x24)]))
    states = b"".join(
        struct.pack("<HH", ENUMERATE, 3)
        + number(value)
        + each.encode()
        + b"\0"
        + bytes(0xF0 + left for left in range(-(len(each) + 7) % 4, 0, -1))
        for value, each in enumerate(("Initialized", "Ready", "Running"))
    )
    fields = types.add(FIELDS, states)
    types.add(ENUM, struct.pack("<HHII", 3, 0, LONG, fields) + b"_KTHREAD_STATE\0")
    return types.stream()


def public(name: str, segment: int, offset: int, flags: int = 2) -> bytes:
    """An S_PUB32 record."""
    content = struct.pack("<HIIH", 0x110E, flags, offset, segment) + name.encode() + b"\0"
    content += bytes(-(len(content) + 2) % 4)
    return struct.pack("<H", len(content)) + content


def section_headers() -> bytes:
    """Of the made-up kernel."""
    return b"".join(
        struct.pack("<8sIIIIIIHHI", name, 0x1_0000, rva, 0, 0, 0, 0, 0, 0, 0)
        for name, rva in ((b".rdata", RODATA), (b".data", DATA), (b".text", TEXT))
    )


def make_msf(streams: Sequence[bytes], block: int = 512) -> bytes:
    """An MSF file of these streams."""
    blocks: list[bytes] = [b"", bytes(block), bytes(block)]

    def put(data: bytes) -> list[int]:
        numbers = []
        for at in range(0, len(data), block):
            numbers.append(len(blocks))
            blocks.append(data[at : at + block].ljust(block, b"\0"))
        return numbers

    places = [put(stream) for stream in streams]
    directory = struct.pack(f"<{1 + len(streams)}I", len(streams), *map(len, streams))
    directory += b"".join(struct.pack(f"<{len(numbers)}I", *numbers) for numbers in places)
    (directory_map,) = put(struct.pack(f"<{-(-len(directory) // block)}I", *put(directory)))
    blocks[0] = (MAGIC + struct.pack("<IIIIII", block, 1, len(blocks), len(directory), 0, directory_map)).ljust(block, b"\0")
    return b"".join(blocks)


def make_pdb(
    layout: Layout,
    symbols: Mapping[str, int],
    *,
    guid: bytes = GUID,
    age: int = 1,
    types: bytes | None = None,
    moved: Sequence[tuple[int, int]] = (),
    block: int = 512,
) -> bytes:
    """The PDB of a made-up kernel; ``symbols``: RVAs by name. ``moved``: an OMAP, from RVAs as the symbols have them."""
    records = b"\x04\0\x25\x11\0\0"  # a record of another kind
    segments = ((3, TEXT), (2, DATA), (1, RODATA))
    for name, rva in symbols.items():
        segment, start = next((number, start) for number, start in segments if start <= rva < start + 0x1_0000)
        records += public(name, segment, rva - start, 2 if segment == 3 else 0)
    records += public("BeyondAllSections", 9, 0) + public("NotInTheImage", 0, 0x40)
    info = struct.pack("<III", 20000404, 1, age + 3) + guid + struct.pack("<IIIII", 0, 0, 1, 0, 0)
    named = [0xFFFF] * 11
    named[5] = 6
    more: list[bytes] = [records, section_headers()]
    if moved:
        named[4], named[10] = 7, 6
        more.append(b"".join(struct.pack("<II", *pair) for pair in moved))
    last = struct.pack("<11H", *named)
    dbi = struct.pack(
        "<iIIHHHHHHiiiiiIiiHHI", -1, 19990903, age, 0xFFFF, 0, 0xFFFF, 0, 5, 0, 0, 0, 0, 0, 0, 0, len(last), 0, 0, 0x8664, 0
    )
    return make_msf([b"", info, kernel_types(layout) if types is None else types, dbi + last, b"", *more], block)
