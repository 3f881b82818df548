"""A Windows made up by the tests: a machine's memory as Windows 10 22H2, 11 23H2 and 11 24H2 lay theirs out.

No byte is Microsoft's. The offsets are those of the three builds' public symbols, written down once more here, so that a slip in
vmexit's own table is seen; the kernel's image has a header, an export directory, a CodeView record, a function table and the few
small functions that are read, each in the form that compilers give them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.guest.pages import Pages
from vmexit.guest.memory import PAGE
from vmexit.guest.registers import WHOLE

BASE = 0xFFFF_F800_1220_0000
SIZE = 0x80_0000
TEXT, TEXT_SIZE = 0x20_0000, 0x1_0000
SHADOW_TEXT = 0x30_0000
RODATA, RODATA_SIZE = 0x40_0000, 0x1_0000
DATA, DATA_SIZE = 0x60_0000, 0x1_0000
HEAP = 0xFFFF_B50F_1A00_0000
KPCRS = 0xFFFF_F800_0E5D_0000
KPCR_SPACING = 0x10_0000
SHARED = 0xFFFF_F780_0000_0000
DRIVER = 0xFFFF_F804_4400_0000
PHYSICAL = 0x200_0000
"""Everything lies behind this; the tables first."""
GUID = bytes(range(16))
KEY = "03020100050407060809" + "0A0B0C0D0E0F1"
STACK = 0x6000

SYSTEM_CALL, SYSTEM_CALL_SHADOW, DIVIDE_ERROR = TEXT + 0x8000, SHADOW_TEXT + 0x180, TEXT + 0x9000
WRITER, CALLER, OUTER, LEAF, NAMELESS = TEXT + 0xA000, TEXT + 0xA100, TEXT + 0xA200, TEXT + 0xA300, TEXT + 0xA400
PROCESSOR_BLOCK, FIRST_PROCESS, MODULES, PROCESS_HEAD, BUILD = (DATA + offset for offset in (0x100, 0x900, 0x910, 0x920, 0x930))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where members lie in one build."""

    build: int
    name: str
    pid: int
    parent: int
    image_name: int
    path: int
    peb: int
    cid: int
    kernel_tables: int
    """Of KPRCB.KernelDirectoryTableBase, in the KPCR."""
    thread_process: int = 0x220
    thread_links: int = 0x2F8
    state: int = 0x184


LAYOUTS = {
    layout.build: layout
    for layout in (
        Layout(19045, "Windows 10 22H2", 0x440, 0x540, 0x5A8, 0x5C0, 0x550, 0x478, 0x9000),
        Layout(22631, "Windows 11 23H2", 0x440, 0x540, 0x5A8, 0x5C0, 0x550, 0x4C8, 0x9000),
        Layout(26100, "Windows 11 24H2", 0x1D0, 0x2D0, 0x338, 0x350, 0x2E0, 0x508, 0xB000),
    )
}
UNKNOWN = Layout(30000, "Windows", 0x1E8, 0x310, 0x388, 0x3A0, 0x320, 0x5A8, 0x9000, 0x230, 0x310, 0x18C)
"""A build that no table has, with other offsets than all others."""


def _load(displacement: int) -> bytes:
    """MOV RAX, [RCX + displacement]; RET"""
    return b"\x48\x8b\x81" + struct.pack("<i", displacement) + b"\xc3"


_CURRENT_THREAD = b"\x65\x48\x8b\x04\x25\x88\x01\x00\x00"


