"""``pipes``: named pipes, their rivals on one machine, .NET at the other end, and what kill -9 leaves.

pipe.message-32, -4k, -64k  us     a message there and back between two processes on one core
pipe.dotnet                 per_s  round trips of 32 bytes in .NET's frames: see pipes_dotnet.py
pipe.dotnet-oneway-64k      mb_s   64 KB frames one way
pipe.churn                  connections, wedged, leaked ...  see pipes_churn.py

``portway`` and ``portway-aio`` receive with a time limit, and could be cancelled. ``af_unix`` is the plainest blocking
code there is: a stream socket without time limit, `sendall`, and `recv` until the size, which both know, is reached.
``mp.connection`` is `Listener` and `Client` over a Unix socket, ``asyncio-streams`` carries a length of 4 bytes and
that much, as a stream needs it to have messages at all; neither has a time limit.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from . import pipes_churn, pipes_dotnet
from .harness import Failed, Figures, Options, Worker, remark, rounds_of, workers

__all__ = ["CONTENDERS", "PINNABLE", "WORKS", "run"]

CONTENDERS = ("portway", "portway-aio", "af_unix", "mp.connection", "asyncio-streams", "dotnet")
SIZES = {"pipe.message-32": 32, "pipe.message-4k": 4096, "pipe.message-64k": 65536}
WORKS = (*SIZES, "pipe.dotnet", "pipe.dotnet-oneway-64k", "pipe.churn")
PINNABLE = False  # those that are to be pinned are, always
LIMIT = 10.0


def run(options: Options, figures: Figures) -> None:
    if any(options.wants_work(work) for work in SIZES):
        with _world():
            _messages(options, figures)
    if options.wants_work("pipe.dotnet") or options.wants_work("pipe.dotnet-oneway-64k"):
        with _world():
            pipes_dotnet.run(options, figures)
    if options.wants_work("pipe.churn") and options.wants("portway"):
        with _world():
            pipes_churn.run(options, figures)


@contextmanager
def _world() -> Iterator[None]:
    """A place of its own for everything that has a path, .NET's too."""
    before = {name: os.environ.get(name) for name in ("PORTWAY_ROOT", "TMPDIR")}
    root = tempfile.mkdtemp(prefix="portway-bench-")
    os.environ.update(PORTWAY_ROOT=root, TMPDIR=root)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(root, ignore_errors=True)


# -- the contenders ----------------------------------------------------------------------------------------------------


class Plain:
    """Raw Unix stream sockets; the others have the same face. One object for each end, made in its process."""

    path = "af_unix"

    def _at(self) -> str:
        return f"{os.environ['PORTWAY_ROOT']}/{self.path}"

    def listen(self) -> None:
        self.listener: Any = socket.socket(socket.AF_UNIX)
        self.listener.bind(self._at())
        self.listener.listen()

    def accept(self) -> None:
        self.sock, _ = self.listener.accept()

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._at())

    def echo(self, count: int, size: int) -> None:
        send, receive, sock = self.sock.sendall, self._receive, self.sock
        for _ in range(count):
            send(receive(sock, size))

    def trips(self, count: int, data: bytes) -> None:
        send, receive, sock, size = self.sock.sendall, self._receive, self.sock, len(data)
        for _ in range(count):
            send(data)
            receive(sock, size)

    @staticmethod
    def _receive(sock: socket.socket, size: int) -> bytes:
        data = sock.recv(size)
        if len(data) == size:
            return data
        parts = [data]
        size -= len(data)
        while size:
            parts.append(sock.recv(size))
            size -= len(parts[-1])
        return b"".join(parts)


class Sync(Plain):
    """portway, blocking: `send` and `receive` with the end's time limit."""

    path = "sync"

    def listen(self) -> None:
        import portway

        self.server: Any = portway.NamedPipeServer(self.path, mode="message", timeout=LIMIT)

    def accept(self) -> None:
        self.pipe: Any = self.server.accept(LIMIT)

    def connect(self) -> None:
        import portway

        self.pipe = portway.NamedPipeClient(self.path, timeout=LIMIT, call_timeout=LIMIT)

    def echo(self, count: int, size: int) -> None:
        send, receive = self.pipe.send, self.pipe.receive
        for _ in range(count):
            send(receive())

    def trips(self, count: int, data: bytes) -> None:
        send, receive = self.pipe.send, self.pipe.receive
        for _ in range(count):
            send(data)
            receive()


class Multiprocessing(Sync):
    """`multiprocessing.connection`."""

    path = "mp"

    def listen(self) -> None:
        self.listener = Listener(self._at(), "AF_UNIX")

    def accept(self) -> None:
        self.use(self.listener.accept())

    def connect(self) -> None:
        self.use(Client(self._at(), "AF_UNIX"))

    def use(self, line: Connection[Any, Any]) -> None:
        self.line = line

    def echo(self, count: int, size: int) -> None:
        send, receive = self.line.send_bytes, self.line.recv_bytes
        for _ in range(count):
            send(receive())

    def trips(self, count: int, data: bytes) -> None:
        send, receive = self.line.send_bytes, self.line.recv_bytes
        for _ in range(count):
            send(data)
            receive()


