"""The search for a kernel: order, cache, download by an APT that scripts play, and its complaints."""

from __future__ import annotations

import io
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vmexit.errors import VmexitError
from vmexit.setup import kernel

RELEASE = "6.1.0-99-cloud-amd64"
PACKAGE = f"linux-image-{RELEASE}"
MODULE = b"\x7fELF module"

APT_BEGINNING = """\
#!/bin/sh
echo "$0 $*" >>"$FAKE/calls"
# fail_if FILE COMPLAINT
fail_if() { [ ! -e "$FAKE/$1" ] || { echo "E: $2" >&2; exit 100; }; }
# own_lists: whether to use other package lists than the machine's
case "$*" in *Lists=*) own_lists=1 ;; *) own_lists= ;; esac
"""
APT_CACHE = f"""\
{APT_BEGINNING}
[ "$own_lists" ] || fail_if no-lists "No packages found"
fail_if unknown "No packages found"
printf 'Package: linux-image-cloud-amd64\\nDepends: {PACKAGE} (= 6.1.999-1)\\n'
"""
APT_GET = f"""\
{APT_BEGINNING}
fail_if no-network "Failed to fetch deb.example.org  Temporary failure resolving
E: Some index files failed to download. They have been ignored."
if [ "$1" = indextargets ]; then
    [ -e "$FAKE/no-debian" ] || printf 'bookworm-updates http://other\\nbookworm http://mirror\\n'
fi
if [ "$1" = update ]; then
    for word in "$@"; do case "$word" in Dir::Etc::SourceList=*) cp "${{word#*=}}" "$FAKE/source.list" ;; esac; done
fi
if [ "$1" = download ]; then
    [ "$own_lists" ] || fail_if old-lists "404  Not Found"
    sleep 0.2
    cp "$FAKE/package" {PACKAGE}_6.1.999-1_amd64.deb
fi
"""
DPKG_DEB = """\
#!/bin/sh
case "$1" in
--field) echo 6.1.999-1 ;;
--fsys-tarfile) cat "$2" ;;
esac
"""


def bzimage(release: str = RELEASE) -> bytes:
    """The first bytes of a bzImage, as its boot protocol has them."""
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x600).to_bytes(2, "little")
    text = f"{release} (someone@example.org) #1 SMP".encode()
    image[0x800 : 0x800 + len(text)] = text
    return bytes(image)


