from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _leaves_nothing(no_leaks: None) -> None:
    """Every test of the kernel floor counts descriptors."""
