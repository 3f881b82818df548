"""Loading a library into a running process, and making its threads leave the kernel: what only ptrace(2) can do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from pathlib import Path

from vmexit.errors import TargetError

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000
_CALM_S = 1.0
_STILL_S = 0.02
_FUTEX = 202

# System calls of x86-64 that a thread sleeps in without holding a lock of the C library's: read, poll, select, nanosleep,
# epoll_wait, pselect6, ppoll, epoll_pwait, clock_nanosleep, rt_sigtimedwait, accept, recvmsg, wait4, epoll_pwait2.
_CALM = frozenset({0, 7, 23, 35, 232, 270, 271, 281, 230, 128, 43, 47, 61, 441})


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def kick(pid: int) -> None:
    """Makes each thread of the process leave the system call that it is in, as a signal would, but without one.

    A thread that ends in the meantime, or that somebody else traces, is left out.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        thread = int(task.name)
        with contextlib.suppress(OSError):
            _ptrace(_SEIZE, thread)
            try:
                _ptrace(_INTERRUPT, thread)
                os.waitpid(thread, _WALL)
            finally:
                with contextlib.suppress(OSError):
                    _ptrace(_DETACH, thread)


def _calls(pid: int) -> dict[int, str]:
    """The system call that each thread is in, with its arguments."""
    calls = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            calls[int(task.name)] = (task / "syscall").read_text()
    return calls


def _calm_thread(pid: int) -> int:
    """A thread that waits for something; one that may but hold a lock meanwhile only if there is no other."""
    waiting: dict[int, str] = {}
    deadline = time.monotonic() + _CALM_S
    while time.monotonic() < deadline:
        calls = _calls(pid)
        numbers = {thread: int(call.split()[0]) for thread, call in calls.items() if call[:1].isdigit()}
        for thread, number in numbers.items():
            # One that has waited in the same place for a while waits for another thread's end or for work.
            if number in _CALM or (number == _FUTEX and waiting.get(thread) == calls[thread]):
                return thread
        waiting = {thread: calls[thread] for thread, number in numbers.items() if number == _FUTEX}
        time.sleep(_STILL_S)
    return pid


def load(pid: int, library: str) -> None:
    """Loads the library, a path as the process sees it. Raises TargetError with the reason.

    A thread of the process is borrowed for that: one that waits for something, because it might hold a lock otherwise that the
    dynamic linker needs.
    """
    import pyinjector

    try:
        with pyinjector.attach(_calm_thread(pid)) as injector:
            injector.inject(library.encode())
    except pyinjector.PyInjectorError as error:
        why = str(getattr(error, "error_str", None) or error).splitlines()[0]
        if isinstance(error, pyinjector.InjectorError) and error.ret_val == -8:
            why = f"{os.strerror(errno.EPERM)} (kernel.yama.ptrace_scope, or a container's rules): run vmexit as root"
        raise TargetError(f"the agent cannot be loaded into process {pid}: {why}") from None
