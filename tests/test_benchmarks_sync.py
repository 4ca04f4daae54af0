"""The benchmark of the synchronisation objects runs and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_sync() -> None:
    command = [sys.executable, "-m", "benchmarks", "sync", "--quick", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(line["work"], line["contender"], line["metric"]): line["max"] for line in lines}
    wanted = {("sync.mutex", "portway", "ns"), ("sync.mutex", "mp.Lock", "ns"), ("map.open", "portway", "us")}
    assert wanted <= set(found)
    assert ("sync.pingpong", "portway", "us") in found and found["sync.abandoned", "portway", "missed"] == 0
    assert [found["sync.killed", "portway", what] for what in ("wedged", "torn", "files", "fds")] == [0] * 4
