"""What `import portway` brings in; never timed here (benchmarks do that)."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"asyncio", "click", "rich", "psutil", "ssl", "hashlib", "uvicorn", "multiprocessing", "subprocess", "ctypes",
         "email", "importlib.metadata"}  # fmt: skip


def imported_by(code: str) -> set[str]:
    """The heavy modules that a bare interpreter has after `code`."""
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return HEAVY & set(done.stdout.split())


def test_import_portway_brings_in_nothing_heavy() -> None:
    assert imported_by("import portway") == set()


@pytest.mark.parametrize("name", ["duplicate_socket", "socket_from", "HandoffSession", "HandoffInbox", "SharedSocket"])
def test_the_nouns_bring_in_nothing_heavy(name: str) -> None:
    assert imported_by(f"import portway; portway.{name}") == set()


def test_the_check_can_fail() -> None:
    assert imported_by("import asyncio, hashlib") >= {"asyncio", "hashlib"}
