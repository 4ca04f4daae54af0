"""Descriptors in messages over a Unix socket (SCM_RIGHTS), with the limits of the kernel said in our own errors.

What `portway.duplicate_socket` stands on, and what speaks with programs that know nothing of portway: any program that
sends or receives SCM_RIGHTS, in any language. Source: unix(7), cmsg(3).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence

from .._accel import handoff as _native
from ..deadline import Deadline
from ..errors import TooManyDescriptors

__all__ = ["MAX_DESCRIPTORS", "close_all", "poll_for", "receive_descriptors", "send_descriptors"]

MAX_DESCRIPTORS: int = _native.MAX_DESCRIPTORS
"""Descriptors in one message (SCM_MAX_FD); one more is EINVAL."""


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def send_descriptors(
    sock: socket.socket, data: bytes, fds: Sequence[int], *, timeout: float | None = None
) -> None:
    """Sends `data`, at least one byte, with duplicates of `fds`; the caller keeps its own.

    Waits while the receiver's queue is full, or while this user has too many descriptors in flight (ETOOMANYREFS is
    back-pressure, not an error), until `timeout` seconds have passed: `OperationTimeout`, nothing was sent. More than
    253 descriptors are `TooManyDescriptors`; a closed peer is BrokenPipeError or ConnectionError. On a stream socket
    the rest of a partly taken `data` is sent after it; the descriptors go with its first byte.
    """
    if not data:
        raise ValueError("data is empty: descriptors travel with at least one byte")
    if len(fds) > MAX_DESCRIPTORS:
        raise TooManyDescriptors(
            f"{len(fds)} descriptors in one message: the kernel takes {MAX_DESCRIPTORS}", hint="send several messages"
        )
    deadline, view, pending = Deadline(timeout), memoryview(data), list(fds)
    while view:
        try:
            view = view[_native.send_message(sock.fileno(), view, pending) :]
            pending = []
        except OSError as error:
            _wait_to_send(sock, error, deadline)


def _wait_to_send(sock: socket.socket, error: OSError, deadline: Deadline) -> None:
    if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
        raise error
    deadline.check("sending descriptors")
    if error.errno == errno.ETOOMANYREFS:
        time.sleep(0.001)  # the kernel has no event for "fewer descriptors in flight"
    else:
        poll_for(sock.fileno(), select.POLLOUT, deadline, "sending descriptors")


def poll_for(fd: int, events: int, deadline: Deadline, doing: str) -> None:
    """Waits until poll() reports one of `events`, an error or an end; `OperationTimeout` when the deadline passes."""
    poll = select.poll()
    poll.register(fd, events)
    if not poll.poll(deadline.poll_ms()):
        raise deadline.error(doing)


def receive_descriptors(
    sock: socket.socket, max_bytes: int = 65536, max_fds: int = MAX_DESCRIPTORS, *, timeout: float | None = None
) -> tuple[bytes, list[int]]:
    """The next message, or the next bytes of a stream: (data, descriptors). ``(b"", [])`` is end of stream.

    The descriptors are close-on-exec and the caller's to close. When this process has no room for them all, or more
    than `max_fds` came, those that came are closed and `TooManyDescriptors` is raised; the message is gone.
    `OperationTimeout` after `timeout` seconds; nothing was received.
    """
    deadline = Deadline(timeout)
    while True:
        try:
            data, fds, flags = _native.receive_message(sock.fileno(), max_bytes, socket.MSG_DONTWAIT)
            break
        except BlockingIOError:
            poll_for(sock.fileno(), select.POLLIN, deadline, "receiving descriptors")
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        close_all(fds)
        raise TooManyDescriptors(
            f"a message with more descriptors than fit ({len(fds)} came, max_fds={max_fds})",
            hint="raise RLIMIT_NOFILE or max_fds",
        )
    return data, fds