class Aio(Plain):
    """portway's twin for asyncio, with the end's time limit. The loop is run for each command."""

    path = "aio"

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def listen(self) -> None:
        self.loop.run_until_complete(self._listen())

    def accept(self) -> None:
        self.loop.run_until_complete(self._accept())

    def connect(self) -> None:
        self.loop.run_until_complete(self._connect())

    def echo(self, count: int, size: int) -> None:
        self.loop.run_until_complete(self._echo(count, self._send(), self._receive_one()))

    def trips(self, count: int, data: bytes) -> None:
        self.loop.run_until_complete(self._trips(count, data, self._send(), self._receive_one()))

    async def _echo(
        self, count: int, send: Callable[[bytes], Awaitable[Any]], receive: Callable[[], Awaitable[bytes]]
    ) -> None:
        for _ in range(count):
            await send(await receive())

    async def _trips(
        self, count: int, data: bytes, send: Callable[[bytes], Awaitable[Any]], receive: Callable[[], Awaitable[bytes]]
    ) -> None:
        for _ in range(count):
            await send(data)
            await receive()

    async def _listen(self) -> None:
        from portway import aio

        self.server: Any = aio.NamedPipeServer(self.path, mode="message", timeout=LIMIT)

    async def _accept(self) -> None:
        self.pipe: Any = await self.server.accept(LIMIT)

    async def _connect(self) -> None:
        from portway import aio

        self.pipe = await aio.NamedPipeClient.open(self.path, timeout=LIMIT, call_timeout=LIMIT)

    def _send(self) -> Callable[[bytes], Awaitable[Any]]:
        send: Callable[[bytes], Awaitable[Any]] = self.pipe.send
        return send

    def _receive_one(self) -> Callable[[], Awaitable[bytes]]:
        receive: Callable[[], Awaitable[bytes]] = self.pipe.receive
        return receive


class Streams(Aio):
    """asyncio's streams with a length before each message."""

    path = "streams"
    head = struct.Struct("<I")

    async def _listen(self) -> None:
        self.came: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.server = await asyncio.start_unix_server(lambda *pair: self.came.put_nowait(pair), self._at())

    async def _accept(self) -> None:
        self.reader, self.writer = await self.came.get()

    async def _connect(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(self._at())

    def _send(self) -> Callable[[bytes], Awaitable[Any]]:
        async def send(data: bytes, head: Any = self.head.pack, writer: Any = self.writer) -> None:
            writer.write(head(len(data)) + data)
            await writer.drain()

        return send

    def _receive_one(self) -> Callable[[], Awaitable[bytes]]:
        async def receive(head: Any = self.head.unpack, exactly: Any = self.reader.readexactly) -> bytes:
            (size,) = head(await exactly(4))
            data: bytes = await exactly(size)
            return data

        return receive


KINDS: dict[str, type[Plain]] = {
    "portway": Sync, "portway-aio": Aio, "af_unix": Plain, "mp.connection": Multiprocessing, "asyncio-streams": Streams,
}  # fmt: skip


# -- there and back ----------------------------------------------------------------------------------------------------


def _server(kind: type[Plain], core: int) -> Callable[..., Any]:
    os.sched_setaffinity(0, {core})
    end = kind()

    def do(command: str, *args: Any) -> None:
        getattr(end, command)(*args)

    return do


def _client(kind: type[Plain], core: int) -> Callable[..., Any]:
    os.sched_setaffinity(0, {core})
    end = kind()

    def do(command: str, *args: Any) -> float:
        if command == "connect":
            end.connect()
            return 0
        count, size = args
        data = os.urandom(size)
        began = time.perf_counter_ns()
        end.trips(count, data)
        took: float = (time.perf_counter_ns() - began) / count / 1000
        return took

    return do


def _pair(stack: ExitStack, name: str, core: int) -> tuple[Worker, Worker]:
    server, client = stack.enter_context(
        workers([lambda: Worker(f"{name} server", _server, KINDS[name], core),
                 lambda: Worker(f"{name} client", _client, KINDS[name], core)])
    )  # fmt: skip
    server.ask("listen")
    server.order("accept")
    client.ask("connect")
    server.answer()
    return server, client


def _messages(options: Options, figures: Figures) -> None:
    core, rounds = max(os.sched_getaffinity(0)), rounds_of(options, 15)
    with ExitStack() as stack:
        pairs = {}
        for name in KINDS:
            if options.wants(name):
                pairs[name] = _pair(stack, name, core)
        for number in range(-1, rounds if pairs else -1):  # the first is to get warm
            remark(f"pipes: round {number + 1} of {rounds}" if number >= 0 else "pipes: warming up")
            for work, size in SIZES.items():
                for name, pair in list(pairs.items()):
                    if options.wants_work(work):
                        try:
                            took = _trips(*pair, 200 if options.quick else 4000 if size > 4096 else 10_000, size)
                        except Failed as error:
                            remark(f"{name} is left out: {error}")
                            del pairs[name]
                        else:
                            if number >= 0:
                                figures.add(work, name, "us", took)


def _trips(server: Worker, client: Worker, count: int, size: int) -> float:
    server.order("echo", count, size)
    took = float(client.ask("trips", count, size))
    server.answer()
    return took
