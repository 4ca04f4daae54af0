"""One of the two unrelated processes between which the tour's connection moves: ``python -m portway.tour.peer``.

It answers each line of its connection with a count that travels along. Orders come on standard input: ``connect PORT``,
``give PID``; what happens is said on standard output, JSON lines.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from typing import Any

import portway

__all__ = ["main"]


class Peer:
    def __init__(self, inbox: portway.HandoffInbox) -> None:
        self.inbox = inbox
        self.selector = selectors.DefaultSelector()
        self.connection: socket.socket | None = None
        self.unread, self.count = b"", 0
        self.sessions: dict[int, portway.HandoffSession] = {}

    def say(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, "pid": os.getpid(), **facts}), flush=True)

    def use(self, connection: socket.socket, unread: bytes, count: int) -> None:
        self.connection, self.unread, self.count = connection, unread, count
        self.selector.register(connection, selectors.EVENT_READ, self.on_data)

    def on_data(self) -> None:
        assert self.connection is not None
        data = self.connection.recv(65536)
        if not data:
            self.drop()
            return
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.connection.sendall(f"{self.count} {os.getpid()} {line.decode()}\n".encode())
        if self.unread:
            self.say("holds", unread=self.unread.decode(), count=self.count)

    def drop(self) -> None:
        assert self.connection is not None
        self.selector.unregister(self.connection)  # before close: another process may still have the connection
        self.connection.close()
        self.connection = None

    def on_socket(self) -> None:
        sock = self.inbox.receive(5)
        state = json.loads(sock.state)
        micros = (time.monotonic_ns() - state["at"]) / 1000
        self.use(sock, sock.unread, state["count"])
        self.say("got", micros=micros, unread=sock.unread.decode(), count=self.count)

    def on_order(self) -> None:
        words = sys.stdin.readline().split()
        if not words:
            raise EOFError
        number = int(words[1])
        if words[0] == "connect":
            self.use(socket.create_connection(("127.0.0.1", number), 5), b"", 0)
        elif self.connection is not None:
            if number not in self.sessions:
                self.sessions[number] = portway.HandoffSession(number)
            state = json.dumps({"count": self.count, "at": time.monotonic_ns()}).encode()
            self.sessions[number].send(self.connection, unread=self.unread, state=state)
            self.drop()

    def run(self) -> None:
        self.selector.register(sys.stdin, selectors.EVENT_READ, self.on_order)
        self.selector.register(self.inbox, selectors.EVENT_READ, self.on_socket)
        self.say("ready")
        while True:
            for key, _ in self.selector.select():
                key.data()


def main() -> None:
    with portway.HandoffInbox() as inbox:
        try:
            Peer(inbox).run()
        except (EOFError, KeyboardInterrupt):
            pass


if __name__ == "__main__":
    main()
