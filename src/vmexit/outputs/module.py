"""A module: a shared library that gets each message, in a process of its own so that its mistakes are its own."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vmexit.outputs.module_host import LOADED
from vmexit.outputs.sink import OutputError, SinkError
from vmexit.outputs.streams import StreamSink
from vmexit.setup.elf import MACHINES, ElfError, read_elf

FUNCTION = "hyperdbg_event_forwarding"
_HOST = Path(__file__).with_name("module_host.py")
_LENGTH = struct.Struct("<I")
_LOAD_S = 10.0
_END_S = 0.5
_REASON = 4096


def check_library(path: Path) -> None:
    """Raises OutputError where that is no shared library for this machine that exports the function."""
    try:
        elf = read_elf(path)
    except ElfError as error:
        raise OutputError(f"{path} is no shared library: {error}", 0) from None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}", 0) from None
    if elf.machine != MACHINES.get(platform.machine()):
        raise OutputError(f"{path} is a library for another processor", 0)
    if FUNCTION not in elf.exports:
        raise OutputError(f"{path} does not export {FUNCTION}(const char *, unsigned int)", 0)


class ModuleSink(StreamSink):
    """The process and the pipe to it. How far it has come is in memory that both share, so that it is known when it dies."""

    _OVERHEAD = _LENGTH.size

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._progress = memoryview(bytearray(16)).cast("Q")

    def connect(self) -> None:
        self.close()
        shared = os.memfd_create("vmexit-module", os.MFD_CLOEXEC)
        read_end, write_end = os.pipe()
        answer, answer_end = os.pipe()
        try:
            os.ftruncate(shared, mmap.PAGESIZE)
            self._progress = memoryview(mmap.mmap(shared, mmap.PAGESIZE)).cast("Q")
            numbers = [str(number) for number in (os.getpid(), read_end, answer_end, shared)]
            self._process = subprocess.Popen(
                [sys.executable, "-ESs", str(_HOST), str(self._path), *numbers],
                stdin=subprocess.DEVNULL,
                pass_fds=(read_end, answer_end, shared),
            )
        except OSError as error:
            os.close(write_end)
            os.close(answer)
            raise SinkError(f"its process cannot be started: {error.strerror}") from None
        finally:
            for fd in (read_end, answer_end, shared):
                os.close(fd)
        os.set_blocking(write_end, False)
        self._fd = write_end
        try:
            self._await_loaded(answer)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(answer)

    def _await_loaded(self, answer: int) -> None:
        assert self._process is not None
        if not select.select([answer], [], [], _LOAD_S)[0]:
            raise SinkError(f"it is not loaded after {_LOAD_S:g} s")
        said = os.read(answer, _REASON)
        if not said:  # it has ended in the library's constructor, or is about to
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LOAD_S)
            raise SinkError(self._end_text(), for_good=True)
        if said != LOADED:
            raise SinkError(f"it cannot be loaded: {said.decode(errors='replace')}", for_good=True)

    def _framed(self, messages: Sequence[bytes]) -> bytes:
        return b"".join(part for message in messages for part in (_LENGTH.pack(len(message)), message))

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BrokenPipeError:
            raise SinkError(self._end_text()) from None

    def idle(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise SinkError(self._end_text())

    def _end_text(self) -> str:
        """How its process ended; waits for that, as its end of the pipe is closed."""
        assert self._process is not None
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it reads no more"
        if status >= 0:
            return f"its process ended with status {status}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process was ended by signal {-status}"

    def _settled(self) -> int:
        return self._progress[1]

    def take_back(self) -> list[bytes]:
        begun, done = self._progress[0], self._progress[1]
        found = super().take_back()
        if begun > done and found:  # what it was at when it ended
            found.pop(0)
            self.lost += 1
        self._progress = memoryview(bytearray(16)).cast("Q")
        return found

    def close(self) -> None:
        super().close()
        if self._process is None:
            return
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
