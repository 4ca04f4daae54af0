"""Part two of the tour: one live connection, with unread bytes and state, moves between two unrelated processes."""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

__all__ = ["TourProcess", "move_connection"]

MOVES = 200
Say = Callable[[str, dict[str, Any]], None]


class TourProcess:
    """A child that says JSON lines and takes orders."""

    def __init__(self, module: str = "portway.tour.peer") -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self.popen.pid
        self.expect("ready")

    def order(self, text: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(text + "\n")
        self.popen.stdin.flush()

    def expect(self, event: str) -> dict[str, Any]:
        """The next event of that kind; RuntimeError when the process ends instead."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
        raise RuntimeError(f"the tour's process {self.pid} ended before it said {event!r}")

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


def move_connection(say: Say) -> dict[str, Any]:
    """Moves it `MOVES` times between two processes, then kills one with -9; the figures."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        processes = [TourProcess(), TourProcess()]
        for process in processes:
            stack.callback(process.end)
        here, there = processes
        here.order(f"connect {server.getsockname()[1]}")
        server.settimeout(10)
        client = stack.enter_context(server.accept()[0])
        client.settimeout(10)
        lines = stack.enter_context(client.makefile("r"))
        client.sendall(b"one\ntwo\nhalf a ")
        answers = [lines.readline().split(), lines.readline().split()]
        here.expect("holds")
        say("connected", {"client": "this process", "served by": here.pid, "unread": "half a ", "state": "count 2"})
        micros = []
        for _ in range(MOVES):
            here.order(f"give {there.pid}")
            got = there.expect("got")
            micros.append(got["micros"])
            here, there = there, here
        say("moved", {"times": MOVES, "median_us": round(statistics.median(micros)), "now served by": here.pid})
        there.popen.send_signal(signal.SIGKILL)
        client.sendall(b"line\n")
        answers.append(lines.readline().split())
        say("killed", {"with -9": there.pid, "client reads": " ".join(answers[-1])})
    kept = answers[-1] == ["3", str(here.pid), "half", "a", "line"] and got["unread"] == "half a "
    return {"moves": MOVES, "median_us": round(statistics.median(micros), 1), "max_us": round(max(micros), 1),
            "unread_and_state_kept": kept, "ok": kept}  # fmt: skip
