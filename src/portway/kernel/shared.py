"""`SharedSocket`: a socket whose open file description another process uses too.

O_NONBLOCK belongs to the description, not to the process: one side's ``settimeout`` makes the other's blocking
``recv`` raise EAGAIN, one side's ``setblocking(True)`` makes the other's non-blocking ``recv`` wait for ever. A
SharedSocket asks the kernel not to wait in each call (MSG_DONTWAIT) and waits in poll(), so it behaves the same
whatever the flag says. It never clears the flag.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from .._accel import handoff as _native
from ..deadline import Deadline
from ..wire.handoff import SocketInformation

__all__ = ["SharedSocket"]

_DONTWAIT = socket.MSG_DONTWAIT
_IN, _OUT = select.POLLIN, select.POLLOUT


class SharedSocket(socket.socket):
    """A `socket.socket` that keeps its promises while another process uses the same connection.

    Timeouts, blocking and non-blocking mode are this object's own (`settimeout`, `gettimeout`), independent of the
    shared O_NONBLOCK. ``close()`` closes this process's descriptor only and never shuts the connection down; it ends
    when the last descriptor is closed, or at once by ``shutdown()``, which is everybody's. From `portway.socket_from`,
    or `SharedSocket.adopt` for a socket this process has already.

    accept() and connect() have no such flag in the kernel: they set O_NONBLOCK, which a plain blocking socket on the
    other side notices. Code that reads the bare descriptor (``os.read``, C libraries) sees the flag as it is.
    """

    __slots__ = ("_mode", "_record")

    _mode: float | None
    _record: bytes | None

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, type, proto, fileno)
        self._mode = super().gettimeout()
        if self._mode:  # socket.setdefaulttimeout(): the base class must not wait on its own
            super().settimeout(0)
        self._record = None

    @property
    def information(self) -> SocketInformation | None:
        """The record this socket came from; None for an adopted one."""
        return None if self._record is None else SocketInformation(self._record)

    @property
    def unread(self) -> bytes:
        """Bytes the source had read and not consumed: they come before anything recv() gives."""
        return b"" if self._record is None else SocketInformation(self._record).unread

    @property
    def state(self) -> bytes:
        """State of the layers above, as the source gave it."""
        return b"" if self._record is None else SocketInformation(self._record).state

    @classmethod
    def adopt(cls, sock: socket.socket) -> Self:
        """Takes the descriptor over from `sock`, which is closed by it, with its timeout and the flag as they are."""
        timeout = sock.gettimeout()
        shared = cls(sock.family, sock.type, sock.proto, fileno=sock.detach())
        shared._mode = timeout
        return shared

    # -- mode -----------------------------------------------------------------------------------------------------

    def settimeout(self, value: float | None, /) -> None:
        """Seconds, None to wait without limit, 0 not to wait. Only 0 touches the shared flag, and only to set it."""
        if value is not None:
            Deadline(value)  # refuses what is no number of seconds
        if value == 0:
            self._set_nonblock()
        self._mode = None if value is None else float(value)

    def setblocking(self, flag: bool, /) -> None:
        self.settimeout(None if flag else 0.0)

    def gettimeout(self) -> float | None:
        return self._mode

    def getblocking(self) -> bool:
        return self._mode != 0

    @property
    def timeout(self) -> float | None:
        return self._mode

    def _set_nonblock(self) -> None:
        flags = fcntl.fcntl(self.fileno(), fcntl.F_GETFL)
        if not flags & os.O_NONBLOCK:
            fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)

    def _retry(self, events: int, call: Callable[[], Any]) -> Any:
        """Until `call` no longer says EAGAIN; waits in poll(), never in the call."""
        deadline = None
        while True:
            try:
                return call()
            except BlockingIOError:
                if self._mode == 0:
                    raise
            deadline = deadline or Deadline(self._mode)
            self._wait(events, deadline)

    def _wait(self, events: int, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self.fileno(), events)
        if not poll.poll(deadline.poll_ms()):
            raise TimeoutError("timed out")

    # -- receiving ------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        try:  # the common case without a closure
            return super().recv(bufsize, flags | _DONTWAIT)
        except BlockingIOError:
            receive = super().recv
        result: bytes = self._retry(_IN, lambda: receive(bufsize, flags | _DONTWAIT))
        return result

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        receive = super().recv_into
        result: int = self._retry(_IN, lambda: receive(buffer, nbytes, flags | _DONTWAIT))
        return result

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        receive = super().recvfrom
        result: tuple[bytes, Any] = self._retry(_IN, lambda: receive(bufsize, flags | _DONTWAIT))
        return result

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        receive = super().recvfrom_into
        result: tuple[int, Any] = self._retry(_IN, lambda: receive(buffer, nbytes, flags | _DONTWAIT))
        return result

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        receive = super().recvmsg
        return self._retry(_IN, lambda: receive(bufsize, ancbufsize, flags | _DONTWAIT))

    def recvmsg_into(self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0, /) -> Any:
        receive, kept = super().recvmsg_into, list(buffers)
        return self._retry(_IN, lambda: receive(kept, ancbufsize, flags | _DONTWAIT))

    # -- sending --------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0, /) -> int:
        try:
            return super().send(data, flags | _DONTWAIT)
        except BlockingIOError:
            send = super().send
        result: int = self._retry(_OUT, lambda: send(data, flags | _DONTWAIT))
        return result

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """All of `data`, within one timeout. What was sent before an error or a timeout is sent."""
        deadline, send = Deadline(self._mode), super().send
        with memoryview(data) as whole, whole.cast("B") as view:
            at, last = 0, False
            while not last:
                try:
                    at += send(view[at:], flags | _DONTWAIT)  # once for an empty datagram, too
                    last = at == len(view)
                except BlockingIOError:
                    if self._mode == 0:
                        raise
                    self._wait(_OUT, deadline)

    def sendto(self, data: Any, *args: Any) -> int:
        flags, address = (0, args[0]) if len(args) == 1 else args
        send = super().sendto
        result: int = self._retry(_OUT, lambda: send(data, flags | _DONTWAIT, address))
        return result

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Any] = (), flags: int = 0, address: Any = None, /
    ) -> int:
        send, kept, extra = super().sendmsg, list(buffers), list(ancdata)
        result: int = self._retry(_OUT, lambda: send(kept, extra, flags | _DONTWAIT, address))
        return result

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """By read() and send(): the kernel's sendfile would wait or not as the shared flag says."""
        sent: int = self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined]
        return sent

    # -- accepting and connecting ---------------------------------------------------------------------------------

    def accept(self) -> tuple[socket.socket, Any]:
        """(socket, address); the socket is a plain one, nobody shares it."""

        def take() -> tuple[int, Any]:
            if self._mode != 0 and not _native.readable(self.fileno()):
                raise BlockingIOError(errno.EAGAIN, "no connection waits")  # nobody may clear the flag under a wait
            self._set_nonblock()
            accepted: tuple[int, Any] = self._accept()  # type: ignore[attr-defined]
            return accepted

        fd, address = self._retry(_IN, take)
        return socket.socket(self.family, self.type, self.proto, fileno=fd), address

    def connect(self, address: Any, /) -> None:
        code = self.connect_ex(address)
        if code:
            raise TimeoutError("timed out") if code == errno.ETIMEDOUT else OSError(code, os.strerror(code))

    def connect_ex(self, address: Any, /) -> int:
        self._set_nonblock()
        deadline = Deadline(self._mode)
        code = super().connect_ex(address)
        while code == errno.EAGAIN and self._mode != 0:  # a Unix listener with a full queue: there is no event for it
            if deadline.expired:
                return errno.ETIMEDOUT
            time.sleep(0.001)
            code = super().connect_ex(address)
        if code == errno.EINPROGRESS and self._mode != 0:
            try:
                self._wait(_OUT, deadline)
            except TimeoutError:
                return errno.ETIMEDOUT
            code = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return code

    def dup(self) -> SharedSocket:
        """Another descriptor in this process, with this one's mode and record."""
        fd = fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
        other = SharedSocket(self.family, self.type, self.proto, fileno=fd)
        other._mode, other._record = self._mode, self._record
        return other
