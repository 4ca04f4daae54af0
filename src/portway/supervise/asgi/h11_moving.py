"""uvicorn's h11 protocol, moving."""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .moving import MovingProtocol

__all__ = ["MovingH11Protocol"]


class MovingH11Protocol(MovingProtocol, H11Protocol):
    handles = "h11"

    def boundary(self) -> bytes | None:
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
        if self.conn.our_state is not h11.IDLE or self.conn.their_state is not h11.IDLE:
            return None
        unread, ended = self.conn.trailing_data
        return None if ended else unread

    def resume(self) -> None:
        self.handle_events()  # requests that were read and held back

    def on_response_complete(self) -> None:
        conn = self.conn
        if (
            not self.server_state.movable
            or not self.plain
            or self.transport.is_closing()
            or conn.our_state is not h11.DONE
            or conn.their_state is not h11.DONE
        ):
            super().on_response_complete()
            return
        # uvicorn would begin the next request here if it was read already; it begins in the successor instead.
        self.server_state.total_requests += 1
        self.arm()
        self.leave()
