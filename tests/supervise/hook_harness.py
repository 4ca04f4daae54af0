"""Plays the supervisor's part of docs/explanation/worker-contract.md with real processes.

The tests of the whole run under the real `portway run`; this harness is for what that cannot do on purpose: a successor
that refuses, dies between two system calls, or never reads its inbox.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Polls until `condition` is true; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return found


class Worker:
    """A process started as `portway run` starts one, with its control line."""

    def __init__(self, command: list[str], generation: int, listener: socket.socket, inbox: socket.socket) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.said: list[dict[str, Any]] = []
        environ = {
            **os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web", "PORTWAY_NAME": "test", "PORTWAY_WORKER": "0",
            "PORTWAY_GENERATION": str(generation), "PORTWAY_INBOX": "4", "PORTWAY_CONTROL": "5",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'examples'}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        # The shell gives the pid that exec keeps: LISTEN_PID has to name the worker itself.
        moves = " ".join(f"{new}<&{old}" for new, old in ((3, listener.fileno()), (4, inbox.fileno()),
                                                         (5, theirs.fileno())))  # fmt: skip
        keep = [listener.fileno(), inbox.fileno(), theirs.fileno()]
        assert min(keep) > 5, "descriptors would overwrite each other"
        script = f'exec {moves}; export LISTEN_PID=$$; exec "$@"'
        self.process = subprocess.Popen(["bash", "-c", script, "sh", *command], env=environ, pass_fds=keep)
        theirs.close()
        self.pid = self.process.pid

    def heard(self, verb: str) -> bool:
        try:
            while data := self.control.recv(65_536, socket.MSG_DONTWAIT):
                self.said.append(json.loads(data))
        except (BlockingIOError, ConnectionResetError):
            pass
        return any(packet["verb"] == verb for packet in self.said)

    def wait_for(self, verb: str) -> None:
        until(lambda: self.heard(verb) or self.process.poll() is not None, f"{verb} from pid {self.pid}")
        assert self.heard(verb), f"ended with {self.process.returncode} before it said {verb}: {self.said}"

    def drain(self, generation: int, inbox: socket.socket | None, limit: float | None = None) -> None:
        rights = [] if inbox is None else [inbox.fileno()]
        packet = json.dumps({"verb": "drain", "generation": generation, "limit": limit}).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights))] if rights else []
        self.control.sendmsg([packet], ancillary)

    def end(self, number: int = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            self.control.close()


class Service:
    """One listening socket, shared, and generations of one worker each (more with `start` and an old inbox)."""

    def __init__(self, command: list[str]) -> None:
        high = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]  # keep 3 to 5 free for the workers' numbers
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.command = command
        self.workers: list[Worker] = []
        self.inboxes: dict[int, tuple[socket.socket, socket.socket]] = {}
        self._high = high

    @property
    def address(self) -> tuple[str, int]:
        name: tuple[str, int] = self.listener.getsockname()
        return name

    def start(self, generation: int, command: list[str] | None = None) -> Worker:
        if generation not in self.inboxes:
            self.inboxes[generation] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker = Worker(command or self.command, generation, self.listener, self.inboxes[generation][0])
        self.workers.append(worker)
        worker.wait_for("ready")
        return worker

    def reload(self, limit: float | None = None) -> Worker:
        """The next generation starts, the last worker drains towards it; its read end of the inbox stays here."""
        number, old = max(self.inboxes) + 1, self.workers[-1]
        new = self.start(number)
        old.drain(number, self.inboxes[number][1], limit)
        return new

    def forget_inbox(self, generation: int) -> None:
        for end in self.inboxes[generation]:
            end.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        for pair in self.inboxes.values():
            for end in pair:
                end.close()
        self.listener.close()
        for fd in self._high:
            os.close(fd)


@contextmanager
def service(*command: str) -> Iterator[Service]:
    made = Service([sys.executable, *command])
    try:
        yield made
    finally:
        made.close()
