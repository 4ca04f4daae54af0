"""Every example runs, as a person would run it. Those with servers in them have tests of their own, named here."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import portway

EXAMPLES = Path(__file__).parent.parent / "examples"
STANDALONE = {
    "ten_steps.py": "answer to second from pid",
    "acceptor_workers.py": "answered",
    "both_sides.py": "400 whole lines",
    "shared_mapping.py": "the same",
    "pipe_pair.py": "easy-server has ended, and its name with it",
}
ELSEWHERE = {
    "asgi_app.py": "tests/supervise",
    "line_server.py": "tests/supervise",
    "threaded_line_server.py": "tests/supervise",
}


@pytest.fixture
def own_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of pipes are the machine's; two runs of these tests must not meet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PORTWAY_ROOT", str(tmp_path))


@pytest.mark.parametrize("name", STANDALONE)
def test_example(name: str, request: pytest.FixtureRequest) -> None:
    if "pipe" in name:
        request.getfixturevalue("own_pipes")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert STANDALONE[name] in done.stdout
    assert done.stderr == ""


@pytest.mark.usefixtures("own_pipes")
@pytest.mark.parametrize("server", ["native-server", "easy-server"])
@pytest.mark.parametrize("everyone", [False, True])
def test_the_pipe_pairs_security(server: str, everyone: bool) -> None:
    command = [sys.executable, str(EXAMPLES / "pipe_pair.py"), server, *["--everyone"] * everyone]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and b"waits" in process.stdout.readline()
            (pipe,) = portway.list_pipes()
            assert (pipe.name, pipe.mode, pipe.shared) == ("HelloWorld", "message", everyone)
            # what the kernel asks, who is nobody's friend:
            modes = {stat.S_IMODE(one.stat().st_mode) for one in Path(pipe_folder()).glob("[0-9]*")}
            assert modes == {0o666 if everyone else 0o600}
        finally:
            process.kill()


def pipe_folder() -> str:
    """The one pipe's."""
    (folder,) = Path(os.environ["PORTWAY_ROOT"]).glob("portway-pipe-*/*")
    return str(folder)


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*STANDALONE, *ELSEWHERE}
    for name, where in ELSEWHERE.items():
        texts = [path.read_text() for path in (EXAMPLES.parent / where).rglob("*.py")]
        assert any(name.removesuffix(".py") in text for text in texts), f"no test in {where} runs {name}"
