"""uvicorn's httptools protocol, moving.

httptools does not say where in a chunk a request ended, and cannot give bytes back. So the raw bytes since the last
clean boundary are kept (the chunk itself, mostly: no copy), and where a chunk spans two requests a scratch parser finds
the place, once, when the connection leaves.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .moving import MovingProtocol

__all__ = ["MAX_KEPT", "MovingHttpToolsProtocol", "end_of_messages"]

MAX_KEPT = 65_536
"""More than this since the last clean boundary (a large body) is not kept; the connection moves after the next one."""


class MovingHttpToolsProtocol(MovingProtocol, HttpToolsProtocol):
    handles = "httptools"
    _kept: bytes | bytearray | None = b""
    _ended = 0
    _begun = False
    _body = False

    def data_received(self, data: bytes) -> None:
        if self._kept is not None:
            self._keep(data)
        super().data_received(data)
        if self._ended and not self._begun:
            self._kept, self._ended = b"", 0

    def _keep(self, data: bytes) -> None:
        kept = self._kept
        if not kept:
            self._kept = data
        elif len(kept) + len(data) > MAX_KEPT:
            self._kept = None
        elif isinstance(kept, bytearray):
            kept += data
        else:
            self._kept = bytearray(kept + data)

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._begun = self._body = False
        self._ended += 1
        super().on_message_complete()

    def boundary(self) -> bytes | None:
        if self._body or self.pipeline or (self.cycle is not None and not self.cycle.response_complete):
            return None
        if self._ended and not self._begun:
            return b""
        if self._kept is None or not self._ended:
            return None if self._kept is None else bytes(self._kept)
        return bytes(self._kept[end_of_messages(bytes(self._kept), self._ended) :])

    def resume(self) -> None:
        pass  # what was read is parsed already

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.server_state.draining:
            self.draining_turn()


class _Counter:
    def __init__(self) -> None:
        self.ended = 0

    def on_message_complete(self) -> None:
        self.ended += 1


def end_of_messages(data: bytes, count: int) -> int:
    """The offset behind the first `count` requests in `data`, which holds them and the beginning of the next."""
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        if _messages(data[:middle]) >= count:
            high = middle
        else:
            low = middle + 1
    return low


def _messages(data: bytes) -> int:
    counter = _Counter()
    parser: Any = httptools.HttpRequestParser(counter)
    try:
        if hasattr(parser, "set_dangerous_leniencies"):
            parser.set_dangerous_leniencies(lenient_data_after_close=True)
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        pass
    return counter.ended
