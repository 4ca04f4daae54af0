"""What both HTTP protocols do to leave for the next generation, and to begin in it.

A connection leaves where a request would begin: no response runs, nothing is parsed beyond the last request, everything
written has left this process. Bytes of a next request that were read travel as they are. Until the successor has
accepted, nothing is read and the descriptor stays open; when it refuses, the connection goes on here.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.protocols.http.flow_control import FlowControl

__all__ = ["CLOSE", "MovingProtocol"]

CLOSE = (b"connection", b"close")


class MovingProtocol(asyncio.Protocol):
    """Goes in front of uvicorn's HTTP protocol class; `boundary` and `resume` are what differs between those."""

    if TYPE_CHECKING:
        transport: asyncio.Transport
        flow: FlowControl
        config: Config
        loop: asyncio.AbstractEventLoop
        server_state: Any  # a MovingState
        connections: set[Any]
        cycle: Any
        client: tuple[str, int] | None
        server: tuple[str, int | None] | None
        timeout_keep_alive: int
        timeout_keep_alive_task: asyncio.TimerHandle | None

        def _unset_keepalive_if_required(self) -> None: ...
        def timeout_keep_alive_handler(self) -> None: ...

    handles: ClassVar[str]
    adopting: tuple[bytes, dict[str, Any]] | None = None
    """Set before connection_made on a connection that moved here: its unread bytes and its state."""
    holding = False
    """Reading is stopped because this connection is on its way, or will be once its output has left."""
    moving = False
    """Offered to the successor, which has not answered."""
    armed = False

    # On the way out

    def boundary(self) -> bytes | None:
        """The bytes read of a request that is not begun; None where the connection cannot leave."""
        raise NotImplementedError

    def resume(self) -> None:
        """Goes on after a refusal."""
        raise NotImplementedError

    @property
    def plain(self) -> bool:
        return self.transport.get_extra_info("sslcontext") is None

    def leave(self) -> None:
        """Moves to the next generation if this is the moment; called again whenever it might have become so."""
        if not self.server_state.movable or self.moving or self not in self.connections:
            return
        if self.transport.is_closing() or not self.plain:
            return
        unread = self.boundary()
        if unread is None:
            return
        again = not self.holding
        self._hold()
        if self.transport.get_write_buffer_size():
            self.server_state.flushing.add(self)
            if again:
                self.loop.call_soon(self.leave)  # uvloop writes at the end of a turn
        elif self.server_state.offer(self, unread, self._state()):
            self.moving = True
        else:
            self._release()

    def answered(self, refusal: str | None) -> None:
        """The successor has it (close this descriptor, which does not touch the connection), or will not take it."""
        self.moving = False
        if refusal is None or self.transport.is_closing():
            self.connections.discard(self)
            self.transport.abort()
        elif self.server_state.ending:
            self.transport.close()
        else:
            self.server_state.refused.add(self)
            self._release()

    def _hold(self) -> None:
        if not self.holding:
            self.holding = True
            self.armed = self.timeout_keep_alive_task is not None
            self._unset_keepalive_if_required()
        self.flow.pause_reading()

    def _release(self) -> None:
        self.holding = False
        if self.transport.is_closing():
            return
        if self.armed:
            self.arm()
        self.flow.resume_reading()
        self.resume()

    def arm(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _state(self) -> bytes:
        return json.dumps({"client": self.client, "server": self.server, "armed": self.armed}).encode()

    def last_response(self) -> None:
        """A connection that cannot move ends with its next response, and says so in it."""
        cycle = self.cycle
        if cycle is None or cycle.response_started or CLOSE in cycle.default_headers:
            return
        cycle.default_headers = [*cycle.default_headers, CLOSE]

    def shutdown(self) -> None:
        """uvicorn's end of all connections; one that is on its way is the successor's, whatever happens here."""
        if self.moving:
            self.connections.discard(self)
            self.transport.abort()
        else:
            super().shutdown()  # type: ignore[misc]

    # uvicorn's own turns

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.adopting is not None:
            self._begin(*self.adopting)
        if self.server_state.draining:
            # Not now: uvloop starts reading after this call, whatever was paused in it.
            self.loop.call_soon(self.leave)

    def _begin(self, unread: bytes, state: dict[str, Any]) -> None:
        if self.client is None and isinstance(state.get("client"), list):
            # The client has gone meanwhile: the address is still right, and its request still counts.
            self.client = tuple(state["client"])
        if unread:
            self.data_received(unread)
        elif state.get("armed"):
            self.arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.server_state.draining:
            self.draining_turn()

    def draining_turn(self) -> None:
        if self.plain and self.server_state.movable:
            self.leave()
        else:
            self.last_response()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.flushing.discard(self)
        self.server_state.refused.discard(self)
        super().connection_lost(exc)
