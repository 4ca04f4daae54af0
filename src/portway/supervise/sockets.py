"""The sockets of a service, one group a bind, and which generation's listener gets the new connections.

Every live generation has a listener of its own in each group, so that what the kernel queued for a generation is
accepted by that generation. The supervisor keeps a copy of each. A `Group` hands listeners out (`take`), turns new
connections to one of them (`promote`), and closes those of a generation that has ended (`release`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import select
import socket
import stat
from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

from ..errors import AccessDenied, AddressInUse, ConfigurationError, InvalidAddress
from .binds import SUN_PATH, Bind
from .proc import holder_of, is_held, other_listeners
from .steer import steer

__all__ = ["Group", "Listener", "SharedGroup", "TcpGroup", "UnixGroup", "open_group"]

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


class TcpGroup(Group):
    """A SO_REUSEPORT group. ``members`` stand in the kernel's order.

    A listener whose generation has ended becomes a spare, for the next generation. Closing one is what cannot be done
    without a moment between: the kernel takes a listener out of its group before it takes it out of the table of
    listeners, and a connection that arrives just then is lost (measured: one in some thousands of closes under load,
    none in 500,000 connections without closing). It is closed all the same when somebody else still holds it, or when
    there are spares enough.

    The kernel moves the last member into the place of one that closes. The ready member must never be the one that
    moves: a spare is put behind it first. Of two members the one that stays is alone, and gets everything.
    """

    SPARES = 2

    def __init__(self, bind: Bind, backlog: int, sockaddr: tuple[Any, ...], family: int) -> None:
        super().__init__(bind, backlog)
        self.sockaddr = sockaddr
        self.family = family

    @classmethod
    def open(cls, bind: Bind, backlog: int) -> TcpGroup:
        """`AddressInUse` names who listens there, where that can be found out."""
        family, sockaddr = _resolve(bind, socket.SOCK_STREAM)
        group = cls(bind, backlog, sockaddr, family)
        if bind.port:
            _plain_bind(group)
        group.members.append(group._new(0))
        group.sockaddr = group.members[0].sock.getsockname()
        others = other_listeners(group.sockaddr, family, {group.members[0].inode}) if bind.port else []
        if others:
            group.close()
            raise _in_use(bind, others[0])
        return group

    @property
    def address(self) -> str:
        host = str(self.sockaddr[0])
        return f"[{host}]:{self.sockaddr[1]}" if ":" in host else f"{host}:{self.sockaddr[1]}"

    def _socket(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if self.bind.host else 0)
        return sock

    def _new(self, generation: int) -> Listener:
        sock = self._socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Accepted sockets inherit it. `uvicorn --fd` takes the descriptor for AF_UNIX and leaves Nagle on, which
            # costs kept connections 40 ms a request.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind(self.sockaddr)
            sock.listen(self.backlog)
        except OSError as error:
            sock.close()
            raise _bind_error(self.bind, error) from error
        return Listener(sock, generation)

    def take(self, generation: int) -> Listener:
        self._forget_closed()
        for member in self.members:
            if member.generation == 0:
                member.refuse_queued()
                member.sock.listen(self.backlog)
                member.generation = generation
                return member
        listener = self._new(generation)
        self.members.append(listener)
        return listener

    def promote(self, listener: Listener) -> None:
        self._forget_closed()
        listener.sock.listen(self.backlog)  # a server's own listen(100) has set its backlog
        self.ready = listener
        self._steer()

    def probe(self, listener: Listener, port: int | None) -> None:
        """Connections from source port `port` reach `listener`, all others the ready one; None ends it."""
        if self.ready is None or len(self.members) < 2 or listener not in self.members:
            return
        if port is None:
            self._steer()
        else:
            place = self.members.index(listener)
            steer(self.ready.sock, self.members.index(self.ready), probe=(port, place))

    def release(self, listener: Listener) -> None:
        self._forget_closed()
        if listener not in self.members:
            return
        if listener is not self.ready and self._spare(listener):
            return
        if listener is not self.ready and self.ready is self.members[-1] and len(self.members) > 2:
            self.members.append(self._new(0))
        # shutdown() takes it out of the group now, not when the last process that inherited it ends.
        with contextlib.suppress(OSError):
            listener.sock.shutdown(socket.SHUT_RDWR)
        listener.sock.close()
        self._remove(listener)
        self._steer()

    def _spare(self, listener: Listener) -> bool:
        """Back to what `_new` made, if it is ours alone."""
        spares = sum(1 for member in self.members if member.generation == 0)
        if spares >= self.SPARES or is_held(listener.inode):
            return False
        listener.generation = 0
        listener.refuse_queued()
        return True

    def _remove(self, listener: Listener) -> None:
        place = self.members.index(listener)
        last = self.members.pop()
        if last is not listener:
            self.members[place] = last
        if listener is self.ready:
            self.ready = None

    def _forget_closed(self) -> None:
        for member in [member for member in self.members if not member.listens()]:
            self._remove(member)
            member.sock.close()
            self._steer()

    def _steer(self) -> None:
        if self.ready is not None:
            steer(self.ready.sock, self.members.index(self.ready))

    def restore(self, recorded: Sequence[Listener | None], ready: int | None) -> None:
        """Members as a dead supervisor recorded them, None for those that closed since; see `places_after`."""
        alive = [member for member in recorded if member is not None]
        serving = None if ready is None else recorded[ready]
        order = places_after(list(range(len(recorded))), [i for i, one in enumerate(recorded) if one is None], ready)
        if order is None and serving is not None:
            # Where the serving listener stands cannot be known. The others belong to generations that no longer
            # accept: taken out of the group, they leave it alone there.
            for member in alive:
                if member is not serving:
                    member.sock.shutdown(socket.SHUT_RDWR)
                    member.sock.close()
            self.members = [serving]
        else:
            self.members = [one for one in (recorded[place] for place in order or []) if one is not None]
        self.ready = serving if serving in self.members else None
        self._steer()


def places_after(members: list[int], closed: list[int], ready: int | None) -> list[int] | None:
    """The order the kernel has after `closed` left in an unknown order; None where it cannot be told.

    Pure. Where only the place of `ready` is certain, that is enough.
    """
    found: list[list[int]] = []
    for order in islice(permutations(closed), 720):
        left = list(members)
        for one in order:
            place = left.index(one)
            last = left.pop()
            if last != one:
                left[place] = last
        found.append(left)
    first = found[0]
    if ready is None or ready in closed:
        return first
    return first if all(one.index(ready) == first.index(ready) for one in found) else None


class UnixGroup(Group):
    """Each generation's socket is bound beside the path and renamed over it when the generation is ready."""

    @classmethod
    def open(cls, bind: Bind, backlog: int) -> UnixGroup:
        _unix_free(bind)
        return cls(bind, backlog)

    def take(self, generation: int) -> Listener:
        folder, base = os.path.split(self.bind.path)
        room = SUN_PATH - len(os.fsencode(folder)) - 16
        if room < 1:
            raise InvalidAddress(
                f"{self.bind.path}: too long by {1 - room} bytes for the name of a second socket beside it"
            )
        path = f"{folder}/.{os.fsdecode(os.fsencode(base)[: min(room, 40)])}.{secrets.token_hex(4)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            self._secure(path)
            sock.listen(self.backlog)
        except OSError as error:
            sock.close()
            _unlink(path)
            raise _bind_error(self.bind, error) from error
        listener = Listener(sock, generation, path)
        self.members.append(listener)
        return listener

    def _secure(self, path: str) -> None:
        if self.bind.owner is not None:
            os.chown(path, *owner_ids(self.bind.owner))
        if self.bind.mode is not None:
            os.chmod(path, self.bind.mode)

    def promote(self, listener: Listener) -> None:
        listener.sock.listen(self.backlog)
        if listener.path:
            os.rename(listener.path, self.bind.path)
            listener.path = ""
        self.ready = listener

    def release(self, listener: Listener) -> None:
        if listener not in self.members:
            return
        self.members.remove(listener)
        self.ready = None if listener is self.ready else self.ready
        if listener.path:
            _unlink(listener.path)
        listener.sock.close()

    def restore(self, recorded: Sequence[Listener | None], ready: int | None) -> None:
        self.members = [member for member in recorded if member is not None]
        self.ready = None if ready is None else recorded[ready]

    def close(self) -> None:
        if self.ready is not None:
            _unlink(self.bind.path)
        for member in self.members:
            if member.path:
                _unlink(member.path)
        super().close()