def functions(layout: Layout) -> dict[str, bytes]:
    """The small functions that the kernel exports, by name."""
    return {
        "IoGetCurrentProcess": _CURRENT_THREAD + b"\x48\x8b\x80\xb8\0\0\0\xc3",
        "KeQueryPrcbAddress": b"",  # needs its own address; see _code
        "NtClose": b"\x48\x83\xec\x28\x33\xc0\x48\x83\xc4\x28\xc3",
        "PsGetCurrentThread": _CURRENT_THREAD + b"\xc3",
        "PsGetCurrentThreadStackBase": _CURRENT_THREAD + b"\x48\x8b\x40\x38\xc3",
        "PsGetCurrentThreadStackLimit": _CURRENT_THREAD + b"\x48\x8b\x40\x30\xc3",
        "PsGetProcessId": _load(layout.pid),
        "PsGetProcessImageFileName": b"\x48\x8d\x81" + struct.pack("<i", layout.image_name) + b"\xc3",
        "PsGetProcessInheritedFromUniqueProcessId": _load(layout.parent),
        "PsGetProcessPeb": _load(layout.peb),
        "PsGetThreadId": _load(layout.cid + 8),
        "PsGetThreadTeb": _load(0xF0),
        "PsGetThreadProcess": _load(layout.thread_process),
        "PsGetThreadProcessId": _load(layout.cid),
    }


