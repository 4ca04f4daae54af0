"""Named pipes for asyncio: opening them, from either side."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Literal, Self

from ..deadline import Deadline
from ..errors import ObjectClosed, OperationAborted, OperationTimeout, PipeBusy, PipeNotFound
from ..wire.pipe import Direction
from .pipe_aio import AsyncConnection, AsyncPipeEnd
from .pipe_client import DEFAULT_WAIT, default_wait, give_up, search_for
from .pipe_client import NamedPipeClient as _SyncClient
from .pipe_end import DEFAULT_MAX_MESSAGE, mode_is_message
from .pipe_server import NamedPipeServer as _SyncServer

__all__ = ["NamedPipeClient", "NamedPipeServer", "call_pipe", "wait_pipe"]


class NamedPipeServer:
    """`portway.NamedPipeServer` for one event loop: the same arguments and errors. ``sync`` is the server itself."""

    def __init__(self, name: str, **options: Any) -> None:
        self.sync = _SyncServer(name, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._returned: deque[Any] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching = -1

    @property
    def name(self) -> str:
        return self.sync.name

    @property
    def closed(self) -> bool:
        return self.sync.closed

    async def accept(self, timeout: float | None = None) -> AsyncConnection:
        """The next client; the caller closes it. Cancelling loses none."""
        if not self._waiting:
            found = self._returned.popleft() if self._returned else self.sync.serving.accept()
            if found is not None:
                return self._connection(found)
        self._loop = asyncio.get_running_loop()
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        self._watch()
        try:
            async with asyncio.timeout(timeout):
                return self._connection(await waiter)
        except TimeoutError:
            self._keep(waiter)
            raise OperationTimeout(
                f"timed out after {timeout:g} s waiting for a client of the pipe {self.name}"
            ) from None
        except asyncio.CancelledError:
            self._keep(waiter)
            raise

    def _connection(self, found: Any) -> AsyncConnection:
        return AsyncConnection(self.sync._connection(*found))

    def _keep(self, waiter: asyncio.Future[Any]) -> None:
        """A client that came in the moment of cancelling is the next accept()'s."""
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            other = next((one for one in self._waiting if not one.done()), None)
            if self.closed:
                self.sync._connection(*waiter.result()).close()
            elif other is not None:
                other.set_result(waiter.result())
            else:
                self._returned.append(waiter.result())

    def _watch(self) -> None:
        if self._watching < 0 and self._loop is not None:
            self._watching = self.sync.fileno()
            self._loop.add_reader(self._watching, self._readable)

    def _readable(self) -> None:
        while self._waiting:
            waiter = self._waiting[0]
            if waiter.done():
                self._waiting.popleft()
                continue
            try:
                found = self.sync.serving.accept()
            except Exception as error:
                self._waiting.popleft().set_exception(error)
                continue
            if found is None:
                return
            self._waiting.popleft().set_result(found)
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watching >= 0 and self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._watching)
        self._watching = -1

    def cancel(self) -> None:
        """Ends every accept() that waits now with `OperationAborted`."""
        self._wake(OperationAborted(f"accept() of the pipe {self.name} was cancelled"))

    def _wake(self, error: Exception) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    async def serve(self, handler: Callable[[AsyncConnection], Awaitable[Any]]) -> None:
        """Runs ``await handler(pipe)`` for each client in a task of its own, and closes the pipe after it, until
        `aclose`, or until this is cancelled, which cancels the conversations. What a handler raises is reported."""
        try:
            async for pipe in self:
                task = asyncio.ensure_future(self._converse(handler, pipe))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _converse(self, handler: Callable[[AsyncConnection], Awaitable[Any]], pipe: AsyncConnection) -> None:
        async with pipe:
            try:
                await handler(pipe)
            except (BrokenPipeError, ConnectionError):
                pass
            except Exception as error:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"the handler of the pipe {self.name} failed", "exception": error}
                )

    async def aclose(self) -> None:
        """Listens no longer; who waits in accept() gets `ObjectClosed`. Conversations go on."""
        self._unwatch()
        self._wake(ObjectClosed(f"the server of the pipe {self.name} was closed"))
        while self._returned:
            self._connection(self._returned.popleft()).sync.close()
        self.sync.close()

    async def __aiter__(self) -> AsyncIterator[AsyncConnection]:
        while not self.closed:
            try:
                yield await self.accept()
            except ObjectClosed:
                return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class NamedPipeClient(AsyncPipeEnd):
    """`portway.NamedPipeClient`: ``async with NamedPipeClient(name) as pipe``, or ``await ....open(name)``."""

    def __init__(self, name: str, *, timeout: float | None = 0, appear: bool = False, **options: Any) -> None:
        self._how = name, timeout, appear, options

    @classmethod
    async def open(cls, name: str, **options: Any) -> Self:
        """The opened client; the caller closes it."""
        return await cls(name, **options).__aenter__()

    async def __aenter__(self) -> Self:
        if hasattr(self, "sync"):  # from `open`
            return self
        name, timeout, appear, options = self._how
        end = await _opened(name, Deadline(timeout), appear, **options)
        AsyncPipeEnd.__init__(self, end)
        return self

    @property
    def closed(self) -> bool:
        return not hasattr(self, "sync") or self.sync.closed


async def _opened(
    name: str, deadline: Deadline, appear: bool, *, direction: str | Direction | None = None,
    read_mode: Literal["byte", "message"] | None = None, server_uid: int | None = None,
    max_message: int = DEFAULT_MAX_MESSAGE, call_timeout: float | None = None,
    root: str | os.PathLike[str] | None = None,
) -> _SyncClient:  # fmt: skip
    wanted = None if read_mode is None else mode_is_message(read_mode, "read_mode")
    with search_for(name, direction, server_uid, root) as search:
        search.patient = appear
        while True:
            try:
                return _SyncClient.adopting(search.claim(), search, wanted, max_message, call_timeout)
            except (PipeBusy, PipeNotFound) as error:
                give_up(error, deadline, appear)
            await search.pause_task(deadline)


async def call_pipe(
    name: str, data: bytes, *, timeout: float | None = DEFAULT_WAIT, size: int | None = None, **options: Any
) -> bytes:
    """`portway.call_pipe`, awaited."""
    if timeout == DEFAULT_WAIT:
        waiting, deadline = default_wait(name, options.get("server_uid"), options.get("root")), Deadline(None)
    else:
        waiting = deadline = Deadline(timeout)
    client = NamedPipeClient(name, direction="duplex", read_mode="message", timeout=waiting.remaining(), **options)
    async with client as pipe:
        return await pipe.transact(data, size, timeout=deadline.remaining())


async def wait_pipe(
    name: str, timeout: float | None = DEFAULT_WAIT, *, server_uid: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> None:  # fmt: skip
    """`portway.wait_pipe`, awaited."""
    deadline = Deadline(timeout) if timeout != DEFAULT_WAIT else None
    with search_for(name, None, server_uid, root) as search:
        while True:
            try:
                return search.listens()
            except PipeBusy as error:
                deadline = deadline or Deadline(search.default_wait_ms / 1000)
                if deadline.expired:
                    raise deadline.error(f"waiting for a free instance of the pipe {search.name}") from error
            await search.pause_task(deadline)
