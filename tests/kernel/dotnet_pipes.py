"""A world for pipes with a TMPDIR of its own, and .NET programs in it that say what they do, a JSON object a line."""

from __future__ import annotations

import json
import os
import select
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
from handoff_peers import patiently

__all__ = ["PATTERN", "Net", "NetStart", "World", "echo", "pattern", "serving", "world"]

PATTERN = bytes((31 * i + (i >> 8)) & 255 for i in range(65536))
"""netpeer's test bytes; they repeat."""


def pattern(size: int, at: int = 0) -> bytes:
    at %= 65536
    return (PATTERN * ((at + size) // 65536 + 1))[at : at + size]


class World:
    """A folder that is TMPDIR and portway's root for this process and its children."""

    def __init__(self, path: str) -> None:
        self.path = path

    def dotnet(self, name: str) -> str:
        return f"{self.path}/CoreFxPipe_{name}"

    def files(self) -> list[str]:
        """What lies there, but for the folders that stay: one for each user."""
        found = [str(one.relative_to(self.path)) for one in Path(self.path).rglob("*")]
        return sorted(one for one in found if not one.startswith("portway-pipe-") or "/" in one)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """After the test nothing may be left in it."""
    path = tempfile.mkdtemp(prefix="pw-", dir="/tmp")
    os.chmod(path, 0o1777)
    for name in ("TMPDIR", "PORTWAY_ROOT"):
        monkeypatch.setenv(name, path)
    for name in ("DOTNET_EnableDiagnostics", "COMPlus_EnableDiagnostics"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("DOTNET_SYSTEM_GLOBALIZATION_INVARIANT", "1")
    made = World(path)
    try:
        yield made
        left = made.files()
        assert left == [], left
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Net:
    """A .NET program. ``event(name)`` is the next line of that name; lines read on the way are in ``seen``."""

    def __init__(self, *command: str, uid: int | None = None, **env: str) -> None:
        self.seen: list[dict[str, Any]] = []
        self._rest = b""
        self._file = ""
        user: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, **env}, **user
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def _line(self, timeout: float) -> dict[str, Any] | None:
        """None: it has ended."""
        assert self.process.stdout is not None
        limit = time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = limit - time.monotonic()
            ready = left > 0 and select.select([self.process.stdout], [], [], left)[0]
            assert ready, f"{self.process.args} says nothing, after {self.seen}"
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        said = json.loads(line)
        self.seen.append(said)
        if said["event"] == "listening":
            self._file = said["name"] if said["name"].startswith("/") else said["path"]
        return said

    def event(self, *names: str, timeout: float = 30) -> dict[str, Any]:
        while (said := self._line(timeout)) is not None:
            if said["event"] in names:
                return said
            assert said["event"] != "error", said
        raise AssertionError(f"{self.process.args} has ended, after {self.seen}")

    def error(self, timeout: float = 30) -> str:
        """Its end by an exception: type and message."""
        said = self.event("error", timeout=timeout)
        return f"{said['type']}: {said['message']}"

    def tell(self, line: str = "quit") -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n".encode())

    def end(self) -> list[dict[str, Any]]:
        """Ends it in order; all that it said."""
        self.tell()
        while self._line(30) is not None:
            pass
        self.process.wait(30)
        return self.seen

    def ping(self) -> list[dict[str, Any]]:
        """All that it has said up to now, surely."""
        self.tell("ping")
        self.event("pong")
        return self.seen

    def count(self, name: str) -> int:
        return sum(one["event"] == name for one in self.seen)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        """Ends it, and removes the file that a .NET server leaves when it is killed, or in a hurry; a file of portway's
        there is a link to another, or marked sticky, and stays."""
        self.kill()
        with suppress(FileNotFoundError):
            if self._file:
                info = os.lstat(self._file)
                if info.st_nlink == 1 and not info.st_mode & stat.S_ISVTX:
                    os.unlink(self._file)
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            with suppress(BrokenPipeError):
                file.close()


class NetStart(Protocol):
    def __call__(self, *words: str, uid: int | None = None, **env: str) -> Net: ...


def echo(pipe: Any) -> None:
    for chunk in pipe:
        pipe.send(chunk)


class serving:
    """``with serving(server, handler):`` serves in a thread; leaving closes the server and waits for the thread."""

    def __init__(self, server: Any, handler: Callable[[Any], Any] = echo) -> None:
        self.server = server
        self._thread = threading.Thread(target=server.serve, args=(handler,), daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self.server

    def __exit__(self, *exc: object) -> None:
        patiently(lambda: not self.server.serving.used, 20)
        self.server.close()
        self._thread.join(20)
        assert not self._thread.is_alive()
