"""Looking without touching: the live host, or a virtual machine of KVM's, through the kernel's own tracepoints."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from vmexit.errors import TargetError
from vmexit.link.client import Link
from vmexit.link.wire import Access
from vmexit.targets.attach import machines, vcpus_of
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks, Untrappable
from vmexit.targets.host_threads import HostThreads
from vmexit.targets.trace_events import Cores, TraceLink, Tracepoint, TraceRings
from vmexit.targets.trace_instance import Instance, folder_of, mount_for_us

_HOST_POINTS = (
    Tracepoint("msr", "write_msr", "msr", "val", "failed", Access.WRMSR),
    Tracepoint("msr", "read_msr", "msr", "val", "failed", Access.RDMSR),
)
_KVM_POINTS = (Tracepoint("kvm", "kvm_msr", "ecx", "data", "exception", write="write"),)

# IA32_TSC_DEADLINE and the x2APIC's EOI, ICR and initial count: written at every timer and interrupt.
_NOISE = (0x6E0, 0x80B, 0x830, 0x838)
_REASON = "a tracepoint only tells what the kernel has done; nothing can be stopped or changed by it"

_REFRESH_S = 0.5


class _Looked:
    """What both have in common. See targets.base.Target; halting means to look no more for a while."""

    wants_halted = False
    found_running: bool | None = True
    untrappable: tuple[Untrappable, ...] = ()

    def __init__(self, points: Sequence[Tracepoint], cores: Cores, threads: HostThreads | None = None) -> None:
        self._instance = Instance([(point.system, point.name) for point in points])
        self._pending: list[Notice] = []
        self._refresh_at = 0.0
        self._closed = False
        try:
            self._rings = TraceRings(self._instance, points, cores, threads)
        except BaseException:
            self._instance.close()
            raise
        self.only_looks: OnlyLooks | None = OnlyLooks(_REASON, _NOISE, threads)
        # It does all that the debugger asks of a link, and refuses what it cannot.
        self.link = cast(Link, TraceLink(self._rings, _REASON))

    def resume(self) -> None:
        """Looks again."""
        self._switch(True)

    def halt(self) -> None:
        """Looks no more; what came before is still to be had."""
        self._switch(False)
        self._pending.append(Notice(NoticeKind.STOPPED))

    def _switch(self, on: bool) -> None:
        self._rings.runs = on
        if not self._closed:
            try:
                self._instance.write("tracing_on", "1" if on else "0")
            except OSError as error:
                raise TargetError(f"tracing cannot be switched {'on' if on else 'off'}: {error.strerror}") from None

    def filenos(self) -> list[int]:
        """Of each CPU's buffer."""
        return list(self._instance.pipes.values())

    def notices(self) -> list[Notice]:
        """That it was halted."""
        if self._closed:
            return []
        if (now := time.monotonic()) >= self._refresh_at:
            self._refresh_at = now + _REFRESH_S
            self._rings.refresh()
        notices, self._pending = self._pending, []
        return notices

    def detach(self) -> None:
        """As close: it was never touched."""
        self.close()

    def close(self) -> None:
        """Looks no more, and leaves nothing behind."""
        if self._closed:
            return
        self._closed = True
        self.link.close()
        self._instance.close()


class _HostCores:
    """Cores are the host's own CPUs."""

    def of(self, cpu: int, threads: npt.NDArray[np.uint32]) -> int:
        return cpu

    def filter(self, core: int) -> str:
        return f"CPU == {core}"


class Host(_Looked):
    """The live Linux host that vmexit itself runs on: every access that its kernel makes by way of its own functions."""

    name = vmm = "the live host"
    exit_status: int | None = None
    pid = 0

    def __init__(self) -> None:
        """Raises TargetError in one line where there is nothing to be seen."""
        super().__init__(_HOST_POINTS, _HostCores(), HostThreads())

    @property
    def vcpus(self) -> int:
        """The host's CPUs."""
        return max(self._instance.pipes, default=0) + 1


