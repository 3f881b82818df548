"""Profiles of kernels that were met before, kept by content so that the next session has them at once.

A kernel is two files: NAME.json, small, says what to look for in a guest; NAME.npz holds symbols and types. Both are plain data:
nothing in them is executed, and a file that is damaged is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmexit.folders import cache_folder
from vmexit.guest.linux.profile import Profile
from vmexit.guest.symbols import Symbols

_FORMAT = 2
"""To be raised whenever what is kept, or what it means, changes."""
_MOST_KERNELS = 16
"""That are looked at; the newest."""


@dataclass(frozen=True, slots=True)
class Known:
    """A kernel in the cache, as far as it takes to see whether a guest runs it."""

    key: str
    banner: bytes
    banner_at: int
    """The address that linux_banner was linked at."""


class Cache:
    """A folder of profiles. It may be missing, damaged or not writable: then it holds nothing and keeps nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: by default the user's own."""
        self.folder = cache_folder() / "linux" if folder is None else folder

    @staticmethod
    def key_of(content: bytes) -> str:
        """The name for what was got out of a file with this content."""
        return hashlib.sha256(content).hexdigest()[:32]

    def known(self) -> Iterator[Known]:
        """The kernels met before, the last one first."""
        try:
            paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        except OSError:
            return
        for path in paths[:_MOST_KERNELS]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                head = json.loads(path.read_text("utf-8"))
                if head["format"] == _FORMAT and isinstance(head["banner_at"], int):
                    yield Known(path.stem, head["banner"].encode("latin-1"), head["banner_at"])

    def load(self, key: str) -> Profile | None:
        """What was kept under that name."""
        path = self.folder / f"{key}.json"
        try:
            head = json.loads(path.read_text("utf-8"))
            if head["format"] != _FORMAT:
                return None
            # numpy would not close a damaged file.
            with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                addresses = arrays["addresses"].astype(np.uint64)
                names = arrays["names"].tobytes().decode("utf-8").split("\0")
                kinds = arrays["kinds"].tobytes().decode("latin-1")
                btf = arrays["btf"].tobytes()
            if not len(addresses) == len(names) == len(kinds) or np.any(addresses[1:] < addresses[:-1]):
                return None
            offsets = {str(name): int(value) for name, value in head["offsets"].items()}
            profile = Profile(head["banner"].encode("latin-1"), Symbols(addresses, names, kinds), btf, offsets)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return profile

    def keep(self, key: str, profile: Profile) -> None:
        """Keeps a profile; does nothing where that is not possible."""
        head = {
            "format": _FORMAT,
            "banner": profile.banner.decode("latin-1"),
            "banner_at": profile.symbols.find("linux_banner"),
            "offsets": dict(profile.offsets),
        }
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._replaced(f"{key}.npz") as path, path.open("wb") as file:
                np.savez(
                    file,
                    addresses=profile.symbols.addresses,
                    names=np.frombuffer("\0".join(profile.symbols.names).encode("utf-8"), np.uint8),
                    kinds=np.frombuffer(profile.symbols.kinds.encode("latin-1"), np.uint8),
                    btf=np.frombuffer(profile.btf_data, np.uint8),
                )
            # Last: what has no head is not there.
            with self._replaced(f"{key}.json") as path:
                path.write_text(json.dumps(head), "utf-8")

    @contextlib.contextmanager
    def _replaced(self, name: str) -> Iterator[Path]:
        """A new file that takes its place once it is whole; several sessions may do this at once."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        os.close(handle)
        path = Path(temporary)
        try:
            yield path
            path.replace(self.folder / name)
        finally:
            path.unlink(missing_ok=True)
