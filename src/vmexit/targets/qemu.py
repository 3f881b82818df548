"""Starting QEMU with the agent inside: as a plugin where it emulates (the TCG door), preloaded where it uses KVM."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence

from qemu.qmp import Message

from vmexit.errors import LinkError, TargetError, UsageError
from vmexit.link.client import Link
from vmexit.link.wire import Capability
from vmexit.targets.agent import agent_path, listening_socket, preloaded
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks, Untrappable
from vmexit.targets.kvm import untrappable_under_kvm
from vmexit.targets.process import OutputTo, Process
from vmexit.targets.qmp import Qmp

__all__ = ["DEFAULT_QEMU", "OutputTo", "Qemu", "check_arguments"]

DEFAULT_QEMU = "qemu-system-x86_64"
TCG = "tcg"
KVM = "kvm"
ACCELERATORS = (TCG, KVM)

_NOTICES = {
    "STOP": NoticeKind.STOPPED,
    "RESUME": NoticeKind.RESUMED,
    "RESET": NoticeKind.RESET,
    "SHUTDOWN": NoticeKind.SHUTDOWN,
    "GUEST_PANICKED": NoticeKind.PANICKED,
}
_QUIT_S = 3.0
_GONE_S = 2.0

# What QEMU says, and what that means for somebody who wants traps.
_KNOWN_FAILURES = (
    (
        re.compile(r"-plugin: invalid option"),
        "this QEMU was built without plugins (configure --enable-plugins); Debian's qemu-system-x86 has them",
    ),
    (
        re.compile(r"TCG plugins? .*(version|API)|could not load plugin.*(version|API)", re.IGNORECASE),
        "this QEMU's plugin interface is of a version that the agent does not know (it knows QEMU 7.2 to 11)",
    ),
)


def check_arguments(arguments: Sequence[str], accelerator: str = TCG) -> bool:
    """Whether the user wants the machine to start halted (-S). Raises UsageError for what cannot go together with vmexit."""
    following = [*arguments, ""][1:]
    halted = False
    for argument, value in zip(arguments, following, strict=True):
        option = "-" + argument.lstrip("-") if argument.startswith("-") else argument
        named = _accelerator_named(option, value)
        if named and (named != accelerator):
            what = argument if option == "-enable-kvm" else f"{argument} {value}"
            if named == KVM:
                raise UsageError(f"{what}: to trap in a guest that KVM runs, say --accel kvm before the --")
            raise UsageError(f"{what}: this contradicts --accel {accelerator}; leave one of them out")
        if option == "-daemonize":
            raise UsageError("-daemonize: vmexit has to stay QEMU's parent; leave it out")
        halted |= option == "-S"
    return halted


def _accelerator_named(option: str, value: str) -> str | None:
    """The accelerator that this argument of QEMU's chooses, if it does; KVM where it comes into question."""
    if option == "-enable-kvm":
        return KVM
    if option == "-accel":
        found = re.findall(r"(?:^|[,=])(kvm|tcg)\b", value)
    elif option in ("-machine", "-M"):
        found = re.findall(r"\b(kvm|tcg)\b", (re.findall(r"\baccel=([^,]*)", value) or [""])[-1])
    else:
        return None
    return KVM if KVM in found else found[0] if found else None


