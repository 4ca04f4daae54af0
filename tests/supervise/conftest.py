from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
from running import World


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def world_path() -> Iterator[str]:
    """A short folder: Unix socket names end at 107 bytes."""
    path = tempfile.mkdtemp(prefix="pw")
    yield path
    shutil.rmtree(path)
