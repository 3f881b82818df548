"""What the tests of the commands share."""

from collections.abc import Iterator

import pytest

from tests.commands.fakes import Typist


@pytest.fixture
def typist() -> Iterator[Typist]:
    """Types on a machine with two vCPUs that is halted before its first instruction."""
    typist = Typist()
    yield typist
    typist.close()