def package(members: dict[str, bytes]) -> bytes:
    """The tar stream that dpkg-deb takes out of a package."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


GOOD_PACKAGE = package(
    {
        f"./boot/config-{RELEASE}": b"CONFIG_X86_MSR=m\n",
        f"./boot/vmlinuz-{RELEASE}": bzimage(),
        f"./lib/modules/{RELEASE}/kernel/arch/x86/kernel/msr.ko": MODULE,
        f"./lib/modules/{RELEASE}/kernel/drivers/powercap/intel_rapl_msr.ko": b"another",
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder that find_kernel() keeps kernels in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    return tmp_path / "cache" / "vmexit" / "kernel"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose APT is played by scripts; the folder with their calls and the files that steer them."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in {"apt-cache": APT_CACHE, "apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "package").write_bytes(GOOD_PACKAGE)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def calls(apt: Path, word: str) -> list[str]:
    """The calls so far that have this word."""
    path = apt / "calls"
    return [line for line in path.read_text().splitlines() if word in line.split()] if path.exists() else []


def test_explicit_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "mine"
    image.write_bytes(bzimage("5.10.1-mine"))
    monkeypatch.setenv(kernel.VARIABLE, "/nowhere")
    assert kernel.find_kernel(image) == kernel.Kernel(image, None, "5.10.1-mine")


def test_variable_wins_over_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "mine"
    image.write_bytes(bzimage("5.10.1-mine"))
    (cache / "6.1.1-1").mkdir(parents=True)
    (cache / "6.1.1-1" / "vmlinuz").write_bytes(bzimage())
    monkeypatch.setenv(kernel.VARIABLE, str(image))
    assert kernel.find_kernel().image == image
    monkeypatch.setenv(kernel.VARIABLE, "")
    assert kernel.find_kernel().image == cache / "6.1.1-1" / "vmlinuz"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VmexitError, match=r"^cannot read the kernel .*/gone: No such file or directory$"):
        kernel.find_kernel(tmp_path / "gone")


def test_not_a_bzimage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(b"\x7fELF" + bytes(0x1000))
    with pytest.raises(VmexitError, match=r"^/.*vmlinux is not a bzImage \(no 'HdrS' at offset 0x202\)$"):
        kernel.find_kernel(image)
    monkeypatch.setenv(kernel.VARIABLE, str(image))
    with pytest.raises(VmexitError, match=r"^VMEXIT_KERNEL: /.*vmlinux is not a bzImage"):
        kernel.find_kernel()


def test_release_of_odd_headers(tmp_path: Path) -> None:
    image = tmp_path / "image"
    data = bytearray(bzimage())
    for offset, expected in ((0, "unknown"), (0xFFFF, "unknown"), (0x600, RELEASE)):
        data[0x20E:0x210] = offset.to_bytes(2, "little")
        image.write_bytes(data)
        assert kernel.read_release(image) == expected
    image.write_bytes(b"")
    with pytest.raises(VmexitError, match="not a bzImage"):
        kernel.read_release(image)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernel.cache_folder() == Path("/home/someone/.cache/vmexit/kernel")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel.cache_folder() == Path("/somewhere/vmexit/kernel")


def test_download_then_cache(apt: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = kernel.find_kernel()
    assert found == kernel.Kernel(cache / "6.1.999-1" / "vmlinuz", cache / "6.1.999-1" / "modules", RELEASE)
    assert found.image.read_bytes() == bzimage()
    assert found.modules is not None
    assert {path.name: path.read_bytes() for path in found.modules.iterdir()} == {"msr.ko": MODULE}
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"vmexit: downloading Debian's kernel once ({PACKAGE}) ...\n"
    assert {path.name for path in cache.iterdir()} == {".lock", "6.1.999-1"}

    monkeypatch.setenv("PATH", "/nowhere")
    assert kernel.find_kernel() == found
    assert capsys.readouterr().err == ""


def test_the_newer_kernel_comes_from_the_backports(apt: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From where the machine has Debian from, into a folder of its own, and by no lists but these."""
    found = kernel.find_newer_kernel()
    assert found.image == cache.parent / "newer-kernel" / "6.1.999-1" / "vmlinuz" == kernel.find_newer_kernel().image
    words = (apt / "source.list").read_text().split()
    assert words[0] == "deb" and words[-3:] == ["http://mirror", "bookworm-backports", "main"]
    assert len(calls(apt, "update")) == len(calls(apt, "download")) == 1
    for call in (*calls(apt, "update"), *calls(apt, "download"), *calls(apt, "show")):
        assert "Dir::Etc::SourceList=" in call and "Dir::State::Lists=" in call and "Dir::Etc::SourceParts=-" in call
    assert "SourceList" not in calls(apt, "indextargets")[0]
    assert kernel.cached_kernel() is None
    assert capsys.readouterr().err.count("\n") == 2


def test_no_newer_kernel(apt: Path) -> None:
    (apt / "no-debian").touch()
    with pytest.raises(VmexitError, match="the APT sources here name no Debian whose backports there could be"):
        kernel.find_newer_kernel()
    (apt / "no-debian").unlink()
    (apt / "unknown").touch()
    with pytest.raises(VmexitError, match=r"the APT sources here do not have linux-image-cloud-amd64"):
        kernel.find_newer_kernel()


