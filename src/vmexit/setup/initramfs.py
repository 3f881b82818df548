"""Makes an initramfs: busybox, an init script and what the caller adds; same input, same bytes."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from vmexit.errors import VmexitError
from vmexit.setup.elf import X86_64, ElfError, read_elf

PRELUDE = """\
#!/bin/sh
# Until /proc is there the shell cannot find its own commands.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /lib/modules/*.ko; do
    [ ! -e "$module" ] || insmod "$module"
done
"""
"""How an init script may begin: mounts /proc, /sys and /dev, loads the modules of build_initramfs()."""

READ_MSR = """\
# read_msr CPU MSR: prints the MSR's value as 16 hex digits, or nothing when it cannot be read; MSR is 0x..
read_msr() {
    dd if="/dev/cpu/$1/msr" bs=8 count=1 skip="$(($2))" iflag=skip_bytes 2>/dev/null |
        od -An -v -tx8 | tr -d ' '
}
# write_msr CPU MSR VALUE: writes 16 hex digits into an MSR; fails when the processor or the kernel refuses.
write_msr() {
    echo "$3" | fold -w 2 | tac | xxd -r -p |
        dd of="/dev/cpu/$1/msr" bs=8 count=1 seek="$(($2))" oflag=seek_bytes conv=notrunc 2>/dev/null
}
"""
"""Shell functions for a script after PRELUDE; they need the kernel's msr module, loaded or built in."""

_BUSYBOX = (Path("/bin/busybox"), Path("/usr/bin/busybox"))
_FOLDERS = ("bin", "dev", "lib/modules", "proc", "sys", "tmp")


def build_initramfs(
    init_script: str,
    files: Mapping[str, bytes | Path] | None = None,
    *,
    modules: Iterable[Path] = (),
    busybox: Path | None = None,
) -> bytes:
    """Return an uncompressed initramfs whose /init is `init_script`, run by busybox's shell.

    `files` maps a path in the guest ("/etc/motd") to what it holds: bytes, or a file to be copied.  `modules`
    go to /lib/modules/NAME.ko.  What begins as a program (ELF or #!) can be executed.

    Raises VmexitError when there is no busybox, or when a file cannot be read or has no proper place.
    """
    archive = _Archive()
    for folder in _FOLDERS:
        archive.add_folder(folder)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    archive.add_file("bin/busybox", _content(busybox or find_busybox()))
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    archive.add_file("init", init_script.encode())
    for module in sorted(modules):
        archive.add_file(f"lib/modules/{module.name}", _content(module))
    for name, source in sorted((files or {}).items()):
        archive.add_file(name, source if isinstance(source, bytes) else _content(source))
    return archive.finish()


def find_busybox() -> Path:
    """Return a busybox for x86-64 that needs no libraries; raise VmexitError when there is none."""
    on_path = shutil.which("busybox")
    candidates = [*_BUSYBOX, *([Path(on_path)] if on_path else [])]
    for path in candidates:
        try:
            elf = read_elf(path)
        except (OSError, ElfError):
            continue
        if elf.static and elf.machine == X86_64:
            return path
    raise VmexitError("no static busybox for x86-64 here: install Debian's package busybox-static")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VmexitError(f"cannot read {path} for the initramfs: {error.strerror or error}") from None


class _Archive:
    """A cpio archive in the "newc" format (Linux: driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._modes: dict[str, int] = {}

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add an entry of the type and permissions in `mode`; all belong to root and are of the year 1970."""
        path = PurePosixPath("/", name).relative_to("/")
        if name.endswith("/") or not path.parts or ".." in path.parts or "\0" in name:
            raise VmexitError(f"{name!r} is no place for a file in an initramfs")
        if str(path) in self._modes:
            raise VmexitError(f"/{path} is already in the initramfs")
        self.add_folder(str(path.parent))
        self._append(str(path), mode, content, device)

    def add_folder(self, name: str) -> None:
        """Add a folder and those above it, where they are not there yet."""
        path = PurePosixPath(name)
        for folder in [*reversed(path.parents), path]:
            if not folder.parts:
                continue
            if stat.S_ISDIR(self._modes.setdefault(str(folder), 0)):
                continue
            if self._modes[str(folder)]:
                raise VmexitError(f"/{folder} is no folder in the initramfs")
            self._append(str(folder), stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes) -> None:
        """Add a regular file."""
        program = content.startswith((b"#!", b"\x7fELF"))
        self.add(name, stat.S_IFREG | (0o755 if program else 0o644), content)

    def finish(self) -> bytes:
        """Return the whole archive; nothing can be added to it afterwards."""
        self._append("TRAILER!!!", 0)
        return bytes(self._data)

    def _append(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Append a header of 13 fields of 8 hex digits, the name and the content, each padded to 4 bytes."""
        self._modes[name] = mode
        links = 2 if stat.S_ISDIR(mode) else 1
        number = len(self._modes)  # no inode number may come twice: equal ones are hard links
        text = name.encode() + b"\0"
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(text), 0)
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields) + text
        self._data += bytes(-len(self._data) % 4) + content
        self._data += bytes(-len(self._data) % 4)
