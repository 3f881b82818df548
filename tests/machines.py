"""Machines that tests start: bare-metal guests, and a real Linux, each with the agent inside."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guests.build import build, qemu_arguments
from vmexit import Debugger, Trap
from vmexit.link.wire import Access
from vmexit.setup.initramfs import PRELUDE, READ_MSR, build_initramfs
from vmexit.setup.kernel import Kernel, cached_kernel, find_kernel, newer_folder
from vmexit.targets.qemu import Qemu

from .guests import expected


class Output:
    """What a machine has printed so far; to be given to it as its ``output``."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._lock = threading.Lock()

    def __call__(self, stream: str, data: bytes) -> None:
        with self._lock:
            self._parts.append(data)

    @property
    def text(self) -> str:
        with self._lock:
            return b"".join(self._parts).decode(errors="replace").replace("\r\n", "\n")


def need_kvm() -> None:
    """Skips the test where KVM is out of reach."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing or not for this user")


def guest_arguments(
    name: str, vcpus: int = 1, *, thread: str = "multi", machine: str = "microvm", cpu: str | None = None, **defines: int | str
) -> tuple[Path, list[str]]:
    """The image of a bare-metal guest and QEMU's arguments for it. The firmware of microvm is short."""
    image = build(name, **defines)
    # Where KVM is itself emulated, it lacks what the default model has, and QEMU warns of that.
    accelerator = ["-cpu", "host"] if thread == "kvm" else ["-accel", f"tcg,thread={thread}"]
    if cpu is not None and thread != "kvm":
        accelerator += ["-cpu", cpu]
    return image, [*accelerator, *qemu_arguments(image, vcpus, machine=machine)]


@contextmanager
def guest(
    name: str, vcpus: int = 1, *, thread: str = "multi", machine: str = "microvm", cpu: str | None = None, **defines: int | str
) -> Iterator[tuple[Debugger, Path, Output]]:
    """A bare-metal guest, halted before its first instruction: its debugger, its image, what it prints.

    ``thread``: how TCG runs it, or "kvm", which skips the test where there is none. ``cpu``: QEMU's model for TCG.
    """
    if thread == "kvm":
        need_kvm()
    image, arguments = guest_arguments(name, vcpus, thread=thread, machine=machine, cpu=cpu, **defines)
    output = Output()
    with Debugger(Qemu(arguments, output=output, accelerator="kvm" if thread == "kvm" else "tcg")) as debugger:
        yield debugger, image, output


def linux_arguments(
    commands: str,
    *,
    command_line: str = "",
    vcpus: int = 2,
    kernel: Kernel | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> list[str]:
    """QEMU's arguments for a kernel (by default Debian's) with an init that runs these shell commands and switches off.

    ``read_msr CPU MSR`` and ``write_msr CPU MSR VALUE`` are among its commands (setup.initramfs), and ``files`` among its files.
    It prints on the first serial port.
    """
    kernel = kernel or find_kernel()
    modules = sorted(kernel.modules.glob("*.ko")) if kernel.modules else []
    initramfs = build_initramfs(f"{PRELUDE}{READ_MSR}{commands}\npoweroff -f\n", files, modules=modules)
    path = Path(tempfile.gettempdir(), f"vmexit-test-{hashlib.sha256(initramfs).hexdigest()[:16]}.cpio")
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(initramfs)
        Path(file.name).replace(path)
    return [
        *("-accel", "tcg,thread=multi", "-smp", str(vcpus), "-m", "256", "-display", "none", "-nodefaults", "-no-reboot"),
        *("-serial", "stdio", "-kernel", str(kernel.image), "-initrd", str(path)),
        *("-append", f"console=ttyS0 quiet panic=-1 tsc=reliable cryptomgr.notests msr.allow_writes=on {command_line}".strip()),
    ]


def newer_kernel() -> Kernel:
    """The kernel of Debian's backports; skips the test where it has not been fetched."""
    kernel = cached_kernel(newer_folder())
    if kernel is None:
        pytest.skip("no newer kernel here; 'python -m vmexit.setup.kernel --newer' fetches one where APT has Debian's backports")
    return kernel


@contextmanager
def linux(commands: str, *, command_line: str = "", vcpus: int = 2) -> Iterator[tuple[Debugger, Output]]:
    """A real Linux, halted before its first instruction: its debugger and what it prints."""
    output = Output()
    arguments = linux_arguments(commands, command_line=command_line, vcpus=vcpus)
    with Debugger(Qemu(arguments, output=output)) as debugger:
        yield debugger, output


def access_of(trap: Trap) -> expected.Access:
    """A trap as the guests' expected logs have it."""
    kind = "wrmsr" if trap.access == Access.WRMSR else "rdmsr"
    return expected.Access("wrmsr" if kind == "wrmsr" else "rdmsr", trap.rip, trap.msr, trap.value, trap.core)
