"""Fixtures of the kernel floor's tests; those of the kernel objects are in `sync_world`."""

from __future__ import annotations

import pytest
from pipe_world import pipe_root
from sync_world import root, start

__all__ = ["pipe_root", "root", "start"]


@pytest.fixture(autouse=True)
def _leaves_nothing(no_leaks: None) -> None:
    """Every test of the kernel floor counts descriptors."""
