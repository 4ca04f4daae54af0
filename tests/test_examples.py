"""Every example runs, as a person would run it. Those with servers in them have tests of their own, named here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STANDALONE = {
    "ten_steps.py": "answer to second from pid",
    "acceptor_workers.py": "answered",
    "both_sides.py": "400 whole lines",
    "shared_mapping.py": "the same",
}
ELSEWHERE = {
    "asgi_app.py": "tests/supervise",
    "line_server.py": "tests/supervise",
    "threaded_line_server.py": "tests/supervise",
}


@pytest.mark.parametrize("name", STANDALONE)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert STANDALONE[name] in done.stdout
    assert done.stderr == ""


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*STANDALONE, *ELSEWHERE}
    for name, where in ELSEWHERE.items():
        texts = [path.read_text() for path in (EXAMPLES.parent / where).rglob("*.py")]
        assert any(name.removesuffix(".py") in text for text in texts), f"no test in {where} runs {name}"
