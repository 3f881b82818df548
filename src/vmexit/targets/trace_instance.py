"""A tracefs instance of our own: trace buffers, filters and switches that nobody else's tracing gets in the way of."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

from vmexit.errors import TargetError
from vmexit.targets.trace_pages import EventFormat, FormatError, PageFormat, parse_event_format, parse_page_format

_MOUNTED = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_SUBBUFFER_KB = 32
_BUFFER_KB = 8192
"""For each CPU, unless there are very many."""
_BUFFERS_KB = 512 << 10
_PREFIX = "vmexit"

# uapi/linux/mount.h; the numbers of system calls that came with Linux 5.2 are the same for every architecture.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6

_serial = itertools.count()


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    given = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def mount_for_us(filesystem: str) -> int:
    """Mounts a file system of the kernel's at no place at all: a descriptor of its root. It is unmounted when that is closed,
    however this process ends. Raises OSError."""
    context = _system_call(_FSOPEN, filesystem.encode(), _CLOEXEC)
    try:
        _system_call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _system_call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def folder_of(descriptor: int) -> Path:
    """Where to reach what mount_for_us has mounted."""
    return Path(f"/proc/self/fd/{descriptor}")


def _find_tracefs() -> tuple[Path, int | None]:
    """Its folder, and the descriptor to be closed if it was mounted for us. Raises TargetError, with what would help."""
    for folder in _MOUNTED:
        if os.access(folder / "instances", os.W_OK | os.X_OK, effective_ids=True):
            return folder, None
    try:
        mount = mount_for_us("tracefs")
    except OSError as error:
        raise TargetError(_why_no_tracefs(error)) from None
    return folder_of(mount), mount


def missing_tracepoints(tracepoints: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of these (system, name) that this kernel does not have; nothing is changed.

    Raises TargetError, with what would help, where tracefs cannot be used at all.
    """
    root, mount = _find_tracefs()
    try:
        return [point for point in tracepoints if not _has_tracepoint(root, *point)]
    finally:
        if mount is not None:
            os.close(mount)


def _has_tracepoint(root: Path, system: str, name: str) -> bool:
    return (root / "events" / system / name / "enable").exists()


def _why_no_tracefs(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        if os.geteuid() != 0:
            return "the kernel's tracepoints are for root: run vmexit as root (sudo)"
        return (
            "tracefs is closed to us here (CAP_SYS_ADMIN is missing, or the kernel is locked down): "
            "run vmexit outside of the container"
        )
    if error.errno == errno.ENODEV:
        return "this kernel has no tracefs (CONFIG_TRACING)"
    return f"there is no tracefs, and it cannot be mounted ({error.strerror}): mount -t tracefs tracefs /sys/kernel/tracing"


def _started(pid: int | str) -> str | None:
    """When the process began, in the kernel's ticks: what tells it from a later one with its number; None: it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def remove_abandoned(instances: Path) -> None:
    """Removes the instances of vmexits that were killed. One that is in use the kernel does not let go."""
    with contextlib.suppress(OSError):
        for folder in list(instances.iterdir()):
            found = re.fullmatch(rf"{_PREFIX}-(\d+)-(\d+)-\d+", folder.name)
            if found and _started(found[1]) != found[2]:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _release(owner: int, folder: Path | None, descriptors: list[int], mount: int | None) -> None:
    if os.getpid() != owner:
        return  # a child that was forked
    for descriptor in descriptors:
        os.close(descriptor)
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / "tracing_on").write_text("0")
        with contextlib.suppress(OSError):
            folder.rmdir()
    if mount is not None:
        os.close(mount)


class Instance:
    """The instance of one target. It is gone when it is closed, or forgotten, or when this process ends on its own."""

    def __init__(self, tracepoints: Sequence[tuple[str, str]]) -> None:
        """``tracepoints``: (system, name) of those that are wanted. They are switched off, and nothing is filtered.

        Raises TargetError in one line where there is no tracefs, no right to it, or no such tracepoint.
        """
        self._pipes: dict[int, int] = {}
        descriptors: list[int] = []
        root, mount = _find_tracefs()
        remove_abandoned(root / "instances")
        folder = root / "instances" / f"{_PREFIX}-{os.getpid()}-{_started('self')}-{next(_serial)}"
        release = weakref.finalize(self, _release, os.getpid(), None, descriptors, mount)
        self._release = release
        try:
            for system, name in tracepoints:
                if not _has_tracepoint(root, system, name):
                    raise TargetError(_why_no_tracepoint(system, name))
            folder.mkdir(mode=0o700)
            release.detach()
            self._release = weakref.finalize(self, _release, os.getpid(), folder, descriptors, mount)
            self._folder = folder
            self._set_up()
            for cpu in self._cpus():
                with contextlib.suppress(FileNotFoundError):
                    path = folder / "per_cpu" / f"cpu{cpu}" / "trace_pipe_raw"
                    self._pipes[cpu] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    descriptors.append(self._pipes[cpu])
        except OSError as error:
            self.close()
            if error.errno in (errno.EPERM, errno.EACCES):
                raise TargetError(_why_no_tracefs(error)) from None
            raise TargetError(f"tracing is not to be had here: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self.write("trace_clock", "mono")  # that of Trap.time_ns
        with contextlib.suppress(OSError):  # since Linux 6.8
            self.write("buffer_subbuf_size_kb", str(_SUBBUFFER_KB))
        self.write("buffer_size_kb", str(max(256, min(_BUFFER_KB, _BUFFERS_KB // max(1, os.cpu_count() or 1)))))
        try:
            self.layout: PageFormat = parse_page_format(self.read("events/header_page"))
        except FormatError as error:
            raise TargetError(f"this kernel's trace pages are not as they were ever seen: {error}") from None

    def _cpus(self) -> list[int]:
        names = [path.name for path in (self._folder / "per_cpu").iterdir()]
        return sorted(int(name[3:]) for name in names if name.startswith("cpu") and name[3:].isdigit())

    def event_format(self, system: str, name: str, *needed: str) -> EventFormat:
        """How its entries look. Raises TargetError where a field that is needed is not among them."""
        try:
            return parse_event_format(self.read(f"events/{system}/{name}/format"), *needed)
        except (FormatError, OSError) as error:
            raise TargetError(f"this kernel's tracepoint {system}:{name} is not as it was ever seen: {error}") from None

    def write(self, path: str, text: str) -> None:
        """One of the instance's files. Raises OSError."""
        (self._folder / path).write_text(text)

    def read(self, path: str) -> str:
        """One of the instance's files. Raises OSError."""
        return (self._folder / path).read_text()

    @property
    def pipes(self) -> dict[int, int]:
        """A descriptor for each CPU, which is readable when half of the CPU's buffer is full."""
        return self._pipes

    def read_page(self, cpu: int) -> bytes:
        """The oldest page of that CPU that was not read yet, also one that is not full; empty: there is nothing."""
        try:
            return os.read(self._pipes[cpu], self.layout.size)
        except (BlockingIOError, InterruptedError):
            return b""

    def close(self) -> None:
        """Removes it. Does nothing the second time."""
        self._pipes = {}
        self._release()


def _why_no_tracepoint(system: str, name: str) -> str:
    text = f"this kernel has no tracepoint {system}:{name}"
    return f"{text}: is the kvm module loaded?" if system == "kvm" else text
