"""One process accepts, several answer: the acceptor pushes connections to its workers in batches.

    python examples/acceptor_workers.py [WORKERS [CONNECTIONS]]

A worker that dies takes only its own connections with it; the acceptor sends the next ones elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections import Counter
from multiprocessing.connection import Connection

import portway
from portway.errors import HandoffError


def worker(ready: Connection) -> None:
    with portway.HandoffInbox() as inbox:
        ready.send(os.getpid())
        for connection in inbox:  # until the acceptor ends this process
            with connection:
                connection.sendall(b"%d\n" % os.getpid())


def hand_out(sessions: list[portway.HandoffSession], batch: list[socket.socket], turn: int) -> None:
    """To the worker whose turn it is, or to the next one that lives."""
    for step in range(len(sessions)):
        try:
            sessions[(turn + step) % len(sessions)].send_many(batch)
            break
        except HandoffError as error:
            print(f"acceptor: {error}", file=sys.stderr)
    for connection in batch:
        connection.close()


def accept_batch(server: socket.socket, most: int) -> list[socket.socket]:
    """At least one connection, and as many more as are there already."""
    server.settimeout(5)
    batch = [server.accept()[0]]
    server.settimeout(0)
    while len(batch) < most:
        try:
            batch.append(server.accept()[0])
        except BlockingIOError:
            break
    return batch


def main(workers: int = 3, connections: int = 300) -> None:
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [context.Process(target=worker, args=(send,), daemon=True) for _, send in ends]
    for process in processes:
        process.start()
    sessions = [portway.HandoffSession(receive.recv()) for receive, _ in ends]
    with socket.create_server(("127.0.0.1", 0), backlog=connections) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(connections)]
        left, turn = connections, 0
        while left:
            batch = accept_batch(server, min(left, connections // workers))
            hand_out(sessions, batch, turn)
            left, turn = left - len(batch), turn + 1
    answered = Counter(client.makefile().readline().strip() for client in clients)
    for client in clients:
        client.close()
    for pid, count in sorted(answered.items()):
        print(f"worker {pid} answered {count} connections")
    assert sum(answered.values()) == connections
    for session in sessions:
        session.close()
    for process in processes:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
