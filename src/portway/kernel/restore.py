"""The target's side, whatever the way: check a record, and turn its descriptors into the object."""

from __future__ import annotations

import _socket
import errno
import time
from collections import deque
from typing import Any

from .._accel import handoff as _native
from ..errors import InvalidInformation, PortwayError, WrongProcess
from ..provider import Parcel, handoff_provider
from ..wire.handoff import SocketInformation
from .fdpass import close_all
from .offer import expired
from .record import myself
from .shared import SharedSocket

__all__ = ["check_record", "restore", "restore_plain"]

_shortcut, _shortcuts = _native.shared, _native.shared_many
_initialise = _socket.socket.__init__
_default_timeout = _socket.getdefaulttimeout


def check_record(info: SocketInformation) -> None:
    """`WrongProcess` unless the record is for this very process, `InformationExpired` unless its time still runs."""
    head = info.head
    pid, started = myself()
    if head.target_pid != pid or head.target_start != started:
        raise WrongProcess(
            f"this record is for pid {head.target_pid}, started at tick {head.target_start}; "
            f"this is pid {pid}, started at {started}",
            hint="duplicate the socket for the process that will use it",
        )
    if head.expires_ns <= time.monotonic_ns():
        raise expired(info)


def restore(record: bytes, fds: list[int]) -> Any:
    """The object of a record that is known to be whole; owns the descriptors, and closes them all if it fails.

    `InvalidInformation` when they are not what the record says, and what the record's provider raises.
    """
    try:
        if _shortcut is not None and len(fds) == 1 and _default_timeout() is None:
            plain = _shortcut(SharedSocket, _initialise, record, fds[0])
            if plain is not None:
                return plain
        info = SocketInformation(record)
        sock = _shared(info, record, fds)
    except BaseException as error:
        close_all(fds)
        if isinstance(error, OSError) and error.errno in (errno.ENOTSOCK, errno.EBADF):
            raise InvalidInformation("a record of a socket came with a descriptor that is none") from None
        raise
    return sock if info.provider == "kernel" else _by_provider(info, sock, fds[1:])


def restore_plain(waiting: deque[tuple[int, bytes, list[int]]]) -> list[SharedSocket]:
    """Makes sockets of the leading records of `waiting` that need no long way; those leave it. May make none."""
    if _shortcuts is None or _default_timeout() is not None:
        return []
    made: list[SharedSocket] = _shortcuts(SharedSocket, _initialise, waiting, time.monotonic_ns())
    return made


def _shared(info: SocketInformation, record: bytes, fds: list[int]) -> SharedSocket:
    head = info.head
    if len(fds) != 1 + head.descriptors:
        raise InvalidInformation(f"{len(fds)} descriptors came for a record that names {1 + head.descriptors}")
    if head.descriptors and info.provider == "kernel":
        raise InvalidInformation(f"a record of the kernel provider with {head.descriptors} descriptors besides")
    sock = SharedSocket(head.family, head.type, head.protocol, fds[0])
    sock._record = record
    sock.settimeout(info.timeout)
    return sock


def _by_provider(info: SocketInformation, sock: SharedSocket, descriptors: list[int]) -> Any:
    parcel = Parcel(sock, info.provider_reserved, descriptors, info.unread, info.state)
    try:
        return handoff_provider(info.provider).restore(parcel)
    except PortwayError:
        sock.close()
        raise
    except Exception as error:
        sock.close()
        raise InvalidInformation(
            f"the provider {info.provider!r} could not restore what came: {type(error).__name__}: {error}",
            hint="the same version of it on both sides",
        ) from error
    finally:
        close_all(parcel.descriptors)
