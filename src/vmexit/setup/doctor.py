"""Looks at this machine: what vmexit can do here, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import vmexit
from vmexit.errors import VmexitError
from vmexit.setup.elf import MACHINES, Elf, ElfError, read_elf
from vmexit.setup.initramfs import find_busybox
from vmexit.setup.kernel import VARIABLE, cached_kernel, find_kernel

QEMU = "qemu-system-x86_64"
OLDEST_PYTHON = (3, 11)
OLDEST_QEMU = (7, 2)

_TIMEOUT_S = 10.0
_GET_QEMU = "apt install qemu-system-x86"
_OTHER_QEMU = "use a QEMU of 7.2 or later as Debian or Ubuntu build it (" + _GET_QEMU + ")"

_PRECISE = frozenset({"qemu_get_cpu", "cpu_restore_state", "cpu_loop_exit"})
_NEEDS: dict[str, tuple[frozenset[str], ...]] = {
    "see a trap": (
        frozenset({"qemu_get_cpu", "x86_cpu_gdb_read_register"}),
        frozenset({"qemu_plugin_read_register"}),
    ),
    "change or skip a write": (
        _PRECISE | {"x86_cpu_gdb_write_register"},
        _PRECISE | {"qemu_plugin_write_register"},
    ),
    "trap after the instruction": (_PRECISE | {"async_run_on_cpu"},),
    "break": (_PRECISE | {"vm_stop", "vm_start", "runstate_is_running"},),
    "show memory": (frozenset({"qemu_get_cpu", "cpu_memory_rw_debug"}),),
}
"""What can be done, and the sets of symbols of which QEMU must export one whole."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """True: as it should be.  False: something does not work without it.  None: good to know."""
    detail: str
    """What was found, in a few words."""
    remedy: str | None = None
    """What to do about it."""


def checks(qemu: str | Path | None = None) -> list[Check]:
    """Look at everything; `qemu` is the binary to look at, by default the one on PATH.

    Nothing is changed or downloaded, and nothing raises: what cannot be looked at is reported as such.  Takes
    well below a second.
    """
    return [
        check_python(),
        check_agent(Path(vmexit.__file__).parent / "agent" / "agent.so"),
        *check_qemu(qemu),
        check_busybox(),
        check_kernel(),
        check_program("C compiler", "gcc", "builds the agent and the tests' guests", "gcc libc6-dev"),
        check_program("gdb", "gdb", "for the benchmark only", "gdb"),
        check_kvm(Path("/dev/kvm")),
        check_tracefs(),
    ]


def render(results: Iterable[Check]) -> str:
    """Return one line a check, and one more for what to do about it; no newline at the end."""
    results = list(results)
    width = max((len(check.name) for check in results), default=0)
    words = {True: "ok", False: "MISSING", None: "-"}
    lines = []
    for check in results:
        lines.append(f"{words[check.ok]:<8} {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{width}}  to do: {check.remedy}")
    return "\n".join(lines)


def check_python() -> Check:
    """Python's version."""
    ok = sys.version_info >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check("Python", ok, platform.python_version(), None if ok else f"use Python {oldest} or later")


def check_agent(path: Path) -> Check:
    """The compiled agent: there, for this machine, and a QEMU plugin.  (Only a QEMU can load it.)"""
    rebuild = "install vmexit again (pip install .), with gcc and libc6-dev at hand"
    try:
        elf = read_elf(path)
    except FileNotFoundError:
        return Check("agent", False, f"{path} is not there", rebuild)
    except (OSError, ElfError) as error:
        return Check("agent", False, f"{path}: {error}", rebuild)
    if elf.machine != MACHINES.get(platform.machine()):
        return Check("agent", False, f"{path} is for another kind of machine", rebuild)
    if not {"qemu_plugin_install", "qemu_plugin_version"} <= elf.exports:
        return Check("agent", False, f"{path} is no QEMU plugin", rebuild)
    return Check("agent", True, str(path))


def check_qemu(qemu: str | Path | None = None) -> list[Check]:
    """The QEMU binary: its version, plugins, and whether the agent reaches what it needs in it."""
    name = str(qemu or QEMU)
    found = shutil.which(name)
    if found is None:
        return [Check("QEMU", False, f"{name} is not there or cannot be run", _GET_QEMU)]
    version = _qemu_version(found)
    if not version.ok:
        return [version]
    try:
        elf = read_elf(Path(found))
    except (OSError, ElfError) as error:
        unknown = f"cannot be told: {found}: {error}"
        return [version, Check("QEMU plugins", None, unknown), Check("QEMU internals", None, unknown)]
    return [version, _qemu_plugins(elf), _qemu_internals(elf)]


