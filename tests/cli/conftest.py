from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def root() -> Iterator[str]:
    """A root of named objects for this test alone."""
    root = tempfile.mkdtemp(prefix="portway-test-", dir="/dev/shm")
    yield root
    shutil.rmtree(root)
