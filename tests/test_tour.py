from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_tour_loses_nothing_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "portway", "tour", "--json"], capture_output=True, text=True, timeout=100
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    pipes = ["serves", "called", "killed"]
    if events and events[-1].get("talk", {}).get("dotnet"):
        pipes += ["answers", "asks"]
    assert [event["event"] for event in events][-7 - len(pipes) :] == [
        "connected", "moved", "killed", "shared", "killed", "went on", *pipes, "summary"
    ], done.stderr  # fmt: skip
    summary = events[-1]
    assert done.returncode == 0 and all(part["ok"] for part in list(summary.values())[1:]), summary
    # Counted by clients that are processes of their own and never retry:
    assert summary["reload"]["failed_new"] == summary["reload"]["failed_kept"] == 0
    assert summary["reload"]["requests"] > 500
    assert summary["reload"]["versions_served"] == [f"version {n}" for n in range(1, 6)]
    assert summary["reload"]["broken_version_refused"]
