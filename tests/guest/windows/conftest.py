"""A made-up Windows, recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.windows.fake_windows import FakeWindows
from vmexit.guest.store import Store
from vmexit.guest.system import Help, Recognised
from vmexit.guest.windows.recognise import recognise
from vmexit.guest.windows.running import Windows

Attach = Callable[[FakeWindows], Windows]


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
