"""A session on a machine without QEMU, open to programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.fakes import Typist
from vmexit.sdk import Client


@pytest.fixture
def typist() -> Iterator[Typist]:
    """Types on a machine with two vCPUs that is halted before its first instruction."""
    typist = Typist()
    yield typist
    typist.close()


@pytest.fixture
def path(typist: Typist, tmp_path: Path) -> Path:
    """Where that session serves programs."""
    path = tmp_path / "sdk"
    typist.types(f"settings sdk-socket {path}")
    return path


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    """A program that is connected to it."""
    with Client(path) as client:
        yield client
