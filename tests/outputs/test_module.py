"""Modules: shared libraries that a compiler makes here, called in a process of their own with what a guest's traps bring."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines import guest
from tests.outputs.peers import SCRIPT, STAR, finish, lines, wait_until
from vmexit import Debugger, VmexitError
from vmexit.outputs import OutputError

COUNT = 20_000

_SOURCE = """
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void hyperdbg_event_forwarding(const char *message, unsigned int length);

void hyperdbg_event_forwarding(const char *message, unsigned int length)
{
    static int file = -1;
    static int calls;
    if (file < 0)
        file = open("%(path)s", O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (message[length] != 0 || strlen(message) != length)
        abort();
    %(first)s
    if (write(file, message, length) != (ssize_t)length)
        abort();
    calls++;
}
"""


def library(folder: Path, first: str = "", source: str = _SOURCE, name: str = "module.so") -> Path:
    """A module that does ``first`` at each message, and then appends it to the file "got"."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    code = folder / f"{name}.c"
    code.write_text(source % {"path": folder / "got", "first": first} if "%(" in source else source)
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", folder / name, code], check=True)
    return folder / name


def forward(debugger: Debugger, path: Path) -> None:
    debugger.outputs.create("out", "module", str(path))
    debugger.outputs.open("out")
    debugger.on_msr_write(STAR, script=SCRIPT, outputs=("out",))


def child_of(debugger: Debugger) -> int:
    """The module's process."""
    found = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and b"module_host.py" in _read(path / "cmdline") and _parent(path) == os.getpid()
    ]
    return found[0] if found else 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parent(path: Path) -> int:
    status = _read(path / "stat").rpartition(b")")[2].split()
    return int(status[1]) if status else 0


def test_each_print_is_a_call(tmp_path: Path) -> None:
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, library(tmp_path))
        finish(debugger)
        debugger.close()
        output = debugger.outputs["out"]
        assert (tmp_path / "got").read_bytes().splitlines() == lines(COUNT)
        assert (output.sent, output.dropped) == (COUNT, 0)


def test_one_that_crashes_loses_what_it_was_called_with(tmp_path: Path) -> None:
    crash = 'if (strstr(message, "5a5a5a5a00001000") != NULL) raise(SIGSEGV);'
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, library(tmp_path, crash))
        finish(debugger)
        debugger.close()
        output = debugger.outputs["out"]
        assert (tmp_path / "got").read_bytes().splitlines() == [line for line in lines(COUNT) if line != b"5a5a5a5a00001000"]
        assert (output.sent, output.dropped) == (COUNT - 1, 1)


def test_one_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, library(tmp_path, "usleep(20);"))
        output = debugger.outputs["out"]
        debugger.run(until=lambda: output.sent > 500, timeout=60)
        wait_until(lambda: output.sent > 500, "some calls")
        first = child_of(debugger)
        assert first
        os.kill(first, 9)
        finish(debugger)
        debugger.close()
        got = (tmp_path / "got").read_bytes().splitlines()
        # What it was at when it was killed may have been written, and is not sent again.
        assert output.sent + output.dropped == COUNT and output.dropped <= 1
        assert len(got) == len(set(got)) and output.sent <= len(got) and set(got) <= set(lines(COUNT))


def test_its_process_ends_with_the_output(tmp_path: Path) -> None:
    with guest("loop", COUNT=10) as (debugger, _, _):
        forward(debugger, library(tmp_path))
        child = child_of(debugger)
        assert child
        debugger.outputs.close("out")
        assert child_of(debugger) == 0


def test_its_process_ends_with_vmexit(tmp_path: Path) -> None:
    path = library(tmp_path, "for (;;) pause();")
    program = f"""
import os, sys
from vmexit.outputs.kinds import Machine
from vmexit.outputs import Outputs
outputs = Outputs(lambda: Machine("x", 1, lambda records: ""), lambda: True)
outputs.create("m", "module", {str(path)!r})
outputs.open("m")
print(outputs["m"]._sink._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    child = int(done.stdout)
    wait_until(lambda: _read(Path(f"/proc/{child}/stat")).rpartition(b")")[2][1:2] in (b"", b"Z"), "its end")


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    with guest("loop", COUNT=100) as (debugger, _, _):
        forward(debugger, library(tmp_path, "if (calls == 10) for (;;) pause();"))
        finish(debugger)
        debugger.outputs.finish(0.3)
        output = debugger.outputs["out"]
        assert (output.sent, output.dropped) == (10, 90) and child_of(debugger) == 0


class TestRefused:
    """What is no module."""

    def create(self, path: Path) -> str:
        from vmexit.outputs import Outputs
        from vmexit.outputs.kinds import Machine

        outputs = Outputs(lambda: Machine("x", 1, lambda records: ""), lambda: True)
        try:
            outputs.create("m", "module", str(path))
            outputs.open("m")
        except VmexitError as error:
            return str(error)
        raise AssertionError(f"{path} was taken for a module")

    def test_no_file(self, tmp_path: Path) -> None:
        assert "cannot be read: No such file" in self.create(tmp_path / "none.so")

    def test_no_library(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("text")
        assert "is no shared library: not a 64-bit little-endian ELF file" in self.create(tmp_path / "text")

    def test_without_the_function(self, tmp_path: Path) -> None:
        path = library(tmp_path, source="int other(void);\nint other(void) { return 1; }\n")
        assert "does not export hyperdbg_event_forwarding(const char *, unsigned int)" in self.create(path)

    def test_that_cannot_be_loaded(self, tmp_path: Path) -> None:
        source = (
            "void nowhere(void);\nvoid hyperdbg_event_forwarding(const char *m, unsigned n);\n"
            "void *kept = (void *)nowhere;\nvoid hyperdbg_event_forwarding(const char *m, unsigned n) { (void)m; (void)n; }\n"
        )
        text = self.create(library(tmp_path, source=source))
        assert "cannot be opened: it cannot be loaded" in text and "nowhere" in text

    def test_that_ends_while_it_is_loaded(self, tmp_path: Path) -> None:
        source = (
            "#include <stdlib.h>\nvoid hyperdbg_event_forwarding(const char *m, unsigned n);\n"
            "__attribute__((constructor)) static void first(void) { _Exit(3); }\n"
            "void hyperdbg_event_forwarding(const char *m, unsigned n) { (void)m; (void)n; }\n"
        )
        assert "its process ended with status 3" in self.create(library(tmp_path, source=source))


def test_errors_know_the_word() -> None:
    error = OutputError("no", 1, "do this")
    assert (error.part, error.hint, str(error)) == (1, "do this", "no (do this)")
