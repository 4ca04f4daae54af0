"""The supervisor replaces itself: same process, same children, same sockets, other code.

A trial process of the new interpreter must read the state first. Then `execve` in place: the state travels in a memfd,
the descriptors stay open, signals wait blocked until the new code has its handlers. Run as
``python -m portway.supervise.upgrade trial|resume FD``; people use ``portway upgrade NAME``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from typing import Any

from ..errors import GenerationFailed, OperationAborted, PortwayError, SuperviseError
from .config import Options
from .control import Control, Request
from .exits import report
from .loop import Timer
from .paths import Lock
from .plan import Plan
from .report import snapshot
from .restore import go_on, load_generations, load_groups, load_plan
from .spawn import Launch, clean_environment, launch
from .supervisor import Supervisor
from .worker import Worker

__all__ = ["install"]

_TRIAL = 30.0  # seconds for the new code to read the state
_MAX_SAID = 65536


def install(supervisor: Supervisor) -> None:
    supervisor.hooks["upgrade"] = lambda request: _Upgrade(supervisor, request).begin()


class _Upgrade:
    """One request to upgrade, from the trial to exec."""

    def __init__(self, supervisor: Supervisor, request: Request) -> None:
        self.supervisor = supervisor
        self.request = request
        python = request.message.get("python")
        self.python = os.path.abspath(python) if isinstance(python, str) and python else sys.executable
        self.said = b""
        self.pipe = -1
        self.pid = 0
        self.timer: Timer | None = None

    def _busy(self) -> None:
        if self.supervisor.stopping:
            raise OperationAborted(f"{self.supervisor.options.name} is stopping")
        if self.supervisor.rising is not None:
            raise SuperviseError(
                f"{self.supervisor.options.name}: generation {self.supervisor.rising.number} is starting",
                hint="upgrade once it serves",
            )

    def begin(self) -> None:
        self._busy()
        state = _memfd(self._state())
        self.pipe, write = os.pipe()
        command = [self.python, "-P", "-m", "portway.supervise.upgrade", "trial"]
        try:
            environ = clean_environment()
            self.pid = launch(Launch(command, extra={"PORTWAY_STATE": state}, environ=environ, stdout=write))
        except PortwayError:
            os.close(self.pipe)
            raise
        finally:
            os.close(write)
            os.close(state)
        self.request.event(f"trying {self.python}")
        self.supervisor.loop.watch(self.pipe, self._on_said)
        self.timer = self.supervisor.loop.after(_TRIAL, self._late)

    def _late(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # not waited for yet: its end would have cancelled this

    def _on_said(self) -> None:
        data = os.read(self.pipe, 65536)
        self.said = (self.said + data)[-_MAX_SAID:]
        if data:
            return
        self.supervisor.loop.forget(self.pipe)
        os.close(self.pipe)
        if self.timer is not None:
            self.timer.cancel()
        try:
            lines = self.said.decode(errors="replace").splitlines()
            if not lines or not lines[-1].startswith("OK "):
                refused = GenerationFailed(f"{self.python}: cannot take over the supervisor; nothing has changed")
                refused.add_note("\n".join(lines[-20:]) or "(it said nothing)")
                raise refused
            self._busy()
            self._exec()
        except PortwayError as error:
            self.request.fail(error)

    def _state(self) -> dict[str, Any]:
        return snapshot(self.supervisor) | {"request": self.request.sock.fileno()}

    def _exec(self) -> None:
        supervisor = self.supervisor
        if supervisor.tail is not None:
            supervisor.tail.flush()
        state = _add_descriptors(supervisor, self._state())
        fds = [fd for fd in _descriptors(state) if fd >= 0]
        memory = _memfd(state)
        arguments = [self.python, "-P", "-m", "portway.supervise.upgrade", "resume", str(memory)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for fd in [*fds, memory]:
                os.set_inheritable(fd, True)
            os.execve(self.python, arguments, os.environ)
        except OSError as error:
            for fd in fds:
                os.set_inheritable(fd, False)
            os.close(memory)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise SuperviseError(f"{self.python}: {error.strerror}; nothing has changed") from error


def _memfd(state: dict[str, Any]) -> int:
    fd = os.memfd_create("portway-state", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(state).encode())
    return fd


def _add_descriptors(supervisor: Supervisor, state: dict[str, Any]) -> dict[str, Any]:
    """`report.snapshot` names processes and inodes; we go on with the descriptors themselves."""
    assert supervisor.control is not None
    state["lock"], state["control"] = supervisor.lock.fd, supervisor.control.sock.fileno()
    state["folder"] = supervisor.folder
    state["notifier"] = [supervisor.notifier.path, supervisor.notifier.period]
    for generation, record in zip(supervisor.generations, state["generations"], strict=True):
        if generation.inbox is not None:
            record["inbox"] = [end.fileno() for end in generation.inbox]
        for worker, one in zip(generation.workers, record["workers"], strict=True):
            one["fds"] = [worker.line.fileno() if worker.line else -1, worker.notify.fileno() if worker.notify else -1,
                          worker.pidfd.fileno() if worker.pidfd else -1]  # fmt: skip
            one["backoff"] = worker.backoff
    return state


def _descriptors(state: dict[str, Any]) -> list[int]:
    found = [state["lock"], state["control"], state["request"]]
    found += [member["fd"] for group in state["groups"] for member in group["members"]]
    for generation in state["generations"]:
        found += generation.get("inbox", ())
        for worker in generation["workers"]:
            found += worker["fds"]
    return found


def _read(fd: int) -> dict[str, Any]:
    with open(f"/proc/self/fd/{fd}", "rb") as file:  # an offset of its own
        state = json.load(file)
    if not isinstance(state, dict) or state.get("version") != 1:
        raise SuperviseError(f"state version {state.get('version') if isinstance(state, dict) else None}: we read 1")
    return state


def _trial() -> int:
    """The new code, in a process of its own: can it read this state?"""
    from .. import __version__

    state = _read(int(os.environ["PORTWAY_STATE"]))
    plan = Plan(**load_plan(state))
    Options.load(state["options"])
    plan.read()
    print(f"OK {__version__}")
    return 0


def _resume(memory: int) -> int:
    """The new code, in the supervisor's process: go on."""
    state = _read(memory)
    os.close(memory)
    for fd in _descriptors(state):
        if fd >= 0:
            os.set_inheritable(fd, False)
    plan = Plan(**load_plan(state))
    lock = Lock(state["folder"], plan.name, fd=state["lock"])
    supervisor = Supervisor(plan, Options.load(state["options"]), state["folder"], lock)
    supervisor.notifier.load(*state["notifier"])
    load_groups(supervisor, state, lambda record: socket.socket(fileno=record["fd"]))
    load_generations(supervisor, state, lambda worker, record: _attach(supervisor, worker, record))
    supervisor.control = Control(supervisor.loop, socket.socket(fileno=state["control"]), supervisor.serve)
    supervisor.signals()
    install(supervisor)
    for name, at in state["output"].items():
        if supervisor.tail is not None:
            generation, worker = (int(part) for part in name.split(".")[:2])
            supervisor.tail.follow(generation, worker, at)
    go_on(supervisor, state)
    supervisor.save()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    supervisor.reap()
    _welcome(supervisor, state["request"])
    return _run(supervisor, lock)


