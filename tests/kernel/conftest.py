"""Fixtures of the kernel floor's tests; those of the kernel objects are in `sync_world`."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

import pytest
from sync_world import root, start

__all__ = ["root", "start"]


@pytest.fixture(scope="session")
def _servers_of_multiprocessing() -> Iterator[None]:
    """Started once and kept open by multiprocessing itself: no leak of a test."""
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    yield


@pytest.fixture(autouse=True)
def _leaves_nothing(_servers_of_multiprocessing: None, no_leaks: None) -> None:
    """Every test of the kernel floor counts descriptors."""
