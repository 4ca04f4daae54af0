"""A killed supervisor's sockets and workers come to the next one of that name.

The workers hold copies of the listeners, and of the dead supervisor's end of their control line. Both are found by
inode and duplicated with pidfd_getfd(2); the workers, which are nobody's children now, are watched by pidfd. They serve
on until the next generation has taken over, and drain then as any other.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

from ..errors import AccessDenied, ConfigurationError, NotSupported, PortwayError, ProcessNotFound
from ..kernel.process import Pidfd, start_time, take_descriptor
from . import proc
from .config import Options
from .generation import Generation, same_sockets
from .restore import go_on, load_generations, load_groups, load_plan
from .state import read_state
from .supervisor import Supervisor
from .worker import Worker

__all__ = ["obstacle", "take_over"]


def take_over(supervisor: Supervisor) -> bool:
    """True when there were workers, which `supervisor` has now, sockets and all; False when there was nothing.

    `ConfigurationError` when they serve other addresses than asked for, `AccessDenied` or `NotSupported` where their
    sockets cannot be duplicated: they serve on untouched then.
    """
    state = read_state(supervisor.folder)
    if state is None:
        return False
    load_plan(state)
    alive = _alive(state)
    if not alive:
        _tidy(state)
        return False
    try:
        _check_binds(supervisor, state, alive)
        pids = _holders(alive)
        load_groups(supervisor, state, lambda record: _fetch(pids, record["inode"]))
    except (AccessDenied, NotSupported) as error:
        for handle in alive.values():
            handle.close()
        raise type(error)(
            f"{supervisor.options.name}: workers of a killed supervisor serve on (pid {_list(alive)}), but their "
            f"sockets cannot be taken over: {error.message}",
            hint="allow pidfd_getfd, or stop those processes and run again",
        ) from error
    except PortwayError:
        for handle in alive.values():
            handle.close()
        raise
    load_generations(supervisor, state, lambda worker, record: _attach(supervisor, worker, record, alive))
    for handle in alive.values():
        handle.close()  # of workers that no generation claimed: none, unless the state is odd
    _adopt(supervisor, state)
    return True


def _list(alive: dict[tuple[int, int], Pidfd]) -> str:
    return ", ".join(str(pid) for pid, _ in sorted(alive))


def _alive(state: dict[str, Any]) -> dict[tuple[int, int], Pidfd]:
    """Workers of the state that still run, by (pid, start time). The pidfd first, then the look: no pid can be reused
    between."""
    found = {}
    for generation in state["generations"]:
        for worker in generation["workers"]:
            try:
                handle = Pidfd(worker["pid"])
            except ProcessNotFound:
                continue
            try:
                same = start_time(worker["pid"]) == worker["start"]
            except ProcessNotFound:
                same = False
            if same:
                found[(worker["pid"], worker["start"])] = handle
            else:
                handle.close()
    return found


def _holders(alive: dict[tuple[int, int], Pidfd]) -> list[int]:
    processes = proc.table()
    return [member for pid, _ in alive for member in proc.members(pid, processes)]


def _check_binds(supervisor: Supervisor, state: dict[str, Any], alive: dict[tuple[int, int], Pidfd]) -> None:
    before = Options.load(state["options"])
    if not same_sockets(before, supervisor.options):
        raise ConfigurationError(
            f"{before.name}: workers of a killed supervisor (pid {_list(alive)}) serve on {' '.join(before.bind)}, "
            f"not on {' '.join(supervisor.options.bind) or 'nothing'}",
            hint="run it with those binds, or stop these processes first",
        )


def _fetch(pids: list[int], inode: int) -> socket.socket | None:
    fd = _duplicate(pids, inode)
    return None if fd is None else socket.socket(fileno=fd)


def _duplicate(pids: list[int], inode: int) -> int | None:
    """The socket of that inode, from whichever of the processes holds it."""
    for _ in range(3):
        found = proc.find_descriptor(pids, inode)
        if found is None:
            return None
        try:
            with Pidfd(found[0]) as process:
                fd = take_descriptor(process, found[1])
        except (ProcessNotFound, OSError) as error:
            if isinstance(error, (AccessDenied, NotSupported)):
                raise
            continue  # it ended, or closed it, between the look and the call
        if os.fstat(fd).st_ino == inode and stat.S_ISSOCK(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    return None


def _attach(
    supervisor: Supervisor, worker: Worker, record: dict[str, Any], alive: dict[tuple[int, int], Pidfd]
) -> bool:
    handle = alive.pop((record["pid"], record["start"]), None)
    if handle is None:
        return False
    worker.pid, worker.start, worker.orphan, worker.pidfd = record["pid"], record["start"], True, handle
    line = _duplicate([worker.pid], worker.line_inode)
    if line is not None:
        worker.line = socket.socket(fileno=line)
        worker.line.setblocking(False)
    if record["notify"]:
        try:
            worker.open_notify(worker.notify_name)
        except OSError:
            worker.notify = None  # somebody took the name; its messages are lost, it serves all the same
    worker.watch(supervisor.loop)
    return True


def _adopt(supervisor: Supervisor, state: dict[str, Any]) -> None:
    for generation in supervisor.generations:
        for worker in generation.alive:
            supervisor.watch_orphan(generation, worker)
            if supervisor.tail is not None:
                supervisor.tail.follow(generation.number, worker.index)
    serving = supervisor.serving
    count = sum(len(generation.alive) for generation in supervisor.generations)
    supervisor.say(
        f"took over from a killed supervisor (pid {state['pid']}): {count} workers"
        + (f", generation {serving.number} serves" if serving else "")
    )
    go_on(supervisor, state)
    supervisor.save()


def _tidy(state: dict[str, Any]) -> None:
    """Sockets that were bound beside a path and never renamed over it."""
    for group in state["groups"]:
        for member in group["members"]:
            path = member["path"]
            hidden = path and os.path.basename(path).startswith(".") and os.path.lexists(path)
            if hidden and stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)


def obstacle(generation: Generation) -> str | None:
    """Why a later supervisor could not take this generation's sockets over; None when it could (tried, and let go)."""
    for worker in generation.alive:
        for listener in generation.listeners[:1]:
            try:
                fd = _duplicate([worker.pid], listener.inode)
            except PortwayError as error:
                return str(error)
            if fd is not None:
                os.close(fd)
                return None
    return None
