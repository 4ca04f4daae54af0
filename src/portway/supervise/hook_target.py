"""The successor's side of moving connections: messages from the inbox, answers to the sources.

A connection is read only after ``accepted`` was sent. Whatever goes wrong before that closes what came, and the end of
the reply socket tells the source to keep serving.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..deadline import Deadline
from ..errors import InvalidInformation, OperationTimeout, TooManyDescriptors
from ..kernel.fdpass import receive_descriptors
from ..wire.handover import MAX_MESSAGE, Header, Moving, decode_header, decode_payload, encode_answer

__all__ = ["Adopted", "Batch", "Check", "Receiver"]


@dataclass(frozen=True, slots=True, repr=False)
class Adopted:
    """A connection that moved here. ``sock`` is the caller's to close, blocking, close-on-exec."""

    sock: socket.socket
    kind: str
    unread: bytes
    """Bytes the source had read and not consumed: they come before what the socket still delivers."""
    state: bytes
    generation: int
    """Where it came from."""

    def __repr__(self) -> str:
        return (
            f"<Adopted {self.kind!r} from generation {self.generation}: fd {self.sock.fileno()}, "
            f"{len(self.unread)} bytes unread, {len(self.state)} of state>"
        )


Check = Callable[[Adopted], str | None]
"""Looks at a connection that is offered, without reading from it; a reason refuses it, None accepts."""


class Batch:
    """One message: connections that were offered and not answered yet. Closing refuses the rest."""

    def __init__(self, reply: socket.socket, header: Header, fds: list[int]) -> None:
        self.reply, self.header, self.fds = reply, header, deque(fds)
        self.payload = bytearray()
        self.moving: deque[Moving] = deque(header.moving or ())
        self.next = 0

    @property
    def complete(self) -> bool:
        return self.header.moving is not None or len(self.payload) == self.header.size

    def feed(self) -> bool:
        """Takes payload that follows; True when complete. `InvalidInformation` when it never will be."""
        while not self.complete:
            try:
                part = self.reply.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                raise InvalidInformation(f"the source ended while its payload came ({error.strerror})") from None
            if not part or len(self.payload) + len(part) > self.header.size:
                raise InvalidInformation(f"{len(self.payload)} + {len(part)} bytes came, not {self.header.size}")
            self.payload += part
        if self.header.moving is None:
            self.moving = deque(decode_payload(self.header.entries, self.payload))
            self.payload = bytearray()
            self.header = self.header._replace(moving=())
        return True

    def accept(self, check: Check | None = None) -> Adopted | None:
        """Answers for the next connection: the connection, or None when `check` refused it."""
        fd, moving, index = self.fds.popleft(), self.moving.popleft(), self.next
        self.next += 1
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            self._answer(False, index, "not a socket")
            self._close_if_done()
            return None
        adopted = Adopted(sock, *moving, self.header.generation)
        reason: str | None = "the successor's check failed"
        try:
            reason = check(adopted) if check else None
        finally:
            self._answer(reason is None, index, reason or "")
            if reason is not None:
                sock.close()
            self._close_if_done()
        if reason is not None:
            return None
        sock.setblocking(True)  # the flag is shared with the source's descriptor: not before it was told
        return adopted

    def _close_if_done(self) -> None:
        if not self.fds:
            self.close()

    def _answer(self, accepted: bool, index: int, reason: str = "") -> None:
        try:
            self.reply.send(encode_answer(accepted, index, 1, reason), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionError):
            pass  # the source has ended; a connection that it sent completely lives on here

    def close(self) -> None:
        self.reply.close()
        while self.fds:
            os.close(self.fds.popleft())


class Receiver:
    """Takes messages from an inbox that may have other readers. Never blocks; `descriptors` says what to wait for."""

    def __init__(self, inbox: socket.socket) -> None:
        self.inbox = inbox
        self.ended = False
        self.dropped = 0
        self.partial: dict[int, Batch] = {}
        self.ready: deque[Batch] = deque()

    def descriptors(self) -> list[int]:
        return [*([] if self.ended else [self.inbox.fileno()]), *self.partial]

    def step(self, messages: int = 4) -> None:
        """Moves at most that many messages, and payload that followed, to `ready`."""
        for fd, batch in list(self.partial.items()):
            self._feed(fd, batch)
        for _ in range(messages):
            if self.ended or not self._receive():
                return

    def _receive(self) -> bool:
        try:
            data, fds = receive_descriptors(self.inbox, MAX_MESSAGE, timeout=0)
        except OperationTimeout:
            return False
        except TooManyDescriptors:
            self.dropped += 1  # all were closed, the reply socket too: the source goes on serving them
            return True
        except OSError:
            data, fds = b"", []
        if not data:
            self.ended = True
            return False
        batch = self._batch(data, fds)
        if batch is not None:
            self._feed(batch.reply.fileno(), batch)
        return True

    def _batch(self, data: bytes, fds: list[int]) -> Batch | None:
        try:
            header = decode_header(data)
            if len(fds) != 1 + len(header.entries):
                raise InvalidInformation(f"{len(header.entries)} connections with {len(fds)} descriptors")
            return Batch(socket.socket(fileno=fds[0]), header, fds[1:])
        except (InvalidInformation, OSError):
            for fd in fds:
                os.close(fd)
            self.dropped += 1
            return None

    def _feed(self, fd: int, batch: Batch) -> None:
        try:
            if batch.feed():
                self.partial.pop(fd, None)
                self.ready.append(batch)
            else:
                self.partial[fd] = batch
        except InvalidInformation:
            self.partial.pop(fd, None)
            batch.close()
            self.dropped += 1

    def wait(self, deadline: Deadline) -> bool:
        """Blocks until `step` may find something; False when the deadline passed."""
        poll = select.poll()
        for fd in self.descriptors():
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(deadline.poll_ms()))

    def close(self) -> None:
        """Refuses everything not taken; the inbox itself stays open."""
        for batch in (*self.ready, *self.partial.values()):
            batch.close()
        self.ready.clear()
        self.partial.clear()
