"""What the tests of recordings share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmexit.report.digest import Digest
from vmexit.report.reader import RecordingFile


@pytest.fixture
def digest_of() -> Iterator[Callable[[Path], Digest]]:
    """Sums recordings up; they stay open for as long as the test lasts."""
    with contextlib.ExitStack() as held:
        yield lambda path: Digest(held.enter_context(RecordingFile(path)))