VARIABLES = {
    "NtBuildNumber": BUILD,
    "PsInitialSystemProcess": FIRST_PROCESS,
    "PsLoadedModuleList": MODULES,
}
# Functions of the function table: begin, end and the codes of their unwind information.
_PUSH_RBX, _SUB_28 = 0x3001, 0x4205
UNWIND: Mapping[int, tuple[int, Sequence[int]]] = {
    WRITER: (0x40, ()),
    # PUSH RBX (1 byte); SUB RSP, 0x28 (4 bytes)
    CALLER: (0x60, (0x4205, 0x3001)),
    # SUB RSP, 0x1008 (7 bytes), in two slots
    OUTER: (0x40, (0x0107, 0x1008 // 8)),
    NAMELESS: (0x40, ()),
}


def make_directory(name: str, exports: Mapping[str, int], at: int) -> bytes:
    """An export directory that lies at the RVA ``at``."""
    names = sorted(exports)
    table = at + 40
    names_at = table + 4 * len(names)
    ordinals = names_at + 4 * len(names)
    strings = ordinals + 2 * len(names)
    text = bytearray(name.encode() + b"\0")
    places = []
    for each in names:
        places.append(strings + len(text))
        text += each.encode() + b"\0"
    head = struct.pack("<IIHHIIIIIII", 0, 0, 0, 0, strings, 1, len(names), len(names), table, names_at, ordinals)
    rvas = struct.pack(f"<{len(names)}I", *(exports[each] for each in names))
    return (
        head + rvas + struct.pack(f"<{len(names)}I", *places) + struct.pack(f"<{len(names)}H", *range(len(names))) + bytes(text)
    )


def make_headers(size: int, sections: Sequence[tuple[str, int, int, int]], directories: Mapping[int, tuple[int, int]]) -> bytes:
    """The first page of an image; ``sections``: name, RVA, size, flags."""
    head = bytearray(PAGE)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x100)
    struct.pack_into("<4sHHIIIHH", head, 0x100, b"PE\0\0", 0x8664, len(sections), 0x5F00_0001, 0, 0, 0xF0, 0x22)
    struct.pack_into("<H", head, 0x118, 0x20B)
    struct.pack_into("<II", head, 0x118 + 56, size, PAGE)
    struct.pack_into("<I", head, 0x118 + 108, 16)
    for index, (rva, length) in directories.items():
        struct.pack_into("<II", head, 0x118 + 112 + 8 * index, rva, length)
    for index, (name, rva, length, flags) in enumerate(sections):
        at = 0x118 + 0xF0 + 40 * index
        struct.pack_into("<8sII", head, at, name.encode(), length, rva)
        struct.pack_into("<I", head, at + 36, flags)
    return bytes(head)


@dataclass
class FakeWindows(Pages):
    """A machine on which that kernel runs (vmexit.guest.memory.Machine)."""

    layout: Layout = field(default_factory=lambda: LAYOUTS[19045])
    vcpus: int = 2
    base: int = BASE
    without: frozenset[str] = frozenset()
    """Exports that the kernel does not have."""
    pages: dict[int, bytearray] = field(default_factory=dict)
    cores: list[dict[str, int]] = field(default_factory=list)
    processes: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)
    exports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next_page = PHYSICAL // PAGE
        self._mapped: dict[tuple[int, int], int] = {}
        self.root = self._new_page()
        self._heap = HEAP
        # Low memory lies where it is, for a guest that executes code there.
        self._identity()
        self._image()
        self._drivers()
        self._boot()

    def virtual(self, physical: int) -> list[int]:
        """The addresses at which a physical page is mapped."""
        return [page * PAGE for (root, page), number in self._mapped.items() if number == physical // PAGE and root == self.root]

    # ---- memory ----

    def _new_page(self) -> int:
        """The physical address of a new page of zeros."""
        number = self._next_page
        self._next_page += 1
        self.pages[number] = bytearray(PAGE)
        return number * PAGE

    def _entry(self, table: int, index: int, value: int) -> None:
        struct.pack_into("<Q", self.pages[table // PAGE], 8 * index, value)

    def _table(self, table: int, index: int) -> int:
        """The table below an entry, made where there is none."""
        (entry,) = struct.unpack_from("<Q", self.pages[table // PAGE], 8 * index)
        if not entry & 1:
            entry = self._new_page() | 0x63
            self._entry(table, index, entry)
        return int(entry) & ~0xFFF

    def map(self, address: int, physical: int | None = None, root: int | None = None) -> int:
        """Maps the page of an address, by default to a new one; gives its physical address."""
        root = self.root if root is None else root
        found = self._mapped.get((root, address // PAGE))
        if found is not None:
            return found * PAGE
        physical = self._new_page() if physical is None else physical
        table = root
        for shift in (39, 30, 21):
            table = self._table(table, address >> shift & 0x1FF)
        self._entry(table, address >> 12 & 0x1FF, physical | 0x63)
        self._mapped[root, address // PAGE] = physical // PAGE
        return physical

    def _identity(self) -> None:
        directory = self._table(self._table(self.root, 0), 0)
        for index in range(512):
            self._entry(directory, index, index << 21 | 0xE3)

    def write(self, address: int, data: bytes) -> None:
        """Puts bytes at a virtual address; pages come into being."""
        done = 0
        while done < len(data):
            number = self.map((address + done) & -PAGE) // PAGE
            start = (address + done) % PAGE
            piece = data[done : done + PAGE - start]
            self.pages[number][start : start + len(piece)] = piece
            done += len(piece)

    def read(self, address: int, length: int) -> bytes:
        """What is there."""
        return b"".join(
            self.pages[self.map(at & -PAGE) // PAGE][at % PAGE : at % PAGE + 1] for at in range(address, address + length)
        )

    def u64(self, address: int, value: int) -> None:
        """Puts 8 bytes there."""
        self.write(address, struct.pack("<Q", value % (1 << 64)))

    def allocate(self, size: int) -> int:
        """Memory of the pool, zeroed."""
        at = self._heap
        self._heap += -(-size // 64) * 64
        self.write(at, bytes(size))
        return at

    def string(self, text: str, at: int | None = None) -> int:
        """A UNICODE_STRING, by default a new one."""
        data = text.encode("utf-16-le")
        buffer = self.allocate(len(data) + 2)
        self.write(buffer, data)
        at = self.allocate(16) if at is None else at
        self.write(at, struct.pack("<HHIQ", len(data), len(data) + 2, 0, buffer))
        return at

    # ---- the kernel ----

    def _image(self) -> None:
        self.exports = dict(VARIABLES)
        code = bytearray(b"\xcc" * TEXT_SIZE)
        for index, (name, body) in enumerate(functions(self.layout).items()):
            rva = TEXT + 0x40 + 0x40 * index
            if name == "KeQueryPrcbAddress":
                # MOV EAX, ECX; LEA RCX, [KiProcessorBlock]; MOV RAX, [RCX + RAX * 8]; RET
                body = b"\x8b\xc1\x48\x8d\x0d" + struct.pack("<i", PROCESSOR_BLOCK - (rva + 9)) + b"\x48\x8b\x04\xc1\xc3"
            code[rva - TEXT : rva - TEXT + len(body)] = body
            self.exports[name] = rva
        self._frames(code)
        self.exports |= {"KeWriteMsr": WRITER, "KeBugCheckEx": OUTER}
        self.exports = {name: rva for name, rva in self.exports.items() if name not in self.without}
        directory = make_directory("ntoskrnl.exe", self.exports, RODATA)
        record_at = RODATA + 0x8000
        record = b"RSDS" + GUID + struct.pack("<I", 1) + b"ntkrnlmp.pdb\0"
        debug = struct.pack("<IIHHIIII", 0, 0, 0, 0, 2, len(record), record_at + 0x100, 0)
        table_at = RODATA + 0xA000
        rows, information = bytearray(), bytearray()
        for begin, (length, codes) in UNWIND.items():
            rows += struct.pack("<III", begin, begin + length, table_at + 0x800 + len(information))
            prolog = codes[0] & 0xFF if codes else 0
            information += struct.pack("<BBBB", 1, prolog, len(codes), 0)
            information += struct.pack(f"<{len(codes)}H", *codes) + bytes(2 * (len(codes) % 2))
        sections = [
            (".rdata", RODATA, RODATA_SIZE, 0x4000_0040),
            (".data", DATA, DATA_SIZE, 0xC000_0040),
            (".text", TEXT, TEXT_SIZE, 0x6800_0020),
            ("KVASCODE", SHADOW_TEXT, PAGE, 0x6800_0020),
        ]
        directories = {0: (RODATA, len(directory)), 3: (table_at, len(rows)), 6: (record_at, len(debug))}
        # Between the sections there are gaps that are not mapped.
        self.write(self.base, make_headers(SIZE, sections, directories))
        self.write(self.base + TEXT, bytes(code))
        self.write(self.base + SHADOW_TEXT, b"\xcc" * PAGE)
        self.write(self.base + RODATA, directory)
        self.write(self.base + record_at, debug.ljust(0x100, b"\0") + record)
        self.write(self.base + table_at, bytes(rows).ljust(0x800, b"\0") + bytes(information))
        self.write(self.base + DATA, bytes(DATA_SIZE))

    @staticmethod
    def _frames(code: bytearray) -> None:
        """The functions that call each other: OUTER calls CALLER, which calls WRITER, whose third instruction is WRMSR."""

        def put(rva: int, body: bytes) -> None:
            code[rva - TEXT : rva - TEXT + len(body)] = body

        def call(rva: int, target: int) -> bytes:
            return b"\xe8" + struct.pack("<i", target - rva - 5)

        put(WRITER, b"\x90\x90\x0f\x30\xc3")
        put(CALLER, b"\x53\x48\x83\xec\x28" + call(CALLER + 5, WRITER) + b"\x48\x83\xc4\x28\x5b\xc3")
        put(OUTER, b"\x48\x81\xec\x08\x10\x00\x00" + call(OUTER + 7, CALLER) + b"\x48\x81\xc4\x08\x10\x00\x00\xc3")
        put(LEAF, b"\x0f\x30\xc3")
        put(NAMELESS, b"\x0f\x30\xc3")

    def address(self, rva: int) -> int:
        """Of a place in the kernel's image."""
        return self.base + rva

    def _drivers(self) -> None:
        self.driver_exports = {"NdisSend": 0x1010, "NdisReceive": 0x1020}
        directory = make_directory("ndis.sys", self.driver_exports, 0x2000)
        sections = [(".text", 0x1000, 0x1000, 0x6800_0020), (".edata", 0x2000, 0x1000, 0x4000_0040)]
        self.write(DRIVER, make_headers(0x4000, sections, {0: (0x2000, len(directory))}))
        self.write(DRIVER + 0x1000, b"\x90" * PAGE)
        self.write(DRIVER + 0x2000, directory)
        self.module_entries = [
            self._module("ntoskrnl.exe", self.base, SIZE),
            self._module("NDIS.SYS", DRIVER, 0x4000),
            self._module("my-filter.sys", DRIVER + 0x10_0000, 0x3000),
        ]
        self._link(self.address(MODULES), self.module_entries)

    def _module(self, name: str, base: int, size: int) -> int:
        entry = self.allocate(0xA0)
        self.u64(entry + 0x30, base)
        self.write(entry + 0x40, struct.pack("<I", size))
        self.string(name, entry + 0x58)
        return entry

    def _link(self, head: int, links: Sequence[int]) -> None:
        """Makes a list of these LIST_ENTRYs."""
        ring = [head, *links]
        for index, link in enumerate(ring):
            self.u64(link, ring[(index + 1) % len(ring)])
            self.u64(link + 8, ring[index - 1])

    def _boot(self) -> None:
        layout = self.layout
        self.write(self.address(BUILD), struct.pack("<I", 0xF000_0000 | layout.build))
        self.write(SHARED + 0x260, struct.pack("<I", layout.build))
        self.kpcrs = [KPCRS + KPCR_SPACING * cpu for cpu in range(self.vcpus)]
        idt = self.allocate(0x1000)
        handler = self.address(DIVIDE_ERROR)
        for gate in range(32):
            low = handler & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48
            self.write(idt + 16 * gate, struct.pack("<QQ", low, handler >> 32))
        self.idt = idt
        self.add_process(0, "Idle", kernel=True, listed=False)
        self.add_process(4, "System", kernel=True)
        self.add_process(0x1A4, "smss.exe", parent=4, path="\\Device\\HarddiskVolume3\\Windows\\System32\\smss.exe")
        name = "a-long-program.exe"
        self.add_process(0x1234, name, parent=0x1A4, path=f"\\Device\\HarddiskVolume3\\Users\\{name}")
        for cpu in range(self.vcpus):
            self.add_thread(0, 0, key=-cpu)
        for tid in (8, 0x10):
            self.add_thread(4, tid)
        self.add_thread(0x1A4, 0x1A8)
        for tid in (0x1238, 0x123C):
            self.add_thread(0x1234, tid)
        self.u64(self.address(FIRST_PROCESS), self.processes[4])
        for cpu, kpcr in enumerate(self.kpcrs):
            self.write(kpcr, bytes(0xC000))
            self.u64(kpcr + 0x18, kpcr)
            self.u64(kpcr + 0x20, kpcr + 0x180)
            self.u64(kpcr + 0x38, idt)
            self.u64(kpcr + layout.kernel_tables, self.root)
            self.u64(self.address(PROCESSOR_BLOCK) + 8 * cpu, kpcr + 0x180)
        self.relink()
        self._shadow()
        self.cores = [self._core(cpu) for cpu in range(self.vcpus)]
        self.switch(0, 0x123C)

    def add_process(
        self, pid: int, name: str, *, parent: int = 0, path: str = "", kernel: bool = False, listed: bool = True
    ) -> int:
        """A process; ``relink`` puts it into the list."""
        layout = self.layout
        process = self.allocate(0xC00)
        self.processes[pid] = process
        self.write(process, b"\x03\0\0\0")  # KOBJECTS.ProcessObject
        self.u64(process + 0x28, self.root)
        self.u64(process + layout.pid, pid)
        self.u64(process + layout.parent, parent)
        self.write(process + layout.image_name, name.encode()[:14].ljust(15, b"\0") + b"\x02")
        if path:
            self.u64(process + layout.path, self.string(path))
        if not kernel:
            self.u64(process + layout.peb, 0x7FF6_0000_0000 + pid * 0x1000)
        if not listed:
            self._unlisted = {*getattr(self, "_unlisted", set()), pid}
        return process

    def add_thread(self, pid: int, tid: int, *, key: int | None = None) -> int:
        """A thread of a process; ``key``: by what ``threads`` knows it, by default its number."""
        layout = self.layout
        thread = self.allocate(0xA00)
        self.threads[tid if key is None else key] = thread
        stack = self.allocate(STACK)
        self.write(thread, b"\x06\0\0\0")  # KOBJECTS.ThreadObject
        self.u64(thread + 0x30, stack)
        self.u64(thread + 0x38, stack + STACK)
        self.u64(thread + layout.thread_process, self.processes[pid])
        self.u64(thread + 0xB8, self.processes[pid])
        self.u64(thread + 0xF0, 0x7FF6_2000_0000 + tid * 0x800 if pid > 4 else 0)
        self.u64(thread + layout.cid, pid)
        self.u64(thread + layout.cid + 8, tid)
        self.write(thread + layout.state, b"\x05")
        self._owners = {**getattr(self, "_owners", {}), thread: pid}
        return thread

    def relink(self) -> None:
        """Makes the lists of processes and of their threads anew."""
        links = self.layout.pid + 8
        listed = [process + links for pid, process in self.processes.items() if pid not in self._unlisted]
        self._link(self.address(PROCESS_HEAD), listed)
        for pid, process in self.processes.items():
            own = [thread + self.layout.thread_links for thread, owner in self._owners.items() if owner == pid]
            self._link(process + 0x30, own)

    def stack_of(self, tid: int) -> int:
        """The highest address of a thread's stack."""
        return int(struct.unpack("<Q", self.read(self.threads[tid] + 0x38, 8))[0])

    def switch(self, cpu: int, tid: int) -> None:
        """The CPU executes that thread, in the kernel."""
        self.u64(self.kpcrs[cpu] + 0x188, self.threads[tid])
        self.write(self.threads[tid] + self.layout.state, b"\x02")
        self.cores[cpu]["rsp"] = self.stack_of(tid) - 0x2000

    def _core(self, cpu: int) -> dict[str, int]:
        self.u64(self.kpcrs[cpu] + 0x188, self.threads[-cpu])
        registers = {register.name: 0 for register in WHOLE}
        registers |= {
            "rip": self.address(WRITER + 2),
            "rsp": self.stack_of(-cpu) - 0x100,
            "rflags": 0x202,
            "cs": 0x10,
            "ss": 0x18,
        }
        registers |= {"gs_base": self.kpcrs[cpu], "kernel_gs_base": 0x7F_0000_1000 + cpu, "cr3": self.root}
        return registers | {"cr0": 0x8005_0033, "cr4": 0x3506F8, "efer": 0xD01}

    def _shadow(self) -> None:
        """The table of a program with KVA shadow: only the entry code, the interrupt table and part of the KPCRs."""
        self.shadow_root = self._new_page()
        tables = self.layout.kernel_tables
        for address in (self.address(SHADOW_TEXT), self.idt & -PAGE, *(kpcr + tables for kpcr in self.kpcrs)):
            self.map(address, self.map(address & -PAGE), self.shadow_root)

    def enter_program(self, cpu: int, *, shadow: bool = False) -> None:
        """The CPU executes a program's code, of the thread that it had."""
        own = {"cs": 0x33, "rip": 0x7FF6_1234_0000, "rsp": 0x12_3456_7890, "kernel_gs_base": self.kpcrs[cpu]}
        self.cores[cpu] |= own | {"gs_base": 0x7F_0000_1000 + cpu, "cr3": self.shadow_root if shadow else self.root}
