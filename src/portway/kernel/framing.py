"""A layered hand-off provider that ships: length-prefixed messages whose half-read frame travels along."""

from __future__ import annotations

import socket
import struct
from collections import deque
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import InvalidInformation, UnsupportedSocket
from ..provider import Handoff, Parcel, handoff_provider
from ..wire.framing import FrameReader, FrameTooLarge, pack_frame

__all__ = ["FramedSocket", "FramingHandoff"]

_RESERVED = struct.Struct("<BIII")  # version, max_message, frames waiting, length of the lower layer's reserved bytes


class FramedSocket:
    """Whole messages over a connected stream socket, each behind its length (4 bytes, big-endian).

    Timeouts are the socket's own (`settimeout`). Duplicate it with ``provider="framing"``: what was read and not yet
    given out, complete messages and the half-read one, comes along. ``close()`` or leaving ``with`` closes the socket.
    """

    def __init__(self, sock: socket.socket, *, max_message: int = 1 << 20) -> None:
        self.socket = sock
        self._reader = FrameReader(max_message)
        self._ready: deque[bytes] = deque()

    @property
    def max_message(self) -> int:
        return self._reader.max_message

    @property
    def buffered(self) -> bytes:
        """The bytes read from the socket and not yet given out, as they were on the wire."""
        return b"".join(map(pack_frame, self._ready)) + self._reader.pending

    def feed(self, data: bytes) -> None:
        """Bytes that came from the socket before this object had it."""
        self._ready += self._reader.receive(data)

    def send(self, message: bytes) -> None:
        """Sends one message whole; `FrameTooLarge` above ``max_message`` before a byte is sent."""
        if len(message) > self.max_message:
            raise FrameTooLarge(f"a message of {len(message)} bytes: at most {self.max_message}")
        self.socket.sendall(pack_frame(message))

    def receive(self) -> bytes | None:
        """The next message, or None when the peer has ended the stream between two messages.

        ConnectionError when it ended inside one; TimeoutError and BlockingIOError as the socket is set: what was read
        of a message until then is kept.
        """
        while not self._ready:
            data = self.socket.recv(65536)
            if not data:
                if self._reader.pending:
                    raise ConnectionError(f"the stream ended inside a message, after {len(self._reader.pending)} bytes")
                return None
            self.feed(data)
        return self._ready.popleft()

    def fileno(self) -> int:
        """To wait on; messages may be buffered already, so call `receive` until it would block."""
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FramingHandoff:
    """Layered over another provider; adds the framing's state to the reserved bytes, the buffered bytes to `unread`."""

    name = "framing"
    restores: Literal["descriptor", "object"] = "object"

    def __init__(self, below: Handoff | None = None) -> None:
        self._below = below

    @property
    def below(self) -> Handoff:
        return self._below or handoff_provider("kernel")

    def missing(self) -> str | None:
        return self.below.missing()

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        if not isinstance(obj, FramedSocket):
            raise UnsupportedSocket(f"{obj!r} is no FramedSocket", hint="leave provider= out for a plain socket")
        parcel = self.below.duplicate(obj.socket, pid)
        parcel.unread = obj.buffered + parcel.unread
        own = _RESERVED.pack(1, obj.max_message, len(obj._ready), len(parcel.reserved))
        parcel.reserved = own + parcel.reserved
        return parcel

    def restore(self, parcel: Parcel) -> FramedSocket:
        if len(parcel.reserved) < _RESERVED.size:
            raise InvalidInformation(f"{len(parcel.reserved)} reserved bytes: the framing provider wrote more")
        version, max_message, frames, below = _RESERVED.unpack_from(parcel.reserved)
        rest = parcel.reserved[_RESERVED.size :]
        if version != 1 or below != len(rest):
            raise InvalidInformation(f"reserved bytes of framing version {version}, {len(rest)} of {below} bytes below")
        unread, parcel.unread, parcel.reserved = parcel.unread, b"", rest
        framed = FramedSocket(self.below.restore(parcel), max_message=max_message)
        framed.feed(unread)
        if len(framed._ready) != frames:
            raise InvalidInformation(f"{len(framed._ready)} whole messages came, the record names {frames}")
        return framed

    def close(self, obj: Any) -> None:
        obj.close()
