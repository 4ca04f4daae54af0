"""TCP: a SO_REUSEPORT group whose members' places we keep account of."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

from .binds import Bind
from .listeners import Group, Listener, bind_error, in_use, resolve
from .proc import is_held, other_listeners
from .steer import steer

__all__ = ["TcpGroup", "places_after"]


class TcpGroup(Group):
    """A SO_REUSEPORT group. ``members`` stand in the kernel's order.

    A listener whose generation has ended becomes a spare, for the next generation. Closing one is what cannot be done
    without a moment between: the kernel takes a listener out of its group before it takes it out of the table of
    listeners, and a connection that arrives just then is lost (measured: one in some thousands of closes under load,
    none in 200,000 connections without closing). It is closed all the same when somebody else still holds it, or when
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
        family, sockaddr = resolve(bind, socket.SOCK_STREAM)
        group = cls(bind, backlog, sockaddr, family)
        if bind.port:
            _plain_bind(group)
        group.members.append(group._new(0))
        group.sockaddr = group.members[0].sock.getsockname()
        others = other_listeners(group.sockaddr, family, {group.members[0].inode}) if bind.port else []
        if others:
            group.close()
            raise in_use(bind, others[0])
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
            raise bind_error(self.bind, error) from error
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


def _plain_bind(group: TcpGroup) -> None:
    """SO_REUSEPORT would join a listener of the same uid without a word; a bind without it tells."""
    sock = group._socket()
    try:
        sock.bind(group.sockaddr)
        sock.listen(1)
    except OSError as error:
        raise bind_error(group.bind, error, group.sockaddr, group.family) from error
    finally:
        sock.close()
