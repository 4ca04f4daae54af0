"""kill -9 of either side at random points: a connection is served by the one or the other, or was its killed owner's.

"Served by neither" would be a client that waits for ever; "by both" an answer with a wrong count or one too many.
"""

from __future__ import annotations

import random
import socket
import time

import pytest
from hook_harness import ROOT, Service, service, until

CONNECTIONS = 40
ROUNDS = 12


def ask(sock: socket.socket, line: bytes) -> bytes:
    """The answer, b"" when the connection has ended; a connection that nobody serves is a TimeoutError."""
    data = b""
    try:
        sock.sendall(line + b"\n")
        while not data.endswith(b"\n") and (part := sock.recv(1000)):
            data += part
    except (ConnectionResetError, BrokenPipeError):
        return b""
    return data


def served(it: Service, socks: list[socket.socket], line: bytes, count: int) -> list[socket.socket]:
    """The connections that live; each of them gave the right answer, once."""
    living = []
    for sock in socks:
        answer = ask(sock, line)
        assert answer in (b"", b"%d %b\n" % (count, line)), answer
        if answer:
            living.append(sock)
    return living


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["successor", "source"])
@pytest.mark.parametrize("server", ["line_server.py", "threaded_line_server.py"])
def test_either_side_dies_at_a_random_point(server: str, victim: str) -> None:
    rng = random.Random(f"{server} {victim}")
    outcomes: set[str] = set()
    for number in range(ROUNDS):
        with service(str(ROOT / "examples" / server)) as it:
            it.start(1)
            new = it.start(2)
            old = it.workers[0]
            socks = [socket.create_connection(it.address, timeout=20) for _ in range(CONNECTIONS)]
            try:
                # The shared listener may have given some to the new worker already: those do not move.
                assert len(served(it, socks, b"before", 1)) == CONNECTIONS
                old.drain(2, it.inboxes[2][1])
                # At once, while they move, or when all have moved.
                pause((0.0, rng.uniform(0, 0.05), rng.uniform(0.3, 0.45))[number % 3])
                if victim == "successor":
                    new.end()
                    it.forget_inbox(2)
                else:
                    old.end()
                living = served(it, socks, b"after", 2)
                outcomes.add("all" if len(living) == CONNECTIONS else "some" if living else "none")
                survivor = old if victim == "successor" else new
                assert survivor.process.poll() is None
                if victim == "successor" and living:
                    it.start(3)
                    old.drain(3, it.inboxes[3][1])
                    old.wait_for("drained")
                    assert len(served(it, living, b"again", 3)) == len(living)
            finally:
                for sock in socks:
                    sock.close()
    assert outcomes & {"some", "all"}, "in every round every connection was lost"


def pause(seconds: float) -> None:
    """The random point itself; nothing is synchronised by it."""
    time.sleep(seconds)


def test_a_source_killed_right_after_sending() -> None:
    """The message survives it: what the inbox holds is served by the worker that starts later."""
    with service(str(ROOT / "examples" / "line_server.py")) as it:
        it.start(1)
        socks = [socket.create_connection(it.address, timeout=20) for _ in range(10)]
        try:
            for sock in socks:
                assert ask(sock, b"a") == b"1 a\n"
                sock.sendall(b"ha")
            it.inboxes[2] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            it.workers[0].drain(2, it.inboxes[2][1])
            sent = it.inboxes[2][0]
            until(lambda: len(peek(sent)) > 0, "the message")
            it.workers[0].end()
            it.start(2)
            for sock in socks:
                assert ask(sock, b"lf") == b"2 half\n"
        finally:
            for sock in socks:
                sock.close()


def peek(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""
