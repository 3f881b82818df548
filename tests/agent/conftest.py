"""Fixtures for the tests of the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .build import unusable
from .host import OLDEST, FakeHost, Variant

StartHost = Callable[..., FakeHost]


@pytest.fixture
def start_host() -> Iterator[StartHost]:
    """Starts fake hosts, and ends them after the test: a host that is not well then fails it."""
    hosts: list[FakeHost] = []

    def start(variant: Variant = OLDEST, **options: Any) -> FakeHost:
        if reason := unusable(variant.sanitizer):
            pytest.skip(reason)
        host = FakeHost(variant, **options)
        hosts.append(host)
        return host

    yield start
    errors = []
    for host in hosts:
        try:
            host.close()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
