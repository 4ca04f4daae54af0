"""The public nouns of `portway` for asyncio: the same names, arguments and errors, awaited.

What can be done without waiting is done at once; a wait is the event loop's. Cancelling a wait loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import errors
from .deadline import Deadline
from .kernel import handoff as _handoff
from .kernel.inbox import HandoffInbox as _SyncInbox
from .kernel.offer import expired, pending_offer
from .kernel.session import HandoffSession as _SyncSession
from .wire.handoff import SocketInformation

if TYPE_CHECKING:
    from .kernel.pipe_aio_server import NamedPipeClient, NamedPipeServer, call_pipe, wait_pipe
    from .kernel.sync_aio import Event, Mutex, Semaphore, WaitableTimer, signal_and_wait, wait_all, wait_any
    from .supervise.hook_aio import AsyncGeneration, attach, detach, generation

__all__ = [
    "AsyncGeneration", "Event", "HandoffInbox", "HandoffSession", "Mutex", "NamedPipeClient", "NamedPipeServer",
    "Semaphore", "WaitableTimer", "attach", "call_pipe", "detach", "duplicate_and_close", "duplicate_socket",
    "generation", "signal_and_wait", "socket_from", "wait_all", "wait_any", "wait_claimed", "wait_pipe",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in ("AsyncGeneration", "attach", "detach", "generation"):
        from .supervise import hook_aio

        return getattr(hook_aio, name)
    if name in ("Event", "Mutex", "Semaphore", "WaitableTimer", "signal_and_wait", "wait_all", "wait_any"):
        from .kernel import sync_aio

        return getattr(sync_aio, name)
    if name in ("NamedPipeClient", "NamedPipeServer", "call_pipe", "wait_pipe"):
        from .kernel import pipe_aio_server

        return getattr(pipe_aio_server, name)
    raise AttributeError(f"module 'portway.aio' has no attribute {name!r}")


async def _patiently(call: Any, timeout: float | None) -> Any:
    """`call(0)` here; only if it would have to wait, the whole again in a thread."""
    try:
        return call(0)
    except errors.OperationTimeout:
        if timeout == 0:
            raise
    return await asyncio.to_thread(call, timeout)


async def duplicate_socket(
    sock: Any, pid: int, *, timeout: float | None = 5.0, **options: Any
) -> SocketInformation:
    """`portway.duplicate_socket`, without blocking the loop while the target's queue is full."""
    info: SocketInformation = await _patiently(
        lambda limit: _handoff.duplicate_socket(sock, pid, timeout=limit, **options), timeout
    )
    return info


async def duplicate_and_close(
    sock: Any, pid: int, *, timeout: float | None = 5.0, **options: Any
) -> SocketInformation:
    """`portway.duplicate_and_close`. `detach` a transport first: asyncio must not watch the socket any more."""
    info: SocketInformation = await _patiently(
        lambda limit: _handoff.duplicate_and_close(sock, pid, timeout=limit, **options), timeout
    )
    return info


async def socket_from(info: SocketInformation | bytes | str, *, timeout: float | None = 5.0, **options: Any) -> Any:
    """`portway.socket_from`; the socket is non-blocking, as asyncio wants it."""
    deadline = Deadline(timeout)
    while True:
        try:
            return _for_loop(_handoff.socket_from(info, timeout=0, **options))
        except errors.OperationTimeout:  # other sockets lie before it in the inbox; a thread would lose it if cancelled
            deadline.check("for the sockets before it to be received")
        await asyncio.sleep(0.002)


def _for_loop(sock: Any) -> Any:
    if hasattr(sock, "setblocking"):
        sock.setblocking(False)
    return sock


async def wait_claimed(info: SocketInformation, timeout: float | None = None) -> None:
    """`portway.wait_claimed`."""
    offer = pending_offer(info)
    if offer is None:
        return
    loop, done, deadline = asyncio.get_running_loop(), asyncio.Event(), Deadline(timeout)

    def report() -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    offer.then.append(report)
    try:
        if not offer.done.is_set():
            async with asyncio.timeout(timeout):
                await done.wait()
    except TimeoutError:
        raise deadline.error(f"waiting for pid {info.target_pid} to claim a socket") from None
    finally:
        offer.then.remove(report)
    if not offer.taken:
        raise expired(info)


