"""Groups by kind of bind: TCP in `reuseport`, here Unix sockets and what all generations share."""

from __future__ import annotations

import grp
import os
import pwd
import secrets
import socket
import stat
from collections.abc import Sequence

from ..errors import AddressInUse, ConfigurationError, InvalidAddress
from .binds import SUN_PATH, Bind
from .listeners import Group, Listener, bind_error, resolve
from .reuseport import TcpGroup

__all__ = ["SharedGroup", "UnixGroup", "open_group"]


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
            raise bind_error(self.bind, error) from error
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
        family, sockaddr = resolve(bind, socket.SOCK_DGRAM)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if bind.host else 0)
            sock.bind(sockaddr)
        except OSError as error:
            sock.close()
            raise bind_error(bind, error) from error
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
    try:
        uid = -1 if not user else int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
        gid = -1 if not group else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigurationError(f"owner={owner}: no such user or group on this machine") from None
    return uid, gid


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
