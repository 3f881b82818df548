"""Attacks: what a script does must not reach anything but the memory it is given and its own arena."""

from __future__ import annotations

import gc
import mmap
import os
import time
from pathlib import Path

import pytest

from tests.script.running import MEMORY, Session, machine
from vmexit.script import abi
from vmexit.script.abi import constant
from vmexit.script.compile import Compiler
from vmexit.script.errors import ScriptError
from vmexit.script.native import Code, NativeError, compile_module, optimized, triple_and_layout
from vmexit.script.runtime import Machine, NativeCode, Runtime, sealed_file

CONSTANTS, GLOBALS, STACK, BUFFER, TEXT = (
    constant(f"ARENA_{name}") for name in ("CONSTANTS", "GLOBALS", "STACK", "BUFFER", "TEXT")
)
SIZES = {GLOBALS: 8 * constant("MAX_GLOBALS"), STACK: 64 * 1024, TEXT: 64, BUFFER: 0}


def addresses() -> list[int]:
    """Just outside of every segment, in segments that are not there, and where an offset or an address overflows."""
    found = []
    for segment, size in SIZES.items():
        found += [abi.address(segment, offset) for offset in (size, size - 7, size + 1, 1 << 47, (1 << 48) - 1, (1 << 48) - 8)]
    found += [abi.address(segment) for segment in range(constant("ARENA_SEGMENTS"), 256, 25)]
    found += [0x5BFF_FFFF_FFFF_FFFF, 0x5BFF_FFFF_FFFF_FFF9, 0x5D00_0000_0000_0000, (1 << 64) - 1, (1 << 64) - 7, 1 << 63, 0]
    return found


@pytest.mark.parametrize("address", addresses(), ids=hex)
def test_reads_and_writes_outside(address: int) -> None:
    session = Session()
    assert "cannot be read" in str(session.fault(f"print(poi({address:x}));")[1])
    assert "cannot be written" in str(session.fault(f"*{address:x} = 1;")[1])
    assert session.run(f"print(eq({address:x}, 1)); print(strlen({address:x}) * 0);") == "0\n0\n"
    assert session.fault(f"memcpy({MEMORY:x}, {address:x}, 8);")
    assert session.fault(f"memcpy({address:x}, {MEMORY:x}, 8);")
    assert session.run(f'print(memcmp({address:x}, {MEMORY:x}, 8)); print(strcmp("abc", {address:x}) != 0);').endswith("1\n")
    assert session.fault(f"interlocked_exchange({address:x}, 1);")
    assert session.fault(f"spinlock_lock({address:x});")


def test_the_last_bytes_of_a_segment_can_be_used() -> None:
    session = Session()
    last = abi.address(GLOBALS, SIZES[GLOBALS] - 8)
    assert session.run(f"*{last:x} = 5; print(poi({last:x}));") == "5\n"


@pytest.mark.parametrize("segment", [CONSTANTS, TEXT])
def test_read_only_segments(segment: int) -> None:
    session = Session()
    address = abi.address(segment)
    assert "cannot be written" in str(session.fault(f'x = "text"; *(char *){address:x} = 1;')[1])
    assert session.run(f'x = "text"; print(eb({address:x}, 1));') == "0\n"
    assert session.fault(f"memcpy({address:x}, {MEMORY:x}, 1);")
    assert session.fault(f"interlocked_increment({address:x});")


def test_arena_addresses_are_never_the_guests() -> None:
    """Even memory that the user puts there is not seen through them, and they are no physical addresses."""
    address = abi.address(GLOBALS)
    on = Machine(memory=[(address, bytearray(b"guest!!!" * 2))])
    session = Session()
    assert session.run(f".x = 5; print(poi({address:x}));", on) == "5\n"
    assert session.fault(f"print(poi_pa({address:x}));", on)
    assert session.run(f"print(eq_pa({address:x}, 1)); print(virtual_to_physical({address:x}));", on) == "0\n0\n"
    assert on.memory[0][1] == b"guest!!!" * 2


def test_a_stale_address_stays_in_the_arena() -> None:
    session = Session()
    text = """
        int *leak() { int v[4] = {1, 2, 3, 4}; return v; }
        void use() { int w[4] = {5, 6, 7, 8}; int *p = .p; p[3] = 9; print(w[3]); }
        .p = leak();
        use();
    """
    assert session.run(text) == "9\n"


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        *((kind, index) for kind in ("char", "int", "long", "unsigned long") for index in ("4", "-1", "-80")),
        *((kind, index) for kind in ("int", "long", "unsigned") for index in ("7fffffff", "80000000", "ffffffff")),
        *((kind, index) for kind in ("long", "unsigned long") for index in ("2000000000000000", "8000000000000000")),
    ],
)
def test_array_bounds(kind: str, index: str) -> None:
    """Also where index times size of element would come round to 0."""
    out, error = Session().fault(f"{kind} i = {index}; long v[4]; long w[4]; v[i] = 41; print(1);")
    assert out == ""
    assert "no element" in str(error)


