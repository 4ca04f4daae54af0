"""How a generation ends: it settles, is told to drain, and is stopped by force at the limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from . import proc
from .generation import Generation, Phase
from .loop import Loop
from .reuseport import TcpGroup
from .worker import Worker

__all__ = ["Retire", "sweep"]

_POLL = 0.02
_SETTLE_CAP = 5.0  # seconds beyond --settle that queues and handshakes may take to be seen empty
GRACE = 5.0  # seconds between the stop signal at the limit, for a worker that was draining by itself, and KILL


class Retire:
    """Ends one generation. ``successor`` is the one that gets its connections, or None when the service stops."""

    def __init__(
        self, loop: Loop, old: Generation, successor: Generation | None, *, settle: float, limit: float | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self.old = old
        self.successor = successor
        self.settle = settle
        self.limit = limit
        self._say = say
        self.until: float | None = None  # monotonic; of the forced end

    def begin(self) -> None:
        """New connections go elsewhere from now on."""
        if self.successor is None:
            self.drain()
            return
        self.old.phase = Phase.SETTLING
        # A handshake that began with the old listener ends there, a round trip later.
        self._ports = {group.sockaddr[1] for group in self.old.groups if isinstance(group, TcpGroup)}
        self._half_open = proc.half_open(self._ports) if self._ports else set()
        self._settled_at = time.monotonic() + self.settle
        self._later(self.settle, self._settling)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self.old.timers.append(self._loop.after(seconds, call))

    def _settling(self) -> None:
        if self._half_open:
            self._half_open &= proc.half_open(self._ports)
        queued = bool(self._half_open) or any(listener.waiting() for listener in self.old.listeners)
        if queued and self.old.alive and time.monotonic() < self._settled_at + _SETTLE_CAP:
            self._later(_POLL, self._settling)
        else:
            self.drain()

    def drain(self, left: float | None = None) -> None:
        self.old.phase = Phase.STOPPING if self.successor is None else Phase.DRAINING
        limit = self.limit if left is None else left
        if limit is not None:
            self.until = time.monotonic() + limit
        for worker in self.old.alive:
            if not (worker.hook and self._order(worker)):
                worker.signal(self.old.options.stop_signal)
        if limit is not None:
            self._later(limit, self._over)

    def redirect(self, successor: Generation) -> None:
        """A yet newer generation has taken over: what is still here goes there, not into an inbox nobody will read."""
        if self.old.phase not in (Phase.SETTLING, Phase.DRAINING):
            return
        self.successor = successor
        if self.old.phase is Phase.DRAINING:
            for worker in self.old.alive:
                if worker.hook and worker.ordered and not worker.drained:
                    self._order(worker)

    def resume(self, until: float | None) -> None:
        """Another supervisor has told it to drain already; its limit goes on."""
        self.until = until
        if until is not None:
            self._later(max(0.0, until - time.monotonic()), self._over)

    def dump(self) -> dict[str, Any]:
        successor = self.successor.number if self.successor is not None else None
        return {"successor": successor, "limit": self.limit, "until": self.until}

    def _order(self, worker: Worker) -> bool:
        left = None if self.until is None else max(0.0, self.until - time.monotonic())
        if self.successor is None:
            told = worker.tell({"verb": "stop", "limit": left})
        else:
            # No inbox when nobody reads it: what was sent there would wait, served by neither, until the limit.
            inbox = self.successor.inbox if any(one.adopts for one in self.successor.workers) else None
            order = {"verb": "drain", "generation": self.successor.number, "limit": left}
            told = worker.tell(order, () if inbox is None else (inbox[1].fileno(),))
        worker.ordered = worker.ordered or told
        return told

    def on_drained(self, worker: Worker) -> None:
        """It has nothing left to finish: end it, and see that it ends."""
        worker.signal(self.old.options.stop_signal)
        self._later(GRACE, lambda: self._kill(worker, "said it was drained, and did not end"))

    def _over(self) -> None:
        for worker in self.old.alive:
            if worker.hook and not worker.drained:
                worker.signal(self.old.options.stop_signal)
                self._later(GRACE, lambda worker=worker: self._kill(worker, "did not end"))  # type: ignore[misc]
            else:
                self._kill(worker, f"was not done after {self.limit:g} s" if self.limit is not None else "did not end")

    def _kill(self, worker: Worker, why: str) -> None:
        if worker.alive:
            self._say(f"generation {self.old.number}: worker {worker.index} (pid {worker.pid}) {why}: killed")
            worker.signal(signal.SIGKILL, group=True)

    def now(self) -> None:
        """No more patience: KILL to every group."""
        for worker in self.old.alive:
            worker.signal(signal.SIGKILL, group=True)


def sweep(loop: Loop, leader: int, *, force: bool = True) -> None:
    """The process at the head of this group has ended; what it left behind is asked to end, then made to."""
    left = [one for one in proc.table().values() if one.group == leader and one.pid != leader]
    if not left:
        return
    try:
        os.killpg(leader, signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        return

    def kill() -> None:
        now = proc.table()
        for one in left:
            found = now.get(one.pid)
            if found is not None and found.start == one.start:
                try:
                    os.kill(one.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass

    if force:
        loop.after(GRACE, kill)
