"""What the connections of one ASGI worker share: whether they should leave, and the way out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.server import ServerState

from ...wire.handover import MAX_PAYLOAD, Moving

if TYPE_CHECKING:
    from ..hook_aio import AsyncGeneration
    from .moving import MovingProtocol

__all__ = ["KIND", "MovingState"]

KIND = "http/1.1"
_AGAIN = 1.0
_FLUSH = 0.02


class MovingState(ServerState):
    """uvicorn's shared state, and the connections that wait to move. Lives in one loop."""

    def __init__(self, generation: AsyncGeneration) -> None:
        super().__init__()
        self.generation = generation
        self.draining = False
        self.ending = False
        """The drain limit is over, or a stop signal came: connections are closed instead of moved."""
        self.flushing: set[MovingProtocol] = set()
        self.refused: set[MovingProtocol] = set()

    @property
    def movable(self) -> bool:
        return self.draining and not self.ending and self.generation.movable

    def offer(self, connection: MovingProtocol, unread: bytes, state: bytes) -> bool:
        """Sends a connection on its way; False when it carries more than may travel."""
        if len(unread) + len(state) > MAX_PAYLOAD:
            return False
        fd = connection.transport.get_extra_info("socket").fileno()
        self.generation.offer(fd, Moving(KIND, unread, state), connection.answered)
        return True

    async def sweep(self) -> None:
        """Looks again at connections with unsent output, and after a while at those that were refused."""
        refused_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_FLUSH)
            self._retry(self.flushing)
            if self.refused and loop.time() - refused_at >= _AGAIN:
                refused_at = loop.time()
                self._retry(self.refused)

    @staticmethod
    def _retry(waiting: set[MovingProtocol]) -> None:
        again = list(waiting)
        waiting.clear()
        for connection in again:
            connection.leave()