def test_a_whole_frame_is_its_own() -> None:
    """Whatever is written to all of an array, its neighbours keep what they have."""
    assert (
        Session().run("""
        long before = 1; long v[4]; long after = 2; p = &before; q = &after;
        for (int i = 0; i < 4; i++) { v[i] = -1; }
        print(before); print(after);
    """)
        == "1\n2\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "while (1) { }",
        "for (;;) { for (;;) { } }",
        "x = 1; while (x) { x++; if (x == 0) { x = 1; } }",
        "int loop() { while (1) { } return 0; } while (1) { loop(); }",
        "int tail(int n) { return tail(n + 1); } tail(0);",
        "void ping(int n) { pong(n); } void pong(int n) { ping(n); } ping(1);",
        "while (1) { continue; }",
        "do { continue; } while (1);",
        "while (1) { strlen(1000); }",
        "while (1) { memcpy(1000, 1100, 100); }",
        "while (1) { .x++; }",
    ],
)
def test_endless(text: str) -> None:
    start = time.monotonic()
    error = Session().fault(text)[1]
    assert "budget of steps" in str(error) or "too deep" in str(error)
    assert time.monotonic() - start < 60


def test_long_copies_spend_steps() -> None:
    on = Machine(memory=[(0, bytearray(1 << 20))])
    session = Session(steps=100)
    assert "budget of steps" in str(session.fault("memcpy(80000, 0, 80000);", on)[1])
    assert "budget of steps" in str(session.fault("print(memcmp(80000, 0, 80000));", on)[1])
    on.memory[0][1][:] = b"a" * (1 << 20)
    assert "budget of steps" in str(session.fault("print(strlen(0));", on)[1])


@pytest.mark.parametrize("stack", [1024, 64 * 1024, 1 << 20])
def test_recursion_ends_within_the_stack(stack: int) -> None:
    session = Session(steps=1 << 40)
    session.runtime.stack = stack
    text = """
        int run(int n, int m) { if (n == 0) { return run(n, m + 1) + run(m, n); } return run(n + 1, m) * 3 + n; }
        print(run(1, 1));
    """
    assert "too deep" in str(session.fault(text)[1])


def test_deep_recursion_with_arrays_ends_within_the_arena() -> None:
    session = Session()
    assert "too deep" in str(session.fault("int run(int n) { char v[4000]; v[n] = 1; return run(n + 1) + v[n]; } run(1);")[1])


def test_a_function_with_many_live_values_is_bounded() -> None:
    """All are alive when the last one is read, and go to the native stack, which is bounded when the script is compiled."""

    def program(count: int) -> str:
        names = [f"y{i}" for i in range(count)]
        return "".join(f"{name}=rdtsc();" for name in names) + f"print({'^'.join(names)});"

    assert Session().run(program(500))
    with pytest.raises(ScriptError, match="bytes of stack"):
        Compiler().compile(program(2500))


def test_unterminated_string() -> None:
    on = Machine(memory=[(0x1000, bytearray(b"a" * 0x3000))])
    session = Session()
    assert "too long" in str(session.fault('printf("%s", 1000);', on)[1])
    assert session.run('printf("%.3s", 1000);', on) == "aaa"
    assert session.run("print(strlen(1000));", on) == "0\n"


def test_many_long_strings_in_one_print() -> None:
    on = Machine(memory=[(0x1000, bytearray(b"a" * 4000 + bytes(96)))])
    session = Session()
    assert len(session.run('printf("%s%s", 1000, 1000);', on)) == 8000
    assert "too long" in str(session.fault('printf("%s%s%s", 1000, 1000, 1000);', on)[1])


def test_huge_widths() -> None:
    assert len(Session().run('printf("%*d", 7fffffff, 1);')) == 4096
    assert Session().run('printf("%99999999999d");') == "%99999999999d"


def test_code_cannot_be_written_after_it_is_sealed() -> None:
    descriptor = sealed_file(b"\xc3")
    try:
        with pytest.raises(OSError, match=r"."):
            os.write(descriptor, b"x")
        with pytest.raises(OSError, match=r"."):
            mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"."):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def test_no_page_is_writable_and_executable() -> None:
    session = Session()
    session.run("print(1);")
    code = next(iter(session.runtime._code.values()))
    assert isinstance(code, NativeCode)
    mappings = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    ours = [line for line in mappings if len(line) > 5 and "memfd:vmexit-script" in line[5]]
    assert ours
    assert all("w" not in line[1] for line in ours)
    del code
    gc.collect()


def test_compiled_code_refers_to_nothing_outside() -> None:
    """What needs a relocation to something else is refused, not run."""
    triple, layout = triple_and_layout()
    head = f'target triple = "{triple}"\ntarget datalayout = "{layout}"\n'
    call = head + "declare i32 @elsewhere()\ndefine i32 @entry() uwtable { %x = call i32 @elsewhere() ret i32 %x }\n"
    data = head + "@cell = global i32 1\ndefine i32 @entry() uwtable { %x = load i32, ptr @cell ret i32 %x }\n"
    for text in (call, data):
        with pytest.raises(NativeError):
            compile_module(text, "entry")
    fine = head + "define i32 @entry() uwtable { ret i32 7 }\n"
    assert isinstance(compile_module(fine, "entry"), Code)
    assert "ret i32 7" in str(optimized(fine))


def test_runtimes_do_not_share_globals() -> None:
    one, other = Runtime(), Runtime()
    compiler = Compiler()
    one.run(compiler.compile(".x = 5;"), machine(), lambda _: None)
    out = bytearray()
    other.run(compiler.compile("print(.x);"), machine(), out.extend)
    assert out == b"0\n"
