"""From a socket object to the record that describes it: what is known before the target and the way are."""

from __future__ import annotations

import errno
import os
import socket
import sys
from enum import Enum
from typing import Any, Final

from .._accel import handoff as _native
from ..errors import HandoffError, UnsupportedSocket
from ..provider import Handoff, handoff_provider
from ..wire import handoff as wire
from .process import start_time

__all__ = ["KEEP", "Draft", "Keep", "check_seconds", "draft", "myself", "nonces"]


class Keep(Enum):
    KEEP = "keep"


KEEP: Final = Keep.KEEP
"""As a timeout for the target: the one the source's object has."""

_FAMILIES = frozenset((socket.AF_INET, socket.AF_INET6, socket.AF_UNIX))
_encode = wire.encode_record
_LISTENING, _CONNECTED, _NONBLOCKING, _TIMEOUT = (
    int(flag) for flag in (wire.Flag.LISTENING, wire.Flag.CONNECTED, wire.Flag.NONBLOCKING, wire.Flag.TIMEOUT)
)
_CENTURY = 3_000_000_000  # what 64 bits of nanoseconds hold thrice
_me: tuple[int, int] | None = None
_random = b""
_random_at = 0


def myself() -> tuple[int, int]:
    """(pid, start time) of this process."""
    global _me
    if _me is None:
        pid = os.getpid()
        _me = pid, start_time(pid)
    return _me


def _after_fork() -> None:
    global _me, _random, _random_at
    _me, _random, _random_at = None, b"", 0


os.register_at_fork(after_in_child=_after_fork)


def nonces(count: int) -> bytes:
    """16 unguessable bytes for each of `count` records; the kernel is asked for 128 of them at a time."""
    global _random, _random_at
    at, size = _random_at, 16 * count
    if at + size > len(_random):
        _random, at = os.urandom(max(2048, size)), 0
    _random_at = at + size
    return _random[at : at + size]


def check_seconds(name: str, value: float) -> float:
    if not 0 < value <= _CENTURY:
        raise ValueError(f"{name}={value!r}: give seconds above 0, at most {_CENTURY}")
    return value


class Draft:
    """A socket, its facts and its luggage, ready to be made a record for any target."""

    __slots__ = ("_facts", "_flags", "_provider", "_reserved", "_state", "_timeout", "_unread", "fds", "weight")

    def __init__(
        self, sock: socket.socket, timeout: float | Keep | None, provider: bytes, reserved: bytes, unread: bytes,
        state: bytes, descriptors: list[int],
    ) -> None:  # fmt: skip
        fd = sock.fileno()
        self._facts = facts = _facts(sock, fd)
        if timeout is KEEP:
            timeout = sock.gettimeout()
        elif timeout is not None and not 0 <= timeout <= _CENTURY:
            raise ValueError(f"timeout={timeout!r} for the target: give seconds >= 0, or None to wait without limit")
        flags = 0 if timeout is None else _TIMEOUT if timeout else _NONBLOCKING
        if facts[3]:
            flags |= _LISTENING
        if facts[4]:
            flags |= _CONNECTED
        self._flags, self._timeout = flags, timeout or 0.0
        self._provider, self._reserved, self._unread, self._state = provider, reserved, unread, state
        self.fds = [fd, *descriptors]
        self.weight = len(self.fds)

    def encode(self, pid: int, started: int, expires_ns: int, flags: int, source_fd: int) -> bytes:
        """The record for process `pid`, with a nonce of its own."""
        family, kind, protocol, _, _, local, peer = self._facts
        me, my_start = _me or myself()
        return _encode(
            (self._flags | flags, family, kind, protocol, pid, started, me, my_start, os.geteuid(), source_fd,
             expires_ns, self._timeout, nonces(1), self.weight - 1),
            local, peer, self._provider, self._reserved, self._unread, self._state,
        )  # fmt: skip


def _facts(sock: socket.socket, fd: int) -> tuple[int, int, int, bool, bool, bytes, bytes]:
    try:
        facts: tuple[int, int, int, bool, bool, bytes, bytes] = _native.facts(fd)
    except OSError as error:
        if error.errno in (errno.ENOTSOCK, errno.EBADF):
            raise UnsupportedSocket(f"{sock!r}: descriptor {fd} is closed or no socket") from None
        raise
    if facts[0] not in _FAMILIES:
        raise UnsupportedSocket(
            f"{sock!r}: address family {facts[0]}", hint="IPv4, IPv6 and Unix sockets can be duplicated"
        )
    return facts


def draft(
    obj: Any, pid: int, unread: bytes, state: bytes, timeout: float | Keep | None, provider: str | Handoff | None
) -> Draft:
    """`UnsupportedSocket` for what cannot be duplicated, `HandoffError` for luggage over the quotas."""
    if provider is None and isinstance(obj, socket.socket):  # most of all: no provider needs asking
        _refuse_tls(obj)
        made = Draft(obj, timeout, b"kernel", b"", unread, state, [])
        size = len(unread) + len(state)
    else:
        by = handoff_provider(provider or "kernel") if not isinstance(provider, Handoff) else provider
        parcel = by.duplicate(obj, pid)
        if (unread and parcel.unread) or (state and parcel.state):
            raise ValueError(f"provider {by.name!r} brings unread bytes or state of its own: leave unread=, state= out")
        unread, state = unread or parcel.unread, state or parcel.state
        size = len(unread) + len(state)
        if len(parcel.reserved) > wire.MAX_RESERVED:
            raise HandoffError(
                f"{len(parcel.reserved)} reserved bytes of provider {by.name!r}: at most {wire.MAX_RESERVED}"
            )
        if len(parcel.descriptors) >= _native.MAX_DESCRIPTORS:
            raise HandoffError(f"{len(parcel.descriptors)} descriptors of provider {by.name!r}: at most 252")
        _refuse_tls(parcel.socket)
        name, own = by.name.encode(), list(parcel.descriptors)
        made = Draft(parcel.socket, timeout, name, parcel.reserved, unread, state, own)
    if size > wire.MAX_PAYLOAD:
        raise HandoffError(f"{size} bytes unread and state: at most {wire.MAX_PAYLOAD}", hint="consume some first")
    return made


def _refuse_tls(sock: socket.socket) -> None:
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(sock, ssl.SSLSocket):
        raise UnsupportedSocket(
            f"{sock!r}: the keys of a TLS session live in this process and cannot travel",
            hint="hand over the socket below before the handshake, or unwrap() it first",
        )
