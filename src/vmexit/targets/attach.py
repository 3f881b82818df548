"""Machines that run already: finding them, and getting the agent into their VMM, or to one that has it."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmexit.errors import LinkError, TargetError
from vmexit.link.client import Link
from vmexit.setup.elf import ElfError, read_elf
from vmexit.targets import ptrace
from vmexit.targets.agent import SOCKET_PREFIX, agent_path
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks, Untrappable
from vmexit.targets.kvm import first_word, machine_notices, untrappable_under_kvm

_PROC = Path("/proc")
_COMES_UP_S = 8.0
_KICK_S = 0.25
_POLL_S = 0.005
_SEQPACKET, _ACCEPTS = 5, 1 << 16
_OLDEST_QEMU = (7, 2)


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine of this host."""

    pid: int
    """Of its VMM."""
    name: str
    """What its user has called it, or the VMM's name."""
    vcpus: int
    """0: not known."""
    memory: int
    """What the VMM holds, in bytes."""
    kvm: bool
    """KVM runs it; else QEMU emulates it, with the agent inside."""


def machines() -> list[Machine]:
    """Those that can be attached to as far as one can see: KVM's, and emulated ones with the agent inside; by process number."""
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fds = _descriptors(pid)
        is_kvm = "anon_inode:kvm-vm" in fds
        if is_kvm or find_agent(pid, fds) is not None:
            found.append(Machine(pid, _name(pid), _vcpu_count(fds), _resident(pid), is_kvm))
    return sorted(found, key=lambda machine: machine.pid)


def _descriptors(pid: int) -> list[str]:
    """What the process's descriptors are; none where that is not for us to know."""
    found = []
    with contextlib.suppress(OSError):
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(entry.readlink()))
    return found


def vcpus_of(pid: int) -> int:
    """The vCPUs that the process has now; 0: none, or that is not for us to know."""
    return _vcpu_count(_descriptors(pid))


def _vcpu_count(fds: list[str]) -> int:
    return len({fd for fd in fds if fd.startswith("anon_inode:kvm-vcpu")})


def _name(pid: int) -> str:
    words = _arguments(pid)
    for option, value in itertools.pairwise(words):
        if option in ("-name", "--name") and value:
            return value.split(",")[0].removeprefix("guest=")
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text().strip()
    return "?"


def _arguments(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return []


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def find_agent(pid: int, fds: list[str] | None = None) -> bytes | None:
    """The address of the agent's socket in that process; None: there is no agent that listens."""
    inodes = {fd[len("socket:[") : -1] for fd in (_descriptors(pid) if fds is None else fds) if fd.startswith("socket:[")}
    if not inodes:
        return None
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "net" / "unix").read_text().splitlines()[1:]:
            words = line.split()
            is_agents = len(words) == 8 and words[7].startswith(f"@{SOCKET_PREFIX}") and words[6] in inodes
            if is_agents and int(words[4], 16) == _SEQPACKET and int(words[3], 16) & _ACCEPTS:
                return b"\0" + words[7][1:].encode()
    return None


# ---- what cannot be attached to ----


def check_attachable(pid: int) -> None:
    """Raises TargetError, with what would help, for a process that the agent cannot be loaded into."""
    folder = _PROC / str(pid)
    try:
        owner = folder.stat().st_uid
        executable = folder / "exe"
        name = (folder / "comm").read_text().strip()
    except OSError:
        raise TargetError(f"there is no process {pid}") from None
    if os.geteuid() not in (0, owner):
        raise TargetError(f"process {pid} ({name}) is {_user(owner)}'s: run vmexit as that user, or as root")
    fds = _descriptors(pid)
    if "anon_inode:kvm-vm" not in fds:
        raise TargetError(_why_no_vm(pid, name))
    if fds.count("anon_inode:kvm-vm") > 1:
        raise TargetError(f"process {pid} ({name}) runs more than one virtual machine; vmexit does not know which is meant")
    with contextlib.suppress(OSError, ElfError):
        if read_elf(executable).static:
            raise TargetError(
                f"process {pid} ({name}) is linked statically: nothing can be loaded into it; use a dynamically linked build"
            )
    if _is_locked(pid):
        raise TargetError(
            f"process {pid} ({name}) is locked by seccomp, which may end it for what the agent does: start it without "
            "(QEMU: without -sandbox)"
        )
    tracer = _status(folder, "TracerPid")
    if tracer not in ("", "0"):
        raise TargetError(f"process {pid} ({name}) is being traced by process {tracer} (a debugger, strace): end that first")
    _check_qemu(pid, name)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _why_no_vm(pid: int, name: str) -> str:
    if name.startswith("qemu-system"):
        return (
            f"process {pid} ({name}) emulates its machine (TCG) and was started without the agent: start it by 'vmexit run', "
            "or with -accel kvm"
        )
    return f"process {pid} ({name}) runs no virtual machine of KVM's; 'vmexit attach' without a number lists those that there are"


def _status(folder: Path, field: str) -> str:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s*(.*)$", (folder / "status").read_text(), re.MULTILINE)
        return found[1].strip() if found else ""
    return ""


