"""Starting any VMM that uses KVM with the agent preloaded (the KVM door); QEMU has more to offer and is in targets.qemu."""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vmexit.errors import LinkError, TargetError
from vmexit.link.client import Link
from vmexit.targets.agent import listening_socket, preloaded
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks, Untrappable
from vmexit.targets.process import OutputTo, Process

DEVICE = Path("/dev/kvm")

_GONE_S = 2.0
_ANSWER_S = 10.0
_POLL_S = 0.1
_X2APIC = Untrappable(0x800, 0x8FF, "KVM lets no filter apply to x2APIC MSRs")
_TSC_DEADLINE = Untrappable(0x6E0, 0x6E0, "KVM handles it before its MSR filter, to be quick")


def untrappable_under_kvm() -> tuple[Untrappable, ...]:
    """What KVM lets nobody see on this host (Documentation/virt/kvm/api.rst, KVM_X86_SET_MSR_FILTER)."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(found[1].split()) if found else set()
    return (_TSC_DEADLINE, _X2APIC) if flags & {"vmx", "svm"} else (_X2APIC,)


def machine_notices(link: Link) -> list[Notice]:
    """What the agent itself has told of the machine since the last call."""
    return [Notice(NoticeKind.RESUMED if runs else NoticeKind.STOPPED) for runs in link.take_machine()]


def first_word(link: Link) -> bool:
    """Whether the machine runs, which the agent tells when it has announced all vCPUs. Raises LinkError where it does not."""
    deadline = time.monotonic() + _ANSWER_S
    while not (told := link.take_machine()):
        if time.monotonic() > deadline:
            raise LinkError("the agent there is of a version that cannot be attached to")
        select.select([link.fileno()], [], [], _POLL_S)
        link.handle_notices()
    return told[-1]


class Vmm:
    """A VMM that vmexit has started, halted before its guest's first instruction. See targets.base.Target."""

    wants_halted = False
    only_looks: OnlyLooks | None = None
    found_running: bool | None = None

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        output: OutputTo | None = None,
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        """``output``: what gets the VMM's standard output and error; None: they are the caller's own.

        Raises TargetError where it does not start, or has no virtual machine of KVM's before it ends, in one line.
        """
        binary = shutil.which(program)
        if binary is None:
            raise TargetError(f"{program} is not there, or is no program")
        self._closed = False
        self.untrappable = untrappable_under_kvm()
        self.name = self.vmm = Path(program).name
        with listening_socket() as listening:
            self._process = Process(
                [binary, *arguments],
                output=output,
                stdin=stdin,
                pass_fds=(listening.fileno(),),
                environment=preloaded(binary, listening.fileno(), waits=True),
            )
            address = listening.getsockname()
        try:
            self.link = Link(address)
            first_word(self.link)
            self.link.hold(True)
        except BaseException as error:
            has_ended = isinstance(error, LinkError) and self._process.wait(_GONE_S)
            self.close()
            if has_ended:
                raise self._explained() from None
            if isinstance(error, LinkError):
                raise TargetError(f"{self.name} has not begun to run a virtual machine of KVM's: {error}") from None
            raise
        self._process.started()

    def _explained(self) -> TargetError:
        lines = [line for line in self._process.said.splitlines() if line.strip()]
        why = lines[-1] if lines else f"it ended with status {self._process.exit_status}"
        return TargetError(f"{self.name} did not start a virtual machine of KVM's: {why}")

    @property
    def vcpus(self) -> int:
        """Those that have come up."""
        return max(1, self.link.rings.vcpus_up)

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """The VMM's own."""
        return self._process.exit_status

    def resume(self) -> None:
        """Lets the machine run."""
        self.link.hold(False)
        self.link.set_halted(False)

    def halt(self) -> None:
        """Asks the agent to halt the machine."""
        if self.exit_status is None and not self.link.closed:
            with contextlib.suppress(LinkError):
                self.link.hold(True)
                self.link.set_halted(True)

    def filenos(self) -> list[int]:
        """The process's; the link is looked at anyway."""
        return [self._process.pidfd]

    def notices(self) -> list[Notice]:
        """What the agent tells of the machine, and at last that the process has ended."""
        if self._closed:
            return []
        notices = machine_notices(self.link)
        if any(notice.kind is NoticeKind.STOPPED for notice in notices):
            self._process.settle()
        if self._process.has_ended():
            notices.append(Notice(NoticeKind.ENDED))
        return notices

    def detach(self) -> None:
        """Lets the VMM run on by itself."""
        if self._closed:
            return
        self._closed = True
        self.link.close()
        self._process.release()

    def close(self) -> None:
        """Ends the VMM: by SIGTERM, by SIGKILL."""
        if self._closed:
            return
        self._closed = True
        try:
            self._process.close(self._let_go)
        finally:
            if hasattr(self, "link"):
                self.link.close()

    def _let_go(self) -> bool:
        if hasattr(self, "link") and not self.link.closed:
            with contextlib.suppress(LinkError):
                self.link.hold(False)  # it is to end, not to run on
        return False