class SharedGroup(Group):
    """One socket for all generations: UDP, and what socket activation passed in."""

    def __init__(self, bind: Bind, backlog: int, sock: socket.socket) -> None:
        super().__init__(bind, backlog)
        self.members = [Listener(sock, shared=True)]

    @property
    def address(self) -> str:
        if not self.members:
            return self.bind.address
        name = self.members[0].sock.getsockname()
        if isinstance(name, tuple):
            host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
            return f"{'udp:' if self.bind.kind == 'udp' else ''}{host}:{name[1]}"
        return f"unix:{os.fsdecode(name)}"

    @classmethod
    def open(cls, bind: Bind, backlog: int) -> SharedGroup:
        family, sockaddr = _resolve(bind, socket.SOCK_DGRAM)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if bind.host else 0)
            sock.bind(sockaddr)
        except OSError as error:
            sock.close()
            raise _bind_error(bind, error) from error
        return cls(bind, backlog, sock)

    def take(self, generation: int) -> Listener:
        return self.members[0]

    def release(self, listener: Listener) -> None:
        pass  # the other generations use it


def open_group(bind: Bind, backlog: int, inherited: dict[str, int]) -> Group:
    """`inherited`: descriptor by name and by place, from `notify.inherited_sockets`; one is consumed by a fd: bind."""
    if bind.kind == "tcp":
        return TcpGroup.open(bind, backlog)
    if bind.kind == "unix":
        return UnixGroup.open(bind, backlog)
    if bind.kind == "udp":
        return SharedGroup.open(bind, backlog)
    if bind.path not in inherited:
        names = ", ".join(sorted(inherited)) or "none: LISTEN_FDS is not set for this process"
        raise ConfigurationError(f"--bind {bind.text!r}: no such inherited socket; there is {names}")
    fd = inherited[bind.path]
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise ConfigurationError(f"--bind {bind.text!r}: descriptor {fd} is no socket")
    sock = socket.socket(fileno=os.dup(fd))
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SharedGroup(bind, backlog, sock)


