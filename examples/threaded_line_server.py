"""The line server of line_server.py with a thread for each connection: the same hook, blocking.

    portway run --name lines --bind 127.0.0.1:7000 -- python examples/threaded_line_server.py
"""

from __future__ import annotations

import select
import socket
import threading

import portway
from portway.errors import HandoffRefused

KIND = "line/1"
generation = portway.generation()
draining = generation.draining
wake = socket.socketpair()  # readable for every thread once draining has begun
running = 0
changed = threading.Condition()


def serve(sock: socket.socket, half: bytes = b"", count: int = 0) -> None:
    """One connection until it ends, or until a successor has it."""
    refused = False
    while True:
        ready = readable(sock, refused)
        if draining.is_set() and not (refused and ready):
            try:
                generation.hand_over(sock, KIND, half, b"%d" % count)
                return
            except HandoffRefused:
                refused = True  # nobody takes it: go on here, and offer it again when it has been quiet for a second
        if not ready:
            continue
        data = sock.recv(65_536)
        if not data:
            sock.close()
            return
        *lines, half = (half + data).split(b"\n")
        for line in lines:
            count += 1
            sock.sendall(b"%d %b\n" % (count, line))


def readable(sock: socket.socket, refused: bool) -> bool:
    """Waits for the client or for draining; whether there is something to read."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not refused:
        poll.register(wake[0], select.POLLIN)
    return any(fd == sock.fileno() for fd, _ in poll.poll(1000 if refused else None))


def run(sock: socket.socket, half: bytes = b"", count: int = 0) -> None:
    global running
    with changed:
        running += 1
    try:
        serve(sock, half, count)
    except ConnectionError:
        sock.close()
    finally:
        with changed:
            running -= 1
            changed.notify_all()


def start(sock: socket.socket, half: bytes = b"", count: int = 0) -> None:
    threading.Thread(target=run, args=(sock, half, count), daemon=True).start()


def accept(listener: socket.socket) -> None:
    while True:
        start(listener.accept()[0])


def adopt() -> None:
    for found in generation:
        start(found.sock, found.unread, int(found.state))


def main() -> None:
    listeners = list(generation.sockets.values()) or [socket.create_server(("127.0.0.1", 7000))]
    for listener in listeners:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    threading.Thread(target=adopt, daemon=True).start()
    generation.ready()
    draining.wait()
    if generation.successor is None:
        return  # `portway stop`: nobody to move to
    wake[1].send(b".")
    with changed:
        changed.wait_for(lambda: running == 0, generation.drain_remaining)
    generation.drained()
    threading.Event().wait()  # the supervisor ends this process


if __name__ == "__main__":
    main()
