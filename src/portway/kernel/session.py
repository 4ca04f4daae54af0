"""The source's side of pushing: `HandoffSession`, a line to the inbox that the target opened.

Who the target is (pid, start time, uid) is checked once, when the session opens; a pidfd then says whether that very
process still lives. A socket that was sent arrives even if the source ends right after.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from .._accel import handoff as _native
from ..deadline import Deadline
from ..errors import AccessDenied, HandoffError, HandoffRefused, ObjectClosed, ProcessNotFound
from ..provider import Handoff
from ..wire import handoff as wire
from .fdpass import MAX_DESCRIPTORS, poll_for
from .process import Pidfd, peer_of, start_time, uid_of, uids, user_name, within_limits
from .record import KEEP, Draft, Keep, check_seconds, draft, myself, nonces
from .shared import SharedSocket

__all__ = ["HandoffSession", "inbox_name"]

MAX_MESSAGE = 60_000
"""Bytes in one message of a session; well under the default send buffer (net.core.wmem_default, 212,992)."""
_PLAIN = (socket.socket, SharedSocket)
_QUEUED = int(wire.Flag.QUEUED)
_open: weakref.WeakSet[HandoffSession] = weakref.WeakSet()
WINDOW = 512
"""Sockets sent and not yet acknowledged; beyond it the sender waits for the target."""


def inbox_name(pid: int, started: int) -> str:
    """Abstract (no file, gone with the process): nobody but that process can own this name for long, and whoever
    does is checked by SO_PEERCRED."""
    return f"\0portway/handoff/1/{pid}/{started}"


class HandoffSession:
    """An open line to process `pid`, which must have opened a `HandoffInbox`.

    `send` and `send_many` deliver sockets to the target's `HandoffInbox.receive`; `duplicate` and `duplicate_many`
    give records that travel by any other way, for the target's `socket_from`. All keep the caller's sockets open;
    close them when you like, the connections live. Thread-safe; `close` or leave ``with`` to end it. In a forked child
    it is closed: a child is another process and opens its own.

    allow_uids: further users, numbers or names, that the target may belong to; else it must be ours, root included.
    expires: seconds that a record stays valid. timeout: seconds that connecting, and each call, may wait for the target
    (`OperationTimeout`). start_time: what `portway.kernel.process.start_time` said, to be sure of the very process.
    Errors: `ProcessNotFound`, `AccessDenied`, `HandoffRefused` (no inbox there, or closed), `UnsupportedSocket`.
    """

    def __init__(
        self, pid: int, *, allow_uids: Iterable[int | str] = (), expires: float = 30.0, timeout: float | None = 5.0,
        start_time: int | None = None,
    ) -> None:  # fmt: skip
        self.pid, self.expires, self.timeout = pid, check_seconds("expires", expires), timeout
        self._sent = self._acknowledged = 0
        self._me, self._uid = myself(), os.geteuid()
        self._lock = threading.Lock()
        self._process = Pidfd(pid)
        try:
            with within_limits(f"a session to pid {pid}"):
                self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except BaseException:
            self._process.close()
            raise
        _open.add(self)
        try:
            self._start = check_target(pid, uids(allow_uids), start_time)
            self._line.setblocking(False)
            self._connect(Deadline(timeout))
        except BaseException:
            self.close()
            raise

    def _connect(self, deadline: Deadline) -> None:
        name = inbox_name(self.pid, self._start)
        while True:
            try:
                self._line.connect(name)
                break
            except ConnectionRefusedError:
                raise HandoffRefused(
                    f"pid {self.pid} has no open HandoffInbox", hint="open one there, or duplicate by process id"
                ) from None
            except BlockingIOError:  # its backlog is full, and the kernel has no event for that
                deadline.check(f"connecting to the inbox of pid {self.pid}")
                time.sleep(0.001)
        owner = peer_of(self._line)
        if owner.pid != self.pid:
            raise AccessDenied(
                f"the inbox name of pid {self.pid} is held by pid {owner.pid} of uid {user_name(owner.uid)}",
                hint="find out who that is; duplicate by process id meanwhile",
            )
        if owner.uid != os.geteuid():
            self._read_acknowledgement(deadline)  # another user's inbox says first whether it lets us in

    # -- sending --------------------------------------------------------------------------------------------------

    def send(self, sock: Any, *, unread: bytes = b"", state: bytes = b"", timeout: float | Keep | None = KEEP) -> None:
        """Delivers one socket to the target's `HandoffInbox.receive`.

        unread and state travel with it, 1 MiB together. timeout is what the target's socket will have; default: what
        ``sock.gettimeout()`` says.
        """
        if unread or state or timeout is not KEEP or not self._send_plain(sock):
            self._push([draft(sock, self.pid, unread, state, timeout, None)], wire.Flag.QUEUED)

    def send_many(self, socks: Sequence[Any]) -> None:
        """Delivers sockets in as few messages as the kernel allows, some 250 in one. On an error those of whole
        messages have arrived; the caller still has all of them."""
        if not self._push_plain(list(socks)):
            self._push([draft(sock, self.pid, b"", b"", KEEP, None) for sock in socks], wire.Flag.QUEUED)

    def duplicate(
        self, sock: Any, *, unread: bytes = b"", state: bytes = b"", timeout: float | Keep | None = KEEP,
        provider: str | Handoff | None = None,
    ) -> wire.SocketInformation:  # fmt: skip
        """`portway.duplicate_socket` over this session: the record is for the target's `socket_from`."""
        record = None
        if not unread and not state and timeout is KEEP and provider is None:
            record = self._claim_plain(sock)
        if record is None:
            (record,) = self._push([draft(sock, self.pid, unread, state, timeout, provider)], 0)
        return wire.SocketInformation(record)

    def duplicate_many(self, socks: Sequence[Any]) -> list[wire.SocketInformation]:
        """The records of `socks`, in their order."""
        drafts = [draft(sock, self.pid, b"", b"", KEEP, None) for sock in socks]
        return [wire.SocketInformation(record) for record in self._push(drafts, 0)]

    def push(self, ready: Draft) -> bytes:
        """The record of a draft that the caller made (`portway.kernel.record`)."""
        return self._push([ready], 0)[0]

    def _push(self, drafts: Sequence[Draft], flags: int) -> list[bytes]:
        with self._lock:
            deadline, expires = self._begin()
            records = [one.encode(self.pid, self._start, expires, flags, -1) for one in drafts]
            whole = bool(flags & wire.Flag.QUEUED)  # the target has nothing but what we send now
            sizes = [len(record) + 4 if whole else _claim_size(record) for record in records]
            for span in _spans(sizes, [one.weight for one in drafts]):
                fds = [fd for ready in drafts[span] for fd in ready.fds]
                if whole and sizes[span.start] > MAX_MESSAGE:
                    self._send_large(records[span.start], fds, deadline)
                elif whole:
                    self._send_batch(wire.pack_records(records[span]), fds, span, deadline)
                else:
                    weighed = zip(records[span], drafts[span], strict=True)
                    claims = [_claim(record, one.weight, expires) for record, one in weighed]
                    self._send_batch(wire.pack_claims(claims), fds, span, deadline)
            return records

    def _send_plain(self, sock: Any) -> bool:
        """The shortest way, for most of all calls; False sends nothing, and `_push` does, waits, or says why not."""
        if _native.send_plain is None:
            return False
        with self._lock:
            if self._process.closed or self._sent - self._acknowledged >= WINDOW:
                return False
            expires = time.monotonic_ns() + int(self.expires * 1e9)
            sent: bool = _native.send_plain(
                self._line.fileno(), self._process.fileno(), sock, _PLAIN, self.pid, self._start, *self._me, self._uid,
                expires, _QUEUED, nonces(1),
            )  # fmt: skip
            self._sent += sent
            return sent

    def _claim_plain(self, sock: Any) -> bytes | None:
        """The same for a record that travels some other way; None when the long way must do it."""
        if _native.records is None:
            return None
        with self._lock:
            deadline, expires = self._begin()
            fds: list[int] = []
            found: list[bytes] | None = _native.records(
                [sock], _PLAIN, fds, self.pid, self._start, *self._me, self._uid, expires, 0, nonces(1)
            )
            if found is None:
                return None
            self._send_batch(wire.pack_claims([_claim(found[0], 1, expires)]), fds, slice(0, 1), deadline)
            return found[0]

    def _push_plain(self, socks: list[Any]) -> bool:
        """The short way for sockets without luggage; False when one of them needs the long way."""
        if _native.records is None:
            return False
        with self._lock:
            deadline, expires = self._begin()
            fds: list[int] = []
            random = nonces(len(socks))
            records = _native.records(
                socks, _PLAIN, fds, self.pid, self._start, *self._me, self._uid, expires, _QUEUED, random
            )
            if records is None:
                return False
            for span in _spans([len(record) + 4 for record in records], [1] * len(records)):
                self._send_batch(wire.pack_records(records[span]), fds[span], span, deadline)
            return True

    def _begin(self) -> tuple[Deadline, int]:
        """The checks that every record needs, with the lock held; (the deadline, the expiry in ns)."""
        if self._process.closed:
            raise ObjectClosed("this HandoffSession is closed")
        if _native.readable(self._process.fileno()):
            raise self._ended()
        return Deadline(self.timeout), time.monotonic_ns() + int(self.expires * 1e9)

    def _send_batch(self, data: bytes, fds: list[int], span: slice, deadline: Deadline) -> None:
        count = span.stop - span.start
        self._window(count, deadline)
        self._message(data, fds, deadline)
        self._sent += count

    def _send_large(self, record: bytes, fds: list[int], deadline: Deadline) -> None:
        """A record over several messages; they follow each other because the lock is held. One that is not finished
        is as if it had never been begun: the target drops it with the session."""
        self._window(1, deadline)
        self._message(wire.pack_head(record, MAX_MESSAGE), fds, deadline)
        try:
            for at in range(MAX_MESSAGE, len(record), MAX_MESSAGE):
                self._message(wire.pack_rest(record, at, MAX_MESSAGE), [], deadline)
        except BaseException:
            self._shut()
            raise
        self._sent += 1

    def _window(self, more: int, deadline: Deadline) -> None:
        while self._sent + more - self._acknowledged > WINDOW:
            self._read_acknowledgement(deadline)

    def _read_acknowledgement(self, deadline: Deadline) -> None:
        while not self._hear():
            poll_for(self._line.fileno(), select.POLLIN, deadline, f"waiting for pid {self.pid} to receive")

    def _hear(self) -> bool:
        """Whether the target had something to say; `HandoffRefused` when that is no, or nothing ever again."""
        for _ in range(2):
            try:
                self._understand(self._line.recv(2048))
                return True
            except ConnectionResetError:
                continue  # said once, before what the target sent last
            except BlockingIOError:
                return False
        return False

    def _understand(self, message: bytes) -> None:
        if not message:
            raise self._hung_up()
        if message[0] == wire.Kind.REFUSED:
            raise self._refused(message[1:].decode("utf-8", "replace"))
        if message[0] == wire.Kind.ACK:
            self._acknowledged = min(self._sent, wire.unpack_count(message, 8))

    def _hung_up(self) -> HandoffError:
        """A process that was killed closes its descriptors a moment before it counts as ended."""
        poll = select.poll()
        poll.register(self._process.fileno(), select.POLLIN)
        return self._ended() if poll.poll(20) else self._refused("it closed its inbox")

    def _ended(self) -> ProcessNotFound:
        return ProcessNotFound(f"pid {self.pid} has ended")

    def _refused(self, why: str) -> HandoffRefused:
        return HandoffRefused(f"pid {self.pid} does not take sockets: {why}", hint="the caller still has the socket")

    def _message(self, data: bytes, fds: list[int], deadline: Deadline) -> None:
        while True:
            try:
                _native.send_message(self._line.fileno(), data, fds)
                return
            except OSError as error:
                self._again(error, deadline)

    def _again(self, error: OSError, deadline: Deadline) -> None:
        """Waits until sending may work, or says why it never will."""
        doing = f"sending to pid {self.pid}"
        if error.errno == errno.EAGAIN:
            poll_for(self._line.fileno(), select.POLLOUT, deadline, doing)
        elif error.errno == errno.ETOOMANYREFS:  # this user has too many in flight: back-pressure without an event
            deadline.check(doing)
            time.sleep(0.001)
        elif error.errno in (errno.EPIPE, errno.ECONNRESET):
            while self._hear():
                pass
            raise self._hung_up()
        else:
            raise error

    # -- closing --------------------------------------------------------------------------------------------------

    def _shut(self) -> None:
        self._process.close()
        self._line.close()

    def close(self) -> None:
        """Ends the session; what was sent stays sent. Closing twice is fine."""
        with self._lock:
            self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _spans(sizes: Sequence[int], weights: Sequence[int]) -> Iterator[slice]:
    """Runs of records that fit one message, in bytes and in descriptors; a record too large for any is a run alone."""
    first = size = fds = 0
    for at, weight in enumerate(weights):
        if at > first and (size + sizes[at] > MAX_MESSAGE or fds + weight > MAX_DESCRIPTORS):
            yield slice(first, at)
            first, size, fds = at, 0, 0
        size += sizes[at]
        fds += weight
    if weights:
        yield slice(first, len(weights))


def _claim(record: bytes, weight: int, expires: int) -> wire.Claim:
    return wire.Claim(wire.nonce_of(record), expires, weight, wire.proof(record))


def _claim_size(record: bytes) -> int:
    return 28 + min(len(record), 512)


def check_target(pid: int, allowed: frozenset[int], expected_start: int | None) -> int:
    """The start time of `pid`, after all that can be known about it from outside has been checked."""
    started = start_time(pid)
    if expected_start is not None and started != expected_start:
        raise ProcessNotFound(
            f"pid {pid} is another process by now: it started at tick {started}, not {expected_start}"
        )
    owner = uid_of(pid)
    if owner != os.geteuid() and owner not in allowed:
        raise AccessDenied(
            f"pid {pid} belongs to uid {user_name(owner)}, this process to {user_name(os.geteuid())}",
            hint=f"allow_uids=({owner},) hands sockets to that user",
        )
    return started


def _after_fork() -> None:
    """A child is another process: a line that it held open would look to the target as if its source still lived."""
    for session in list(_open):
        session._lock = threading.Lock()  # a thread that does not exist here may have held it
        session._shut()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
