"""One generation of a service: the same code in all its workers, a listener of its own for each bind, one inbox."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from ..errors import GenerationFailed, PortwayError
from .binds import parse_binds
from .config import Options, check_placeholder
from .listeners import Group, Listener
from .loop import Loop, Timer
from .output import Tail
from .ready import HttpProbe, not_accepting
from .sockets import SharedGroup
from .spawn import Launch, clean_environment, identity, launch
from .worker import Worker

__all__ = ["Generation", "Phase"]


class Phase(StrEnum):
    """STARTING -> HOLDING -> SERVING -> SETTLING -> DRAINING -> ENDED; FAILED from the first two; STOPPING from all."""

    STARTING = "starting"  # waiting for the sign of readiness
    HOLDING = "holding"  # the sign was there; all workers must stay alive a while
    SERVING = "serving"  # gets the new connections
    SETTLING = "settling"  # gets no new ones, still accepts those queued
    DRAINING = "draining"  # told to finish
    STOPPING = "stopping"  # told to finish, without a successor
    FAILED = "failed"
    ENDED = "ended"


class Generation:
    """Owns its inbox and its workers' lines; the groups own the listeners. close() once all workers have ended."""

    def __init__(self, number: int, options: Options, groups: Sequence[Group]) -> None:
        self.number = number
        self.options = options
        self.groups = groups
        self.phase = Phase.STARTING
        self.workers = [Worker(number, index) for index in range(options.workers)]
        self.listeners: list[Listener] = []
        self.inbox: tuple[socket.socket, socket.socket] | None = None
        self.since = time.time()
        self.began = time.monotonic()
        self.served = 0.0
        self.cwd = ""
        self.why = ""  # of the failure
        self.probe: HttpProbe | None = None
        self.timers: list[Timer] = []

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive]

    @property
    def sockets(self) -> dict[str, Listener]:
        return {group.bind.name: listener for group, listener in zip(self.groups, self.listeners, strict=True)}

    def open(self, loop: Loop, tail: Tail | None) -> None:
        """Takes its listeners and starts every worker; on any error nothing of it is left."""
        self.cwd = os.path.realpath(self.options.chdir) if self.options.chdir else os.getcwd()
        try:
            for group in self.groups:
                self.listeners.append(group.take(self.number))
            for worker in self.workers:
                self.start(worker, loop, tail)
        except BaseException:
            for worker in self.alive:
                worker.signal(9, group=True)
                os.waitpid(worker.pid, 0)
                worker.ended()
            self.close(loop)
            if tail is not None:
                tail.drop(self.number)
            raise
        self._open_probe(loop)

    def _open_probe(self, loop: Loop) -> None:
        kind, _, path = self.options.ready.partition(":")
        for group, listener in zip(self.groups, self.listeners, strict=True):
            if kind == "http" and not isinstance(group, SharedGroup):
                self.probe = HttpProbe(loop, group, listener, path)
                return

    def start(self, worker: Worker, loop: Loop, tail: Tail | None) -> None:
        """Start (again) one worker's process. Errors as `spawn.launch`."""
        options = self.options
        who = identity(options.user, options.group)
        if self.inbox is None:
            self.inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        extra, mine = worker.prepare(loop, ready_fd=options.ready == "fd")
        if who is not None:
            worker.uids |= {who.uid}
        try:
            extra = {"PORTWAY_INBOX": self.inbox[0].fileno(), **extra}
            if tail is not None:
                mine.append(tail.open(self.number, worker.index, (who.uid, who.gid) if who else None))
            stdout = mine[-1] if tail is not None else None
            cwd = self.cwd if os.path.isdir(self.cwd) else options.chdir or "/"
            listen = [listener.sock.fileno() for listener in self.listeners]
            names = [group.bind.name for group in self.groups]
            worker.started(
                launch(Launch(self.command(), listen, names, extra, self._environ(worker), cwd, who, stdout))
            )
        except (PortwayError, OSError):
            worker.close(loop)
            raise
        finally:
            for fd in mine:
                os.close(fd)

    def command(self) -> list[str]:
        """With the places of the sockets filled in: they are descriptors 3, 4, ... in the order of the binds."""
        binds = self.options.bind

        def number(found: re.Match[str]) -> str:
            return str(3 + check_placeholder(found[1], binds))

        return [re.sub(r"\{(fd[^{}]*)\}", number, word) for word in self.options.command]

    def _environ(self, worker: Worker) -> dict[str, str]:
        environ = clean_environment() | self.options.env
        environ["PORTWAY_NAME"] = self.options.name
        environ["PORTWAY_GENERATION"] = str(self.number)
        environ["PORTWAY_WORKER"] = str(worker.index)
        environ["NOTIFY_SOCKET"] = "@" + worker.notify_name[1:]
        if self.options.watchdog:
            environ["WATCHDOG_USEC"] = str(int(self.options.watchdog * 1e6))
        return environ

    def waiting_for(self) -> str | None:
        """What is missing of the sign of readiness; None when it is there."""
        kind, _, rest = self.options.ready.partition(":")
        if kind == "accepting":
            shown = self.sockets
            return not_accepting(self.workers, shown) if shown else None
        if kind == "delay":
            left = self.began + float(rest) - time.monotonic()
            return f"{left:.1f} s of the delay are left" if left > 0 else None
        if kind == "http":
            if self.probe is None:
                return None
            self.probe.check()
            return None if self.probe.ok else f"GET {rest}: {self.probe.last}"
        late = [str(worker.index) for worker in self.workers if not worker.ready]
        sign = "READY=1" if kind == "notify" else "a line on {ready_fd}"
        return f"worker {', '.join(late)} did not send {sign}" if late else None

    def close(self, loop: Loop) -> None:
        """Lines, inbox, timers, listeners. Its processes have ended, or are being killed."""
        if self.probe is not None:
            self.probe.close()
            self.probe = None
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()
        for worker in self.workers:
            worker.close(loop)
        if self.inbox is not None:
            for end in self.inbox:
                end.close()
            self.inbox = None
        for group, listener in zip(self.groups, self.listeners, strict=False):
            group.release(listener)
        self.listeners.clear()

    def failure(self, lines: list[str]) -> GenerationFailed:
        error = GenerationFailed(f"{self.options.name}: generation {self.number} did not take over: {self.why}")
        error.add_note("\n".join(lines))
        return error

    def dump(self) -> dict[str, Any]:
        """For the state file and for status: what it runs and who its processes are."""
        workers = [
            {"index": w.index, "pid": w.pid, "start": w.start, "restarts": w.restarts, "since": w.since,
             "line_inode": w.line_inode, "notify": w.notify_name[1:], "hook": w.hook, "adopts": w.adopts,
             "orphan": w.orphan, "connections": w.connections, "text": w.text, "ready": w.ready, "drained": w.drained,
             "ordered": w.ordered}
            for w in self.workers
        ]  # fmt: skip
        return {
            "number": self.number, "phase": str(self.phase), "since": self.since, "began": self.began, "cwd": self.cwd,
            "served": self.served, "options": self.options.dump(), "workers": workers, "why": self.why,
            "inodes": [listener.inode for listener in self.listeners],
        }  # fmt: skip


def same_sockets(one: Options, other: Options) -> bool:
    return [bind.address for bind in parse_binds(one.bind)] == [bind.address for bind in parse_binds(other.bind)]
