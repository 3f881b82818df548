"""The ELF reader against files that the compiler makes, and against damaged ones."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmexit.setup.elf import ElfError, read_elf

SOURCE = """\
extern int taken_from_elsewhere(void) __attribute__((weak));
int given_variable = 1;
int given_function(void) { return taken_from_elsewhere ? taken_from_elsewhere() : given_variable; }
__attribute__((visibility("hidden"))) int kept_function(void) { return 2; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.c").write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "a.so", folder / "a.c"], check=True)
    return folder / "a.so"


def test_library_exports_what_it_defines(library: Path) -> None:
    exports = read_elf(library).exports
    assert {"given_variable", "given_function"} <= exports
    assert not {"taken_from_elsewhere", "kept_function", ""} & exports


def test_programs_are_static_or_not(library: Path) -> None:
    source = library.with_name("main.c")
    source.write_text("int main(void) { return 0; }\n")
    for flags, static in ((["-static"], True), ([], False)):
        program = library.with_name("program")
        subprocess.run(["gcc", *flags, "-o", program, source], check=True)
        assert read_elf(program).static is static


def test_symbols_of_a_qemu_like_program(library: Path) -> None:
    source = library.with_name("host.c")
    source.write_text("int reachable(void) { return 0; }\nint main(void) { return reachable(); }\n")
    program = library.with_name("host")
    subprocess.run(["gcc", "-rdynamic", "-o", program, source], check=True)
    assert "reachable" in read_elf(program).exports
    subprocess.run(["gcc", "-o", program, source], check=True)
    assert "reachable" not in read_elf(program).exports


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(100), b"MZ" + bytes(1000)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ElfError, match="not a 64-bit little-endian ELF file"):
        read_elf(path)


def test_cut_short(tmp_path: Path, library: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(library.read_bytes()[:200])
    with pytest.raises(ElfError, match="a damaged ELF file"):
        read_elf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(6, 1 << 14), st.integers(0, 255)), max_size=20),
    cut=st.integers(6, 1 << 15),
)
def test_damaged_files_are_refused_or_read(tmp_path: Path, library: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(library.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    data[:6] = b"\x7fELF\x02\x01"
    path = tmp_path / "file"
    path.write_bytes(data[:cut])
    with contextlib.suppress(ElfError):
        read_elf(path)
