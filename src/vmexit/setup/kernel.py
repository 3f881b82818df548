"""Finds a Linux kernel to boot: the user's own, the cached one, or Debian's cloud kernel, downloaded once.

Nothing is installed and nothing here needs root: the package is downloaded, checked by APT against Debian's
signatures, and the few files needed are copied out of it.  `python -m vmexit.setup.kernel` does just that and
prints the image's path; with `--newer` it does so for the one in Debian's backports, which tests boot besides.
"""

from __future__ import annotations

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vmexit.errors import VmexitError
from vmexit.folders import cache_folder as users_cache

METAPACKAGE = "linux-image-cloud-amd64"
VARIABLE = "VMEXIT_KERNEL"
BACKPORTS = "backports"
MODULES = ("msr",)
"""The kernel modules that are copied out of the package along with the image, without their .ko."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Debian's own keys (package debian-archive-keyring)."""
_OWN = f"or name a kernel of your own with {VARIABLE}=path"
_IMAGE_MEMBER = re.compile(r"(?:\./)?boot/vmlinuz-(?P<release>[^/]+)")
_MODULE_MEMBER = re.compile(rf"(?:\./)?(?:usr/)?lib/modules/[^/]+/.*/(?P<name>{'|'.join(MODULES)})\.ko(?P<packing>\.xz)?")


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted."""

    image: Path
    """The bzImage."""
    modules: Path | None
    """The folder that holds its modules as NAME.ko; None when only the image is at hand (a user's own)."""
    release: str
    """What `uname -r` says in the guest."""


def find_kernel(explicit: Path | None = None) -> Kernel:
    """Return the kernel to boot: `explicit`, else $VMEXIT_KERNEL, else the cached one, else Debian's.

    Only the last of these uses the network; it says so in one line on standard error.  Of several processes
    that call this at once one downloads, the others wait for it.  Raises VmexitError, which says what to do,
    when no kernel can be had.
    """
    if explicit is not None:
        return _own_kernel(explicit, "")
    if named := os.environ.get(VARIABLE):
        return _own_kernel(Path(named), f"{VARIABLE}: ")
    if (kernel := cached_kernel()) is not None:
        return kernel
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            return cached_kernel() or _download(folder)
    except OSError as error:
        raise VmexitError(f"cannot keep a kernel in {folder}: {error.strerror or error}") from None


def find_newer_kernel() -> Kernel:
    """Return the cloud kernel of Debian's backports, the cached one if there is one.

    Uses the network and raises as `find_kernel`, also where what the backports have is packaged in another way.
    """
    folder = newer_folder()
    if (kernel := cached_kernel(folder)) is not None:
        return kernel
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            return cached_kernel(folder) or _download(folder, BACKPORTS)
    except OSError as error:
        raise VmexitError(f"cannot keep a kernel in {folder}: {error.strerror or error}") from None


def cached_kernel(cache: Path | None = None) -> Kernel | None:
    """Return the kernel downloaded last, or None; needs no network and no lock.  `cache`: by default `cache_folder`."""
    try:
        folders = [entry for entry in (cache or cache_folder()).iterdir() if not entry.name.startswith(".")]
        folders.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    except OSError:
        return None
    for folder in folders:
        with contextlib.suppress(OSError, VmexitError):
            image = folder / "vmlinuz"
            modules = folder / "modules"
            return Kernel(image, modules if modules.is_dir() else None, read_release(image))
    return None


def cache_folder() -> Path:
    """Return the folder that holds one folder a kernel, named by its package's version; it need not exist."""
    return users_cache() / "kernel"


def newer_folder() -> Path:
    """Return the folder of the same kind for `find_newer_kernel`."""
    return users_cache() / "newer-kernel"


def read_release(image: Path) -> str:
    """Return the release that a bzImage says it is, from its setup header (Linux: arch/x86/boot.rst).

    Raises VmexitError when the file is no bzImage and OSError when it cannot be read.
    """
    with image.open("rb") as file:
        header = file.read(256 * 512)  # the boot sector and the setup code: at most 256 sectors
    if header[0x202:0x206] != b"HdrS":
        raise VmexitError(f"{image} is not a bzImage (no 'HdrS' at offset 0x202)")
    # kernel_version: 16 bits at 0x20e, the offset of a string ending in a zero, less 0x200; 0 = none.
    offset = int.from_bytes(header[0x20E:0x210], "little")
    text = header[offset + 0x200 :].split(b"\0", 1)[0] if offset else b""
    return text.decode("ascii", "replace").partition(" ")[0] or "unknown"


def _own_kernel(image: Path, where: str) -> Kernel:
    """Return the user's own kernel; `where` opens the error's line with what the path came from."""
    try:
        return Kernel(image, None, read_release(image))
    except OSError as error:
        raise VmexitError(f"{where}cannot read the kernel {image}: {error.strerror or error}") from None
    except VmexitError as error:
        raise VmexitError(f"{where}{error}") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that dies with this process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(folder: Path, pocket: str = "") -> Kernel:
    """Download and unpack Debian's kernel into a folder of its own below `folder`; the lock is held.

    `pocket`: a part of the archive that the machine need not use itself, "backports".
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            _give_up(f"no kernel to boot, and none to download: this is not a Debian ({tool} is missing)")
    for leftover in folder.glob(".new-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a download that was killed: there is one at a time
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as name:
        work = Path(name)
        apt = _Apt(work, pocket)
        # What apt knows may be missing (a fresh machine) or old (the file has gone from the server).
        package = None if pocket else apt.resolve()
        deb = apt.download(package) if package else None
        if deb is None:
            reached = apt.update()
            if not reached:
                complaint = apt.complaint
                if pocket:
                    _give_up(f"cannot download a kernel of Debian's {pocket}: {complaint}")
            package = apt.resolve()
            if package is None and not reached:
                _give_up(f"cannot download Debian's kernel (no network?): {complaint}")
            if package is None:
                _give_up(f"no kernel to boot, and none to download: the APT sources here do not have {METAPACKAGE}")
            deb = apt.download(package)
            if deb is None:
                _give_up(f"cannot download {package} (no network?): {apt.complaint}")
        ready = work / "ready"
        _unpack(deb, ready)
        target = folder / apt.version(deb)
        if target.exists():
            shutil.rmtree(target)  # it holds no kernel, or there would be nothing to download
        ready.rename(target)
    kernel = cached_kernel(folder)
    if kernel is None:
        _give_up(f"the package {deb.name} holds no kernel that can be booted")
    return kernel


def _unpack(deb: Path, target: Path) -> None:
    """Copy the image and the modules wanted out of a Debian package into `target`."""
    modules = target / "modules"
    modules.mkdir(parents=True)
    image_found = False
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is None:
                        continue
                    if _IMAGE_MEMBER.fullmatch(member.name):
                        (target / "vmlinuz").write_bytes(content.read())
                        image_found = True
                    elif match := _MODULE_MEMBER.fullmatch(member.name):
                        data = content.read()
                        if match["packing"]:
                            data = lzma.decompress(data)
                        (modules / f"{match['name']}.ko").write_bytes(data)
        except (tarfile.TarError, lzma.LZMAError):
            image_found = False
        process.communicate()  # reads what is left, or dpkg-deb would wait for ever
        complaints.seek(0)
        complaint = _last_line(complaints.read())
    if process.returncode != 0 or not image_found:
        _give_up(f"cannot unpack {deb.name}: {complaint or 'there is no kernel in it'}")


class _Apt:
    """The APT of this machine, asked without changing anything of it."""

    def __init__(self, work: Path, pocket: str = "") -> None:
        """`work` takes the downloads and, after update(), package lists that are ours alone: of `pocket`, if that is given."""
        self.work = work
        self._pocket = pocket
        self.complaint = ""
        self._options: list[str] = []
        if os.geteuid() == 0:
            # As root APT drops to the user _apt, which may not write into a home folder, and warns about it.
            self._options += ["-o", "APT::Sandbox::User=root"]

    def resolve(self) -> str | None:
        """Return the real package that the metapackage stands for now, or None when APT does not know it."""
        output = self._run("apt-cache", "show", "--no-all-versions", METAPACKAGE)
        match = re.search(r"^Depends:.*?\b(linux-image-[0-9][^\s,(]*)", output or "", re.MULTILINE)
        return match[1] if match else None

    def version(self, deb: Path) -> str:
        """Return the version of a downloaded package, fit for a folder's name."""
        version = (self._run("dpkg-deb", "--field", str(deb), "Version") or "").strip()
        if not re.fullmatch(r"[0-9][0-9A-Za-z.+:~-]*", version):
            _give_up(f"{deb.name} is not a Debian package: {self.complaint or 'it has no version'}")
        return version

    def download(self, package: str) -> Path | None:
        """Download a package; return the file, or None with `complaint` set."""
        _say(f"downloading Debian's kernel once ({package}) ...")
        if self._run("apt-get", "download", "-q", package) is None:
            return None
        return next(self.work.glob("*.deb"), None)

    def update(self) -> bool:
        """From here on use fresh package lists of our own: the machine's belong to root and stay as they are.

        Return whether every server was reached; one of several may do all the same.
        """
        _say("asking APT's servers what is current ...")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self._options += [
            "-o",
            f"Dir::State::Lists={self.work / 'lists'}",
            "-o",
            f"Dir::Cache={self.work / 'cache'}",
        ]
        if self._pocket and not self._use_pocket():
            return False
        # APT ends with 0 even when no server was reached, unless told otherwise.
        return self._run("apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any") is not None

    def _use_pocket(self) -> bool:
        """Have APT use nothing but the pocket, from where this machine has Debian itself."""
        filters = ("Created-By: Packages", "Component: main", "Origin: Debian", "Label: Debian")
        with_own_lists, self._options = self._options, self._options[:-4]
        output = self._run("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", *filters) or ""
        self._options = with_own_lists
        # "bookworm-updates" and the like are pockets themselves.
        found = [words for line in output.splitlines() if len(words := line.split()) == 2 and "-" not in words[0]]
        if not found:
            self.complaint = f"the APT sources here name no Debian whose {self._pocket} there could be"
            return False
        codename, address = found[0]
        options = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        source = self.work / "source.list"
        source.write_text(f"deb {options}{address} {codename}-{self._pocket} main\n")
        self._options += ["-o", f"Dir::Etc::SourceList={source}", "-o", "Dir::Etc::SourceParts=-"]
        return True

    def _run(self, program: str, *arguments: str) -> str | None:
        """Run a program in the work folder; return its output, or None with `complaint` set when it fails."""
        options = self._options if program.startswith("apt-") else []
        done = subprocess.run(
            [program, *arguments, *options],
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
        if done.returncode != 0:
            self.complaint = _last_line(done.stderr) or f"{program}: exit {done.returncode}"
            return None
        return done.stdout


def _last_line(text: str) -> str:
    """Return the last line that says something, without APT's opening letter."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # APT's own last line only says that something failed; the line before it says what.
    lines = [line for line in lines if "Failed to fetch" in line] or lines
    return re.sub(r"^[EW]: ", "", lines[-1]).rstrip(".") if lines else ""


def _say(text: str) -> None:
    print(f"vmexit: {text}", file=sys.stderr, flush=True)


def _give_up(reason: str) -> NoReturn:
    raise VmexitError(f"{reason}; {_OWN}")


def main() -> int:
    """Have a kernel ready and print its path; 1 and one line when there is none."""
    try:
        print((find_newer_kernel() if "--newer" in sys.argv[1:] else find_kernel()).image)
    except VmexitError as error:
        print(f"vmexit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
