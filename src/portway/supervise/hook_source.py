"""The source's side of moving connections: batches into the inbox, answers from the reply sockets.

Nothing here blocks, and nothing here gives a connection up: an offer ends with ``done(None)`` once the successor has
accepted it, or with ``done(reason)`` when it is refused, the inbox is closed, or the reply socket ends without an
answer. Never because time has passed: a message that left can still be accepted, and then both would serve.
"""

from __future__ import annotations

import errno
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import InvalidInformation
from ..wire.handover import Moving, batch_size, decode_answer, encode
from .hook_reactor import Reactor

__all__ = ["BATCH", "MAX_UNANSWERED", "Mover", "Offer"]

MAX_UNANSWERED = 512
"""Connections sent and not answered. What waits here is not served by anybody, so the rest waits at the source."""
BATCH = 64
"""Connections in one message: a worker takes whole messages, and small ones spread over all workers."""
_RETRY = 0.01
_FULL = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_ENDED = "the successor ended before it answered"


class Offer:
    """One connection on its way; `fd` stays the caller's and open until ``done`` was called."""

    __slots__ = ("done", "fd", "moving", "sent")

    def __init__(self, fd: int, moving: Moving, done: Callable[[str | None], object]) -> None:
        self.fd, self.moving, self.done, self.sent = fd, moving, done, False


class _Flight:
    """A message that left: its reply socket, what was not answered yet, payload still to be sent."""

    __slots__ = ("entries", "offers", "packets", "sock")

    def __init__(self, sock: socket.socket, offers: Sequence[Offer], packets: list[bytes]) -> None:
        self.sock, self.packets, self.entries = sock, deque(packets), len(offers)
        self.offers: dict[int, Offer] = dict(enumerate(offers))


class Mover:
    """Moves connections into one inbox at a time; `retarget` changes it for what has not left."""

    def __init__(self, reactor: Reactor, generation: int) -> None:
        self._reactor = reactor
        self._generation = generation
        self._inbox: socket.socket | None = None
        self._queue: deque[Offer] = deque()
        self._flights: set[_Flight] = set()
        self._unanswered = 0
        self._waiting = False
        self._refusal = "no newer generation takes connections"

    @property
    def target(self) -> bool:
        """Whether there is somebody to move to, as far as is known."""
        return self._inbox is not None

    @property
    def pending(self) -> int:
        """Offers that have not ended."""
        return len(self._queue) + self._unanswered

    def retarget(self, inbox: socket.socket | None) -> None:
        """The write end of the newest generation's inbox, not owned by this mover; None: nowhere to move to."""
        if self._inbox is not None:
            self._reactor.watch(self._inbox.fileno(), None)
        self._inbox, self._waiting = inbox, False
        self._pump()

    def submit(self, offer: Offer) -> None:
        self._queue.append(offer)
        if not self._waiting:
            self._waiting = True  # one pump for all offers of this turn: that is what makes batches
            self._reactor.call_soon(self._resume)

    def withdraw(self, offer: Offer) -> bool:
        """Takes back what has not left; False when it has (its ``done`` will be called)."""
        if offer.sent or offer not in self._queue:
            return False
        self._queue.remove(offer)
        return True

    def _resume(self) -> None:
        if self._inbox is not None:
            self._reactor.watch(self._inbox.fileno(), None)
        self._waiting = False
        self._pump()

    def _pump(self) -> None:
        while self._queue and not self._waiting and self._unanswered < MAX_UNANSWERED:
            if self._inbox is None:
                self._refuse_queue(self._refusal)
                return
            limit = min(BATCH, MAX_UNANSWERED - self._unanswered)
            count = batch_size((offer.moving for offer in self._queue), limit)
            self._send(self._inbox, [self._queue.popleft() for _ in range(count)])

    def _send(self, inbox: socket.socket, offers: list[Offer]) -> None:
        data, packets = encode([offer.moving for offer in offers], self._generation)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._not_sent(error, inbox, offers)
            return
        try:
            with theirs:
                fds = array("i", [theirs.fileno(), *(offer.fd for offer in offers)])
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                inbox.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            ours.close()
            self._not_sent(error, inbox, offers)
            return
        self._sent(_Flight(ours, offers, packets))

    def _sent(self, flight: _Flight) -> None:
        for offer in flight.offers.values():
            offer.sent = True
        self._unanswered += len(flight.offers)
        self._flights.add(flight)
        flight.sock.setblocking(False)
        self._on_room(flight)

    def _not_sent(self, error: OSError, inbox: socket.socket, offers: list[Offer]) -> None:
        if error.errno == errno.EBADF:
            self._one_is_closed(error, inbox, offers)
            return
        self._queue.extendleft(reversed(offers))
        if error.errno == errno.EAGAIN:
            self._waiting = True
            self._reactor.watch(inbox.fileno(), None, self._resume)
        elif error.errno in _FULL:  # no event tells when there is room again
            self._waiting = True
            self._reactor.call_later(_RETRY, self._resume)
        else:
            self._inbox = None
            self._refuse_queue(f"the successor's inbox is closed ({error.strerror})")

    def _one_is_closed(self, error: OSError, inbox: socket.socket, offers: list[Offer]) -> None:
        if len(offers) > 1:
            for index, offer in enumerate(offers):
                if self._waiting or self._inbox is None:
                    self._queue.extendleft(reversed(offers[index:]))
                    return
                self._send(inbox, [offer])
        else:
            offers[0].done(f"descriptor {offers[0].fd} is closed ({error.strerror})")

    def _refuse_queue(self, reason: str) -> None:
        queue, self._queue = self._queue, deque()
        for offer in queue:
            offer.done(reason)

    def _on_room(self, flight: _Flight) -> None:
        """Sends what of a large payload the reply socket takes, and watches it for more and for answers."""
        try:
            while flight.packets:
                flight.sock.send(flight.packets[0], socket.MSG_NOSIGNAL)
                flight.packets.popleft()
        except BlockingIOError:
            pass
        except OSError:
            flight.packets.clear()  # the end of the reply socket, read below, refuses it
        room = (lambda: self._on_room(flight)) if flight.packets else None
        self._reactor.watch(flight.sock.fileno(), lambda: self._on_answer(flight), room)

    def _on_answer(self, flight: _Flight) -> None:
        while flight.offers:
            try:
                data = flight.sock.recv(1024)
            except BlockingIOError:
                self._pump()
                return
            except ConnectionResetError:
                continue  # it ended with payload unread; what it answered before is still queued
            if not data:
                break
            self._answered(flight, data)
        self._land(flight)

    def _answered(self, flight: _Flight, data: bytes) -> None:
        try:
            answer = decode_answer(data, flight.entries)
        except InvalidInformation:
            return  # not an answer: whether it took the connection is said by another packet, or by the end
        ended = [flight.offers.pop(index, None) for index in range(answer.first, answer.first + answer.entries)]
        reason = None if answer.accepted else answer.reason or "refused"
        for offer in ended:
            if offer is not None:
                self._unanswered -= 1
                offer.done(reason)

    def _land(self, flight: _Flight) -> None:
        self._reactor.watch(flight.sock.fileno(), None)
        flight.sock.close()
        self._flights.discard(flight)
        left, flight.offers = flight.offers, {}
        self._unanswered -= len(left)
        for offer in left.values():
            offer.done(_ENDED)
        self._pump()

