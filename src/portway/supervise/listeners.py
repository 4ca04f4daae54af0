"""The sockets of a service, one group a bind, and which generation's listener gets the new connections.

Every live generation has a listener of its own in each group, so that what the kernel queued for a generation is
accepted by that generation. The supervisor keeps a copy of each. A `Group` hands listeners out (`take`), turns new
connections to one of them (`promote`), and closes those of a generation that has ended (`release`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Any

from ..errors import AccessDenied, AddressInUse, InvalidAddress
from .binds import Bind
from .proc import holder_of, other_listeners

__all__ = ["Group", "Listener", "bind_error", "in_use", "resolve"]

_TCP_LISTEN = 10  # tcp_states.h


class Listener:
    """One listening (or shared) socket. ``generation`` is 0 while it belongs to none."""

    __slots__ = ("generation", "inode", "path", "shared", "sock")

    def __init__(self, sock: socket.socket, generation: int = 0, path: str = "", shared: bool = False) -> None:
        self.sock = sock
        self.generation = generation
        self.inode = os.fstat(sock.fileno()).st_ino
        self.path = path
        self.shared = shared

    def waiting(self) -> bool:
        """Whether connections are queued that nobody accepted yet. False for a shared socket: others read it."""
        if self.shared:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def refuse_queued(self) -> None:
        """Whatever came too late for its generation gets an answer now, not at the next reload. Leaves it blocking."""
        self.sock.setblocking(False)
        try:
            while True:
                self.sock.accept()[0].close()
        except OSError:
            pass
        self.sock.setblocking(True)

    def listens(self) -> bool:
        """False once anybody who holds this TCP listener has called shutdown() on it."""
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
        return info[0] == _TCP_LISTEN

    def dump(self) -> dict[str, Any]:
        return {"generation": self.generation, "inode": self.inode, "path": self.path, "fd": self.sock.fileno()}


class Group:
    """What the three kinds have in common. Owned by the supervisor, which closes it."""

    def __init__(self, bind: Bind, backlog: int) -> None:
        self.bind = bind
        self.backlog = backlog
        self.members: list[Listener] = []
        self.ready: Listener | None = None

    @property
    def address(self) -> str:
        """Where clients connect, with the port the kernel chose."""
        return self.bind.address

    def take(self, generation: int) -> Listener:
        raise NotImplementedError

    def promote(self, listener: Listener) -> None:
        self.ready = listener

    def release(self, listener: Listener) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The service ends: nothing more is accepted here by this process; workers that hold a copy may."""
        self.abandon()

    def abandon(self) -> None:
        """Our copies only: what a later supervisor takes over stays as it is."""
        members, self.members, self.ready = self.members, [], None
        for member in members:
            member.sock.close()

    def dump(self) -> dict[str, Any]:
        ready = self.members.index(self.ready) if self.ready in self.members else None
        members = [member.dump() for member in self.members]
        return {"bind": self.bind.text, "address": self.address, "ready": ready, "members": members}


def resolve(bind: Bind, kind: socket.SocketKind) -> tuple[int, tuple[Any, ...]]:
    if not bind.host:
        try:
            socket.socket(socket.AF_INET6, kind).close()
            return socket.AF_INET6, ("::", bind.port)
        except OSError:
            return socket.AF_INET, ("0.0.0.0", bind.port)
    try:
        found = socket.getaddrinfo(bind.host, bind.port, type=kind, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidAddress(f"--bind {bind.text!r}: {bind.host!r} does not resolve: {error.strerror}") from error
    return found[0][0], found[0][4]


def bind_error(bind: Bind, error: OSError, sockaddr: tuple[Any, ...] | None = None, family: int = 0) -> Exception:
    """Ours for the kernel's refusal to bind; with the address, who listens there is looked up."""
    if error.errno == errno.EADDRINUSE:
        others = other_listeners(sockaddr, family, set()) if sockaddr else []
        return in_use(bind, others[0] if others else 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(
            f"--bind {bind.text!r}: {error.strerror}", hint="a port below 1024 or another's folder wants root"
        )
    return InvalidAddress(f"--bind {bind.text!r}: {error.strerror}", hint="use an address of this machine")


def in_use(bind: Bind, inode: int) -> AddressInUse:
    holder = holder_of(inode) if inode else None
    who = f" by pid {holder[0]} ({holder[1]})" if holder else ""
    return AddressInUse(f"{bind.address} is in use{who}", hint="stop what listens there, or choose another address")
