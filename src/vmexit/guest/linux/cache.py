"""Profiles of kernels that were met before, kept by content so that the next session has them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmexit.folders import cache_folder
from vmexit.guest.linux.profile import Profile
from vmexit.guest.store import Store, arrays_of, symbols_of

_FORMAT = 3
"""To be raised whenever what is kept, or what it means, changes."""


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
        self._store = Store(self.folder)

    @staticmethod
    def key_of(content: bytes) -> str:
        """The name for what was got out of a file with this content."""
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def known(self) -> Iterator[Known]:
        """The kernels met before, the last one first."""
        for key, head in self._store.heads(_FORMAT):
            banner, banner_at = head.get("banner"), head.get("banner_at")
            if isinstance(banner, str) and isinstance(banner_at, int):
                yield Known(key, banner.encode("latin-1", "replace"), banner_at)

    def load(self, key: str) -> Profile | None:
        """What was kept under that name."""
        found = self._store.load(key, _FORMAT)
        if found is None:
            return None
        head, arrays = found
        try:
            symbols = symbols_of(arrays)
            btf = arrays["btf"].tobytes()
            offsets = {str(name): int(value) for name, value in head["offsets"].items()}
            banner = head["banner"].encode("latin-1")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return Profile(banner, symbols, btf, offsets)

    def keep(self, key: str, profile: Profile) -> None:
        """Keeps a profile; does nothing where that is not possible."""
        head = {
            "banner": profile.banner.decode("latin-1"),
            "banner_at": profile.symbols.find("linux_banner"),
            "offsets": dict(profile.offsets),
        }
        arrays = {**arrays_of(profile.symbols), "btf": np.frombuffer(profile.btf_data, np.uint8)}
        self._store.keep(key, _FORMAT, head, arrays)