def _attach(supervisor: Supervisor, worker: Worker, record: dict[str, Any]) -> bool:
    from ..kernel.process import Pidfd

    worker.pid, worker.start, worker.orphan = record["pid"], record["start"], record["orphan"]
    worker.backoff = record["backoff"]
    line, notify, pidfd = record["fds"]
    worker.line = socket.socket(fileno=line) if line >= 0 else None
    worker.notify = socket.socket(fileno=notify) if notify >= 0 else None
    if pidfd >= 0:
        worker.pidfd = Pidfd(worker.pid)
        os.close(pidfd)
    worker.watch(supervisor.loop)
    return True


def _welcome(supervisor: Supervisor, request: int) -> None:
    from .. import __version__

    for generation in supervisor.generations:
        for worker in generation.workers:
            if worker.orphan:
                supervisor.watch_orphan(generation, worker)
        supervisor.restart_missing(generation)
    supervisor.say(f"upgraded in place: portway {__version__} on {sys.executable} (pid {os.getpid()})")
    if fcntl.fcntl(request, fcntl.F_GETFD) >= 0 and supervisor.control is not None:
        client = supervisor.control.adopt(socket.socket(fileno=request))
        client.verb = "upgrade"
        client.done(version=__version__, python=sys.executable, pid=os.getpid())


def _run(supervisor: Supervisor, lock: Lock) -> int:
    try:
        return supervisor.run()
    finally:
        supervisor.close()
        supervisor.forget()
        lock.close()


def main(arguments: list[str]) -> int:
    try:
        return _trial() if arguments[:1] == ["trial"] else _resume(int(arguments[1]))
    except PortwayError as error:
        return report(error, False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