class Qemu:
    """A QEMU that vmexit has started. See targets.base.Target for what its members mean.

    The machine is halted before its first instruction; ``wants_halted`` says whether the user asked for that (-S).
    """

    found_running: bool | None = None
    vmm = "QEMU"
    only_looks: OnlyLooks | None = None

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        qemu: str = DEFAULT_QEMU,
        accelerator: str = TCG,
        output: OutputTo | None = None,
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        """Starts ``qemu`` with these arguments and those that the agent needs.

        ``accelerator``: "tcg" or "kvm". ``output``: what gets QEMU's standard output and error; None: they are the caller's own.
        Raises UsageError for arguments that contradict vmexit, TargetError when QEMU does not start or is of no use, each in one
        line.
        """
        self.wants_halted = check_arguments(arguments, accelerator)
        self._accelerator = accelerator
        binary = shutil.which(qemu)
        if binary is None:
            raise TargetError(f"{qemu} is not there; install it (Debian: apt install qemu-system-x86) or name it with --qemu")
        self._closed = False
        self._qmp: Qmp | None = None
        self.untrappable: tuple[Untrappable, ...] = untrappable_under_kvm() if accelerator == KVM else ()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with listening_socket() as listening:
                self._process = Process(
                    self._command(binary, arguments, listening.fileno(), theirs.fileno()),
                    output=output,
                    stdin=stdin,
                    pass_fds=(listening.fileno(), theirs.fileno()),
                    environment=self._environment(binary, listening.fileno()),
                )
                address = listening.getsockname()
            theirs.close()
            try:
                # The agent of the KVM door counts the vCPUs when it is called; QEMU's monitor answers once they are all there.
                if accelerator == TCG:
                    self.link = Link(address)
                self._qmp = Qmp(ours.dup())
                self._check()
                if accelerator == KVM:
                    self.link = Link(address)
                self._check_link()
            except BaseException as error:
                # Most often QEMU did not like an argument; then it says so and is gone in a moment.
                has_ended = isinstance(error, LinkError | TargetError) and self._process.wait(_GONE_S)
                self.close()
                if has_ended:
                    raise self._explained() from None
                raise
        self._process.started()

    def _command(self, binary: str, arguments: Sequence[str], link_fd: int, qmp_fd: int) -> list[str]:
        plugin = str(agent_path()).replace(",", ",,")
        agent = ("-plugin", f"{plugin},link={link_fd}") if self._accelerator == TCG else ("-accel", KVM)
        return [
            binary,
            *arguments,
            *agent,
            *("-chardev", f"socket,id=vmexit-qmp,fd={qmp_fd}"),
            *("-mon", "chardev=vmexit-qmp,mode=control"),
            "-S",
        ]

    def _environment(self, binary: str, link_fd: int) -> Mapping[str, str]:
        return preloaded(binary, link_fd) if self._accelerator == KVM else {}

    def _check(self) -> None:
        version = self.query("query-version")
        numbers = version.get("qemu", {}) if isinstance(version, dict) else {}
        self.name = "QEMU " + ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro"))
        kvm = self.query("query-kvm")
        is_kvm = isinstance(kvm, dict) and bool(kvm.get("enabled"))
        if is_kvm and self._accelerator == TCG:
            raise UsageError(
                "this QEMU chose KVM by itself; vmexit traps in an emulated guest: add -accel tcg, or say --accel kvm"
            )
        if not is_kvm and self._accelerator == KVM:
            raise TargetError("this QEMU does not use KVM")
        cpus = self.query("query-cpus-fast")
        self._vcpus_at_start = len(cpus) if isinstance(cpus, list) else 1

    def _check_link(self) -> None:
        if not self.link.capabilities & Capability.RECORD:
            raise TargetError(f"{self.name} gives the agent no way to read registers")
        if not self.wants_halted:
            # Should the debugger die before the machine has begun, it begins without it.
            self.link.hold(True)

    def _explained(self) -> TargetError:
        """Why QEMU has ended, as it said itself."""
        said = self._process.said
        for pattern, meaning in _KNOWN_FAILURES:
            if pattern.search(said):
                return TargetError(meaning)
        lines = [line for line in said.splitlines() if line.strip()]
        # A hint may follow the reason.
        lines = [line for line in lines if re.match(r"[^ ]*qemu[^ ]*: ", line)] or lines
        if lines:
            # QEMU puts the reason last, and its own path before it.
            return TargetError(f"QEMU did not start: {re.sub(r'^[^ ]*qemu[^ ]*: ', '', lines[-1])}")
        return TargetError(f"QEMU did not start: it ended with status {self._process.exit_status}")

    def query(self, command: str) -> object:
        """What a QMP command returns."""
        assert self._qmp is not None
        return self._qmp.execute(command)

    @property
    def vcpus(self) -> int:
        """Those that the machine began with, and those plugged in since."""
        return max(self._vcpus_at_start, self.link.rings.vcpus_up)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """QEMU's own."""
        return self._process.exit_status

    def resume(self) -> None:
        """Lets the machine run."""
        self.link.hold(False)
        try:
            self.query("cont")
        except LinkError:
            # A guest that ends at once takes QEMU with it before the answer has arrived.
            if not self._process.wait(_QUIT_S):
                raise

    def halt(self) -> None:
        """Asks QEMU to pause the machine."""
        if self._qmp is None or self.exit_status is not None:
            return
        with contextlib.suppress(LinkError):
            self.link.hold(True)
        self._qmp.begin("stop")

    def filenos(self) -> list[int]:
        """QMP's and the process's."""
        pidfd = self._process.pidfd
        return [pidfd] if self._qmp is None or self._qmp.closed else [self._qmp.fileno(), pidfd]

    def notices(self) -> list[Notice]:
        """QMP's events, and at last that the process has ended."""
        if self._qmp is None or self._closed:
            return []
        self.link.take_machine()  # QEMU's monitor says the same, and more
        notices = [notice for event in self._qmp.events() if (notice := _notice(event))]
        if any(notice.kind in (NoticeKind.STOPPED, NoticeKind.SHUTDOWN) for notice in notices):
            # What the guest has printed before it halted is to be known before that.
            self._process.settle()
        if self._process.has_ended():
            notices.append(Notice(NoticeKind.ENDED))
        return notices

    def detach(self) -> None:
        """Lets QEMU run on by itself."""
        if self._closed:
            return
        self._closed = True
        self.link.close()  # a machine that is halted goes on then
        self._process.release()
        if self._qmp is not None:
            self._qmp.close()

    def close(self) -> None:
        """Ends QEMU: by asking, by SIGTERM, by SIGKILL. An exception in the meantime (Ctrl-C again) makes it SIGKILL at once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._process.close(self._ask_to_quit)
        finally:
            if hasattr(self, "link"):
                self.link.close()
            if self._qmp is not None:
                self._qmp.close()

    def _ask_to_quit(self) -> bool:
        if hasattr(self, "link") and not self.link.closed:
            with contextlib.suppress(LinkError):
                self.link.hold(False)  # it is to end, not to run on
            self.link.close()
        if self._qmp is None:
            return False
        self._qmp.begin("quit")
        return True


def _notice(event: Message) -> Notice | None:
    kind = _NOTICES.get(str(event.get("event")))
    data = event.get("data")
    detail = str(data.get("reason") or data.get("action") or "") if isinstance(data, dict) else ""
    return Notice(kind, detail) if kind else None
