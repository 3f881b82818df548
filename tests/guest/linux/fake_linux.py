"""A Linux made up by the tests: its image, and a machine's memory as that kernel would lay it out.

It is of no real kernel: structs have offsets of their own, so that nothing can be right by knowing a real one's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.guest.pages import Pages
from vmexit.guest.linux.image import LINKED_AT
from vmexit.guest.memory import PAGE

BANNER = b"Linux version 6.1.0-fake-amd64 (nobody@nowhere) (cc 1) #1 SMP Fake 6.1.0-1 (2026-01-01)"
SIZE = 4 << 20
RODATA, KALLSYMS, BTF, DATA = 0x20_0000, 0x21_0000, 0x28_0000, 0x30_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000
PHYSICAL = 0x100_0000
HEAP = 0x80_0000
SLIDE = 0x1400_0000
FILLERS = 1200
TABLES = DATA + 0x8_0000
TEXT_SYMBOL = 0x2000
THIS_CPU_OFF, CURRENT_TASK = 0x100, 0x108

# Members with their offsets and types; the fourth is how long a struct is.
STRUCTS: Mapping[str, tuple[int, Sequence[tuple[str, int, str]]]] = {
    "list_head": (16, [("next", 0, "pointer"), ("prev", 8, "pointer")]),
    "thread_struct": (16, [("sp", 8, "u64")]),
    "task_struct": (
        0x400,
        [
            ("__state", 0x10, "u32"),
            ("stack", 0x18, "pointer"),
            ("tasks", 0x48, "list_head"),
            ("mm", 0x60, "pointer"),
            ("active_mm", 0x68, "pointer"),
            ("exit_state", 0x70, "u32"),
            ("pid", 0x80, "u32"),
            ("tgid", 0x84, "u32"),
            ("real_parent", 0x90, "pointer"),
            ("group_leader", 0x98, "pointer"),
            ("thread_node", 0xA0, "list_head"),
            ("comm", 0xC0, "char16"),
            ("signal", 0xE0, "pointer"),
            ("thread", 0x100, "thread_struct"),
        ],
    ),
    "signal_struct": (0x40, [("thread_head", 0x18, "list_head")]),
    "mm_struct": (0x80, [("pgd", 0x28, "pointer"), ("exe_file", 0x40, "pointer")]),
    "path": (16, [("mnt", 0, "pointer"), ("dentry", 8, "pointer")]),
    "file": (0x40, [("f_path", 0x20, "path")]),
    "qstr": (16, [("hash_len", 0, "u64"), ("name", 8, "pointer")]),
    "dentry": (0x60, [("d_parent", 0x10, "pointer"), ("d_name", 0x20, "qstr")]),
    "module_layout": (16, [("base", 0, "pointer"), ("size", 8, "u32")]),
    "module": (
        0x200,
        [
            ("state", 0, "module_state"),
            ("list", 8, "list_head"),
            ("name", 0x18, "char56"),
            ("core_layout", 0x60, "module_layout"),
            ("kallsyms", 0x80, "pointer"),
        ],
    ),
    "mod_kallsyms": (
        32,
        [("symtab", 0, "pointer"), ("num_symtab", 8, "u32"), ("strtab", 16, "pointer"), ("typetab", 24, "pointer")],
    ),
}


def member(path: str) -> int:
    """The offset of "task_struct.pid"."""
    owner, _, rest = path.partition(".")
    total = 0
    for name in rest.split("."):
        offset, kind = next((offset, kind) for each, offset, kind in STRUCTS[owner][1] if each == name)
        total, owner = total + offset, kind
    return total


class BtfWriter:
    """Makes a .BTF section."""

    def __init__(self) -> None:
        self.types = bytearray()
        self.strings = bytearray(b"\0")
        self.count = 0

    def string(self, text: str) -> int:
        """The offset of a text."""
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, name: str, kind: int, size: int, behind: bytes = b"", count: int = 0, flag: int = 0) -> int:
        """A type; gives its number."""
        self.types += struct.pack("<III", self.string(name), flag << 31 | kind << 24 | count, size) + behind
        self.count += 1
        return self.count

    def integer(self, name: str, size: int, encoding: int = 0) -> int:
        """A basic type."""
        return self.add(name, 1, size, struct.pack("<I", encoding << 24 | size * 8))

    def structure(self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = 4) -> int:
        """A struct of (name, type, offset in bytes)."""
        behind = b"".join(struct.pack("<III", self.string(each), number, offset * 8) for each, number, offset in members)
        return self.add(name, kind, size, behind, len(members))

    def section(self) -> bytes:
        """All of it."""
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + bytes(self.types) + bytes(self.strings)


def make_btf() -> bytes:
    """The types of STRUCTS and what they are made of."""
    writer = BtfWriter()
    numbers = {"u32": writer.integer("unsigned int", 4), "u64": writer.integer("unsigned long", 8)}
    char = writer.integer("char", 1, 1)
    numbers["pointer"] = writer.add("", 2, 0)
    for length in (16, 56):
        array = struct.pack("<III", char, numbers["u32"], length)
        numbers[f"char{length}"] = writer.add("", 3, 0, array)
    states = ("MODULE_STATE_LIVE", "MODULE_STATE_COMING", "MODULE_STATE_GOING", "MODULE_STATE_UNFORMED")
    values = b"".join(struct.pack("<Ii", writer.string(name), value) for value, name in enumerate(states))
    numbers["module_state"] = writer.add("module_state", 6, 4, values, len(states))
    for name, (size, members) in STRUCTS.items():
        numbers[name] = writer.structure(name, size, [(each, numbers[kind], offset) for each, offset, kind in members])
    return writer.section()


def symbols(btf_length: int) -> list[tuple[int, str, str]]:
    """Address (of the image that is not moved), kind and name of each, by address."""
    found = [(THIS_CPU_OFF, "A", "this_cpu_off"), (CURRENT_TASK, "A", "current_task")]
    places = {
        ("T", "_text"): 0,
        ("T", "_stext"): 0x1000,
        ("t", "native_write_msr"): TEXT_SYMBOL,
        ("t", "native_write_msr_safe"): TEXT_SYMBOL + 0x40,
        ("T", "entry_SYSCALL_64"): 0x8080,
        ("T", "_etext"): 0x10_0000,
        ("D", "linux_banner"): RODATA,
        ("R", "__per_cpu_offset"): RODATA + 0x1000,
        ("D", "nr_cpu_ids"): RODATA + 0x2000,
        ("D", "__cpu_possible_mask"): RODATA + 0x2008,
        ("r", "__start_BTF"): BTF,
        ("r", "__stop_BTF"): BTF + btf_length,
        ("D", "init_task"): DATA,
        ("D", "modules"): DATA + 0x1000,
        ("D", "init_top_pgt"): TABLES,
        ("B", "_end"): SIZE,
    }
    found += [(LINKED_AT + offset, kind, name) for (kind, name), offset in places.items()]
    found += [(LINKED_AT + 0x1_0000 + 16 * index, "t", f"sys_filler_{index:04}") for index in range(FILLERS)]
    return sorted(found)


def make_kallsyms(rows: Sequence[tuple[int, str, str]], base: int, at: int, layout: str = "6.1") -> bytes:
    """The tables as the kernel lays them out. ``base``: where _text is; ``at``: the address of the result; 6.1, 6.12 or 7.3."""
    tokens = [chr(code) if 0x20 < code < 0x7F else f"<{code}>" for code in range(256)]
    tokens[1], tokens[2] = "sys_filler_", "native_write_msr"
    unit = 4 if layout == "7.3" else 8

    def padded(data: bytes, to: int = unit) -> bytes:
        return data + bytes(-len(data) % to)

    names, markers = bytearray(), []
    for index, (_, kind, name) in enumerate(rows):
        if index % 256 == 0:
            markers.append(len(names))
        text = bytearray()
        rest = kind + name
        while rest:
            token = next((number for number in (1, 2) if rest.startswith(tokens[number])), ord(rest[0]))
            text.append(token)
            rest = rest[len(tokens[token]) :]
        names += (bytes([len(text)]) if len(text) < 0x80 else bytes([len(text) & 0x7F | 0x80, len(text) >> 7])) + text
    token_table = b"".join(token.encode() + b"\0" for token in tokens)
    offsets_of_tokens = [len(b"".join(token.encode() + b"\0" for token in tokens[:index])) for index in range(256)]
    token_index = struct.pack("<256H", *offsets_of_tokens)
    head = padded(struct.pack("<I", len(rows))) + padded(bytes(names)) + padded(struct.pack(f"<{len(markers)}I", *markers))
    tail = padded(token_table) + padded(token_index)
    relative = [address if address < LINKED_AT else base - 1 - (address - LINKED_AT + base) for address, _, _ in rows]
    packed = padded(struct.pack(f"<{len(rows)}i", *relative))
    based = struct.pack("<Q", base)
    if layout == "6.1":
        return packed + based + head + padded(bytes(3 * len(rows))) + tail
    if layout == "6.12":
        return head + tail + packed + based + bytes(3 * len(rows))
    first = at + len(head) + len(tail)
    places = [address - LINKED_AT + base - (first + 4 * index) for index, (address, _, _) in enumerate(rows)]
    return head + tail + struct.pack(f"<{len(rows)}i", *places)


def make_image(slide: int = 0, layout: str = "6.1") -> bytearray:
    """The kernel from _text on, moved by ``slide``."""
    btf = make_btf()
    image = bytearray(SIZE)
    image[:0x10_0000] = b"\x90" * 0x10_0000
    image[TEXT_SYMBOL + 2 : TEXT_SYMBOL + 4] = b"\x0f\x30"
    image[RODATA : RODATA + len(BANNER) + 1] = BANNER + b"\n"
    rows = symbols(len(btf))
    if layout == "7.3":
        rows = [row for row in rows if row[0] >= LINKED_AT]
    tables = make_kallsyms(rows, LINKED_AT + slide, LINKED_AT + slide + KALLSYMS, layout)
    assert len(tables) < BTF - KALLSYMS and len(btf) < DATA - BTF
    image[KALLSYMS : KALLSYMS + len(tables)] = tables
    image[BTF : BTF + len(btf)] = btf
    return image


def make_vmlinux(image: bytes) -> bytes:
    """An ELF file with the image as its only segment."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, LINKED_AT, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, PAGE, LINKED_AT, PHYSICAL, len(image), len(image), PAGE)
    return (header + segment).ljust(PAGE, b"\0") + bytes(image)


