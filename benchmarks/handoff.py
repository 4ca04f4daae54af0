"""``handoff``: one source process, one target process, a socket duplicated from the one into the other.

handoff.one   us      duplicate one socket, restore a socket object, acknowledge with one byte; the target closes it
handoff.batch per_s   sockets a second one way, acknowledged once at the end
handoff.move-10k      10,000 established connections: see move.py

The socket is an established TCP connection. Raw contenders send over a Unix stream pair, without any check;
``portway`` over an open `HandoffSession`, with all of them: `send` to `HandoffInbox.receive`. Two more for comparison:
``portway-record`` sends a record over the pair, for `socket_from`; ``send_fds-batched`` is the floor of batches, raw
messages of 253 descriptors.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from . import move
from .harness import Failed, Figures, Options, Worker, remark, rounds_of, workers

__all__ = ["CONTENDERS", "PINNABLE", "WORKS", "run"]

CONTENDERS = ("portway", "send_fds", "mp.send_handle", "mp.pipe", "portway-record", "send_fds-batched")
ONLY_ONE, ONLY_BATCH = {"portway-record"}, {"send_fds-batched"}
WORKS = ("handoff.one", "handoff.batch", "handoff.move-10k")
PINNABLE = True
SCM_MAX = 253


class SendFds:
    """Raw `socket.send_fds`, one descriptor in each message. One end of the link; the same class on both."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    def open_target(self) -> None: ...

    def open_source(self, target: int) -> None: ...

    def send(self, sock: socket.socket) -> None:
        socket.send_fds(self.link, [b"x"], [sock.fileno()])

    def receive(self) -> socket.socket:
        _, fds, _, _ = socket.recv_fds(self.link, 1, 1)
        return socket.socket(fileno=fds[0])

    def send_batch(self, socks: Sequence[socket.socket]) -> None:
        for sock in socks:
            self.send(sock)

    def receive_batch(self, count: int) -> list[socket.socket]:
        """At least one, at most `count`."""
        return [self.receive()]


class SendFdsBatched(SendFds):
    """Raw messages with as many descriptors as the kernel takes."""

    def send_batch(self, socks: Sequence[socket.socket]) -> None:
        for at in range(0, len(socks), SCM_MAX):
            socket.send_fds(self.link, [b"x"], [sock.fileno() for sock in socks[at : at + SCM_MAX]])

    def receive_batch(self, count: int) -> list[socket.socket]:
        _, fds, _, _ = socket.recv_fds(self.link, 1, SCM_MAX)
        return [socket.socket(fileno=fd) for fd in fds]


class SendHandle(SendFds):
    """`multiprocessing.reduction.send_handle`."""

    def open_target(self) -> None:
        self.pipe = Connection(self.link.fileno())

    def open_source(self, target: int) -> None:
        self.pipe, self.target = Connection(self.link.fileno()), target

    def send(self, sock: socket.socket) -> None:
        reduction.send_handle(self.pipe, sock.fileno(), self.target)

    def receive(self) -> socket.socket:
        return socket.socket(fileno=reduction.recv_handle(self.pipe))


class PicklePipe(SendHandle):
    """A socket object through a multiprocessing Pipe: pickled, fetched from the source's resource sharer."""

    def send(self, sock: socket.socket) -> None:
        self.pipe.send(sock)

    def receive(self) -> socket.socket:
        received: socket.socket = self.pipe.recv()
        return received


class Portway(SendFds):
    """An open session and its inbox, with all their checks."""

    def open_target(self) -> None:
        import portway

        self.inbox: Any = portway.HandoffInbox()

    def open_source(self, target: int) -> None:
        import portway

        self.session: Any = portway.HandoffSession(target)

    def send(self, sock: socket.socket) -> None:
        self.session.send(sock)

    def receive(self) -> socket.socket:
        received: socket.socket = self.inbox.receive(30)
        return received

    def send_batch(self, socks: Sequence[socket.socket]) -> None:
        self.session.send_many(socks)

    def receive_batch(self, count: int) -> list[socket.socket]:
        received: list[socket.socket] = self.inbox.receive_many(30)
        return received


class PortwayRecord(Portway):
    """The same session, with a record that travels by another way (here the link) and `portway.socket_from`."""

    def open_target(self) -> None:
        super().open_target()
        from portway import socket_from

        self.restore: Any = socket_from

    def send(self, sock: socket.socket) -> None:
        self.link.send(bytes(self.session.duplicate(sock)))

    def receive(self) -> socket.socket:
        received: socket.socket = self.restore(self.link.recv(4096))
        return received


