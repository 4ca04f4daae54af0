"""``handoff.move-10k``: ten thousand established connections move to a new process.

Three processes: clients, source, target. Each client has sent half of its 8-byte request when the move begins, so every
connection has unread bytes. ``ms`` runs from the first duplication until the target has all sockets and the source has
closed its own. Then the clients send the other halves: ``answered`` counts those that got their 8 bytes back.
"""

from __future__ import annotations

import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from .harness import Failed, Figures, Options, Worker, remark, rounds_of, workers

__all__ = ["CONTENDERS", "run"]

CONTENDERS = ("portway", "send_fds")
SIZE, HALF = 8, 4
SCM_MAX = 253
AT_ONCE = 1000


def _source(link: socket.socket) -> Callable[..., Any]:
    server = socket.create_server(("127.0.0.1", 0), backlog=AT_ONCE)
    connections: list[socket.socket] = []

    def accept(count: int) -> None:
        connections.extend(server.accept()[0] for _ in range(count))

    def move(contender: str, target: int) -> float:
        send = _portway_sender(target) if contender == "portway" else _raw_sender(link)
        began = time.perf_counter_ns()
        send(connections)
        if not link.recv(1):
            raise Failed("the target ended")
        for sock in connections:
            sock.close()
        return (time.perf_counter_ns() - began) / 1e6

    verbs: dict[str, Callable[..., Any]] = {"port": lambda: server.getsockname()[1], "accept": accept, "move": move}
    return lambda verb, *args: verbs[verb](*args)


def _portway_sender(target: int) -> Callable[[Sequence[socket.socket]], None]:
    import portway

    return portway.HandoffSession(target).send_many


def _raw_sender(link: socket.socket) -> Callable[[Sequence[socket.socket]], None]:
    def send(socks: Sequence[socket.socket]) -> None:
        for at in range(0, len(socks), SCM_MAX):
            socket.send_fds(link, [b"x"], [sock.fileno() for sock in socks[at : at + SCM_MAX]])

    return send


def _target(link: socket.socket) -> Callable[..., Any]:
    moved: list[socket.socket] = []
    receivers: dict[str, Callable[[], Sequence[socket.socket]]] = {"send_fds": lambda: _raw_receive(link)}

    def open_inbox(contender: str) -> None:
        if contender == "portway":
            import portway

            inbox = portway.HandoffInbox()
            receivers["portway"] = lambda: inbox.receive_many(30)

    def take(contender: str, count: int) -> None:
        receive = receivers[contender]
        while len(moved) < count:
            moved.extend(receive())
        link.send(b"a")

    verbs: dict[str, Callable[..., Any]] = {"open": open_inbox, "take": take, "serve": lambda: _serve(moved)}
    return lambda verb, *args: verbs[verb](*args)


def _raw_receive(link: socket.socket) -> list[socket.socket]:
    _, fds, _, _ = socket.recv_fds(link, 1, SCM_MAX)
    return [socket.socket(fileno=fd) for fd in fds]


def _serve(connections: Sequence[socket.socket]) -> int:
    """Sends back each whole request, until every client has closed; how many were answered."""
    poller, by_fd = select.epoll(), {sock.fileno(): (sock, bytearray()) for sock in connections}
    for fd in by_fd:
        poller.register(fd, select.EPOLLIN)
    answered, deadline = 0, time.monotonic() + 30
    while by_fd and time.monotonic() < deadline:
        for fd, _ in poller.poll(1):
            sock, request = by_fd[fd]
            data = _read(sock)
            request += data
            if not data:
                poller.unregister(fd)
                by_fd.pop(fd)[0].close()
            elif len(request) == SIZE:
                sock.sendall(request)
                answered += 1
    return answered


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(SIZE)
    except ConnectionError:
        return b""


def _clients() -> Callable[..., Any]:
    connections: list[socket.socket] = []

    def connect(port: int, count: int) -> None:
        for number in range(len(connections), len(connections) + count):
            sock = socket.create_connection(("127.0.0.1", port), timeout=20)
            sock.sendall(struct.pack("!Q", number)[:HALF])
            connections.append(sock)

    def finish() -> int:
        for number, sock in enumerate(connections):
            sock.sendall(struct.pack("!Q", number)[HALF:])
        return sum(_answer_is_right(number, sock) for number, sock in enumerate(connections))

    verbs: dict[str, Callable[..., Any]] = {"connect": connect, "finish": finish}
    return lambda verb, *args: verbs[verb](*args)


def _answer_is_right(number: int, sock: socket.socket) -> bool:
    """Reads the answer and closes by reset, which leaves no TIME_WAIT behind for the next round."""
    try:
        answer = sock.recv(SIZE, socket.MSG_WAITALL)
    except OSError:
        answer = b""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    return answer == struct.pack("!Q", number)


def _raise_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Failed(f"the hard limit of open files is {hard}; {needed} are needed")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _move(contender: str, count: int) -> tuple[float, int]:
    """One move in three fresh processes: milliseconds, clients answered rightly."""
    mine, theirs = socket.socketpair()
    made = [lambda: Worker("source", _source, mine), lambda: Worker("target", _target, theirs),
            lambda: Worker("clients", _clients)]  # fmt: skip
    with mine, theirs, workers(made) as (source, target, clients):
        port = source.ask("port")
        for at in range(0, count, AT_ONCE):
            part = min(AT_ONCE, count - at)
            source.order("accept", part)
            clients.ask("connect", port, part)
            source.answer()
        target.ask("open", contender)
        target.order("take", contender, count)
        took: float = source.ask("move", contender, target.pid)
        target.answer()
        target.order("serve")
        answered: int = clients.ask("finish")
        if target.answer() != count:
            remark(f"handoff.move-10k: {contender}: the target saw fewer than {count} whole requests")
    return took, answered


def run(options: Options, figures: Figures) -> None:
    count = 300 if options.quick else 10_000
    contenders = [name for name in CONTENDERS if options.wants(name)]
    rounds = rounds_of(options, 5)
    for number in range(rounds):
        for name in list(contenders):
            remark(f"handoff.move-10k: round {number + 1} of {rounds}, {name}")
            try:
                _raise_limit(count + 200)
                took, answered = _move(name, count)
            except Failed as error:
                remark(f"{name} is left out: {error}")
                contenders.remove(name)
                continue
            figures.add("handoff.move-10k", name, "ms", took, connections=count)
            figures.add("handoff.move-10k", name, "answered", answered, connections=count)
