"""Duplicating by process id: the source offers, the target takes, and the kernel lets it be taken once.

Linux cannot push a descriptor into a process that does not ask. So the source queues the descriptors, with a digest of
the record, into one end of a seqpacket pair and keeps the other, the *offer*; the target duplicates the offer with
pidfd_getfd(2) and dequeues the message. Dequeuing is what makes it single-use: a second taker finds the queue empty.
The queue dies with its last descriptor, so nothing is left when the source is killed.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence

from .._accel import handoff as _native
from ..deadline import Deadline
from ..errors import (
    AccessDenied,
    InformationExpired,
    InformationUsed,
    InvalidInformation,
    ProcessNotFound,
    SourceGone,
    TooManyDescriptors,
)  # fmt: skip
from ..wire.handoff import SocketInformation, digest
from . import reaper
from .fdpass import close_all, send_descriptors
from .process import Pidfd, peer_of, start_time, take_descriptor, user_name, within_limits
from .record import myself

__all__ = ["Offer", "pending_offer", "take_offer"]

_offers: dict[bytes, Offer] = {}
_lapsed: dict[bytes, None] = {}
_REMEMBERED = 4096
"""Offers that ended untaken, for `outcome`; the oldest are forgotten."""
_ptracer = threading.Lock()
_TAKEN = b"taken"


class Offer:
    """The source's side. Released when taken, when it expires, by `withdraw`, or when the process ends."""

    __slots__ = ("_ptrace", "done", "line", "nonce", "queue", "taken", "then")

    def __init__(self) -> None:
        # The queue is filled from `line`, which then tells the source that the target has dequeued.
        with within_limits("an offer, which needs two until it is claimed"):
            self.line, self.queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.nonce = b""
        self.taken, self.done, self._ptrace = False, threading.Event(), False
        self.then: list[Callable[[], object]] = []
        """Called, from any thread, once it is taken or withdrawn."""

    @property
    def number(self) -> int:
        """What the record names: the descriptor's number in the source."""
        return self.queue.fileno()

    def publish(self, info: SocketInformation, fds: Sequence[int], seconds: float, deadline: Deadline) -> None:
        """Makes it claimable for `seconds`. Waits while this user has too many descriptors in flight
        (`OperationTimeout`)."""
        send_descriptors(self.line, digest(bytes(info)), fds, timeout=deadline.remaining())
        self.nonce = info.nonce
        _offers[self.nonce] = self
        reaper.watch(self, self.line.fileno(), seconds, self._settle)

    def permit(self, pid: int, deadline: Deadline) -> None:
        """Yama lets one process more inspect this one at a time, so such offers wait for each other."""
        left = deadline.remaining()
        if not _ptracer.acquire(timeout=-1 if left is None else left):
            raise deadline.error("waiting for the Yama permission that another offer holds")
        self._ptrace = True
        try:
            _native.set_ptracer(pid)
        except OSError as error:
            self._forbid()
            if error.errno != errno.EINVAL:  # EINVAL: no Yama in this kernel, nothing to permit
                raise

    def _forbid(self) -> None:
        if self._ptrace:
            self._ptrace = False
            try:
                _native.set_ptracer(0)
            except OSError:
                pass
            _ptracer.release()

    def _settle(self) -> None:
        """In the reaper: the target has said so, or the time is over."""
        try:
            self.taken = self.line.recv(16) == _TAKEN
        except OSError:
            pass
        self.withdraw()

    def withdraw(self) -> None:
        """Nobody can take it any more. Also empties the queue, which a forked child may hold open."""
        try:
            close_all(_native.receive_message(self.queue.fileno(), 64, socket.MSG_DONTWAIT)[1])
        except OSError:
            self.taken = True  # somebody emptied it
        if not self.taken and self.nonce:
            _lapsed[self.nonce] = None
            while len(_lapsed) > _REMEMBERED:
                del _lapsed[next(iter(_lapsed))]
        _offers.pop(self.nonce, None)
        self.queue.close()
        self.line.close()
        self._forbid()
        self.done.set()
        for call in tuple(self.then):
            call()

    def close_in_child(self) -> None:
        self.queue.close()
        self.line.close()


