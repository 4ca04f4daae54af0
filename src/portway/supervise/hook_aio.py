"""The asyncio twin of `portway.generation`, and how a connection leaves and enters a loop. Works with uvloop too."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from ..errors import HandoffRefused, ObjectClosed, OperationTimeout, TooManyDescriptors, UnsupportedSocket
from ..wire.handover import Moving
from .hook import BaseGeneration
from .hook_core import Core, core
from .hook_reactor import LoopReactor
from .hook_source import Mover, Offer
from .hook_target import Adopted, Batch, Check, Receiver

__all__ = ["AsyncGeneration", "Detached", "attach", "detach", "generation"]


class AsyncGeneration(BaseGeneration):
    """As `portway.Generation`, awaited. Belongs to the loop it was made in; see `generation`."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._loop = loop
        self._reactor = LoopReactor(loop)
        self._mover = Mover(self._reactor, core.number)
        self._draining = asyncio.Event()
        self._receiver = Receiver(core.inbox) if core.inbox is not None else None
        self._batches: asyncio.Queue[Batch | None] = asyncio.Queue()
        self._batch: Batch | None = None
        self._take: Callable[[Batch], object] | None = None
        self._watched: set[int] = set()
        self._turn = asyncio.Lock()
        core.listen(self._changed_anywhere)
        core.read_control(lambda: self._reactor)
        self._changed()

    @property
    def draining(self) -> asyncio.Event:
        """Set once this worker should hand over and finish. Reading it promises that this server does so by itself:
        no stop signal comes before `drained` or the end of `drain_limit`."""
        self._core.hello()
        return self._draining

    @property
    def movable(self) -> bool:
        """Whether there is, as far as is known, a newer generation that takes connections."""
        return self._mover.target

    @property
    def moving(self) -> int:
        """Connections offered and not yet accepted or refused."""
        return self._mover.pending

    async def hand_over(self, sock: socket.socket, kind: str, unread: bytes = b"", state: bytes = b"") -> None:
        """Gives a connection to the newer generation, and returns once that has it; `sock` is closed then.

        As `portway.Generation.hand_over`. `sock` must be out of the loop (`portway.aio.detach` takes it out).
        Cancelled before the message left, the socket is the caller's; after that it is the successor's, or closed.
        """
        moving = self._movable(sock, kind, unread, state)
        over: asyncio.Future[str | None] = self._loop.create_future()
        offer = Offer(sock.fileno(), moving, lambda reason: _end(over, sock, reason))
        self._mover.submit(offer)
        try:
            refusal = await over
        except asyncio.CancelledError:
            self._mover.withdraw(offer)
            raise
        if refusal is not None:
            raise HandoffRefused(f"the connection stays here: {refusal}", hint="go on serving it")
        sock.close()

    def offer(self, fd: int, moving: Moving, done: Callable[[str | None], object]) -> None:
        """`hand_over` for servers made of callbacks: ``done(None)`` when accepted, ``done(reason)`` when not, later.

        Until then nobody reads from `fd`, and it stays open and the caller's.
        """
        self._mover.submit(Offer(fd, moving, done))

    def on_batch(self, take: Callable[[Batch], object]) -> None:
        """Has `take` called in the loop with each message of connections; it answers for each (`Batch.accept`)."""
        self._take = take
        self._listen()

    async def adopted(self, timeout: float | None = None, *, check: Check | None = None) -> Adopted | None:
        """The next connection from an older generation; None when none will ever come.

        As `portway.Generation.adopted`; `attach` makes streams of what it gives.
        """
        self._listen()
        try:
            async with asyncio.timeout(timeout):
                async with self._turn:
                    return await self._next(check)
        except TimeoutError:
            raise OperationTimeout(
                f"timed out after {timeout:g} s waiting for a connection from an older generation"
            ) from None

    async def __aiter__(self) -> AsyncIterator[Adopted]:
        while (found := await self.adopted()) is not None:
            yield found

    async def _next(self, check: Check | None) -> Adopted | None:
        while True:
            while self._batch is not None and self._batch.fds:
                found = self._batch.accept(check)
                if found is not None:
                    return found
            if self._receiver is None or (self._batches.empty() and not self._receiver.descriptors()):
                return None
            self._batch = await self._batches.get()

    def _listen(self) -> None:
        if self._receiver is None or self._watched:
            return
        self._core.hello(adopts=True)
        self._watch(self._receiver)

    def _watch(self, receiver: Receiver) -> None:
        wanted = set(receiver.descriptors())
        for fd in self._watched - wanted:
            self._reactor.watch(fd, None)
        for fd in wanted - self._watched:
            self._reactor.watch(fd, lambda: self._on_message(receiver))
        self._watched = wanted

    def _on_message(self, receiver: Receiver) -> None:
        # A reply socket that is done is closed by the step: stop watching its number before that can be used again.
        for fd in list(receiver.partial):
            self._reactor.watch(fd, None)
            self._watched.discard(fd)
        receiver.step()
        self._watch(receiver)
        while receiver.ready:
            batch = receiver.ready.popleft()
            if self._take is not None:
                self._take(batch)
            else:
                self._batches.put_nowait(batch)
        if not receiver.descriptors():
            self._batches.put_nowait(None)

    def _changed_anywhere(self) -> None:
        if self._loop.is_closed():
            self._core.unlisten(self._changed_anywhere)
        elif _running() is self._loop:
            self._changed()
        else:
            self._reactor.call_soon(self._changed)

    def _changed(self) -> None:
        self._mover.retarget(self._core.target)
        if self._core.leaving:
            self._draining.set()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _end(over: asyncio.Future[str | None], sock: socket.socket, reason: str | None) -> None:
    if over.cancelled():
        sock.close()  # the caller has gone: it is the successor's now, or nobody's
    elif not over.done():
        over.set_result(reason)


