"""The tour's chapter of named pipes: two clients, one killed; and .NET at either end, by nothing but the name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("portway._native.pipe")
CHAPTER = (
    "import json\nfrom portway.tour.talking import talk\n"
    "print(json.dumps(talk(lambda event, facts: print(json.dumps([event, facts])))))"
)


@pytest.fixture
def root() -> Iterator[str]:
    root = tempfile.mkdtemp(prefix="portway-test-", dir="/dev/shm")
    yield root
    shutil.rmtree(root)


def chapter(root: str, program: str) -> tuple[list[str], Any]:
    env = {**os.environ, "PORTWAY_ROOT": root, "TMPDIR": root, "PORTWAY_NETPEER": program}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHAPTER], capture_output=True, text=True, timeout=100, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    *events, figures = map(json.loads, done.stdout.splitlines())
    assert [one for one in Path(root).rglob("*") if not one.is_dir()] == []  # nothing is left
    return [event for event, _ in events], figures


def test_without_dotnet(root: str) -> None:
    events, figures = chapter(root, "/nowhere/netpeer")
    assert events == ["serves", "called", "killed"]
    assert figures["ok"] and figures["dotnet"] is None and figures["third_was_busy"] and figures["calls"] == 4000


@pytest.mark.netpeer
def test_with_dotnet_by_name(root: str, netpeer: Path) -> None:
    events, figures = chapter(root, str(netpeer))
    assert events[-2:] == ["answers", "asks"]
    assert figures["dotnet"] == {"client_of_ours": True, "server_for_us": True, "ok": True} and figures["ok"]
