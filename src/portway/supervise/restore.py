"""Groups and generations from a state: of a killed supervisor (`takeover`), or of ourselves before exec (`upgrade`)."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from ..errors import ConfigurationError
from .binds import Bind, parse_bind, parse_binds
from .config import Options
from .generation import Generation, Phase
from .listeners import Group, Listener
from .retire import Retire
from .reuseport import TcpGroup
from .sockets import SharedGroup, UnixGroup, open_group
from .supervisor import Supervisor
from .worker import Worker

__all__ = ["go_on", "load_generations", "load_groups", "load_plan"]

Fetch = Callable[[dict[str, Any]], socket.socket | None]


def load_plan(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Plan`, checked; `ConfigurationError` for a state this version cannot read."""
    try:
        plan = state["plan"]
        Options.load(state["options"])
        _whole(state["number"], state["reloads"], state["pid"])
        for group in state["groups"]:
            parse_bind(group["bind"])
            for member in group["members"]:
                _whole(member["inode"], member["generation"])
                os.fspath(member["path"])
        for generation in state["generations"]:
            Options.load(generation["options"])
            Phase(generation["phase"])
            for worker in generation["workers"]:
                _whole(worker["pid"], worker["start"], worker["line_inode"])
        return {key: plan[key] for key in ("name", "given", "file", "environ")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"this portway cannot read that state: {type(error).__name__}: {error}") from error


def _whole(*values: object) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no number of a process, socket or generation")


def load_groups(supervisor: Supervisor, state: dict[str, Any], fetch: Fetch) -> None:
    """`fetch` gives a member's socket from its record, or None when nobody holds it any more."""
    binds = {bind.address: bind for bind in parse_binds(supervisor.options.bind)}
    for record in state["groups"]:
        bind = binds[parse_bind(record["bind"]).address]
        members: list[Listener | None] = []
        for one in record["members"]:
            sock = fetch(one)
            shared = bind.kind in ("udp", "fd")
            members.append(None if sock is None else Listener(sock, one["generation"], one["path"], shared))
        supervisor.groups.append(_group(supervisor, bind, members, record["ready"]))


def _group(supervisor: Supervisor, bind: Bind, members: list[Listener | None], ready: int | None) -> Group:
    backlog = supervisor.options.backlog
    alive = [member for member in members if member is not None]
    if not alive:
        return open_group(bind, backlog, {})
    sock = alive[0].sock
    if bind.kind == "tcp":
        group = TcpGroup(bind, backlog, sock.getsockname(), sock.family)
        group.restore(members, ready)
        return group
    if bind.kind == "unix":
        unix = UnixGroup(bind, backlog)
        unix.restore(members, ready)
        return unix
    return SharedGroup(bind, backlog, sock)


def load_generations(
    supervisor: Supervisor, state: dict[str, Any], attach: Callable[[Worker, dict[str, Any]], bool]
) -> None:
    """`attach` gives a worker its process and lines; False when that process has ended."""
    for record in state["generations"]:
        generation = Generation(record["number"], Options.load(record["options"]), supervisor.groups)
        generation.began, generation.served, generation.since = record["began"], record["served"], record["since"]
        generation.cwd, generation.phase = record["cwd"], Phase(record["phase"])
        _find_listeners(generation, record["inodes"])
        for worker, one in zip(generation.workers, record["workers"], strict=False):
            _load_worker(supervisor, worker, one)
            if one["pid"] and not attach(worker, one):
                worker.ended()
        if record.get("inbox"):
            ends = [socket.socket(fileno=fd) for fd in record["inbox"]]
            generation.inbox = (ends[0], ends[1])
        supervisor.generations.append(generation)
        if record["number"] == state["serving"]:
            supervisor.serving = generation
    supervisor.number, supervisor.reloads = state["number"], state["reloads"]


def _find_listeners(generation: Generation, inodes: list[int]) -> None:
    for group in generation.groups:
        found = [m for m in group.members if m.inode in inodes or m.shared]
        if not found:
            generation.listeners.clear()
            return
        generation.listeners.append(found[0])


def _load_worker(supervisor: Supervisor, worker: Worker, one: dict[str, Any]) -> None:
    worker.restarts, worker.since, worker.last_beat = one["restarts"], one["since"], time.monotonic()
    worker.hook, worker.ready, worker.drained = one["hook"], one["ready"], one["drained"]
    worker.adopts = one.get("adopts") is True
    worker.ordered, worker.connections, worker.text = one["ordered"], one["connections"], one["text"]
    worker.line_inode, worker.notify_name = one["line_inode"], "\0" + one["notify"]
    worker.on_change = supervisor.on_worker


def go_on(supervisor: Supervisor, state: dict[str, Any]) -> None:
    """Timers again: what was settling or draining goes on doing so, what never served is ended."""
    for generation, record in zip(list(supervisor.generations), state["generations"], strict=True):
        retire = record.get("retire") or {}
        if generation.phase in (Phase.STARTING, Phase.HOLDING, Phase.FAILED):
            generation.phase, generation.why = Phase.FAILED, "its supervisor was killed before it was ready"
            for worker in generation.alive:
                worker.signal(signal.SIGKILL, group=True)
        elif generation.phase in (Phase.SETTLING, Phase.DRAINING, Phase.STOPPING):
            later = next((one for one in supervisor.generations if one.number == retire.get("successor")), None)
            again = Retire(
                supervisor.loop, generation, later, settle=generation.options.settle, limit=retire.get("limit"),
                say=supervisor.say,
            )  # fmt: skip
            supervisor.retiring[generation.number] = again
            if generation.phase is Phase.SETTLING:
                again.begin()
            else:
                again.resume(retire.get("until"))
        supervisor.ended_if_empty(generation)
