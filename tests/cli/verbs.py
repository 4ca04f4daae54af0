"""Runs `portway` in a world of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class Portway:
    def __init__(self, root: str) -> None:
        self.env = {**os.environ, "PORTWAY_ROOT": root, "PORTWAY_TEST_PARENT": str(os.getpid())}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "portway", *words]

    def run(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*words), input=stdin, capture_output=True, env=self.env, timeout=60)

    def json(self, *words: str, stdin: bytes = b"") -> Any:
        """The one object printed."""
        done = self.run(*words, "--json", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def lines(self, *words: str) -> list[Any]:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def start(self, *words: str, until: str = "") -> subprocess.Popen[str]:
        """Runs in the background; its first line, or the one `until`, has come when this returns."""
        process = subprocess.Popen(self.command(*words), stdout=subprocess.PIPE, text=True, env=self.env,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        assert process.stdout is not None
        while until not in (line := process.stdout.readline()):
            assert line, "it ended"
        return process


def end(process: subprocess.Popen[str], *, kill: bool = False) -> int:
    (process.kill if kill else process.terminate)()
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(20)