def _is_locked(pid: int) -> bool:
    """Whether any of its threads may be ended for a system call."""
    tasks = list((_PROC / str(pid) / "task").iterdir())
    return any(_status(task, "Seccomp") not in ("", "0") for task in tasks)


def _check_qemu(pid: int, name: str) -> None:
    """No ioctl tells which MSRs a VMM keeps to itself; of QEMU it is known, from the version on that has any."""
    if not name.startswith("qemu-system"):
        return
    if any("rapl=on" in argument for argument in _arguments(pid)):
        raise TargetError(f"process {pid} ({name}) keeps MSRs to itself that vmexit cannot know of: start it without rapl=on")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [f"/proc/{pid}/exe", "--version"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL).stdout
        found = re.search(r"version (\d+)\.(\d+)", said)
        if found and (int(found[1]), int(found[2])) < _OLDEST_QEMU:
            oldest = ".".join(map(str, _OLDEST_QEMU))
            raise TargetError(f"process {pid} is QEMU {found[1]}.{found[2]}; vmexit can attach to QEMU {oldest} and later")


# ---- getting in ----


@contextlib.contextmanager
def _visible_agent(pid: int) -> Iterator[str]:
    """A path by which the process finds the agent: ours, or a copy's where it does not see our files or may not read them."""
    agent, folder = agent_path(), _PROC / str(pid)
    sees_ours = (folder / "ns" / "mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
    if sees_ours and str((folder / "root").readlink()) == "/" and folder.stat().st_uid == os.geteuid():
        yield str(agent)
        return
    with tempfile.NamedTemporaryFile(dir=folder / "root" / "tmp", prefix="vmexit-", suffix=".so") as copy:
        with agent.open("rb") as original:
            shutil.copyfileobj(original, copy)
        copy.flush()
        os.fchmod(copy.fileno(), 0o755)
        yield f"/tmp/{Path(copy.name).name}"


def _bring_agent(pid: int) -> bytes:
    """Loads the agent and waits until it listens; gives the address of its socket."""
    check_attachable(pid)
    try:
        with _visible_agent(pid) as path:
            ptrace.load(pid, path)
    except OSError as error:
        raise TargetError(f"the agent cannot be shown to process {pid}: {error.strerror}") from None
    deadline, kicked = time.monotonic() + _COMES_UP_S, 0.0
    while (address := find_agent(pid)) is None:
        now = time.monotonic()
        if now > deadline or not _PROC.joinpath(str(pid)).exists():
            raise TargetError(
                f"the agent in process {pid} does not come up: its vCPUs do not go by the C library's ioctl, or memory is short"
            )
        if now - kicked > _KICK_S:
            kicked = now
            with contextlib.suppress(OSError):
                ptrace.kick(pid)
        time.sleep(_POLL_S)
    return address


class Attached:
    """A machine that was found running. See targets.base.Target; closing it lets go of it, and it runs on."""

    wants_halted = True
    only_looks: OnlyLooks | None = None

    def __init__(self, pid: int) -> None:
        """Attaches to the VMM with that process number, whose guest notices nothing. Raises TargetError, with what would help."""
        self._pid = pid
        self._closed = False
        self._ended_told = False
        address = find_agent(pid) or _bring_agent(pid)
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise TargetError(f"there is no process {pid}: {error.strerror}") from None
        try:
            self.link = Link(address)
            self.found_running: bool | None = first_word(self.link)
        except BaseException as error:
            if hasattr(self, "link"):
                self.link.close()
            os.close(self._pidfd)
            if isinstance(error, LinkError):
                raise TargetError(f"process {pid}: {error}") from None
            raise
        self.untrappable: tuple[Untrappable, ...] = untrappable_under_kvm() if self.link.door == "kvm" else ()
        self.name = self.vmm = f"{_name(pid)} (process {pid})"

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self._pid

    @property
    def vcpus(self) -> int:
        """Those that have come up."""
        return max(1, self.link.rings.vcpus_up)

    @property
    def exit_status(self) -> None:
        """Nobody tells a stranger how it ended."""
        return None

    def resume(self) -> None:
        """Lets the machine run."""
        self.link.hold(False)
        self.link.set_halted(False)

    def halt(self) -> None:
        """Asks the agent to halt the machine."""
        if not self.link.closed:
            with contextlib.suppress(LinkError):
                self.link.hold(True)
                self.link.set_halted(True)

    def filenos(self) -> list[int]:
        """The process's; the link is looked at anyway."""
        return [] if self._closed else [self._pidfd]

    def notices(self) -> list[Notice]:
        """What the agent tells of the machine, and at last that the process has ended."""
        if self._closed:
            return []
        notices = machine_notices(self.link)
        if not self._ended_told and select.select([self._pidfd], [], [], 0)[0]:
            self._ended_told = True
            notices.append(Notice(NoticeKind.ENDED))
        return notices

    def detach(self) -> None:
        """Lets the machine run on as it did before."""
        self.close()

    def close(self) -> None:
        """As detach: it is not vmexit's to end."""
        if self._closed:
            return
        self._closed = True
        self.link.close()  # a machine that is halted goes on then
        os.close(self._pidfd)
