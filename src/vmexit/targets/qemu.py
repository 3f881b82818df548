"""Starting QEMU with the agent inside (the TCG door)."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from qemu.qmp import Message

from vmexit.errors import LinkError, TargetError, UsageError
from vmexit.link.client import Link
from vmexit.link.wire import Capability
from vmexit.output import OutputReader
from vmexit.targets.base import Notice, NoticeKind
from vmexit.targets.qmp import Qmp

DEFAULT_QEMU = "qemu-system-x86_64"
OutputTo = Callable[[str, bytes], None]
"""Called with "stdout" or "stderr" and what QEMU wrote there; from threads of their own."""

_NOTICES = {
    "STOP": NoticeKind.STOPPED,
    "RESUME": NoticeKind.RESUMED,
    "RESET": NoticeKind.RESET,
    "SHUTDOWN": NoticeKind.SHUTDOWN,
    "GUEST_PANICKED": NoticeKind.PANICKED,
}
_QUIT_S = 3.0
_GONE_S = 2.0
_SETTLE_S = 0.05

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


def agent_path() -> Path:
    """The compiled agent. Raises TargetError where the package was not built."""
    path = Path(str(resources.files("vmexit.agent") / "agent.so"))
    if not path.is_file():
        raise TargetError(f"the agent is not built: {path} is missing; reinstall with 'pip install .' (needs gcc)")
    return path


def check_arguments(arguments: Sequence[str]) -> bool:
    """Whether the user wants the machine to start halted (-S). Raises UsageError for what cannot go together with vmexit."""
    following = [*arguments, ""][1:]
    halted = False
    for argument, value in zip(arguments, following, strict=True):
        option = "-" + argument.lstrip("-") if argument.startswith("-") else argument
        accelerator = re.search(r"(?:^|[,=])kvm\b", value) if option == "-accel" else re.search(r"\baccel=kvm\b", value)
        if option == "-enable-kvm" or (option in ("-accel", "-machine", "-M") and accelerator):
            what = argument if option == "-enable-kvm" else f"{argument} {value}"
            raise UsageError(f"{what}: vmexit traps in an emulated guest (TCG); leave it out, or use -accel tcg")
        if option == "-daemonize":
            raise UsageError("-daemonize: vmexit has to stay QEMU's parent; leave it out")
        halted |= option == "-S"
    return halted


class Qemu:
    """A QEMU that vmexit has started. See targets.base.Target for what its members mean.

    The machine is halted before its first instruction; ``wants_halted`` says whether the user asked for that (-S).
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        qemu: str = DEFAULT_QEMU,
        output: OutputTo | None = None,
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        """Starts ``qemu`` with these arguments and those that the agent needs.

        ``output``: what gets QEMU's standard output and error; None: they are the caller's own. Raises UsageError for arguments
        that contradict vmexit, TargetError when QEMU does not start or is of no use, each in one line.
        """
        self.wants_halted = check_arguments(arguments)
        binary = shutil.which(qemu)
        if binary is None:
            raise TargetError(f"{qemu} is not there; install it (Debian: apt install qemu-system-x86) or name it with --qemu")
        self._closed = False
        self._ended_told = False
        self._errors: list[bytes] = []
        self._starting = True
        self._starting_lock = threading.Lock()
        self._output = output
        self._readers: list[OutputReader] = []
        self._qmp: Qmp | None = None
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryDirectory(prefix="vmexit-", dir=_private_folder()) as folder, ours, theirs:
            # The folder is the user's alone and its name a secret; it is gone again once both ends have met.
            path = Path(folder, "agent")
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with listening:
                listening.bind(str(path))
                path.chmod(0o600)
                listening.listen()
                self._process = self._spawn(binary, arguments, listening.fileno(), theirs.fileno(), stdin)
            theirs.close()
            try:
                self.link = Link(path)
                self._qmp = Qmp(ours.dup())
                self._check()
            except BaseException as error:
                # Most often QEMU did not like an argument; then it says so and is gone in a moment.
                has_ended = isinstance(error, LinkError | TargetError) and self._wait(_GONE_S)
                self.close()
                if has_ended:
                    raise self._explained() from None
                raise
        self._started()

    def _spawn(
        self, binary: str, arguments: Sequence[str], link_fd: int, qmp_fd: int, stdin: int | None
    ) -> subprocess.Popen[bytes]:
        plugin = str(agent_path()).replace(",", ",,")
        command = [
            binary,
            *arguments,
            *("-plugin", f"{plugin},link={link_fd}"),
            *("-chardev", f"socket,id=vmexit-qmp,fd={qmp_fd}"),
            *("-mon", "chardev=vmexit-qmp,mode=control"),
            "-S",
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE if self._output is not None else None,
                stderr=subprocess.PIPE,
                pass_fds=(link_fd, qmp_fd),
                # The terminal's Ctrl-C is for the debugger, not for the machine.
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(f"{binary} cannot be started: {error.strerror}") from None
        self._pidfd = os.pidfd_open(process.pid)
        if self._output is not None and process.stdout:
            output = self._output
            self._readers.append(OutputReader(process.stdout, lambda data: output("stdout", data)))
        if process.stderr:
            self._readers.append(OutputReader(process.stderr, self._on_stderr))
        return process

    def _on_stderr(self, data: bytes) -> None:
        with self._starting_lock:
            if self._starting:
                self._errors.append(data)
                return
        if self._output is not None:
            self._output("stderr", data)
        else:
            with contextlib.suppress(OSError):
                os.write(2, data)

    def _started(self) -> None:
        """What QEMU has warned of so far is no reason not to start, so the user gets to see it."""
        with self._starting_lock:
            self._starting = False
        if self._errors:
            self._on_stderr(b"".join(self._errors))

    def _check(self) -> None:
        version = self.query("query-version")
        numbers = version.get("qemu", {}) if isinstance(version, dict) else {}
        self.name = "QEMU " + ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro"))
        kvm = self.query("query-kvm")
        if isinstance(kvm, dict) and kvm.get("enabled"):
            raise UsageError("this QEMU chose KVM by itself; vmexit traps in an emulated guest: add -accel tcg")
        cpus = self.query("query-cpus-fast")
        self._vcpus_at_start = len(cpus) if isinstance(cpus, list) else 1
        if not self.link.capabilities & Capability.RECORD:
            raise TargetError(f"{self.name} gives the agent no way to read registers")
        if not self.wants_halted:
            # Should the debugger die before the machine has begun, it begins without it.
            self.link.hold(True)

    def _explained(self) -> TargetError:
        """Why QEMU has ended, as it said itself."""
        said = b"".join(self._errors).decode(errors="replace")
        for pattern, meaning in _KNOWN_FAILURES:
            if pattern.search(said):
                return TargetError(meaning)
        lines = [line for line in said.splitlines() if line.strip()]
        # A hint may follow the reason.
        lines = [line for line in lines if re.match(r"[^ ]*qemu[^ ]*: ", line)] or lines
        if lines:
            # QEMU puts the reason last, and its own path before it.
            return TargetError(f"QEMU did not start: {re.sub(r'^[^ ]*qemu[^ ]*: ', '', lines[-1])}")
        return TargetError(f"QEMU did not start: it ended with status {self._process.returncode}")

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
        return self._process.poll()

    def resume(self) -> None:
        """Lets the machine run."""
        self.link.hold(False)
        try:
            self.query("cont")
        except LinkError:
            # A guest that ends at once takes QEMU with it before the answer has arrived.
            if not self._wait(_QUIT_S):
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
        return [self._pidfd] if self._qmp is None or self._qmp.closed else [self._qmp.fileno(), self._pidfd]

    def notices(self) -> list[Notice]:
        """QMP's events, and at last that the process has ended."""
        if self._qmp is None or self._closed:
            return []
        notices = [notice for event in self._qmp.events() if (notice := _notice(event))]
        if any(notice.kind in (NoticeKind.STOPPED, NoticeKind.SHUTDOWN) for notice in notices):
            # What the guest has printed before it halted is to be known before that.
            for reader in self._readers:
                reader.settle(_SETTLE_S)
        if self._process.poll() is not None and not self._ended_told:
            self._ended_told = True
            self._finish_output()
            notices.append(Notice(NoticeKind.ENDED))
        return notices

    def _finish_output(self) -> None:
        """Has everything printed that QEMU still wrote."""
        for reader in self._readers:
            reader.finish()

    def close(self) -> None:
        """Ends QEMU: by asking, by SIGTERM, by SIGKILL. An exception in the meantime (Ctrl-C again) makes it SIGKILL at once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._end()
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._finish_output()
            if self._qmp is not None:
                self._qmp.close()
            os.close(self._pidfd)

    def _end(self) -> None:
        if hasattr(self, "link") and not self.link.closed:
            with contextlib.suppress(LinkError):
                self.link.hold(False)  # it is to end, not to run on
            self.link.close()
        if self._process.poll() is None and self._qmp is not None:
            self._qmp.begin("quit")
            self._wait(_QUIT_S)
        if self._process.poll() is None:
            self._process.terminate()
            self._wait(_QUIT_S)

    def _wait(self, seconds: float) -> bool:
        """Whether QEMU has ended by then."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            select.select([self._pidfd], [], [], left)
        return self._process.returncode is not None


def _notice(event: Message) -> Notice | None:
    kind = _NOTICES.get(str(event.get("event")))
    data = event.get("data")
    detail = str(data.get("reason") or data.get("action") or "") if isinstance(data, dict) else ""
    return Notice(kind, detail) if kind else None


def _private_folder() -> str | None:
    """Where sockets of this user belong; None: the system's folder for temporary files."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    # A Unix socket's path has at most 107 bytes.
    return folder if folder and len(folder) < 60 and os.access(folder, os.W_OK | os.X_OK) else None
