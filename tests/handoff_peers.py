"""Real processes for the hand-over tests: clean ones, related to nobody, that run lines of Python when told.

A *zygote* is executed once a session, imports portway, and forks a `Peer` on request in a millisecond. A peer holds no
descriptor of the test and none of another peer; it ends when its line to the test ends, however the test ends.
"""

from __future__ import annotations

import ast
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT = 40.0  # seconds; a peer that says nothing for so long hangs


def patiently(condition: Any, seconds: float = 15.0) -> Any:
    """Polls until `condition()` is true, and returns that; AssertionError when it never is."""
    from portway.deadline import Deadline

    deadline, pause = Deadline(seconds), Deadline(0.002)
    while not (seen := condition()):
        assert not deadline.expired, f"still not after {seconds} s: {condition}"
        signal.sigtimedwait((), pause.timeout)
    return seen


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """What a process has open: number -> what it is."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return {number: what for number, what in found.items() if not what.endswith(f"/{pid}/fd") and "/proc/" not in what}


class Peer:
    """One process. ``run`` executes Python there and gives back the value of the last expression; what it raises
    there is raised here. Names stay defined from one call to the next."""

    def __init__(self, line: Connection, pid: int) -> None:
        self._line, self.pid = line, pid
        self._killed = False
        self._pidfd = os.pidfd_open(pid)

    def run(self, code: str, **names: Any) -> Any:
        self.start(code, **names)
        return self.result()

    def start(self, code: str, **names: Any) -> None:
        """`run` without waiting; `result` waits."""
        self._line.send((code, names))

    def result(self, timeout: float = LIMIT) -> Any:
        assert self._line.poll(timeout), f"peer {self.pid} says nothing"
        good, value = self._line.recv()
        if not good:
            raise value
        return value

    def give(self, **socks: socket.socket) -> None:
        """Hands sockets over under names; here they are closed."""
        for name, sock in socks.items():
            self._line.send(("", {"": (name, sock.__class__ is socket.socket)}))
            with socket.socket(fileno=os.dup(self._line.fileno())) as line:
                socket.send_fds(line, [b"x"], [sock.fileno()])
            self.result()
            sock.close()

    def descriptors(self) -> dict[int, str]:
        return descriptors(self.pid)

    def kill(self) -> None:
        """SIGKILL, and returns when it is gone."""
        if not self._killed:  # later its number may be another's
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            gone = select.poll()  # told when the last thread has closed everything, not the first
            gone.register(self._pidfd, select.POLLIN)
            assert gone.poll(LIMIT * 1000), f"peer {self.pid} survives SIGKILL"
            self._killed = True

    def close(self) -> None:
        if self._pidfd >= 0:
            self.kill()
            os.close(self._pidfd)
            self._pidfd = -1
            self._line.close()


class Zygote:
    """Forks peers; `close` ends it."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(HERE)}, start_new_session=True,
            )  # fmt: skip

    def peer(self, uid: int | None = None) -> Peer:
        """A new process, of user `uid` if that is given (the test must be root then)."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._line, [str(-1 if uid is None else uid).encode()], [theirs.fileno()])
        pid = int(self._line.recv(32))
        made = Peer(Connection(ours.detach()), pid)
        made.run("")  # now it has closed what it had from the zygote
        return made

    def close(self) -> None:
        self._line.close()
        self._process.wait(LIMIT)


def _evaluate(code: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<peer>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<peer>", "eval"), names) if last is not None else None


def _live(line: Connection, names: dict[str, Any]) -> None:
    while True:
        try:
            code, more = line.recv()
        except (EOFError, OSError):
            os._exit(0)
        if "" in more:
            with socket.socket(fileno=os.dup(line.fileno())) as raw:
                fds = socket.recv_fds(raw, 1, 1)[1]
            names[more[""][0]] = socket.socket(fileno=fds[0])
            os.set_inheritable(fds[0], False)
            line.send((True, None))
            continue
        try:
            names.update(more)
            value = _evaluate(code, names)
            line.send((True, value if not isinstance(value, socket.socket) else None))
        except BaseException as error:
            line.send((False, _portable(error)))


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def _names() -> dict[str, Any]:
    """What peers find defined; all imported before a uid that may not read this installation is taken."""
    import asyncio
    import ctypes
    import encodings.idna
    import hashlib
    import resource
    import select
    import threading
    import time

    import psutil

    import portway
    from portway import _accel, aio, errors
    from portway.kernel import fdpass, framing, handoff, inbox, offer, pipe_identity, process, session

    hashlib.blake2b(b"")
    for module in (portway, aio):
        for name in module.__all__:
            getattr(module, name)
    return {
        "os": os, "socket": socket, "signal": signal, "portway": portway, "errors": errors, "aio": aio, "time": time,
        "asyncio": asyncio, "threading": threading, "select": select, "resource": resource, "ctypes": ctypes,
        "fdpass": fdpass, "process": process, "inbox": inbox, "offer": offer, "session": session, "sys": sys,
        "framing": framing, "handoff": handoff, "descriptors": descriptors, "patiently": patiently, "idna": encodings,
        "also": (psutil, _accel.identity), "pipe_identity": pipe_identity,
    }  # fmt: skip


def _zygote(control: socket.socket) -> None:
    names = _names()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        request, fds, _, _ = socket.recv_fds(control, 32, 1)
        if not request:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            os.set_inheritable(fds[0], False)
            if int(request) >= 0:
                _become(int(request))
            _live(Connection(fds[0]), names)
        os.close(fds[0])
        control.send(str(pid).encode())


if __name__ == "__main__":
    sys.modules["handoff_peers"] = sys.modules["__main__"]
    _zygote(socket.socket(fileno=int(sys.argv[1])))
