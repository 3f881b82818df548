"""Builds the small VMM (vmm.c) and says how it runs a guest."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

from tests.guests.build import cache_folder, symbols

SOURCE = Path(__file__).parent / "vmm.c"
_COMPILE = ("gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


@functools.cache
def build_vmm(*, static: bool = False) -> Path:
    """The program; what was built once is kept in a cache folder."""
    command = [*_COMPILE, *(["-static"] if static else [])]
    digest = hashlib.sha256(repr(command).encode() + SOURCE.read_bytes()).hexdigest()[:20]
    target = cache_folder().parent / "vmm" / f"vmm-{digest}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder, "vmm")
            done = subprocess.run([*command, SOURCE, "-o", fresh], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, done.stderr
            fresh.replace(target)
    return target


def vmm_arguments(
    image: Path,
    vcpus: int = 1,
    own_msr: int | None = None,
    *,
    late: bool = False,
    carries_out: bool = False,
    many_slots: bool = False,
) -> list[str]:
    """The arguments, without the program's name, with which it runs a guest.

    ``own_msr``: the VMM keeps this MSR to itself; ``late``: from when the guest first prints something, ``carries_out``: it lets
    KVM do what the guest has written. ``many_slots``: the guest's memory comes in those that vmm.c describes.
    """
    arguments = [*(["-s"] if many_slots else []), str(image), f"{symbols(image)['boot']:x}", str(vcpus)]
    how = ["late"] if late else ["carry"] if carries_out else []
    return arguments if own_msr is None else [*arguments, f"{own_msr:x}", *how]
