"""Named pipes for asyncio: the ends. The loop waits for the descriptor; the native channel does the rest, try first.

Cancelling a call, or its time running out, loses nothing: what had been received is the next call's, and a message that
was sent in part is marked as abandoned.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from .._accel import aio as _native
from ..errors import (
    AccessDenied,
    BadPipe,
    BrokenPipe,
    ObjectClosed,
    OperationAborted,
    OperationTimeout,
    PipeBusy,
)  # fmt: skip

if TYPE_CHECKING:
    from ..wire.pipe import Direction
    from .pipe_end import PipeEnd
    from .pipe_identity import Identity
    from .pipe_server import NamedPipeConnection

__all__ = ["AsyncConnection", "AsyncPipeEnd", "Left"]

_T = TypeVar("_T")
Left = object()
"""As a timeout: the end's own."""


class AsyncPipeEnd:
    """One end of a connected pipe, for the tasks of one event loop. See `portway.kernel.pipe_end.PipeEnd`: the same
    names, arguments and errors. ``sync`` is the end itself (``peek``, ``peer``, ``mode``, ``max_message`` ...)."""

    def __init__(self, end: PipeEnd) -> None:
        self.sync = end
        self.timeout = end.timeout
        self._loop = asyncio.get_running_loop()
        self._fd = end.fileno()
        self._nowait, self._send_now = end.receive_nowait, end.send_nowait
        self._pump = _native.Pump(self._loop, self._fd, self._nowait, self._late)
        self._sending: asyncio.Lock | None = None
        self._writable: asyncio.Future[None] | None = None
        self._cancels = self._senders = 0

    # -- receiving -----------------------------------------------------------------------------------------------------

    async def receive(self, size: int | None = None, *, timeout: Any = Left) -> bytes:
        """The next message, or up to `size` bytes of it; see `PipeEnd.receive`."""
        if not self._pump.waiting:
            data = self._nowait(size)
            if data is not None:
                return data
        seconds = self.timeout if timeout is Left else timeout
        if seconds == 0:
            raise OperationTimeout(f"nothing to receive from the pipe {self.sync.name}")
        received: bytes = await self._pump.wait(size, seconds)
        return received

    def _late(self, seconds: float) -> OperationTimeout:
        return OperationTimeout(f"timed out after {seconds:g} s receiving from the pipe {self.sync.name}")

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(self, data: Any, *, timeout: Any = Left) -> int:
        """One message, or all bytes; see `PipeEnd.send`."""
        if not self._senders:  # a lock that is free may have its next owner already
            at = self._send_now(data)
            if at == (len(data) if type(data) is bytes else memoryview(data).nbytes):
                return at
        else:
            at = -1
        return await self._rest(data, at, self.timeout if timeout is Left else timeout)

    async def _rest(self, data: Any, at: int, seconds: float | None) -> int:
        if self._sending is None:
            self._sending = asyncio.Lock()
        view, cancels = memoryview(data).cast("B"), self._cancels
        self._senders += 1
        try:
            async with asyncio.timeout(seconds), self._sending:
                if cancels != self._cancels:
                    raise OperationAborted(f"cancelled: {self.sync!r}")
                while True:
                    if at < 0 or at < len(view):
                        now = self.sync.send_nowait(view, max(at, 0))
                        at = now if now >= 0 else at
                    if at == len(view):
                        return at
                    await self._when_writable()
        except (TimeoutError, asyncio.CancelledError, OperationAborted) as error:
            if at > 0 and self.sync.message and not self.sync.closed:
                self.sync.abandon()
            if isinstance(error, TimeoutError) and not isinstance(error, OperationTimeout):
                late = OperationTimeout(f"timed out after {seconds:g} s sending to the pipe {self.sync.name}")
                late.sent = max(at, 0)  # type: ignore[attr-defined]
                raise late from None
            raise
        finally:
            self._senders -= 1

    async def _when_writable(self) -> None:
        self._writable = ready = self._loop.create_future()
        self._loop.add_writer(self._fd, _settle, ready)
        try:
            await ready
        finally:
            if self._writable is ready:
                self._writable = None
                self._loop.remove_writer(self._fd)

    # -- the rest ------------------------------------------------------------------------------------------------------

    async def transact(self, data: Any, size: int | None = None, *, timeout: Any = Left) -> bytes:
        """One message there, one back; `BadPipe`, `PipeBusy` as `PipeEnd.transact`."""
        end = self.sync
        if not end.message or not end.read_message:
            raise BadPipe(f"{end!r}: only an end that reads messages can transact")
        if self._pump.waiting or end.peek(0) != (b"", 0, 0):
            raise PipeBusy(f"{end!r}: unread data is in the way, or another task receives")
        seconds = self.timeout if timeout is Left else timeout
        until = None if seconds is None else self._loop.time() + seconds
        await self.send(data, timeout=seconds)
        return await self.receive(size, timeout=None if until is None else max(0.0, until - self._loop.time()))

    async def flush(self, *, timeout: Any = Left) -> None:
        """Returns when the other end has read everything."""
        seconds = self.timeout if timeout is Left else timeout
        pause, until = 0.0005, None if seconds is None else self._loop.time() + seconds
        cancels = self._cancels
        while True:
            try:
                return self.sync.flush(timeout=0)
            except OperationTimeout:
                if cancels != self._cancels:
                    raise OperationAborted(f"cancelled: {self.sync!r}") from None
                if until is not None and self._loop.time() >= until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def peek(self, size: int = 0) -> tuple[bytes, int, int]:
        """(data, total, left); never waits."""
        return self.sync.peek(size)

    def cancel(self) -> None:
        """Ends every call that waits now with `OperationAborted`."""
        self._cancels += 1
        self._wake(OperationAborted(f"cancelled: {self.sync!r}"))

    def _wake(self, error: Exception) -> None:
        self._pump.wake(error)
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(error)

    @property
    def mode(self) -> Literal["byte", "message"]:
        return self.sync.mode

    @property
    def name(self) -> str:
        return self.sync.name

    @property
    def direction(self) -> Direction:
        return self.sync.direction

    @property
    def peer(self) -> Identity:
        return self.sync.peer

    @property
    def closed(self) -> bool:
        return self.sync.closed

    def fileno(self) -> int:
        return self.sync.fileno()

    def _detach_from_loop(self) -> None:
        self._pump.stop()
        if self._writable is not None and not self._loop.is_closed():
            self._loop.remove_writer(self._fd)
        self._wake(ObjectClosed(f"the pipe {self.sync.name} was closed meanwhile"))

    async def aclose(self) -> None:
        """Whoever waits gets `ObjectClosed`. Closing twice is fine."""
        self._detach_from_loop()
        self.sync.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                yield await self.receive()
            except BrokenPipe:
                return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"


class AsyncConnection(AsyncPipeEnd):
    """The server's end of one conversation, from ``await server.accept()``."""

    sync: NamedPipeConnection

    async def disconnect(self) -> None:
        """As `NamedPipeConnection.disconnect`."""
        self._detach_from_loop()
        self.sync.disconnect()

    async def run_as_client(self, function: Callable[..., _T], *args: Any) -> _T:
        """Calls ``function(*args)`` as the client's user, in a thread of its own; see `PipeEnd.impersonate`."""
        from .pipe_identity import run_as

        result: _T = await run_as(self.peer, function, *args)
        return result

    def impersonate(self) -> None:
        raise AccessDenied("the thread of an event loop cannot become the client", hint="use run_as_client(function)")


def _settle(ready: asyncio.Future[None]) -> None:
    with suppress(asyncio.InvalidStateError):
        ready.set_result(None)