def test_download_in_parallel_happens_once(apt: Path) -> None:
    command = [sys.executable, "-m", "vmexit.setup.kernel"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {worker.communicate(timeout=60)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(outputs) == 1
    assert len(calls(apt, "download")) == 1


@pytest.mark.parametrize("trouble", ["no-lists", "old-lists"])
def test_package_lists_that_are_missing_or_old(apt: Path, trouble: str) -> None:
    (apt / trouble).touch()
    assert kernel.find_kernel().release == RELEASE
    update = calls(apt, "update")
    assert len(update) == 1
    assert "Dir::State::Lists=" in update[0], "the machine's own lists are root's to change"


@pytest.mark.parametrize("lists", ["no-lists", "good-lists"])
def test_no_network(apt: Path, cache: Path, lists: str) -> None:
    (apt / "no-network").touch()
    (apt / lists).touch()
    (apt / "unknown").touch()
    with pytest.raises(VmexitError) as caught:
        kernel.find_kernel()
    assert str(caught.value) == (
        "cannot download Debian's kernel (no network?): "
        "Failed to fetch deb.example.org  Temporary failure resolving; or name a kernel of your own with VMEXIT_KERNEL=path"
    )
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_no_network_with_known_package(apt: Path) -> None:
    (apt / "no-network").touch()
    with pytest.raises(VmexitError, match=rf"^cannot download {PACKAGE} \(no network\?\): Failed to fetch deb\.example\.org"):
        kernel.find_kernel()


def test_apt_without_the_package(apt: Path) -> None:
    (apt / "unknown").touch()
    with pytest.raises(VmexitError, match=r"sources here do not have linux-image-cloud-amd64; or name .*VMEXIT_KERNEL"):
        kernel.find_kernel()


def test_not_a_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VmexitError, match=r"not a Debian \(apt-get is missing\); or name .*VMEXIT_KERNEL=path$"):
        kernel.find_kernel()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage" * 1000, "cannot unpack .*: there is no kernel in it"),
        (GOOD_PACKAGE[: len(GOOD_PACKAGE) // 2 - 700], "cannot unpack .*: there is no kernel in it"),
        (package({"./usr/share/doc/readme": b"none"}), "cannot unpack .*: there is no kernel in it"),
        (package({f"./boot/vmlinuz-{RELEASE}": bytes(0x1000)}), "holds no kernel that can be booted"),
    ],
    ids=["garbage", "cut short", "no kernel", "no bzImage"],
)
def test_bad_package(apt: Path, content: bytes, message: str) -> None:
    (apt / "package").write_bytes(content)
    with pytest.raises(VmexitError, match=message):
        kernel.find_kernel()
    # Once the server has a good one, it is taken.
    (apt / "package").write_bytes(GOOD_PACKAGE)
    assert kernel.find_kernel().release == RELEASE


def test_later_debians_compress_modules(apt: Path) -> None:
    members = {
        f"./boot/vmlinuz-{RELEASE}": bzimage(),
        f"./usr/lib/modules/{RELEASE}/kernel/arch/x86/kernel/msr.ko.xz": lzma.compress(MODULE),
    }
    (apt / "package").write_bytes(package(members))
    found = kernel.find_kernel()
    assert found.modules is not None
    assert (found.modules / "msr.ko").read_bytes() == MODULE


def test_what_a_killed_download_left_is_removed(apt: Path, cache: Path) -> None:
    (cache / ".new-killed" / "lists").mkdir(parents=True)
    (cache / "6.1.999-1").mkdir()
    assert kernel.find_kernel().release == RELEASE
    assert {path.name for path in cache.iterdir()} == {".lock", "6.1.999-1"}


@pytest.mark.parametrize(("user", "expected"), [(0, True), (1000, False)])
def test_root_needs_no_sandbox(apt: Path, monkeypatch: pytest.MonkeyPatch, user: int, expected: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    kernel.find_kernel()
    assert ("APT::Sandbox::User=root" in calls(apt, "download")[0]) is expected


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(VmexitError, match=r"^cannot keep a kernel in .*: Not a directory$"):
        kernel.find_kernel()


def test_as_a_program(apt: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main() == 0
    assert capsys.readouterr().out == f"{cache / '6.1.999-1' / 'vmlinuz'}\n"
    monkeypatch.setenv(kernel.VARIABLE, "/nowhere/kernel")
    assert kernel.main() == 1
    assert capsys.readouterr().err == "vmexit: VMEXIT_KERNEL: cannot read the kernel /nowhere/kernel: No such file or directory\n"
