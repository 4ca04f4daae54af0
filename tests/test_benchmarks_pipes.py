"""The benchmark of named pipes runs and prints what it promises; clients and servers killed leave nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RIVALS = ("portway", "portway-aio", "af_unix", "mp.connection", "asyncio-streams")


def run(*works: str, **environment: str) -> tuple[dict[tuple[str, str, str], float], str]:
    command = [sys.executable, "-m", "benchmarks", "pipes", "--quick", "--json"]
    for work in works:
        command += ["--work", work]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["work"], line["contender"], line["metric"]): line["max"] for line in lines}, done.stderr


def test_messages_without_dotnet(tmp_path: Path) -> None:
    messages = ("pipe.message-32", "pipe.message-4k", "pipe.message-64k")
    found, remarks = run(*messages, "pipe.dotnet", PORTWAY_NETPEER=str(tmp_path / "none"))
    assert set(found) == {(work, rival, "us") for work in messages for rival in RIVALS}
    assert all(took > 0 for took in found.values())
    assert "pipe.dotnet is left out" in remarks


def test_dotnet(netpeer: Path) -> None:
    found, _ = run("pipe.dotnet", "pipe.dotnet-oneway-64k", PORTWAY_NETPEER=str(netpeer))
    for work, metric in (("pipe.dotnet", "per_s"), ("pipe.dotnet-oneway-64k", "mb_s")):
        assert found[work, "portway", metric] > 0 and found[work, "dotnet", metric] > 0


def test_churn() -> None:
    found, remarks = run("pipe.churn")
    assert found["pipe.churn", "portway", "connections"] >= 200
    assert found["pipe.churn", "portway", "killed"] > 0
    assert [found["pipe.churn", "portway", what] for what in ("wedged", "leaked")] == [0, 0], remarks