def missing_symbols(exports: frozenset[str]) -> dict[str, frozenset[str]]:
    """Return what the agent cannot do in a QEMU that exports these, each with what is lacking."""
    return {
        action: choices[0] - exports for action, choices in _NEEDS.items() if not any(symbols <= exports for symbols in choices)
    }


def check_busybox() -> Check:
    """A static busybox, which the demo's guest is made of."""
    try:
        return Check("busybox", True, str(find_busybox()))
    except VmexitError:
        return Check("busybox", False, "no static one for x86-64 (the demo needs it)", "apt install busybox-static")


def check_kernel() -> Check:
    """A kernel to boot in the demo: the user's own or a cached one."""
    if os.environ.get(VARIABLE):
        try:
            kernel = find_kernel()
        except VmexitError as error:
            return Check("kernel", False, str(error), f"name a bzImage in {VARIABLE}, or unset it")
        return Check("kernel", True, f"{kernel.release}, {kernel.image} ({VARIABLE})")
    cached = cached_kernel()
    if cached is None:
        return Check("kernel", None, "none yet: the demo downloads Debian's (27 MB) when it first runs")
    return Check("kernel", True, f"{cached.release}, {cached.image}")


def check_program(name: str, program: str, purpose: str, packages: str) -> Check:
    """A program that is needed now and then."""
    found = shutil.which(program)
    if found is None:
        return Check(name, None, f"none ({purpose})", f"apt install {packages}")
    return Check(name, True, found)


def check_kvm(device: Path) -> Check:
    """The host's virtualisation."""
    if not device.exists():
        state = "not there"
    elif os.access(device, os.R_OK | os.W_OK):
        state = "can be used"
    else:
        state = "there, but not yours to open"
    return Check(str(device), None, f"{state}; for guests that KVM runs (--accel kvm, --vmm, attach)")


def check_tracefs() -> Check:
    """The kernel's own tracepoints, for looking without touching."""
    # It loads numpy, which nothing else here needs.
    from vmexit.targets.trace_instance import missing_tracepoints

    uses = {("msr", "write_msr"): "host", ("kvm", "kvm_msr"): "watch"}
    try:
        missing = missing_tracepoints(list(uses))
    except (VmexitError, OSError) as error:
        return Check("tracefs", None, f"for 'vmexit host' and 'vmexit watch', but {error}")
    can = [f"'vmexit {use}'" for point, use in uses.items() if point not in missing]
    lacks = [f"no tracepoint {system}:{name} for 'vmexit {uses[system, name]}'" for system, name in missing]
    remedy = "modprobe kvm (kvm-intel, kvm-amd)" if ("kvm", "kvm_msr") in missing else None
    return Check("tracefs", None, "; ".join((f"can be used, for {' and '.join(can)}" if can else "can be used", *lacks)), remedy)


def _qemu_version(path: str) -> Check:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("QEMU", False, f"{path} does not run: {error}", _GET_QEMU)
    match = re.search(r"^QEMU emulator version ((\d+)\.(\d+)\S*)", done.stdout, re.MULTILINE)
    if match is None:
        return Check("QEMU", False, f"{path} does not say that it is a QEMU (exit {done.returncode})", _GET_QEMU)
    if (int(match[2]), int(match[3])) < OLDEST_QEMU:
        return Check("QEMU", False, f"{match[1]}, {path}: too old", _OTHER_QEMU)
    return Check("QEMU", True, f"{match[1]}, {path}")


def _qemu_plugins(elf: Elf) -> Check:
    if "qemu_plugin_register_vcpu_tb_trans_cb" in elf.exports:
        return Check("QEMU plugins", True, "this QEMU takes them")
    return Check("QEMU plugins", False, "this QEMU was built without them", _OTHER_QEMU)


def _qemu_internals(elf: Elf) -> Check:
    missing = missing_symbols(elf.exports)
    if not missing:
        return Check("QEMU internals", True, "all that the agent needs can be reached")
    symbols = sorted(frozenset().union(*missing.values()))
    detail = f"cannot {', '.join(missing)}: it does not export {', '.join(symbols)}"
    return Check("QEMU internals", False, detail, _OTHER_QEMU)
