"""uvicorn's server, as a worker of `portway run`: adopts connections, and on a reload hands its own on.

uvicorn's classes are no promised API: the range in pyproject.toml is what tests/supervise/test_asgi*.py ran with, at
both of its ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import time
from collections.abc import Coroutine
from typing import Any

import uvicorn

from ..hook_aio import AsyncGeneration, generation
from ..hook_target import Adopted, Batch
from .moving import MovingProtocol
from .state import KIND, MovingState

__all__ = ["MovingServer"]

SETTLE = 0.25
"""Seconds for which a draining worker goes on accepting: what the kernel had queued for it is not lost."""
_PAUSE = 0.02
_LAST_MOVES = 2.0


class MovingServer(uvicorn.Server):
    """Runs in `portway run`; outside of it this is uvicorn's server."""

    generation: AsyncGeneration
    moving_state: MovingState

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._helpers: set[asyncio.Task[None]] = set()
        self._watchdog = bool(os.environ.get("WATCHDOG_USEC"))

    # Beginning

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.generation = generation()
        self.server_state = self.moving_state = MovingState(self.generation)
        await super().startup(sockets=sockets)
        if not self.started:
            return
        self._help(self._drain())
        self.generation.on_batch(self._adopt)
        self.generation.ready()

    def _help(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self.generation.status(len(self.server_state.connections), "draining" if self.draining else "")
            if self._watchdog:
                self.generation.watchdog()
        return await super().on_tick(counter)

    @property
    def draining(self) -> bool:
        return self.moving_state.draining

    # Connections from the generation before

    def _adopt(self, batch: Batch) -> None:
        while batch.fds:
            adopted = batch.accept(self._check)
            if adopted is not None:
                self._help(self._begin(adopted))

    def _check(self, adopted: Adopted) -> str | None:
        if adopted.kind != KIND:
            return f"kind {adopted.kind!r} is not {KIND!r}"
        if self.should_exit:
            return "the successor is ending itself"
        if self.config.ssl is not None:
            return "the successor speaks TLS, this connection does not"
        return None if _state(adopted.state) is not None else "its state is not what this version of portway writes"

    async def _begin(self, adopted: Adopted) -> None:
        loop = asyncio.get_running_loop()
        protocol: Any = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        protocol.adopting = adopted.unread, _state(adopted.state)
        try:
            await loop.connect_accepted_socket(lambda: protocol, adopted.sock)
        except OSError:
            adopted.sock.close()  # the client has gone

    # Leaving for the generation after

    async def _drain(self) -> None:
        await self.generation.draining.wait()
        if self.generation.successor is None:
            self.should_exit = True  # the service is being stopped: uvicorn's own graceful end
            return
        self.moving_state.draining = True
        self._help(self.moving_state.sweep())
        for connection in list(self.server_state.connections):
            if isinstance(connection, MovingProtocol):
                connection.draining_turn()
        await self._stop_accepting()
        while self.server_state.connections or self.server_state.tasks or self.generation.moving:
            if self.generation.drain_remaining == 0.0 and not self.moving_state.ending:
                self._end_of_limit()
            await asyncio.sleep(_PAUSE)
        self.generation.drained()
        if not self.generation.supervised:
            self.should_exit = True  # nobody is there to end this worker

    async def _stop_accepting(self) -> None:
        await asyncio.sleep(SETTLE)
        listeners = list(self.generation.sockets.values())
        until = time.monotonic() + 8 * SETTLE
        while any(map(_queued, listeners)) and time.monotonic() < until:
            await asyncio.sleep(_PAUSE / 4)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_PAUSE)  # what was accepted last becomes a connection

    def _end_of_limit(self) -> None:
        self.moving_state.ending = True
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.moving_state.ending = True
        until = time.monotonic() + _LAST_MOVES
        while self.generation.moving and time.monotonic() < until:
            await asyncio.sleep(_PAUSE)
        await super().shutdown(sockets=sockets)
        for helper in list(self._helpers):
            helper.cancel()


def _queued(listener: socket.socket) -> bool:
    """Whether a connection waits to be accepted."""
    if listener.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _state(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
