"""The whole life of `portway run`: from checked options to the exit code."""

from __future__ import annotations

import os
from typing import Any

from .binds import parse_binds
from .notify import inherited_sockets
from .paths import Lock, service_dir
from .plan import Plan
from .sockets import open_group
from .spawn import close_on_exec
from .supervisor import Supervisor

__all__ = ["run"]


def run(name: str, given: dict[str, Any], file: str | None) -> int:
    """Supervise service `name` until it is stopped: 0. Raises `PortwayError` when it does not come up.

    Takes over what a killed supervisor of that name left, see `takeover`. Uses this process's signals and descriptors:
    call it from the main thread of a process of its own.
    """
    plan = Plan(name, given, file)
    options = plan.read()
    inherited = inherited_sockets()
    if not options.bind and inherited:
        plan.given["bind"] = [f"fd:{place},name={_label(inherited, place)}" for place in inherited if place.isdigit()]
        options = plan.read()
    close_on_exec()
    folder = service_dir(name)
    lock = Lock(folder, name)
    try:
        supervisor = Supervisor(plan, options, folder, lock)
        return _supervise(supervisor, inherited)
    finally:
        lock.close()


def _label(inherited: dict[str, int], place: str) -> str:
    names = [name for name, fd in inherited.items() if fd == inherited[place] and not name.isdigit()]
    return names[0] if names else f"fd-{place}"


def _supervise(supervisor: Supervisor, inherited: dict[str, int]) -> int:
    from .takeover import take_over
    from .upgrade import install

    taken, running = True, False  # until it is known that there is nothing to take over, nothing is touched
    try:
        taken = take_over(supervisor)
        if not taken:
            for bind in parse_binds(supervisor.options.bind):
                supervisor.groups.append(open_group(bind, supervisor.options.backlog, inherited))
        for fd in set(inherited.values()):
            os.close(fd)
        supervisor.listen()
        supervisor.signals()
        install(supervisor)
        where = ", ".join(group.address for group in supervisor.groups) or "no sockets"
        supervisor.say(f"pid {os.getpid()}, {where}")
        supervisor.first()
        running = True
        return supervisor.run()
    finally:
        keep = taken and not running
        supervisor.close(keep=keep)
        if not keep:
            supervisor.forget()
