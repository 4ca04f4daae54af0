"""One process of a generation: its pid, its line to the supervisor, its notify socket. The contract with the process
is docs/explanation/worker-contract.md."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from ..errors import ProcessNotFound
from ..kernel.process import Pidfd, start_time
from .loop import Loop, Timer

__all__ = ["Worker"]

_MAX_PACKET = 65536
_STATUS_TEXT = 500


class Worker:
    """Owns our end of the control line and the notify socket; close() ends both. ``pid`` is 0 while none runs."""

    def __init__(self, generation: int, index: int) -> None:
        self.generation = generation
        self.index = index
        self.pid = 0
        self.start = 0  # clock ticks since boot; with the pid it names the process for good
        self.since = 0.0  # monotonic
        self.restarts = 0
        self.backoff = 0.1
        self.ready = False
        self.hook = False
        self.adopts = False  # reads its generation's inbox: connections may be sent there
        self.drained = False
        self.ordered = False  # told to drain or stop, or sent a signal: its end is no crash
        self.killed = False
        self.orphan = False  # the child of a supervisor that was killed
        self.saved = (False, False, False)  # hook and drained, as the state file has them
        self.connections: int | None = None
        self.text = ""
        self.line: socket.socket | None = None
        self.line_inode = 0
        self.notify: socket.socket | None = None
        self.notify_name = ""
        self.ready_pipe = -1
        self.pidfd: Pidfd | None = None
        self.beat: Timer | None = None
        self.last_beat = 0.0
        self.beats = False  # has fed the watchdog once
        self.uids: frozenset[int] = frozenset((0, os.geteuid()))
        self.on_change: Callable[[Worker], None] = lambda worker: None

    @property
    def alive(self) -> bool:
        return self.pid > 0

    def prepare(self, loop: Loop, *, ready_fd: bool) -> tuple[dict[str, int], list[int]]:
        """New line and sockets for a new process: (descriptors by environment key, those to close after the start)."""
        self.close(loop)
        self.ready = self.hook = self.adopts = self.drained = self.ordered = self.killed = self.beats = False
        self.connections, self.text = None, ""
        self.open_notify(f"\0portway/{os.geteuid()}/{secrets.token_hex(12)}")
        write = -1
        if ready_fd:
            self.ready_pipe, write = os.pipe()
            os.set_blocking(self.ready_pipe, False)
        try:
            self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            if ready_fd:
                os.close(write)
            raise
        self.line.setblocking(False)
        self.line_inode = os.fstat(self.line.fileno()).st_ino
        extra = {"PORTWAY_CONTROL": theirs.fileno(), "PORTWAY_CONTROL_PEER": self.line.fileno()}
        mine = [theirs.detach()]
        if ready_fd:
            extra["PORTWAY_READY_FD"] = write
            mine.append(write)
        self.watch(loop)
        return extra, mine

    def open_notify(self, name: str) -> None:
        """An abstract name: a worker under another uid cannot enter our folder. SO_PASSCRED tells who writes."""
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notify.bind(name)
        self.notify.setblocking(False)
        self.notify_name = name

    def watch(self, loop: Loop) -> None:
        if self.line is not None:
            loop.watch(self.line, lambda: self._on_line(loop))
        if self.notify is not None:
            loop.watch(self.notify, self._on_notify)
        if self.ready_pipe >= 0:
            loop.watch(self.ready_pipe, lambda: self._on_ready_pipe(loop))

    def started(self, pid: int) -> None:
        self.pid = pid
        try:
            self.start = start_time(pid)
        except ProcessNotFound:
            self.start = 0  # it has ended already; we hear of it by SIGCHLD
        self.since = self.last_beat = time.monotonic()

    def ended(self) -> None:
        self.pid = 0
        if self.pidfd is not None:
            self.pidfd.close()
            self.pidfd = None

    # -- what the process says

    def _on_line(self, loop: Loop) -> None:
        if self.line is None:
            return
        try:
            data, fds, flags, _ = socket.recv_fds(self.line, _MAX_PACKET, 16)
        except (BlockingIOError, ConnectionResetError):
            return
        for fd in fds:
            os.close(fd)  # nothing we know comes with one
        if not data:
            loop.forget(self.line)
            return
        if not flags & socket.MSG_TRUNC:
            self.obey(data)

    def obey(self, data: bytes) -> None:
        """One packet of the control line. What is no object, or no verb we know, is ignored."""
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        verb = message.get("verb")
        if verb == "hello":
            self.hook = message.get("hook") == 1
            self.adopts = message.get("adopts") is True
        elif verb == "ready":
            self.ready = True
        elif verb == "drained":
            self.drained = True
        elif verb == "status":
            count = message.get("connections")
            self.connections = count if isinstance(count, int) and not isinstance(count, bool) else None
            self.text = str(message.get("text", ""))[:_STATUS_TEXT]
        else:
            return
        self.on_change(self)

    def _on_notify(self) -> None:
        if self.notify is None:
            return
        try:
            data, ancillary, _, _ = self.notify.recvmsg(_MAX_PACKET, 4096, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        uid = -1
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                for fd in memoryview(body[: len(body) & ~3]).cast("i"):
                    os.close(fd)  # BARRIER=1: closing it is the answer
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                uid = struct.unpack("iII", body[:12])[1]
        if uid in self.uids:
            self.notified(data)

    def notified(self, data: bytes) -> None:
        """sd_notify(3): KEY=VALUE lines."""
        for line in data.decode(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key == "READY" and value == "1":
                self.ready = True
            elif key == "STATUS":
                self.text = value[:_STATUS_TEXT]
            elif key == "WATCHDOG" and value == "1":
                self.beats = True
                self.last_beat = time.monotonic()
            elif key == "WATCHDOG" and value == "trigger":
                self.beats, self.last_beat = True, 0.0
        self.on_change(self)

    def _on_ready_pipe(self, loop: Loop) -> None:
        try:
            data = os.read(self.ready_pipe, 4096)
        except BlockingIOError:
            return
        if b"\n" in data:
            self.ready = True
        if self.ready or not data:
            loop.forget(self.ready_pipe)
            os.close(self.ready_pipe)
            self.ready_pipe = -1
            self.on_change(self)

    # -- what we say

    def tell(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> bool:
        """False when the line is broken or full: a signal must do."""
        if self.line is None:
            return False
        try:
            socket.send_fds(self.line, [json.dumps(message).encode()], list(fds), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def signal(self, number: int, *, group: bool = False) -> None:
        """To the process, or to its whole group; never to one that took its pid since."""
        if not self.alive:
            return
        self.ordered = True
        self.killed = self.killed or number == signal.SIGKILL
        try:
            if self.orphan and self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd.fileno(), number)  # not our child: only the pidfd is sure
                if not group:
                    return
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def close(self, loop: Loop) -> None:
        for sock in (self.line, self.notify):
            if sock is not None:
                loop.forget(sock)
                sock.close()
        self.line = self.notify = None
        if self.ready_pipe >= 0:
            loop.forget(self.ready_pipe)
            os.close(self.ready_pipe)
            self.ready_pipe = -1
        if self.pidfd is not None:
            loop.forget(self.pidfd)
            self.pidfd.close()
            self.pidfd = None
