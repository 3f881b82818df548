"""A folder of what was found out about kernels, kept so that the next session has it at once.

A kernel is two files: NAME.json, small; NAME.npz with what is large. Both are plain data: nothing in them is executed, and a
file that is damaged is as good as none.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vmexit.guest.nametable import NameTable
from vmexit.guest.symbols import Symbols

_MOST = 16
"""That are looked at; the newest."""

Arrays = Mapping[str, npt.NDArray[Any]]


class Store:
    """A folder that may be missing, damaged or not writable: then it holds nothing and keeps nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def heads(self, version: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and head of what was kept in that version of the format, the last one first."""
        try:
            paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        except OSError:
            return
        for path in paths[:_MOST]:
            head = self._head(path, version)
            if head is not None:
                yield path.stem, head

    @staticmethod
    def _head(path: Path, version: int) -> dict[str, Any] | None:
        try:
            head = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return head if isinstance(head, dict) and head.get("format") == version else None

    def load(self, name: str, version: int) -> tuple[dict[str, Any], Arrays] | None:
        """What was kept under a name, in that version of the format."""
        path = self.folder / f"{name}.json"
        head = self._head(path, version)
        if head is None:
            return None
        try:
            # numpy would not close a damaged file.
            with path.with_suffix(".npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return head, found

    def keep(self, name: str, version: int, head: Mapping[str, Any], arrays: Arrays) -> None:
        """Keeps something; does nothing where that is not possible."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._replaced(f"{name}.npz") as path, path.open("wb") as file:
                np.savez(file, **cast("dict[str, Any]", dict(arrays)))
            # Last: what has no head is not there.
            with self._replaced(f"{name}.json") as path:
                path.write_text(json.dumps({"format": version, **head}), "utf-8")

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


def arrays_of(symbols: Symbols) -> dict[str, npt.NDArray[Any]]:
    """A table of symbols as arrays to keep."""
    hashes, order = symbols.names.index
    return {
        "addresses": symbols.addresses,
        "names": np.frombuffer(symbols.names.text, np.uint8),
        "kinds": np.frombuffer(symbols.kinds.encode("latin-1"), np.uint8),
        "hashes": hashes,
        "order": order,
    }


def symbols_of(arrays: Arrays) -> Symbols:
    """The table that was kept so. Raises ValueError, KeyError where they are damaged."""
    addresses = arrays["addresses"].astype(np.uint64, copy=False)
    if np.any(addresses[1:] < addresses[:-1]):
        raise ValueError("the addresses do not rise")
    index = arrays["hashes"].astype(np.uint32, copy=False), arrays["order"].astype(np.uint32, copy=False)
    return Symbols(addresses, NameTable(arrays["names"].tobytes(), index), arrays["kinds"].tobytes().decode("latin-1"))
