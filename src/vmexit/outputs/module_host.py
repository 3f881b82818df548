"""Runs a module: a process of its own that loads a shared library and calls it with each message.

Started as a file by module.py, with Python alone: nothing of vmexit is imported here. Arguments: the library's path, the number
of the process that started it, and the descriptors of a pipe with messages (4 bytes of length, little-endian, before each), of
a pipe for what it says when it has loaded the library (LOADED, or why it could not), and of shared memory: bytes of messages
begun, and done.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys

LOADED = b"\0"
"""What it says then; a library whose constructor ends the process leaves nothing said."""
_FUNCTION = "hyperdbg_event_forwarding"
_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """The kernel ends this process with the one that started it, whatever the library does then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def main() -> None:
    """Until the messages end."""
    path, parent, messages_fd, answer_fd, shared_fd = sys.argv[1], *map(int, sys.argv[2:6])
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for vmexit
    try:
        function = getattr(ctypes.CDLL(path), _FUNCTION)
    except (OSError, AttributeError) as error:
        os.write(answer_fd, str(error).encode()[:1000])
        sys.exit(1)
    os.write(answer_fd, LOADED)
    os.close(answer_fd)
    function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_uint), None
    done = memoryview(mmap.mmap(shared_fd, mmap.PAGESIZE)).cast("Q")
    length = struct.Struct("<I")
    with os.fdopen(messages_fd, "rb", 1 << 16) as messages:
        while len(header := messages.read(length.size)) == length.size:
            size = length.unpack(header)[0]
            message = messages.read(size)
            if len(message) != size:
                break
            done[0] += length.size + size
            function(message, size)
            done[1] += length.size + size


if __name__ == "__main__":
    main()
