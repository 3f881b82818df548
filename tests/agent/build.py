"""Builds the agent and the fake host that it is tested in; what was built once is kept in a cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from tests.guests.build import cache_folder

HERE = Path(__file__).parent
AGENT = Path(str(resources.files("vmexit.agent")))

_COMPILE = ("gcc", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread")
# Without initial-exec the leak checker of gcc 12 dies of thread-local memory in a library that was loaded late.
_SANITIZERS = {
    "": ("-O1",),
    "address": (
        "-O1",
        "-ftls-model=initial-exec",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-O1", "-fsanitize=thread", "-Wno-error=tsan"),
}


@functools.cache
def unusable(sanitizer: str) -> str | None:
    """Why nothing can be tested with this sanitizer here, in one line; None: it can."""
    if not sanitizer:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "nothing.c"), Path(folder, "nothing")
        source.write_text("int main(void) { return 0; }\n")
        compiled = subprocess.run(
            ["gcc", *_SANITIZERS[sanitizer], source, "-o", program], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if compiled.returncode:
            return f"gcc cannot do -fsanitize={sanitizer} here (Debian: apt install libgcc-12-dev)"
        ran = subprocess.run([program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return f"-fsanitize={sanitizer} does not run on this kernel: {ran.stderr.strip()[:100]}" if ran.returncode else None


def build_agent(sanitizer: str = "") -> Path:
    """The agent, from the sources of the package that is tested."""
    return _build("agent", sorted(AGENT.glob("*.c")), ("-std=c11", "-shared", "-fvisibility=hidden"), sanitizer)


def build_part(*names: str) -> Path:
    """Some of the agent's sources as a library, all of whose functions can be called."""
    return _build("part", [AGENT / name for name in names], ("-std=c11", "-shared"), "")


def build_host(api: int, *, internals: bool, halt: bool, general_registers: int, sanitizer: str = "") -> Path:
    """The fake host that plays a QEMU of this plugin API version; see fake_qemu.c and fake_guest.h for the rest."""
    options = (
        *("-std=gnu11", "-rdynamic", f"-DAPI={api}", f"-DINTERNALS={int(internals)}", f"-DHALT={int(halt)}"),
        f"-DGENERAL_REGISTERS={general_registers}",
    )
    return _build("host", sorted(HERE.glob("*.c")), options, sanitizer)


def _build(name: str, sources: Sequence[Path], options: Sequence[str], sanitizer: str) -> Path:
    """The same arguments give the same path, which holds something complete as soon as it exists."""
    command = [*_COMPILE, *_SANITIZERS[sanitizer], *options]
    digest = hashlib.sha256(repr(command).encode())
    for path in (*sources, *sorted(sources[0].parent.glob("*.h"))):
        digest.update(path.read_bytes())
    target = cache_folder().parent / "agent" / f"{name}-{digest.hexdigest()[:20]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(target.parent), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as folder:
            if not target.exists():
                fresh = Path(folder, name)
                _run(*command, *map(str, sources), "-ldl", "-o", str(fresh))
                fresh.replace(target)
    return target


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps test workers from building the same thing at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, f"{shlex.join(command)}: {result.stderr}"
    return result.stdout
