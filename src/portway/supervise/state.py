"""The state file: what a later supervisor needs to take the sockets over. 0600, replaced by rename."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

__all__ = ["read_state", "remove_state", "write_state"]


def _path(folder: str) -> str:
    return os.path.join(folder, "state.json")


def write_state(folder: str, state: dict[str, Any]) -> None:
    path = _path(folder)
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(state, file)
    os.rename(path + ".new", path)


def read_state(folder: str) -> dict[str, Any] | None:
    """None when there is none, or none that can be read: then nothing can be taken over."""
    try:
        fd = os.open(_path(folder), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and state.get("version") == 1 else None


def remove_state(folder: str) -> None:
    for name in ("state.json", "state.json.new", "control"):
        try:
            os.unlink(os.path.join(folder, name))
        except FileNotFoundError:
            pass
    shutil.rmtree(os.path.join(folder, "output"), ignore_errors=True)
    try:
        os.unlink(os.path.join(folder, "lock"))
        os.rmdir(folder)
    except OSError:
        pass  # something else stands there, or another supervisor is beginning
