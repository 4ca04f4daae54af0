"""A line server whose connections survive `portway reload`, each with half a line read and a count of its own.

    portway run --name lines --bind 127.0.0.1:7000 -- python examples/line_server.py
    portway reload lines

Each line comes back as ``<count> <line>``; count numbers the lines of this connection over all generations. On a reload
the connections move to the new process: the client sees nothing of it, and no byte is lost or doubled.
"""

from __future__ import annotations

import asyncio
import socket

import portway.aio
from portway.errors import HandoffRefused, ObjectClosed

KIND = "line/1"
AT_ONCE = 500
open_connections: set[Line] = set()


class Line(asyncio.Protocol):
    """One connection. What a successor needs of it is the half line and the count."""

    def __init__(self, half: bytes = b"", count: int = 0) -> None:
        self.half, self.count = half, count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        open_connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        open_connections.discard(self)

    def data_received(self, data: bytes) -> None:
        *lines, self.half = (self.half + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.transport.write(b"%d %b\n" % (self.count, line))

    def pause_writing(self) -> None:
        self.transport.pause_reading()  # a client that sends and does not read gets no more of our memory

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def move(connection: Line) -> None:
    """To the newer generation, or back here when that will not take it."""
    try:
        sock, _ = await portway.aio.detach(connection.transport)
    except ObjectClosed:
        return  # the client has gone meanwhile
    half, count = connection.half, connection.count
    try:
        await portway.aio.generation().hand_over(sock, KIND, half, b"%d" % count)
    except HandoffRefused:
        await serve(sock, half, count)


async def serve(sock: socket.socket, half: bytes, count: int) -> None:
    await asyncio.get_running_loop().connect_accepted_socket(lambda: Line(half, count), sock)


async def adopt(generation: portway.aio.AsyncGeneration) -> None:
    async for found in generation:
        await serve(found.sock, found.unread, int(found.state))


async def main() -> None:
    generation, loop = portway.aio.generation(), asyncio.get_running_loop()
    servers = [await loop.create_server(Line, sock=sock) for sock in generation.sockets.values()]
    if not servers:
        servers = [await loop.create_server(Line, "127.0.0.1", 7000)]
    adopting = asyncio.create_task(adopt(generation))
    adopting.add_done_callback(lambda task: task.cancelled() or task.result())
    generation.ready()
    await generation.draining.wait()
    await asyncio.sleep(0.3)  # what the kernel had queued for us is accepted first
    for server in servers:
        server.close()
    if generation.successor is None:
        return  # `portway stop`: nobody to move to
    await drain(generation)


async def drain(generation: portway.aio.AsyncGeneration) -> None:
    """Moves what there is, and what an even older generation still sends, until the supervisor ends this process."""
    told = False
    while True:
        before = len(open_connections)
        await asyncio.gather(*map(move, list(open_connections)[:AT_ONCE]))
        if not open_connections and not told:
            generation.drained()
            told = True
        await asyncio.sleep(0 if len(open_connections) < before else 0.05)


if __name__ == "__main__":
    asyncio.run(main())
