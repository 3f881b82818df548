"""Where vmexit keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's own, $XDG_CACHE_HOME/vmexit or ~/.cache/vmexit; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification: a relative path is to be ignored.
    if base.startswith("/"):
        return Path(base, "vmexit")
    try:
        home = Path.home()
    except RuntimeError:  # nobody knows this user: what cannot be kept is made again
        home = Path("/nonexistent")
    return home / ".cache" / "vmexit"