KINDS: dict[str, type[SendFds]] = {
    "portway": Portway, "send_fds": SendFds, "mp.send_handle": SendHandle, "mp.pipe": PicklePipe,
    "send_fds-batched": SendFdsBatched, "portway-record": PortwayRecord,
}  # fmt: skip


def _connections(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Established TCP connections of this process with itself: their one ends, their other ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=count) as server:
        pairs = [(socket.create_connection(server.getsockname()), server.accept()[0]) for _ in range(count)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _source(kind: type[SendFds], link: socket.socket, ack: socket.socket, target: int) -> Callable[..., Any]:
    """The source's commands: each does its count and returns what one took."""
    end = kind(link)
    end.open_source(target)
    socks, peers = _connections(64)

    def one(count: int) -> float:
        sock, send, wait = socks[0], end.send, ack.recv
        began = time.perf_counter_ns()
        for _ in range(count):
            send(sock)
            wait(1)
        return (time.perf_counter_ns() - began) / count / 1000

    def batch(count: int) -> float:
        batch = [socks[at % len(socks)] for at in range(count)]
        began = time.perf_counter_ns()
        end.send_batch(batch)
        ack.recv(1)
        return count / ((time.perf_counter_ns() - began) / 1e9)

    return lambda verb, count=0: {"open": lambda _: len(peers), "one": one, "batch": batch}[verb](count)


def _target(kind: type[SendFds], link: socket.socket, ack: socket.socket) -> Callable[..., Any]:
    end = kind(link)
    end.open_target()

    def one(count: int) -> None:
        receive, answer = end.receive, ack.send
        for _ in range(count):
            with receive() as sock:
                _check(sock)
                answer(b"a")

    def batch(count: int) -> None:
        missing = count
        while missing > 0:
            socks = end.receive_batch(missing)
            missing -= len(socks)
            for sock in socks:
                sock.close()
        ack.send(b"a")

    return lambda verb, count=0: {"open": lambda _: None, "one": one, "batch": batch}[verb](count)


def _check(sock: socket.socket) -> None:
    if sock.fileno() < 0:
        raise Failed("the target got no usable socket")


@dataclass
class Pair:
    """Source and target of one contender, ready to be told to run."""

    name: str
    source: Worker
    target: Worker

    def measure(self, verb: str, count: int) -> float:
        self.target.order(verb, count)
        value: float = self.source.ask(verb, count)
        self.target.answer()
        return value


def _pair(stack: ExitStack, name: str) -> Pair:
    kind = KINDS[name]
    links, acks = socket.socketpair(), socket.socketpair()
    with links[0], links[1], acks[0], acks[1]:  # the processes have inherited them
        [target] = stack.enter_context(workers([lambda: Worker(f"{name} target", _target, kind, links[1], acks[1])]))
        target.ask("open")
        [source] = stack.enter_context(
            workers([lambda: Worker(f"{name} source", _source, kind, links[0], acks[0], target.pid)])
        )
        source.ask("open")
    return Pair(name, source, target)


def run(options: Options, figures: Figures) -> None:
    with ExitStack() as stack:
        pairs = _pairs(stack, options) if not options.works or options.works & set(WORKS[:2]) else []
        rounds = rounds_of(options, 21)
        for number in range(-1, rounds if pairs else -1):  # the first is to get warm
            remark(f"handoff: round {number + 1} of {rounds}" if number >= 0 else "handoff: warming up")
            for pair in list(pairs):
                try:
                    _measure(pair, options, figures if number >= 0 else Figures())
                except Failed as error:
                    remark(f"{pair.name} is left out: {error}")
                    pairs.remove(pair)
    if options.wants_work("handoff.move-10k"):
        move.run(options, figures)


def _pairs(stack: ExitStack, options: Options) -> list[Pair]:
    pairs = []
    for name in CONTENDERS:
        if options.wants(name):
            try:
                pairs.append(_pair(stack, name))
            except Failed as error:
                remark(f"{name} is left out: {error}")
    return pairs


def _measure(pair: Pair, options: Options, figures: Figures) -> None:
    count = (100 if options.quick else 4000) // (10 if pair.name == "mp.pipe" else 1)
    if options.wants_work("handoff.one") and pair.name not in ONLY_BATCH:
        figures.add("handoff.one", pair.name, "us", pair.measure("one", count), count=count)
    if options.wants_work("handoff.batch") and pair.name not in ONLY_ONE:
        figures.add("handoff.batch", pair.name, "per_s", pair.measure("batch", count), count=count)
