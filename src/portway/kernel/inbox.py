"""The target's side of pushing: `HandoffInbox`, where sockets that other processes push arrive."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

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
from .line import Addressed, Line, Waiting
from .process import uids, user_name, within_limits
from .record import myself
from .restore import restore, restore_plain
from .session import inbox_name

__all__ = ["HandoffInbox", "open_inbox"]

MAX_SESSIONS = 256
"""Open at a time; further sources wait to be accepted."""
MAX_WAITING = 4096
"""Sockets that were received and not yet asked for; beyond it the inbox stops reading and the senders wait."""
_SWEEP = 1.0  # seconds between looks for what has expired unread
_FAIR = 64  # messages from one session before the others are looked at
_HOUR = 3600.0

_inbox: HandoffInbox | None = None
_opening = threading.Lock()
_closed_before = False


def open_inbox() -> HandoffInbox | None:
    """The inbox of this process, if it has one."""
    return _inbox


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
        self._uid = os.geteuid()
        self._allowed = uids(allow_uids) | {self._uid}
        self._closed = False
        self._lock = threading.RLock()
        self._waiters = 0
        self._lines: dict[int, Line] = {}
        self._recent: Line | None = None  # where the last message came from: most likely the next one, too
        self._streak = 0
        self._queue: deque[Waiting] = deque()
        self._addressed: Addressed = {}
        self._failure: Exception | None = None
        self._rung = False
        with _opening:
            if _inbox is not None:
                raise HandoffError("this process has a HandoffInbox already", hint="share it, or close the first")
            with within_limits("opening a HandoffInbox"):
                self._open()
            _inbox = self
        self._watch()

    def _watch(self) -> None:
        # By way of the epoll set: a poll() on the listener itself would keep its name taken after close().
        reaper.watch(self, self._ready.fileno(), _HOUR, self._first_comes)

    def _open(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        bell = -1
        try:
            self._bind()
            self._listener.listen(128)
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._ready = select.epoll()
        except BaseException:
            self._listener.close()
            if bell >= 0:
                os.close(bell)
            raise
        self._bell = bell
        self._ready.register(self._listener, select.EPOLLIN)
        self._ready.register(self._bell, select.EPOLLIN)

    def _bind(self) -> None:
        deadline = Deadline(1 if _closed_before else 0)
        while True:
            try:
                self._listener.bind(inbox_name(*myself()))
                return
            except OSError as error:
                taken = error
            if deadline.expired:
                break
            time.sleep(0.001)  # a poll() in another thread may hold the one before for a moment after its close()
        raise AccessDenied(
            f"the inbox name of pid {os.getpid()} is taken: by another process, or another interpreter of this one",
            hint="`ss -xlp` says by whom",
        ) from taken

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
        waiting = deque([self._next(Deadline(timeout))])
        with self._lock:
            if not self._closed:
                with suppress(TooManyDescriptors):  # the next call meets it again, if it still holds
                    self._pump()
            waiting += self._queue
            self._queue.clear()
            if not self._closed:
                self._ring()
        restored: list[Any] = []
        try:
            while waiting:
                restored += restore_plain(waiting)
                if waiting:
                    expires_ns, record, fds = waiting.popleft()
                    if self._fresh(expires_ns, fds):
                        restored.append(restore(record, fds))
        except Exception as error:
            if not restored:
                raise
            self._failure = error  # these come first; the next call says what became of the one after them
        finally:
            self._put_back(waiting)
        return restored

    def _put_back(self, waiting: deque[Waiting]) -> None:
        with self._lock:
            if self._closed:
                self._discard(waiting)
            else:
                self._queue.extendleft(reversed(waiting))
                self._ring()

    def __iter__(self) -> Iterator[Any]:
        """Sockets until the inbox is closed."""
        while not self._closed:
            try:
                yield self.receive()
            except ObjectClosed:
                return

    def _next(self, deadline: Deadline) -> Waiting:
        briefly = deadline.timeout != 0  # before the first wait a look at the last line will do
        while True:
            with self._lock:
                self._check_open()
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                if not self._queue:
                    self._look(briefly)
                while self._queue:
                    one = self._queue.popleft()
                    if self._fresh(one[0], one[2]):
                        self._ring()
                        return one
                self._ring()
                full = self._full
                self._waiters += 1
            briefly = False
            try:
                self._wait(deadline, full)
            finally:
                self._leave()

    def _wait(self, deadline: Deadline, full: bool) -> None:
        if full:
            time.sleep(0.001)  # with records that wait for socket_from(): there is no event for "one was claimed"
        else:
            self._ready.poll(deadline.remaining(), 1)
        if deadline.expired and not self._closed:
            raise deadline.error("waiting for a socket to be handed over")

    def _leave(self) -> None:
        with self._lock:
            self._waiters -= 1
            if self._closed and not self._waiters:
                self._release()

    def claim(self, info: wire.SocketInformation, deadline: Deadline) -> list[int]:
        """The descriptors of `info`; the caller owns them. For `socket_from`.

        They came before the record could; only an inbox that is full of others has not read them yet.
        """
        while True:
            with self._lock:
                self._check_open()
                if info.nonce not in self._addressed and self._recent is not None and not self._full:
                    self._read(self._recent)  # most likely it is the next one there
                all_read = info.nonce in self._addressed or self._pump()
                found = self._addressed.get(info.nonce)
                if found is not None:
                    self._check_claim(info, found[0])
                    return self._addressed.pop(info.nonce)[1]
                self._ring()
            if all_read:
                raise InformationUsed(
                    f"this record of pid {info.source_pid} was used already, or its socket has expired",
                    hint="each duplicate_socket() makes one socket, once",
                )
            deadline.check(f"for the {MAX_WAITING} sockets before it to be received")
            time.sleep(0.001)  # until others have taken theirs

    def _check_claim(self, info: wire.SocketInformation, claim: wire.Claim) -> None:
        if wire.proof(bytes(info)) != claim.proof:
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
        """The bell is readable exactly while `receive` has something without reading more."""
        wanted = bool(self._queue) or self._failure is not None
        if wanted is not self._rung:
            self._rung = wanted
            if wanted:
                os.eventfd_write(self._bell, 1)
            else:
                os.eventfd_read(self._bell)

    # -- what comes from the kernel -------------------------------------------------------------------------------

    def _look(self, briefly: bool) -> None:
        """For the next one: most likely it comes from where the last came from."""
        if self._recent is not None and self._streak < _FAIR and len(self._addressed) < MAX_WAITING:
            self._streak += 1
            if self._read(self._recent) or briefly:
                return
        self._streak = 0
        self._pump()

    def _pump(self) -> bool:
        """Reads what is there without waiting, up to the limit of what may lie here; whether that was all."""
        for _ in range(MAX_WAITING):
            if self._full:
                return False
            ready = [fd for fd, _ in self._ready.poll(0, 16) if fd != self._bell]
            if not ready:
                return True
            for fd in ready:
                if fd in self._lines:
                    self._read(self._lines[fd])
                else:
                    self._accept()
        return False

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyDescriptors(
                    "no descriptor left for a session that waits to be accepted; nothing is lost",
                    hint="close some, or raise RLIMIT_NOFILE, and receive again",
                ) from error
            return  # it has gone already
        sock.setblocking(False)
        line = Line(sock, self._queue, self._addressed)
        if line.peer.uid not in self._allowed:
            line.refuse(f"uid {user_name(line.peer.uid)} is not allowed; HandoffInbox(allow_uids=...) lets it in")
            line.close()
            return
        if line.peer.uid != self._uid:
            line.acknowledge()  # it waits for this word
        if not self._lines:
            reaper.watch(self, None, _SWEEP, self._sweep)
        self._lines[sock.fileno()] = line
        self._ready.register(sock, select.EPOLLIN)
        if len(self._lines) >= MAX_SESSIONS:
            self._ready.modify(self._listener, 0)

    def _read(self, line: Line) -> bool:
        there = line.read()
        if line.ended:
            self._end(line)
        elif there:
            self._recent = line
        return there

    def _end(self, line: Line) -> None:
        if self._recent is line:
            self._recent = None
        if len(self._lines) >= MAX_SESSIONS:
            self._ready.modify(self._listener, select.EPOLLIN)
        del self._lines[line.sock.fileno()]
        self._ready.unregister(line.sock)
        line.close()

    def _first_comes(self) -> None:
        """In the reaper: a source has connected to an inbox that nobody may ever look into."""
        reaper.watch(self, None, 0, self._sweep)

    def _sweep(self) -> float | None:
        """In the reaper: closes what has expired, read or unread, even if nobody ever asks for it."""
        if not self._lock.acquire(timeout=0):
            return _SWEEP
        try:
            if self._closed:
                return None
            stuck = False
            try:
                self._pump()
            except TooManyDescriptors:
                stuck = True
            fresh = [one for one in self._queue if self._fresh(one[0], one[2])]
            self._queue.clear()
            self._queue += fresh
            for nonce, (claim, fds) in list(self._addressed.items()):
                if not self._fresh(claim.expires_ns, fds):
                    del self._addressed[nonce]
            self._ring()
            if stuck or self._lines or self._queue or self._addressed or self._failure:
                return _SWEEP
            self._watch()
            return None
        finally:
            self._lock.release()

    # -- closing --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes it and every socket that nobody asked for; who waits in `receive` gets `ObjectClosed`. Closing twice
        is fine."""
        global _inbox, _closed_before
        with self._lock:
            if self._closed:
                return
            self._closed = _closed_before = True
            if _inbox is self:
                _inbox = None
            reaper.forget(self)
            self._close_all()
            if self._waiters:
                os.eventfd_write(self._bell, 1)  # they wake, see, and the last one releases it
            else:
                self._release()

    def _close_all(self) -> None:
        for line in self._lines.values():
            line.close()
        self._discard(self._queue)
        for _, fds in self._addressed.values():
            close_all(fds)
        self._lines.clear()
        self._recent = self._failure = None
        self._queue.clear()
        self._addressed.clear()
        self._listener.close()

    def _discard(self, waiting: Iterable[Waiting]) -> None:
        for _, _, fds in waiting:
            close_all(fds)

    def _release(self) -> None:
        self._ready.close()
        os.close(self._bell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _after_fork() -> None:
    """A child is another process: the inbox, and what lies in it, is its parent's."""
    global _inbox, _opening
    _opening = threading.Lock()
    if _inbox is not None:
        _inbox._lock = threading.RLock()  # a thread that does not exist here may have held it
        _inbox._closed = True
        _inbox._close_all()
        _inbox._release()
        _inbox = None


os.register_at_fork(after_in_child=_after_fork)
