"""What the tests of the made-up Linux share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.linux.fake_linux import FakeLinux
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.recognise import recognise
from vmexit.guest.linux.running import Linux


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty one."""
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One that knows the made-up kernel."""
    cache = Cache(tmp_path_factory.mktemp("profiles"))
    recognise(FakeLinux(), cache=cache)
    return cache


@pytest.fixture
def attach(profiles: Cache) -> Callable[[FakeLinux], Linux]:
    """Recognises a guest that runs the made-up kernel."""
    return lambda guest: recognise(guest, cache=profiles).linux
