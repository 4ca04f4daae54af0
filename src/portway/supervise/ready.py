"""When a generation counts as ready: one sign of readiness each, asked again until it is there."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from . import proc
from .listeners import Group, Listener
from .loop import Loop
from .reuseport import TcpGroup
from .sockets import UnixGroup
from .worker import Worker

__all__ = ["HttpProbe", "not_accepting"]


def not_accepting(workers: list[Worker], sockets: Mapping[str, Listener]) -> str | None:
    """What still has to wait on what; None when every worker's processes wait on every socket."""
    wanted = {listener.inode: name for name, listener in sockets.items()}
    processes = proc.table()
    for worker in workers:
        left = set(wanted)
        for pid in proc.members(worker.pid, processes):
            left -= proc.accepting(pid, left) if left else set()
        if left:
            names = ", ".join(sorted(wanted[inode] for inode in left))
            return f"worker {worker.index} (pid {worker.pid}) does not accept on {names}"
    return None


class HttpProbe:
    """GETs a path from one generation until it answers 2xx or 3xx: over TCP from a source port that the group steers to
    that generation, over Unix at the path its socket has before the rename. The generation owns and closes it."""

    TRY = 5.0  # seconds for one answer
    PAUSE = 0.1
    _HEAD = 65536

    def __init__(self, loop: Loop, group: Group, listener: Listener, path: str) -> None:
        self._loop = loop
        self._group = group
        self._listener = listener
        self._path = path
        self._sock: socket.socket | None = None
        self._answer = b""
        self._until = 0.0
        self.last = "no answer yet"
        self.ok = False
        self._next = 0.0

    def check(self) -> None:
        """Called every few milliseconds: begin, or give up, one try."""
        now = time.monotonic()
        if self.ok:
            return
        if self._sock is not None and now > self._until:
            self._end(f"no answer within {self.TRY:g} s")
        if self._sock is None and now >= self._next:
            self._begin(now)

    def _begin(self, now: float) -> None:
        self._until, self._answer = now + self.TRY, b""
        try:
            self._sock, target = self._aim()
            self._sock.setblocking(False)
            code = self._sock.connect_ex(target)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except OSError as error:
            self._end(f"connect: {error.strerror}")
            return
        self._loop.watch(self._sock, self._on_connected, write=True)

    def _aim(self) -> tuple[socket.socket, Any]:
        if isinstance(self._group, UnixGroup):
            return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), self._listener.path or self._group.bind.path
        assert isinstance(self._group, TcpGroup)
        host, port = self._group.sockaddr[0], self._group.sockaddr[1]
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        sock = socket.socket(self._group.family, socket.SOCK_STREAM)
        sock.bind((local, 0))
        self._group.probe(self._listener, sock.getsockname()[1])
        return sock, (local, port, *self._group.sockaddr[2:])

    def _on_connected(self) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._end(f"connect: {os.strerror(code)}")
            return
        self._loop.forget(self._sock)
        request = f"GET {self._path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: portway\r\nConnection: close\r\n\r\n"
        try:
            self._sock.send(request.encode())  # far below an empty socket's buffer
        except OSError as error:
            self._end(f"send: {error.strerror}")
            return
        self._loop.watch(self._sock, self._on_answer)

    def _on_answer(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(4096)
        except OSError as error:
            self._end(f"receive: {error.strerror}")
            return
        self._answer += data
        head, line_end, _ = self._answer.partition(b"\r\n")
        if line_end:
            words = head.split()
            good = len(words) >= 2 and words[0].startswith(b"HTTP/1.") and words[1][:1] in (b"2", b"3")
            self.ok = good
            self._end("ready" if good else f"answered {head[:80].decode(errors='replace')}")
        elif not data or len(self._answer) > self._HEAD:
            self._end("closed the connection without an answer")

    def _end(self, said: str) -> None:
        self.last = said
        self._next = time.monotonic() + self.PAUSE
        self.close()

    def close(self) -> None:
        if self._sock is not None:
            self._loop.forget(self._sock)
            self._sock.close()
            self._sock = None
            if isinstance(self._group, TcpGroup):
                self._group.probe(self._listener, None)