class _VcpuThreads:
    """Cores are vCPUs, each of which a thread of the VMM runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._mount: int | None = None
        with contextlib.suppress(OSError):
            self._mount = mount_for_us("debugfs")
        self._cores: dict[int, int] = {}

    def close(self) -> None:
        if self._mount is not None:
            os.close(self._mount)
            self._mount = None

    def of(self, cpu: int, threads: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
        unique, inverse = np.unique(threads, return_inverse=True)
        found = np.array([self._core_of(thread) for thread in unique.tolist()], np.uint16)
        return found[inverse]

    def _core_of(self, thread: int) -> int:
        if thread not in self._cores:
            self._look()
        if thread not in self._cores:  # the kernel tells nobody; they are numbered as they come
            taken = set(self._cores.values())
            self._cores[thread] = next(core for core in range(len(taken) + 1) if core not in taken)
        return self._cores[thread]

    def _look(self) -> None:
        """KVM tells in debugfs which thread ran a vCPU last (since Linux 6.0); QEMU can name them so."""
        if self._mount is not None:
            with contextlib.suppress(OSError, ValueError):
                for path in folder_of(self._mount).glob(f"kvm/{self._pid}-*/vcpu*/pid"):
                    if thread := int(path.read_text()):  # 0: it has not run yet
                        self._cores[thread] = int(path.parent.name.removeprefix("vcpu"))
        if not self._cores:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{self._pid}/task").iterdir():
                    if found := re.fullmatch(r"CPU (\d+)/KVM", (task / "comm").read_text().strip()):
                        self._cores[int(task.name)] = int(found[1])

    def filter(self, core: int) -> str | None:
        self._look()
        threads = [thread for thread, other in self._cores.items() if other == core]
        return f"({' || '.join(f'common_pid == {thread}' for thread in threads)})" if threads else None


class Watched(_Looked):
    """A virtual machine of KVM's: every access of its guest that comes to KVM. The VMM notices nothing."""

    def __init__(self, pid: int) -> None:
        """``pid``: the VMM's process. Raises TargetError in one line where there is nothing to be seen."""
        found = next((machine for machine in machines() if machine.pid == pid and machine.kvm), None)
        if found is None:
            raise TargetError(_why_not(pid))
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:
            raise TargetError(f"there is no process {pid}") from None
        self._pid = pid
        self._ended_told = False
        self._vcpus = max(1, found.vcpus)
        self._threads = _VcpuThreads(pid)
        self.name = self.vmm = f"{found.name} (process {pid})"
        try:
            super().__init__(_KVM_POINTS, self._threads)
            self._follow()
        except BaseException:
            self._threads.close()
            os.close(self._pidfd)
            raise

    def _follow(self) -> None:
        """Has the kernel look at nobody but the VMM's threads, and those that they begin."""
        try:
            threads = [entry.name for entry in Path(f"/proc/{self._pid}/task").iterdir()]
            self._instance.write("options/event-fork", "1")
            self._instance.write("set_event_pid", " ".join(threads))
        except OSError as error:
            self._instance.close()
            raise TargetError(f"process {self._pid} cannot be followed: {error.strerror}") from None

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self._pid

    @property
    def vcpus(self) -> int:
        """Those that it has, or had."""
        self._vcpus = max(self._vcpus, vcpus_of(self._pid))
        return self._vcpus

    @property
    def exit_status(self) -> int | None:
        """Nobody tells a stranger how it ended: 0 then."""
        return 0 if self._closed or select.select([self._pidfd], [], [], 0)[0] else None

    def filenos(self) -> list[int]:
        """The process's, too."""
        return [] if self._closed else [*super().filenos(), self._pidfd]

    def notices(self) -> list[Notice]:
        """That it was halted, and at last that the process has ended."""
        notices = super().notices()
        if not self._closed and self.exit_status is not None and not self._ended_told:
            self._ended_told = True
            notices.append(Notice(NoticeKind.ENDED))
        return notices

    def close(self) -> None:
        """Looks no more, and leaves nothing behind."""
        if not self._closed:
            super().close()
            self._threads.close()
            os.close(self._pidfd)


def _why_not(pid: int) -> str:
    folder = Path(f"/proc/{pid}")
    try:
        name = (folder / "comm").read_text().strip()
    except OSError:
        return f"there is no process {pid}"
    if os.geteuid() not in (0, folder.stat().st_uid):
        return f"process {pid} ({name}) is another user's, and the kernel's tracepoints are for root: run vmexit as root (sudo)"
    return f"process {pid} ({name}) runs no virtual machine of KVM's; 'vmexit watch' without a number lists those that there are"
