"""`Control`: what the commands use to talk to a running service, and what a program may use too."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from .. import errors
from ..deadline import Deadline
from ..errors import NotRunning, OperationTimeout, PortwayError, SuperviseError
from ..kernel.process import peer_of
from . import proc
from .paths import existing_services, near, runtime_dir
from .state import read_state

__all__ = ["Control", "leftovers", "services"]


class Control:
    """The control socket of service `name`, of this uid. Each call is one connection and has one limit in seconds.

    Raises `NotRunning`, `OperationTimeout` (what was asked goes on), `SuperviseError` when the supervisor goes away
    meanwhile, and what the supervisor answers: `GenerationFailed` (its last lines in ``__notes__``),
    `ConfigurationError`, `CommandNotFound` ...
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = os.path.join(runtime_dir(create=False), name, "control")

    def status(self, *, timeout: float | None = 10.0, connections: bool = False) -> dict[str, Any]:
        """What runs; with `connections` each generation's ``connections``, counted by this process from /proc."""
        report = self._ask({"verb": "status"}, timeout, None)
        if connections:
            _count(report)
        return report

    def reload(
        self, command: list[str] | None = None, *, timeout: float | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Start the next generation and wait until it serves: ``{"generation": N, "pids": [...]}``."""
        return self._ask({"verb": "reload", "command": command}, timeout, on_event)

    def stop(
        self, *, now: bool = False, timeout: float | None = None, on_event: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Drain everything, then end; `now` kills. Returns once the supervisor has gone."""
        return self._ask({"verb": "stop", "now": now}, timeout, on_event)

    def upgrade(
        self, python: str | None = None, *, timeout: float | None = None, on_event: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Replace the supervisor by the portway that `python` imports: ``{"version": ..., "pid": ..., "python": ...}``.

        The same process goes on; no socket or child is closed.
        """
        return self._ask({"verb": "upgrade", "python": python}, timeout, on_event)

    def _ask(
        self, request: dict[str, Any], timeout: float | None, on_event: Callable[[str], None] | None
    ) -> dict[str, Any]:
        deadline = Deadline(timeout)
        with self._connect(deadline) as sock:
            try:
                sock.sendall(json.dumps(request).encode() + b"\n")
                answer: dict[str, Any] | None = None
                for record in _records(sock, deadline):
                    if "event" in record and on_event is not None:
                        on_event(str(record["event"]))
                    answer = record if "result" in record or "error" in record else answer
            except TimeoutError:
                what = f"waiting for {request['verb']} of {self.name}; it goes on in the supervisor"
                raise deadline.error(what) from None
            except OSError as error:
                raise SuperviseError(f"{self.name}: the supervisor went away: {error.strerror}") from error
        if answer is None:
            raise SuperviseError(f"{self.name}: the supervisor ended without an answer", hint="see its own output")
        if "error" in answer:
            raise _rebuild(answer["error"])
        return dict(answer["result"])

    def _connect(self, deadline: Deadline) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.remaining())
            with near(self.path) as path:
                sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            sock.close()
            raise self._not_running() from None
        except TimeoutError:
            sock.close()
            raise deadline.error(f"connecting to {self.name}") from None
        except OSError as error:
            sock.close()
            raise SuperviseError(f"{self.name}: cannot reach its supervisor: {error.strerror}") from error
        if peer_of(sock).uid != os.geteuid():
            sock.close()
            raise SuperviseError(f"{self.path}: another uid listens there", hint="do not trust this folder")
        return sock

    def _not_running(self) -> NotRunning:
        if leftovers(self.name):
            return NotRunning(
                f"{self.name}: its supervisor is gone, its workers still serve",
                hint=f"`portway run` of {self.name} takes them over",
            )
        return NotRunning(f"{self.name} is not running", hint="see `portway status`, or start it with `portway run`")


def _records(sock: socket.socket, deadline: Deadline) -> Iterator[dict[str, Any]]:
    pending = b""
    while True:
        left = deadline.remaining()
        if left is not None and left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        data = sock.recv(65536)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _rebuild(record: dict[str, Any]) -> PortwayError:
    kind = getattr(errors, str(record.get("kind")), SuperviseError)
    if not (isinstance(kind, type) and issubclass(kind, PortwayError)):
        kind = SuperviseError
    error = kind(str(record.get("message", "")), hint=record.get("hint"))
    if isinstance(error, OSError) and isinstance(record.get("errno"), int):
        error.errno = record["errno"]
    if record.get("lines"):
        error.add_note("\n".join(str(line) for line in record["lines"]))
    return error


def _count(report: dict[str, Any]) -> None:
    addresses = [str(one["address"]) for one in report["sockets"]]
    paths = {one[5:] for one in addresses if one.startswith("unix:")}
    ports = {int(one.rpartition(":")[2]) for one in addresses if one.rpartition(":")[2].isdigit()}
    processes = proc.table()
    inodes: dict[int, set[int]] = {}
    for one in report["generations"]:
        pids = [pid for w in one["workers"] if w["pid"] for pid in proc.members(w["pid"], processes)]
        inodes[one["number"]] = {inode for pid in pids for inode in proc.socket_inodes(pid).values()}
    counted = proc.connections(inodes, ports, paths)
    for one in report["generations"]:
        said = [w["connections"] for w in one["workers"] if w["connections"] is not None]
        one["connections"] = sum(said) if said else counted.get(one["number"], 0)


def leftovers(name: str) -> list[int]:
    """Pids of workers whose supervisor was killed: alive by pid and start time, listed in the state file."""
    state = read_state(os.path.join(runtime_dir(create=False), name))
    if state is None:
        return []
    processes = proc.table()
    return [
        worker["pid"]
        for generation in state.get("generations", ())
        for worker in generation["workers"]
        if worker["pid"] in processes and processes[worker["pid"]].start == worker["start"]
    ]


def services(*, timeout: float | None = 5.0) -> list[dict[str, Any]]:
    """Every service of this uid: ``name``, ``state`` and, when it runs, what `Control.status` says."""
    found = []
    for name in existing_services():
        try:
            found.append({"state": "running", **Control(name).status(timeout=timeout, connections=True)})
        except NotRunning:
            found.append({"name": name, "state": "orphaned" if leftovers(name) else "stopped", "pids": leftovers(name)})
        except (OperationTimeout, SuperviseError) as error:
            found.append({"name": name, "state": f"unknown: {error}"})
    return found
