"""The example and the tour's chapter of shared memory: one process is killed, the other is told and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("portway._native.view")
EXAMPLE = Path(__file__).parent.parent / "examples" / "shared_mapping.py"
CHAPTER = (
    "import json\nfrom portway.tour.sharing import share_memory\n"
    "print(json.dumps(share_memory(lambda event, facts: None)))"
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"/dev/shm/portway-test-{os.getpid()}-{tmp_path.name}"


def run(root: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PORTWAY_ROOT": root},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    left = [path for path in Path(root).rglob("*") if path.is_file()]
    subprocess.run(["rm", "-r", root], check=True)
    assert left == []
    return done.stdout


def test_the_example(root: str) -> None:
    lines = run(root, str(EXAMPLE)).splitlines()
    assert lines == [
        "told that the owner died: True; the numbers are 5001 and 5000", "at the end: 15001 and 15001, the same",
    ]  # fmt: skip


def test_the_tours_chapter(root: str) -> None:
    said = json.loads(run(root, "-c", CHAPTER))
    assert said["ok"] and said["told"] == 1 and said["left_over"] == 0
    assert sum(said["numbers"]) == 0