_generation: AsyncGeneration | None = None


def generation() -> AsyncGeneration:
    """The asyncio twin of `portway.generation`, to be called in a running loop: the same object for each call there."""
    global _generation
    loop = asyncio.get_running_loop()
    found = _generation
    if found is None or found._loop is not loop or found._core.pid != os.getpid():
        found = _generation = AsyncGeneration(core(), loop)
    return found


class Detached(NamedTuple):
    sock: socket.socket
    unread: bytes


async def detach(target: asyncio.Transport | asyncio.StreamWriter) -> Detached:
    """Takes a connection out of the loop: ``(sock, unread)``. What was written is sent first; reading stops at once.

    The socket is the caller's (non-blocking, close-on-exec), and unread are the bytes that a stream's reader had
    buffered; no byte is lost and the connection is not shut down. The protocol sees ``connection_lost(None)``. Nobody
    may be waiting in the stream's reader: cancel that task first (a cancelled ``readline`` keeps what came so far).
    `UnsupportedSocket` for TLS and pipes, `ObjectClosed` when the connection is closing or is lost meanwhile,
    `TooManyDescriptors` (it is served on) when there is no room for the moment in which it has two.
    """
    transport = target.transport if isinstance(target, asyncio.StreamWriter) else target
    raw = transport.get_extra_info("socket")
    if raw is None or transport.get_extra_info("sslcontext") is not None:
        raise UnsupportedSocket(
            "only a plain socket's transport can be detached; TLS keeps its keys in this process",
            hint="finish a TLS connection here and close it",
        )
    if isinstance(transport, asyncio.Transport):
        transport.pause_reading()
    await _flushed(transport)
    if isinstance(transport, asyncio.Transport):
        transport.pause_reading()  # again: a protocol's resume_writing may have resumed it
    unread = _buffered(target) if isinstance(target, asyncio.StreamWriter) else b""
    try:
        sock = socket.socket(fileno=os.dup(raw.fileno()))
    except OSError as error:
        if isinstance(transport, asyncio.Transport):
            transport.resume_reading()
        raise TooManyDescriptors(
            "no descriptor left for a moment's second one", hint="detach fewer at once, or raise RLIMIT_NOFILE"
        ) from error
    sock.setblocking(False)
    transport.abort()
    await asyncio.sleep(0)
    return Detached(sock, unread)


def _buffered(writer: asyncio.StreamWriter) -> bytes:
    reader = writer._reader  # type: ignore[attr-defined]
    return b"" if reader is None else bytes(reader._buffer)


async def _flushed(transport: asyncio.WriteTransport) -> None:
    """Waits until nothing is left to write; there is no public event for it, and a full buffer means a slow peer."""
    pause = 0.0
    while transport.get_write_buffer_size() and not transport.is_closing():
        await asyncio.sleep(pause)
        pause = min(0.05, pause + 0.001)
    if transport.is_closing():
        raise ObjectClosed("this connection is closing: there is nothing left to detach")


async def attach(
    sock: socket.socket, unread: bytes = b"", *, limit: int = 65_536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams for a connection that was detached or adopted; the reader gives `unread` first. They own the socket."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    if unread:
        reader.feed_data(unread)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
