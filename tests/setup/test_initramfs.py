"""The initramfs, as seen by a reader written apart from the writer, by busybox's cpio, and by Linux."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmexit.errors import VmexitError
from vmexit.setup import initramfs
from vmexit.setup.initramfs import PRELUDE, READ_MSR, build_initramfs, find_busybox
from vmexit.setup.kernel import find_kernel


@dataclass
class Entry:
    """One entry of an archive."""

    inode: int
    mode: int
    content: bytes
    device: tuple[int, int]


def read_archive(data: bytes) -> dict[str, Entry]:
    """The entries of a newc archive in their order; fails on anything that the kernel would not take."""
    entries: dict[str, Entry] = {}
    offset = 0
    while True:
        assert offset % 4 == 0
        assert data[offset : offset + 6] == b"070701"
        fields = [int(data[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, _, mtime, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid, mtime) == (0, 0, 0)
        name = data[offset + 110 : offset + 110 + name_size]
        assert name.endswith(b"\0")
        offset = (offset + 110 + name_size + 3) & ~3
        content = data[offset : offset + size]
        assert len(content) == size
        offset = (offset + size + 3) & ~3
        text = name[:-1].decode()
        if text == "TRAILER!!!":
            assert offset == len(data)
            return entries
        assert text not in entries
        entries[text] = Entry(inode, mode, content, (major, minor))


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """A file that stands for busybox where nothing is run."""
    path = tmp_path / "busybox"
    path.write_bytes(b"\x7fELF busybox")
    return path


def test_contents(tmp_path: Path, busybox: Path) -> None:
    module = tmp_path / "msr.ko"
    module.write_bytes(b"module")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    files: dict[str, bytes | Path] = {"/etc/deep/motd": b"hello", "bin/script": script}
    entries = read_archive(build_initramfs("#!/bin/sh\necho\n", files, modules=[module], busybox=busybox))

    def kind(name: str) -> tuple[int, int]:
        return stat.S_IFMT(entries[name].mode), stat.S_IMODE(entries[name].mode)

    assert entries["init"].content == b"#!/bin/sh\necho\n"
    assert kind("init") == (stat.S_IFREG, 0o755)
    assert entries["bin/busybox"].content == b"\x7fELF busybox"
    assert kind("bin/busybox") == (stat.S_IFREG, 0o755)
    assert kind("bin/sh") == (stat.S_IFLNK, 0o777)
    assert entries["bin/sh"].content == b"busybox"
    assert kind("bin/script") == (stat.S_IFREG, 0o755)
    assert kind("etc/deep/motd") == (stat.S_IFREG, 0o644)
    assert entries["lib/modules/msr.ko"].content == b"module"
    assert (*kind("dev/console"), entries["dev/console"].device) == (stat.S_IFCHR, 0o600, (5, 1))
    assert (*kind("dev/null"), entries["dev/null"].device) == (stat.S_IFCHR, 0o666, (1, 3))
    for folder in ("bin", "dev", "etc", "etc/deep", "lib", "lib/modules", "proc", "sys", "tmp"):
        assert kind(folder) == (stat.S_IFDIR, 0o755)
    assert len({entry.inode for entry in entries.values()}) == len(entries)
    names = list(entries)
    for name in names:
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)


def test_same_input_same_bytes(tmp_path: Path, busybox: Path) -> None:
    first, second = tmp_path / "a.ko", tmp_path / "b.ko"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    one = build_initramfs("x", {"a": b"1", "b": b"2"}, modules=[first, second], busybox=busybox)
    busybox.chmod(0o600)
    two = build_initramfs("x", {"b": b"2", "a": b"1"}, modules=[second, first], busybox=busybox)
    assert one == two


@pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox: apt install busybox-static")
def test_busybox_reads_it(busybox: Path) -> None:
    archive = build_initramfs("#!/bin/sh\n", {"odd": b"12345"}, busybox=busybox)
    done = subprocess.run(["busybox", "cpio", "-tv"], input=archive, capture_output=True, check=True)
    listing = done.stdout.decode().splitlines()
    assert [line.split()[-1] for line in listing] == ["busybox" if name == "bin/sh" else name for name in read_archive(archive)]
    assert any(line.startswith("-rw-r--r-- 0/0         5 1970-01-01") and line.endswith(" odd") for line in listing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no place"),
        ("/", "'/' is no place"),
        ("../escape", "no place"),
        ("etc/../motd", "no place"),
        ("folder/", "no place"),
        ("a\0b", "no place"),
        ("/init", "/init is already"),
        ("bin//busybox", "/bin/busybox is already"),
        ("proc", "/proc is already"),
        ("init/below", "/init is no folder"),
    ],
)
def test_places_that_are_refused(busybox: Path, name: str, message: str) -> None:
    with pytest.raises(VmexitError, match=message):
        build_initramfs("", {name: b""}, busybox=busybox)


def test_file_that_cannot_be_read(tmp_path: Path, busybox: Path) -> None:
    with pytest.raises(VmexitError, match=r"^cannot read .*gone for the initramfs: No such file"):
        build_initramfs("", {"file": tmp_path / "gone"}, busybox=busybox)


def test_no_busybox_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "dynamic.c"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-o", tmp_path / "busybox", source], check=True)
    monkeypatch.setattr(initramfs, "_BUSYBOX", (tmp_path / "gone", tmp_path / "busybox", source))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VmexitError, match=r"^no static busybox .*: install Debian's package busybox-static$"):
        find_busybox()
    subprocess.run(["/usr/bin/gcc", "-static", "-o", tmp_path / "busybox", source], check=True, env={"PATH": "/usr/bin"})
    assert find_busybox() == tmp_path / "busybox"


def test_linux_boots_it_and_reads_its_msrs(tmp_path: Path) -> None:
    kernel = find_kernel()
    if kernel.modules is None:
        pytest.skip("a kernel of the user's own, whose msr module is not at hand")
    script = f"""\
{PRELUDE}{READ_MSR}
echo "release=$(uname -r)"
for cpu in 0 1; do echo "lstar$cpu=$(read_msr $cpu 0xc0000082)"; done
write_msr 1 0x176 0123456789abcdef
echo "sysenter1=$(read_msr 1 0x176)"
echo "other=$(cat /etc/motd)"
poweroff -f
"""
    image = tmp_path / "initramfs"
    image.write_bytes(build_initramfs(script, {"etc/motd": b"from the host"}, modules=kernel.modules.glob("*.ko")))
    command = shlex.split(
        "qemu-system-x86_64 -accel tcg,thread=multi -smp 2 -m 256 -no-reboot -nodefaults -display none -serial stdio"
    )
    arguments = "console=ttyS0 quiet panic=-1 tsc=reliable cryptomgr.notests msr.allow_writes=on"
    done = subprocess.run(
        [*command, "-kernel", kernel.image, "-initrd", image, "-append", arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(re.findall(r"^(\w+)=(.*?)\r?$", done.stdout, re.MULTILINE))
    assert said["release"] == kernel.release
    assert said["lstar0"] == said["lstar1"]
    assert re.fullmatch("ffffffff[0-9a-f]{8}", said["lstar0"]), said
    assert said["sysenter1"] == "0123456789abcdef"
    assert said["other"] == "from the host"