def pending_offer(info: SocketInformation) -> Offer | None:
    """The offer of this process that waits to be claimed; None when it was, or when nobody needs this process for it.
    `InformationExpired` when its time ended first, ValueError for another process's record."""
    if (info.source_pid, info.head.source_start) != myself():
        raise ValueError(f"this record was made by pid {info.source_pid}, not by this process")
    offer = _offers.get(info.nonce)
    if offer is None and info.nonce in _lapsed:
        raise expired(info)
    return offer


def take_offer(info: SocketInformation, allowed: frozenset[int]) -> list[int]:
    """The target's side: the descriptors of `info`, which the caller owns. Every refusal leaves the offer in place."""
    queue = _fetch_queue(info)
    try:
        _check_source(queue, info, allowed)
        queued = queue.recv(64, socket.MSG_DONTWAIT | socket.MSG_PEEK)  # without room for descriptors: none is made
        if not queued:
            raise _used(info)  # the source has closed its end since: it was told of the claim, or the time was over
        if queued != digest(bytes(info)):
            raise InvalidInformation(
                f"this record is not the one that pid {info.source_pid} made: tampered with, or a stale number",
                hint="carry the bytes unchanged",
            )
        fds = _dequeue(queue)
        try:
            queue.send(_TAKEN, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the source ended meanwhile; what was dequeued is ours
        return fds
    except BlockingIOError:
        raise _used(info) from None
    except OSError as error:
        if error.errno in (errno.ENOTSOCK, errno.EOPNOTSUPP, errno.ENOTCONN, errno.ECONNRESET):
            raise _used(info) from None
        raise
    finally:
        queue.close()


def _dequeue(queue: socket.socket) -> list[int]:
    """Looks, and takes only what fits: whoever takes the message off the queue has won."""
    taken = _native.take_message(queue.fileno())
    if taken is None:
        raise BlockingIOError
    data, fds, flags = taken
    if not data:
        raise BlockingIOError  # the source has closed its end between our two looks, because somebody else has won
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise TooManyDescriptors(
            "no descriptor left in this process for the socket; it can still be claimed",
            hint="close some, or raise RLIMIT_NOFILE, and try again",
        )
    return list(fds)


def _used(info: SocketInformation) -> InformationUsed:
    return InformationUsed(
        f"this record of pid {info.source_pid} was used already", hint="each duplicate_socket() makes one socket, once"
    )


def _fetch_queue(info: SocketInformation) -> socket.socket:
    """A descriptor of our own for the offer the record names; not yet trusted to be one."""
    head = info.head
    try:
        if head.source_pid == os.getpid():
            if head.source_start != myself()[1]:
                raise ProcessNotFound(f"pid {head.source_pid} is another process by now")
            with within_limits("the socket"):
                fd = os.dup(head.source_fd)
        else:
            with Pidfd(head.source_pid) as process:
                if start_time(head.source_pid) != head.source_start:
                    raise ProcessNotFound(f"pid {head.source_pid} is another process by now")
                fd = take_descriptor(process, head.source_fd)
    except ProcessNotFound as gone:
        raise SourceGone(
            f"the source, pid {head.source_pid}, ended before the socket was claimed",
            hint="keep the source until portway.wait_claimed(info), or let the target open a HandoffInbox",
        ) from gone
    except OSError as error:
        if error.errno == errno.EBADF:
            raise _used(info) from None
        raise
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise _used(info) from None


def _check_source(queue: socket.socket, info: SocketInformation, allowed: frozenset[int]) -> None:
    """SO_PEERCRED of a socketpair is whoever made it; a number that is used again leads to some other socket."""
    if queue.family != socket.AF_UNIX or queue.type != socket.SOCK_SEQPACKET:
        raise _used(info)
    maker = peer_of(queue)
    if maker.uid != os.geteuid() and maker.uid not in allowed:
        raise AccessDenied(
            f"the source, pid {info.source_pid}, belongs to uid {user_name(maker.uid)}",
            hint=f"allow_uids=({maker.uid},) accepts sockets of that user",
        )


def expired(info: SocketInformation) -> InformationExpired:
    return InformationExpired(
        f"this record of pid {info.source_pid} has expired", hint="claim it sooner, or give expires= a longer time"
    )


def _after_fork() -> None:
    """A child holds no offer of its parent: it would keep the sockets alive beyond their time."""
    global _ptracer
    for offer in _offers.values():
        offer.close_in_child()
    _offers.clear()
    _lapsed.clear()
    _ptracer = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
