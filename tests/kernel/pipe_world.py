"""A world of pipes of its own for each test, .NET's temporary folder included, and what the tests repeat."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portway

__all__ = ["pair", "pipe_root", "remains", "world_of"]


@pytest.fixture
def pipe_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Short, so that .NET's path fits; open to every user, as /tmp is."""
    path = tempfile.mkdtemp(prefix="pw-", dir="/tmp")
    os.mkdir(f"{path}/tmp")
    for one in (path, f"{path}/tmp"):
        os.chmod(one, 0o1777)
    for name, value in world_of(path).items():
        monkeypatch.setenv(name, value)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def world_of(root: str) -> dict[str, str]:
    """The environment of a peer that shall be in the test's world."""
    return {"PORTWAY_ROOT": root, "TMPDIR": f"{root}/tmp"}


def remains(root: str) -> list[str]:
    """What lies in the world besides each user's empty folder: nothing, once every server has gone in order."""
    found = [str(one.relative_to(root)) for one in Path(root).rglob("*")]
    return sorted(one for one in found if one != "tmp" and not re.fullmatch("portway-pipe-[0-9]+", one))


def pair(name: str = "p", **options: Any) -> tuple[portway.NamedPipeServer, Any, portway.NamedPipeClient]:
    """A server, its end of one conversation, the client's end."""
    options.setdefault("mode", "message")
    server = portway.NamedPipeServer(name, **options)
    client = portway.NamedPipeClient(name)
    return server, server.accept(5), client
