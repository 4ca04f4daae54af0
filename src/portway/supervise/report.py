"""What a supervisor says of itself: to `portway status`, and to the one that comes after it."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .supervisor import Supervisor

__all__ = ["report", "snapshot"]


def report(supervisor: Supervisor) -> dict[str, Any]:
    """The record of ``portway status NAME --json``, but for the connections, which the asking process counts."""
    from .. import __version__
    from .takeover import obstacle

    serving = supervisor.serving
    sockets = [
        {"name": group.bind.name, "address": group.address, "kind": group.bind.kind,
         "inodes": {str(member.generation): member.inode for member in group.members}}
        for group in supervisor.groups
    ]  # fmt: skip
    return {
        "name": supervisor.options.name, "pid": os.getpid(), "version": __version__, "python": sys.executable,
        "stopping": supervisor.stopping, "reloads": supervisor.reloads, "sockets": sockets,
        "folder": supervisor.folder, "clock": time.monotonic(), "obstacle": obstacle(serving) if serving else None,
        "serving": serving.number if serving else None,
        "generations": [generation.dump() for generation in supervisor.generations],
    }  # fmt: skip


def snapshot(supervisor: Supervisor) -> dict[str, Any]:
    """The state file's content; `restore` reads it."""
    generations = []
    for one in supervisor.generations:
        retire = supervisor.retiring.get(one.number)
        generations.append(one.dump() | {"retire": None if retire is None else retire.dump()})
    return {
        "version": 1, "plan": supervisor.plan.dump(), "options": supervisor.options.dump(), "pid": os.getpid(),
        "number": supervisor.number, "reloads": supervisor.reloads, "stopping": supervisor.stopping,
        "serving": supervisor.serving.number if supervisor.serving else None,
        "groups": [group.dump() for group in supervisor.groups], "generations": generations,
        "output": supervisor.tail.positions() if supervisor.tail else {},
    }  # fmt: skip