def make_bzimage(vmlinux: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    """A bzImage with that kernel, packed."""
    payload = pack(vmlinux)
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x208] = b"HdrS" + struct.pack("<H", 0x20F)
    setup[0x248:0x250] = struct.pack("<II", 0x40, len(payload))
    return bytes(setup) + bytes(0x40) + payload


@dataclass
class FakeLinux(Pages):
    """A machine on which that kernel runs (vmexit.guest.memory.Machine)."""

    slide: int = SLIDE
    layout: str = "6.1"
    vcpus: int = 2
    pages: dict[int, bytearray] = field(default_factory=dict)
    cores: list[dict[str, int]] = field(default_factory=list)
    tasks: dict[int, int] = field(default_factory=dict)
    """Addresses of task_structs by tid."""

    def __post_init__(self) -> None:
        self._heap = HEAP
        image = make_image(self.slide, self.layout)
        for offset in range(0, len(image), PAGE):
            self.pages[(PHYSICAL + offset) // PAGE] = image[offset : offset + PAGE]
        self._map()
        self._boot()

    # ---- writing ----

    def physical(self, address: int) -> int:
        """Of an address of the image or of the direct map."""
        text = LINKED_AT + self.slide
        return address - text + PHYSICAL if text <= address < text + SIZE else address - DIRECT_MAP

    def write(self, address: int, data: bytes) -> None:
        """Puts bytes at a virtual address; pages come into being."""
        for index, byte in enumerate(data):
            number, start = divmod(self.physical(address + index), PAGE)
            self.pages.setdefault(number, bytearray(PAGE))[start] = byte

    def virtual(self, physical: int) -> list[int]:
        """The addresses at which physical memory is mapped."""
        text = [self.address(physical - PHYSICAL)] if PHYSICAL <= physical < PHYSICAL + SIZE else []
        return [*text, DIRECT_MAP + physical]

    def u64(self, address: int, value: int) -> None:
        """Puts 8 bytes there."""
        self.write(address, struct.pack("<Q", value % (1 << 64)))

    def u32(self, address: int, value: int) -> None:
        """Puts 4 bytes there."""
        self.write(address, struct.pack("<I", value))

    def allocate(self, size: int) -> int:
        """Memory of the direct map, zeroed."""
        at = self._heap
        self._heap += -(-size // 64) * 64
        self.write(DIRECT_MAP + at, bytes(size))
        return DIRECT_MAP + at

    def address(self, offset: int) -> int:
        """Of a place in the image."""
        return LINKED_AT + self.slide + offset

    # ---- the kernel ----

    def _map(self) -> None:
        """Its page tables: the image in pages of 2 MB, all memory in one of 1 GB."""
        top, image_pud, image_pmd, direct_pud = (TABLES + index * PAGE for index in range(4))

        def entry(table: int, index: int, value: int) -> None:
            self.u64(self.address(table) + 8 * index, value)

        entry(top, 511, PHYSICAL + image_pud | 3)
        entry(image_pud, 510, PHYSICAL + image_pmd | 3)
        first = (self.address(0) >> 21) & 0x1FF
        for slot in range(SIZE >> 21):
            entry(image_pmd, first + slot, PHYSICAL + (slot << 21) | 0x83)
        entry(top, DIRECT_MAP >> 39 & 0x1FF, PHYSICAL + direct_pud | 3)
        entry(direct_pud, 0, 0x83)

    def _boot(self) -> None:
        self.areas = [DIRECT_MAP + 0x60_0000 + 0x1_0000 * cpu for cpu in range(self.vcpus)]
        self.u32(self.address(RODATA + 0x2000), self.vcpus)
        self.u64(self.address(RODATA + 0x2008), (1 << self.vcpus) - 1)
        for cpu, area in enumerate(self.areas):
            self.u64(self.address(RODATA + 0x1000) + 8 * cpu, area)
            self.u64(area + THIS_CPU_OFF, area)
        modules = self.address(DATA + 0x1000)
        self.u64(modules, modules)
        self.u64(modules + 8, modules)
        self._list = self.address(DATA) + member("task_struct.tasks")
        self.u64(self._list, self._list)
        self._task(self.address(DATA), 0, 0, b"swapper/0", user=False)
        for pid, name, user in ((1, b"init", True), (2, b"kthreadd", False), (94, b"dd", True)):
            self.add_process(pid, name, user=user)
        self.add_thread(94, 95, b"worker")
        for cpu, area in enumerate(self.areas):
            self.u64(area + CURRENT_TASK, self.tasks[(95, 0)[cpu % 2]])
            stack = int.from_bytes(self.read(self.tasks[(95, 0)[cpu % 2]] + member("task_struct.stack"), 8), "little")
            self.cores.append(
                {
                    "rip": self.address(TEXT_SYMBOL + 2),
                    "rsp": stack + 0x3F00,
                    "rbp": 0,
                    "cs": 0x10,
                    "cr0": 0x8005_0033,
                    "cr3": PHYSICAL + TABLES,
                    "cr4": 0x20,
                    "efer": 0xD01,
                    "gs_base": area,
                    "kernel_gs_base": 0,
                }
            )

    def read(self, address: int, length: int) -> bytes:
        """What is at a virtual address."""
        return self.read_physical(self.physical(address), length)

    def _task(self, at: int, pid: int, tid: int, comm: bytes, *, user: bool) -> None:
        def put(path: str, value: int) -> None:
            self.u64(at + member(f"task_struct.{path}"), value)

        self.tasks[tid] = at
        self.u32(at + member("task_struct.pid"), tid)
        self.u32(at + member("task_struct.tgid"), pid)
        self.write(at + member("task_struct.comm"), comm.ljust(16, b"\0"))
        stack = self.allocate(0x4000)
        put("stack", stack)
        put("real_parent", self.tasks[0])
        # A word on the stack that points right behind a call.
        self.write(self.address(0x3000), b"\xe8\0\0\0\0")
        self.u64(stack + 0x3F40, self.address(0x3005))
        if user:
            mm = self.allocate(STRUCTS["mm_struct"][0])
            put("mm", mm)
            self.u64(mm + member("mm_struct.pgd"), self.allocate(PAGE))
            self.u64(mm + member("mm_struct.exe_file"), self._file([b"bin", comm]))

    def _file(self, names: Sequence[bytes]) -> int:
        parent = self.allocate(STRUCTS["dentry"][0])
        self.u64(parent + member("dentry.d_parent"), parent)
        for name in names:
            dentry, text = self.allocate(STRUCTS["dentry"][0]), self.allocate(64)
            self.write(text, name + b"\0")
            self.u64(dentry + member("dentry.d_parent"), parent)
            self.u64(dentry + member("dentry.d_name.name"), text)
            parent = dentry
        file = self.allocate(STRUCTS["file"][0])
        self.u64(file + member("file.f_path.dentry"), parent)
        return file

    def _append(self, head: int, node: int) -> None:
        last = int.from_bytes(self.read(head + 8, 8), "little") or head
        self.u64(last, node)
        self.u64(node, head)
        self.u64(node + 8, last)
        self.u64(head + 8, node)

    def add_process(self, pid: int, comm: bytes, *, user: bool = True) -> int:
        """A process with one thread; gives its task_struct."""
        at = self.allocate(STRUCTS["task_struct"][0])
        self._task(at, pid, pid, comm, user=user)
        self._append(self._list, at + member("task_struct.tasks"))
        signal = self.allocate(STRUCTS["signal_struct"][0])
        head = signal + member("signal_struct.thread_head")
        self.u64(at + member("task_struct.signal"), signal)
        self.u64(head, head)
        self._append(head, at + member("task_struct.thread_node"))
        return at

    def add_thread(self, pid: int, tid: int, comm: bytes) -> int:
        """One thread more of a process; gives its task_struct."""
        at = self.allocate(STRUCTS["task_struct"][0])
        self._task(at, pid, tid, comm, user=True)
        signal = int.from_bytes(self.read(self.tasks[pid] + member("task_struct.signal"), 8), "little")
        self.u64(at + member("task_struct.signal"), signal)
        self._append(signal + member("signal_struct.thread_head"), at + member("task_struct.thread_node"))
        return at

    def add_module(self, name: bytes, functions: Sequence[str], size: int = 0x4000) -> int:
        """A module whose functions are 0x40 bytes each; gives its struct module."""
        base, at = self.allocate(size), self.allocate(STRUCTS["module"][0])
        strings = b"\0" + b"".join(each.encode() + b"\0" for each in functions)
        table, at_string = bytes(24), 1
        for index, each in enumerate(functions):
            table += struct.pack("<IBBHQQ", at_string, 2, 0, 1, base + 0x40 * (index + 1), 0x40)
            at_string += len(each) + 1
        places = [self.allocate(len(data)) for data in (table, strings, b"?" + b"t" * len(functions))]
        for place, data in zip(places, (table, strings, b"?" + b"t" * len(functions)), strict=True):
            self.write(place, data)
        kallsyms = self.allocate(STRUCTS["mod_kallsyms"][0])
        self.u64(kallsyms + member("mod_kallsyms.symtab"), places[0])
        self.u32(kallsyms + member("mod_kallsyms.num_symtab"), len(functions) + 1)
        self.u64(kallsyms + member("mod_kallsyms.strtab"), places[1])
        self.u64(kallsyms + member("mod_kallsyms.typetab"), places[2])
        self.write(at + member("module.name"), name)
        self.u64(at + member("module.core_layout.base"), base)
        self.u32(at + member("module.core_layout.size"), size)
        self.u64(at + member("module.kallsyms"), kallsyms)
        self._append(self.address(DATA + 0x1000), at + member("module.list"))
        return at