def owner_ids(owner: str) -> tuple[int, int]:
    """USER[:GROUP] as (uid, gid), -1 for what is not given; `ConfigurationError` names who does not exist."""
    user, _, group = owner.partition(":")
    import grp

    try:
        uid = -1 if not user else int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
        gid = -1 if not group else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigurationError(f"owner={owner}: no such user or group on this machine") from None
    return uid, gid


def _resolve(bind: Bind, kind: socket.SocketKind) -> tuple[int, tuple[Any, ...]]:
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


def _plain_bind(group: TcpGroup) -> None:
    """SO_REUSEPORT would join a listener of the same uid without a word; a bind without it tells."""
    sock = group._socket()
    try:
        sock.bind(group.sockaddr)
        sock.listen(1)
    except OSError as error:
        raise _bind_error(group.bind, error, group) from error
    finally:
        sock.close()


def _bind_error(bind: Bind, error: OSError, group: TcpGroup | None = None) -> Exception:
    if error.errno == errno.EADDRINUSE:
        others = other_listeners(group.sockaddr, group.family, set()) if group else []
        return _in_use(bind, others[0] if others else 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(
            f"--bind {bind.text!r}: {error.strerror}", hint="a port below 1024 or another's folder wants root"
        )
    return InvalidAddress(f"--bind {bind.text!r}: {error.strerror}", hint="use an address of this machine")


def _in_use(bind: Bind, inode: int) -> AddressInUse:
    holder = holder_of(inode) if inode else None
    who = f" by pid {holder[0]} ({holder[1]})" if holder else ""
    return AddressInUse(f"{bind.address} is in use{who}", hint="stop what listens there, or choose another address")


def _unix_free(bind: Bind) -> None:
    """A stale socket file may be replaced; a live socket or anything else may not."""
    try:
        mode = os.lstat(bind.path).st_mode
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(bind.path)):
            raise InvalidAddress(f"--bind {bind.text!r}: there is no folder {os.path.dirname(bind.path)}") from None
        return
    if not stat.S_ISSOCK(mode):
        raise AddressInUse(f"{bind.path} exists and is no socket", hint="remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(bind.path)
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # EAGAIN: its queue is full; EACCES, EPROTOTYPE: not ours to replace
    raise AddressInUse(f"{bind.path}: somebody listens there", hint="stop it, or choose another path")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
