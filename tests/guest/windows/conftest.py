"""A made-up Windows, recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.windows.fake_windows import FakeWindows
from vmexit.guest.linux.cache import Cache
from vmexit.guest.store import Store
from vmexit.guest.system import Help, Recognised
from vmexit.guest.windows.recognise import recognise
from vmexit.guest.windows.running import Windows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return Store(tmp_path / "kept")


def look(
    guest: FakeWindows, core: int = 0, *, lstar: int | None = None, pdb: Path | None = None, store: Store | None = None
) -> Recognised:
    """Recognises a guest."""
    return recognise(guest, core, given=Help(pdb=pdb), lstar=lstar, store=store or Store(Path("/dev/null/nowhere")))


def attach(guest: FakeWindows) -> Windows:
    """The Windows that runs there."""
    system = look(guest).system
    assert isinstance(system, Windows)
    return system


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty one."""
    return Cache(tmp_path / "linux")
