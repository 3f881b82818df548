"""Builds the guests of this folder and says how QEMU is to run them.

A guest is a small bare-metal program, one `.S` file, whose header says what it does and which trap log is
right for it. Only gcc and binutils are needed. The images lie in a cache folder and are made again when
anything they depend on changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

OK_STATUS = 33
"""Exit status of QEMU when the guest is content."""
FAILED_STATUS = 35
"""The guest found something wrong, and printed what."""
CRASHED_STATUS = 37
"""An exception that the guest did not expect; it printed which and where."""
ALONE_STATUS = 39
"""A vCPU that the guest needs did not come up."""

COMPILE = ("gcc", "-c", "-x", "assembler-with-cpp")
LINK = ("ld", "-nostdlib", "-static", "-z", "noexecstack", "-z", "max-page-size=4096")


class GuestBuildError(Exception):
    """A guest cannot be built; the message says why, with what the compiler said."""


def names() -> list[str]:
    """The guests that there are, sorted."""
    return sorted(path.stem for path in HERE.glob("*.S"))


def build(name: str, **defines: int | str) -> Path:
    """Build the guest `name` unless it is in the cache; give the path of its ELF image.

    `defines` are the constants which the head of `name`.S lists (an int, or text as the assembler is to see
    it). Those not given have their defaults. The same arguments give the same path, which holds a complete
    image as soon as it exists: workers that build it at once do no harm to each other. Raises GuestBuildError
    for an unknown guest or constant, or if a tool is missing or refuses.
    """
    source = HERE / f"{name}.S"
    if name not in names():
        raise GuestBuildError(f"no guest {name!r}; there are: {', '.join(names())}")
    known = set(re.findall(r"^#ifndef (\w+)$", source.read_text(), re.MULTILINE))
    if unknown := sorted(defines.keys() - known):
        raise GuestBuildError(f"{name} has no constant {unknown[0]!r}; it has: {', '.join(sorted(known)) or 'none'}")
    options = [f"-D{key}={value}" for key, value in sorted(defines.items())]

    image = cache_folder() / f"{name}-{_key(source, options)}.elf"
    if image.exists():
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=image.parent) as folder:
        linked = Path(folder, "image")
        _run(*COMPILE, "-I", str(HERE), *options, str(source), "-o", f"{folder}/object")
        _run(*LINK, "-T", str(HERE / "guest.ld"), f"{folder}/object", "-o", str(linked))
        linked.replace(image)
    return image


def cache_folder() -> Path:
    """Where images lie: guests/ in $VMEXIT_CACHE, else in $XDG_CACHE_HOME/vmexit, else in ~/.cache/vmexit."""
    if own := os.environ.get("VMEXIT_CACHE"):
        return Path(own, "guests")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vmexit", "guests")


def qemu_arguments(image: Path, vcpus: int = 1, *, machine: str = "pc", serial: str = "stdio") -> list[str]:
    """The arguments, without the binary's name, with which qemu-system-x86_64 runs `image` on `vcpus` vCPUs.

    What the guest prints goes to `serial`, as QEMU's -serial takes it. No accelerator is named: add `-accel`
    as needed. `machine` may be "q35" or "microvm" too: the latter's firmware is done much sooner where each
    instruction is slow, and in older versions of QEMU it accesses no MSR.
    """
    arguments = f"-machine {machine} -smp {vcpus} -display none -nodefaults -no-reboot -serial {serial}"
    return [*arguments.split(" "), "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel", str(image)]


@functools.cache
def symbols(image: Path) -> dict[str, int]:
    """The addresses of the labels in `image`; image_start and image_end enclose it."""
    lines = _run("nm", str(image)).splitlines()
    return {label: int(address, 16) for address, _, label in (line.split() for line in lines)}


def _key(source: Path, options: list[str]) -> str:
    """A name for what is built from all that it is built from."""
    digest = hashlib.sha256(repr((COMPILE, LINK, options)).encode())
    for path in (source, HERE / "boot.inc", HERE / "guest.ld"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _run(*command: str) -> str:
    """Run a tool and give what it printed."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise GuestBuildError(f"{command[0]} is missing (Debian: apt install gcc binutils)") from None
    if result.returncode:
        raise GuestBuildError(f"{shlex.join(command)}: {result.stderr.strip()}")
    return result.stdout
