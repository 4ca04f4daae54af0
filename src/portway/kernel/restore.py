"""The target's side, whatever the way: check a record, and turn its descriptors into the object."""

from __future__ import annotations

import _socket
import time
from typing import Any

from .._accel import handoff as _native
from ..errors import InvalidInformation, WrongProcess
from ..provider import Parcel, handoff_provider
from ..wire.handoff import Flag, SocketInformation
from .fdpass import close_all
from .offer import expired
from .record import myself
from .shared import SharedSocket

__all__ = ["check_record", "restore"]

_shortcut = _native.shared
_initialise = _socket.socket.__init__
_NONBLOCKING, _TIMEOUT = int(Flag.NONBLOCKING), int(Flag.TIMEOUT)


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
    """The object of a record that is known to be whole; owns the descriptors, and closes them all if it fails."""
    if _shortcut is not None and len(fds) == 1:
        plain = _shortcut(SharedSocket, _initialise, record, fds[0])
        if plain is not None:
            return plain
    info = SocketInformation(record)
    head = info.head
    try:
        if len(fds) != 1 + head.descriptors:
            raise InvalidInformation(f"{len(fds)} descriptors came for a record that names {1 + head.descriptors}")
        sock = SharedSocket(head.family, head.type, head.protocol, fds[0])
    except BaseException:
        close_all(fds)
        raise
    sock._record = record
    if head.flags & (_NONBLOCKING | _TIMEOUT):
        sock.settimeout(info.timeout)
    if info.provider == "kernel":
        return sock
    return _by_provider(info, sock, fds[1:])


def _by_provider(info: SocketInformation, sock: SharedSocket, descriptors: list[int]) -> Any:
    parcel = Parcel(sock, info.provider_reserved, descriptors, info.unread, info.state)
    try:
        return handoff_provider(info.provider).restore(parcel)
    except BaseException:
        sock.close()
        raise
    finally:
        close_all(parcel.descriptors)