class HandoffInbox:
    """`portway.HandoffInbox` for one event loop. ``socket_from`` finds what lies in it as well."""

    def __init__(self, **options: Any) -> None:
        self._inbox = _SyncInbox(**options)
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Future[None] | None = None

    async def receive(self, timeout: float | None = None) -> Any:
        """The next socket that was sent, non-blocking; `OperationTimeout` after `timeout` seconds."""
        return _for_loop(await self._when_readable(self._inbox.receive, timeout))

    async def receive_many(self, timeout: float | None = None) -> list[Any]:
        """All that are there, at least one."""
        many: list[Any] = await self._when_readable(self._inbox.receive_many, timeout)
        return [_for_loop(sock) for sock in many]

    async def _when_readable(self, receive: Any, timeout: float | None) -> Any:
        deadline = Deadline(timeout)
        try:
            async with asyncio.timeout(timeout), self._turn:
                while True:
                    try:
                        return receive(0)
                    except errors.OperationTimeout:
                        deadline.check("waiting for a socket to be handed over")
                    await self._readable()
        except TimeoutError:
            raise deadline.error("waiting for a socket to be handed over") from None

    async def _readable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._inbox.fileno()
        self._waiting = ready = loop.create_future()
        loop.add_reader(fd, _settle, ready)
        try:
            await ready
        finally:
            if self._waiting is ready:  # else aclose() was here, and the number may be another's by now
                self._waiting = None
                loop.remove_reader(fd)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while not self._inbox.closed:
            try:
                yield await self.receive()
            except errors.ObjectClosed:
                return

    async def aclose(self) -> None:
        """As `portway.HandoffInbox.close`: who waits in `receive` gets `ObjectClosed`."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            asyncio.get_running_loop().remove_reader(self._inbox.fileno())
            _settle(waiting)
        self._inbox.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class HandoffSession:
    """`portway.HandoffSession`, opened by ``async with`` or ``await HandoffSession.open(pid)``."""

    def __init__(self, pid: int, *, timeout: float | None = 5.0, **options: Any) -> None:
        self._open = lambda limit: _SyncSession(pid, timeout=limit, **options)
        self._timeout = timeout
        self._session: _SyncSession | None = None
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, pid: int, **options: Any) -> Self:
        self = cls(pid, **options)
        await self.__aenter__()
        return self

    async def __aenter__(self) -> Self:
        self._session = await _patiently(self._open, self._timeout)
        return self

    async def _call(self, name: str, *args: Any, **options: Any) -> Any:
        session = self._session
        if session is None:
            raise errors.ObjectClosed("this HandoffSession is not open")

        def call(limit: float | None) -> Any:
            session.timeout = limit
            return getattr(session, name)(*args, **options)

        async with self._turn:
            if options:  # may be a large record, in several messages that must not be begun twice
                return await asyncio.to_thread(call, self._timeout)
            return await _patiently(call, self._timeout)

    async def _batches(self, name: str, socks: Sequence[Any]) -> list[Any]:
        """In pieces of one message each, which is sent whole or not at all."""
        return [await self._call(name, socks[at : at + 100]) for at in range(0, len(socks), 100)]

    async def send(self, sock: Any, **options: Any) -> None:
        await self._call("send", sock, **options)

    async def send_many(self, socks: Sequence[Any]) -> None:
        await self._batches("send_many", socks)

    async def duplicate(self, sock: Any, **options: Any) -> SocketInformation:
        info: SocketInformation = await self._call("duplicate", sock, **options)
        return info

    async def duplicate_many(self, socks: Sequence[Any]) -> list[SocketInformation]:
        return [info for batch in await self._batches("duplicate_many", socks) for info in batch]

    async def aclose(self) -> None:
        if self._session is not None:
            self._session.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()
