"""Two processes use one connection at the same time, and take turns by a lock so that lines stay whole.

    python examples/both_sides.py
"""

from __future__ import annotations

import multiprocessing
import socket
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock

import portway

LINES = 200


def write_lines(sock: socket.socket, who: str, lock: Lock) -> None:
    for number in range(LINES):
        with lock:  # without it the lines of both would be cut into each other
            sock.sendall(f"{who} {number}\n".encode())


def other_process(records: Connection, lock: Lock) -> None:
    with portway.socket_from(records.recv()) as sock:
        write_lines(sock, "target", lock)
        with lock:
            sock.settimeout(5)  # its own timeout: the source does not notice
            sock.sendall(b"target asks\n")
            print("target read:", sock.recv(100).decode().strip())


def main() -> None:
    context = multiprocessing.get_context("spawn")
    lock, (receive, send) = context.Lock(), context.Pipe(duplex=False)
    client, connection = socket.socketpair()
    shared = portway.SharedSocket.adopt(connection)  # the source gets the same robustness
    process = context.Process(target=other_process, args=(receive, lock))
    process.start()
    assert process.pid is not None
    send.send(portway.duplicate_socket(shared, process.pid))
    write_lines(shared, "source", lock)
    seen = []
    with client, shared, client.makefile("r") as lines:
        for line in lines:
            if line == "target asks\n":
                client.sendall(b"an answer\n")
                break
            seen.append(line)
        process.join(10)
        while len(seen) < 2 * LINES:
            seen.append(lines.readline())
    assert sorted(seen) == sorted(f"{who} {n}\n" for who in ("source", "target") for n in range(LINES))
    print(f"client read {len(seen)} whole lines of two processes from one connection")


if __name__ == "__main__":
    main()
