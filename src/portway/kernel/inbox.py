"""The target's side of pushing: `HandoffInbox`, where sockets that other processes push arrive."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from .._accel import handoff as _native
from ..deadline import Deadline
from ..errors import (
    AccessDenied,
    HandoffError,
    InformationUsed,
    InvalidInformation,
    ObjectClosed,
    TooManyDescriptors,
)  # fmt: skip
from ..wire import handoff as wire
from . import reaper
from .fdpass import close_all
from .process import peer_of, uids, user_name
from .record import myself
from .restore import restore
from .session import inbox_name

__all__ = ["HandoffInbox", "open_inbox"]

MAX_SESSIONS = 256
MAX_WAITING = 4096
"""Sockets that were received and not yet asked for; beyond it the inbox stops reading and the senders wait."""
ACK_EVERY = 64
_SWEEP = 1.0  # seconds between looks for what has expired unread
_DONTWAIT = socket.MSG_DONTWAIT

_Waiting = tuple[int, bytes, list[int]]  # expires_ns, record, descriptors
_inbox: HandoffInbox | None = None


def open_inbox() -> HandoffInbox | None:
    """The inbox of this process, if it has one."""
    return _inbox


class _Line:
    """One session, as the target sees it."""

    __slots__ = ("acknowledged", "fds", "parts", "peer", "received", "size", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.peer = sock, peer_of(sock)
        self.received = self.acknowledged = 0
        self.forget_parts()

    def forget_parts(self) -> None:
        self.parts: list[bytes] = []
        self.size, self.fds = 0, list[int]()

    def acknowledge(self) -> None:
        try:
            _native.send_message(self.sock.fileno(), wire.pack_ack(self.received), [], _DONTWAIT)
            self.acknowledged = self.received
        except OSError:
            pass  # the source has ended, or reads none: either way it needs none

    def refuse(self, why: str) -> None:
        try:
            _native.send_message(self.sock.fileno(), wire.pack_refused(why), [], _DONTWAIT)
        except OSError:
            pass


class HandoffInbox:
    """Where other processes push sockets to this one; one for each process, for all its threads.

    With it `duplicate_socket` and `HandoffSession` of other processes reach this process as a message, which arrives
    even if its source ends right after. `receive`, `receive_many` and iteration give the sockets that came by
    `HandoffSession.send`, in order; those that came by ``duplicate`` wait for `socket_from` and their record.
    ``fileno()`` is readable while `receive` would not wait. Unclaimed sockets are closed when they expire and when the
    inbox closes.

    allow_uids: further users, numbers or names, that may send; else it must be ours, root included.
    Errors: `HandoffError` if the process has an inbox already, `AccessDenied` if somebody squats its name.
    """

    def __init__(self, *, allow_uids: Iterable[int | str] = ()) -> None:
        global _inbox
        self._allowed = uids(allow_uids) | {os.geteuid()}
        self._closed = False
        self._lock = threading.RLock()
        self._lines: dict[int, _Line] = {}
        self._recent: _Line | None = None  # where the last message came from: most likely the next one, too
        self._queue: deque[_Waiting] = deque()
        self._addressed: dict[bytes, tuple[wire.Claim, list[int]]] = {}
        if _inbox is not None:
            raise HandoffError("this process has a HandoffInbox already", hint="share it, or close the first")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(inbox_name(*myself()))
        except OSError as error:
            self._listener.close()
            raise AccessDenied(
                f"another process holds the inbox name of pid {os.getpid()}", hint="see `ss -xlp` for who it is"
            ) from error
        self._listener.listen(128)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rung = False
        self._ready = select.epoll()
        self._ready.register(self._listener, select.EPOLLIN)
        self._ready.register(self._bell, select.EPOLLIN)
        _inbox = self

    def fileno(self) -> int:
        """Readable while `receive` has something; for selectors and event loops."""
        self._check_open()
        return self._ready.fileno()

    @property
    def closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ObjectClosed("this HandoffInbox is closed")

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Any:
        """The next socket that was sent: a `SharedSocket` with ``unread``, ``state`` and ``information``.

        Waits `timeout` seconds, or without limit (`OperationTimeout`). The caller closes the socket.
        """
        _, record, fds = self._next(Deadline(timeout))
        return restore(record, fds)

    def receive_many(self, timeout: float | None = None) -> list[Any]:
        """All that is there, at least one: what `receive` would give, one after the other."""
        first = self._next(Deadline(timeout))
        with self._lock:
            waiting, self._queue = self._queue, deque()
            self._ring()
        fresh = [one for one in waiting if self._fresh(one[0], one[2])]
        return [restore(record, fds) for _, record, fds in (first, *fresh)]

    def __iter__(self) -> Iterator[Any]:
        """Sockets until the inbox is closed."""
        while not self._closed:
            try:
                yield self.receive()
            except ObjectClosed:
                return

    def _next(self, deadline: Deadline) -> _Waiting:
        while True:
            with self._lock:
                self._check_open()
                if not self._queue and not (self._recent and self._read(self._recent)):
                    self._pump()
                while self._queue:
                    one = self._queue.popleft()
                    if self._fresh(one[0], one[2]):
                        self._ring()
                        return one
                self._ring()
            self._wait(deadline)

    def _wait(self, deadline: Deadline) -> None:
        try:
            ready = self._ready.poll(deadline.remaining(), 1)
        except ValueError:
            raise ObjectClosed("this HandoffInbox was closed meanwhile") from None
        if not ready and deadline.expired:
            raise deadline.error("waiting for a socket to be handed over")

    def claim(self, info: wire.SocketInformation, deadline: Deadline) -> list[int]:
        """The descriptors of `info`; the caller owns them. For `socket_from`.

        They came before the record could; only an inbox that is full of others has not read them yet.
        """
        while True:
            with self._lock:
                self._check_open()
                self._pump()
                found = self._addressed.get(info.nonce)
                if found is not None:
                    self._check_claim(info, found[0])
                    return self._addressed.pop(info.nonce)[1]
                if not self._full:
                    raise InformationUsed(
                        f"this record of pid {info.source_pid} was used already, or its socket has expired",
                        hint="each duplicate_socket() makes one socket, once",
                    )
            deadline.check(f"for the {MAX_WAITING} sockets before it to be received")
            time.sleep(0.001)  # until others have taken theirs

    def _check_claim(self, info: wire.SocketInformation, claim: wire.Claim) -> None:
        if wire.digest(bytes(info)) != claim.digest:
            raise InvalidInformation(
                f"this record is not the one that pid {info.source_pid} made: tampered with",
                hint="carry the bytes unchanged",
            )

    @property
    def _full(self) -> bool:
        return len(self._queue) + len(self._addressed) >= MAX_WAITING

    def _fresh(self, expires_ns: int, fds: list[int]) -> bool:
        if expires_ns > time.monotonic_ns():
            return True
        close_all(fds)
        return False

    def _ring(self) -> None:
        """The bell is readable exactly while the queue holds something."""
        if bool(self._queue) is not self._rung:
            self._rung = not self._rung
            if self._rung:
                os.eventfd_write(self._bell, 1)
            else:
                os.eventfd_read(self._bell)

    # -- what comes from the kernel -------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Reads all that is there without waiting, up to the limit of what may lie here."""
        while not self._full:
            ready = [fd for fd, _ in self._ready.poll(0, 16) if fd != self._bell]
            if not ready:
                return
            for fd in ready:
                if fd in self._lines:
                    self._read(self._lines[fd])
                else:
                    self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        line = _Line(sock)
        why = None
        if line.peer.uid not in self._allowed:
            why = f"uid {user_name(line.peer.uid)} is not allowed; HandoffInbox(allow_uids=...) lets it in"
        elif len(self._lines) >= MAX_SESSIONS:
            why = f"{MAX_SESSIONS} sessions are open already"
        if why:
            line.refuse(why)
            sock.close()
            return
        if line.peer.uid != os.geteuid():
            line.acknowledge()  # it waits for this word
        if not self._lines:
            reaper.watch(self, None, _SWEEP, self._sweep)
        self._lines[sock.fileno()] = line
        self._ready.register(sock, select.EPOLLIN)

    def _read(self, line: _Line) -> bool:
        """One message, if there is one. It is looked at first: if this process has no room for its descriptors, it
        stays queued."""
        try:
            data, fds, flags = _native.take_message(line.sock.fileno())
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise TooManyDescriptors(
                    "no descriptor left for the sockets that wait in the inbox; nothing is lost",
                    hint="close some, or raise RLIMIT_NOFILE, and receive again",
                )
        except BlockingIOError:
            return False
        except OSError:
            data, fds = b"", []
        self._recent = line
        try:
            if not data:
                self._end(line)
            else:
                self._understand(line, data, fds)
        except InvalidInformation as error:
            close_all(fds)
            line.refuse(str(error))
            self._end(line)
        return True

    def _understand(self, line: _Line, data: bytes, fds: list[int]) -> None:
        kind = data[0]
        if kind == wire.Kind.CLAIMS:
            claims = wire.unpack_claims(data)
            for claim, own in zip(claims, _shares([claim.descriptors for claim in claims], fds), strict=True):
                self._addressed[claim.nonce] = claim, own
            line.received += len(claims)
        elif kind == wire.Kind.RECORDS:
            plain = _native.split and _native.split(data, fds, *myself(), line.peer.pid)
            if plain is not None:
                self._queue += plain
                line.received += len(plain)
            else:
                self._keep(line, [wire.SocketInformation(record) for record in wire.unpack_records(data)], fds)
        elif kind == wire.Kind.HEAD and not line.size:
            line.size, line.parts, line.fds = wire.unpack_count(data, 4), [data[5:]], fds
        elif kind == wire.Kind.REST and line.size and not fds:
            line.parts.append(data[1:])
        else:
            raise InvalidInformation(f"a message of kind {kind} out of place")
        if line.size:
            self._assemble(line)
        if line.received - line.acknowledged >= ACK_EVERY:
            line.acknowledge()

    def _assemble(self, line: _Line) -> None:
        there = sum(map(len, line.parts))
        if line.size > wire.MAX_RECORD or there > line.size:
            raise InvalidInformation(f"a record of {line.size} bytes in parts of {there}: at most {wire.MAX_RECORD}")
        if there == line.size:
            info, fds = wire.SocketInformation(b"".join(line.parts)), line.fds
            line.forget_parts()
            try:
                self._keep(line, [info], fds)
            except InvalidInformation:
                close_all(fds)
                raise

    def _keep(self, line: _Line, infos: list[wire.SocketInformation], fds: list[int]) -> None:
        for info, own in zip(infos, _shares([1 + info.head.descriptors for info in infos], fds), strict=True):
            head = info.head
            if (head.target_pid, head.target_start) != myself() or head.source_pid != line.peer.pid:
                close_all(own)  # a record for somebody else, or in somebody else's name
            else:
                self._queue.append((head.expires_ns, bytes(info), own))
        line.received += len(infos)

    def _end(self, line: _Line) -> None:
        close_all(line.fds)
        if self._recent is line:
            self._recent = None
        self._lines.pop(line.sock.fileno(), None)
        self._ready.unregister(line.sock)
        line.sock.close()

    def _sweep(self) -> float | None:
        """In the reaper: closes what has expired, read or unread, even if nobody ever asks for it."""
        if not self._lock.acquire(timeout=0):
            return _SWEEP
        try:
            if self._closed:
                return None
            try:
                self._pump()
            except (TooManyDescriptors, OSError):
                pass
            self._queue = deque(one for one in self._queue if self._fresh(one[0], one[2]))
            for nonce, (claim, fds) in list(self._addressed.items()):
                if not self._fresh(claim.expires_ns, fds):
                    del self._addressed[nonce]
            self._ring()
            return _SWEEP if self._lines or self._queue or self._addressed else None
        finally:
            self._lock.release()

    # -- closing --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes it and every socket that nobody asked for. Closing twice is fine."""
        global _inbox
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if _inbox is self:
                _inbox = None
            reaper.forget(self)
            self._close_all()

    def _close_all(self) -> None:
        for line in self._lines.values():
            close_all(line.fds)
            line.sock.close()
        for fds in (*(one[2] for one in self._queue), *(one[1] for one in self._addressed.values())):
            close_all(fds)
        self._lines.clear()
        self._recent = None
        self._queue.clear()
        self._addressed.clear()
        self._listener.close()
        self._ready.close()
        os.close(self._bell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _shares(weights: list[int], fds: list[int]) -> list[list[int]]:
    """The descriptors of a message, cut into those of each of its records."""
    if sum(weights) != len(fds):
        raise InvalidInformation(f"{len(fds)} descriptors came with records that name {sum(weights)}")
    shares, at = [], 0
    for weight in weights:
        shares.append(fds[at : at + weight])
        at += weight
    return shares


def _after_fork() -> None:
    """A child is another process: the inbox, and what lies in it, is its parent's."""
    global _inbox
    if _inbox is not None:
        _inbox._closed = True
        _inbox._close_all()
        _inbox = None


os.register_at_fork(after_in_child=_after_fork)
