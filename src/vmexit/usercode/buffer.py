"""The buffer of an event: zeroed bytes that its code, its script and all cores share, kept from trap to trap."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

from vmexit.errors import VmexitError
from vmexit.link import wire

MAX_BUFFER = wire.MAX_BUFFER
"""The largest buffer there can be, in bytes."""
ADDRESS = wire.constant("ARENA_TAG") << 56 | wire.constant("ARENA_BUFFER") << 48
"""Where scripts and code see it, so that both can use the same pointers."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def check_buffer(size: int) -> None:
    """Raises VmexitError for a buffer that is empty or absurdly large; ``size``: in bytes."""
    if not 0 < size <= MAX_BUFFER:
        raise VmexitError(f"a buffer has 1 to {MAX_BUFFER:x} bytes, not {size:x}")


class Memory:
    """Zeroed bytes, whole pages, at an address of this process: for the emulator, which shares them with Python."""

    def __init__(self, size: int, file: int = -1) -> None:
        """``size``: in bytes, rounded up. ``file``: whose bytes they are; none: nobody else's."""
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(file, self.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


class Buffer:
    """The zeroed bytes of an event that its code and its script keep from one run to the next.

    They are a file in memory, which the agent maps, too.
    """

    def __init__(self, size: int) -> None:
        """``size``: in bytes, 1 to MAX_BUFFER; VmexitError for another."""
        check_buffer(size)
        self.size = size
        self._file = os.memfd_create("vmexit-buffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        self.memory = Memory(size, self._file)

    def fileno(self) -> int:
        """The file, sealed against being made shorter."""
        return self._file

    def __bytes__(self) -> bytes:
        return self.memory.map[: self.size]
