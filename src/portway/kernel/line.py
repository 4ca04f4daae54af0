"""One session as the target sees it: messages in, sockets and claims out.

What arrives here was written by another process and is not trusted: a message that breaks a rule ends the session, and
every descriptor that came is either kept under a record or closed, exactly once.
"""

from __future__ import annotations

import socket
from collections import deque

from .._accel import handoff as _native
from ..errors import InvalidInformation, TooManyDescriptors
from ..wire import handoff as wire
from .fdpass import close_all
from .process import peer_of
from .record import myself

__all__ = ["ACK_EVERY", "Addressed", "Line", "Waiting"]

ACK_EVERY = 64
_DONTWAIT = socket.MSG_DONTWAIT
_TRUNC, _CTRUNC = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)
_RECORDS = int(wire.Kind.RECORDS)

Waiting = tuple[int, bytes, list[int]]  # expires_ns, record, descriptors
Addressed = dict[bytes, tuple[wire.Claim, list[int]]]  # by nonce


class Line:
    """Fills `queue` and `addressed`, which are the inbox's; the inbox's lock is held around every call."""

    __slots__ = ("_addressed", "_fds", "_got", "_queue", "_size", "acknowledged", "ended", "peer", "received", "sock")

    def __init__(self, sock: socket.socket, queue: deque[Waiting], addressed: Addressed) -> None:
        self.sock, self.peer = sock, peer_of(sock)
        self.received = self.acknowledged = 0
        self.ended = False
        self._queue, self._addressed = queue, addressed
        self._forget_parts()

    def _forget_parts(self) -> None:
        self._size, self._got, self._fds = 0, bytearray(), list[int]()

    def acknowledge(self) -> None:
        """Tells the source how many sockets came."""
        try:
            _native.send_message(self.sock.fileno(), wire.pack_ack(self.received), [])
            self.acknowledged = self.received
        except OSError:
            pass  # the source has ended, or reads none: either way it needs none

    def refuse(self, why: str) -> None:
        """Tells the source why nothing more is taken."""
        try:
            _native.send_message(self.sock.fileno(), wire.pack_refused(why), [])
        except OSError:
            pass

    def close(self) -> None:
        close_all(self._fds)
        self._forget_parts()
        self.sock.close()

    def read(self) -> bool:
        """One message; False when there is none. Then look at `ended`: the session is over, close it.

        `TooManyDescriptors` when this process has no room for the descriptors; the message stays in the queue.
        """
        try:
            taken = _native.take_message(self.sock.fileno())
        except ConnectionResetError:
            return True  # the source ended without reading our last word; what it sent still lies behind this
        except OSError:
            self.ended = True
            return True
        if taken is None:
            return False
        data, fds, flags = taken
        if flags & _CTRUNC:
            close_all(fds)
            raise TooManyDescriptors(
                "no descriptor left for the sockets that wait in the inbox; nothing is lost",
                hint="close some, or raise RLIMIT_NOFILE, and receive again",
            )
        try:
            self._understand(data, fds, flags)
        except InvalidInformation as error:
            close_all(fds)
            self.refuse(str(error))
            self.ended = True
        return True

    def _understand(self, data: bytes, fds: list[int], flags: int) -> None:
        """Empties `fds` when it keeps them; what is left in it after an error is the caller's to close."""
        if not data:
            close_all(fds)  # a message without a byte can bring some all the same
            fds.clear()
            self.ended = True
            return
        if flags & _TRUNC:
            raise InvalidInformation("a message of more than 65,536 bytes")
        if data[0] == _RECORDS:
            plain = _native.split and _native.split(data, fds, *myself(), self.peer.pid)
            if plain is not None:
                self._queue += plain
                self.received += len(plain)
            else:
                self._keep([wire.SocketInformation(record) for record in wire.unpack_records(data)], fds)
        elif data[0] == wire.Kind.CLAIMS:
            self._keep_claims(wire.unpack_claims(data), fds)
        else:
            self._part(data, fds)
        if self.received - self.acknowledged >= ACK_EVERY:
            self.acknowledge()

    def _part(self, data: bytes, fds: list[int]) -> None:
        """A record that needs several messages."""
        if data[0] == wire.Kind.HEAD and not self._size:
            size = wire.unpack_count(data, 4)
            if not 0 < size <= wire.MAX_RECORD:
                raise InvalidInformation(f"a record of {size} bytes: at most {wire.MAX_RECORD}")
            self._size, self._got, self._fds = size, bytearray(data[5:]), fds.copy()
            fds.clear()
        elif data[0] == wire.Kind.REST and self._size and len(data) > 1 and not fds:
            self._got += data[1:]
        else:
            raise InvalidInformation(f"a message of kind {data[0]} out of place")
        if len(self._got) > self._size:
            raise InvalidInformation(f"parts of {len(self._got)} bytes for a record of {self._size}")
        if len(self._got) == self._size:
            info = wire.SocketInformation(bytes(self._got))
            self._keep([info], self._fds)
            self._forget_parts()

    def _keep(self, infos: list[wire.SocketInformation], fds: list[int]) -> None:
        for info, own in zip(infos, _shares([1 + info.head.descriptors for info in infos], fds), strict=True):
            head = info.head
            if (head.target_pid, head.target_start) != myself() or head.source_pid != self.peer.pid:
                close_all(own)  # a record for somebody else, or in somebody else's name
            else:
                self._queue.append((head.expires_ns, bytes(info), own))
        fds.clear()
        self.received += len(infos)

    def _keep_claims(self, claims: list[wire.Claim], fds: list[int]) -> None:
        shares = _shares([claim.descriptors for claim in claims], fds)
        nonces = {claim.nonce for claim in claims}
        if len(nonces) != len(claims) or not all(shares) or not nonces.isdisjoint(self._addressed):
            raise InvalidInformation("a claim without a descriptor, or one that was made before")
        for claim, own in zip(claims, shares, strict=True):
            self._addressed[claim.nonce] = claim, own
        fds.clear()
        self.received += len(claims)


def _shares(weights: list[int], fds: list[int]) -> list[list[int]]:
    """The descriptors of a message, cut into those of each of its records."""
    if sum(weights) != len(fds):
        raise InvalidInformation(f"{len(fds)} descriptors came with records that name {sum(weights)}")
    shares, at = [], 0
    for weight in weights:
        shares.append(fds[at : at + weight])
        at += weight
    return shares
