"""Length-prefixed messages on a stream: 4 bytes, big-endian, then as many bytes.

The smallest protocol with a state that must travel when its connection does: a half-read frame.
"""

from __future__ import annotations

from ..errors import PortwayError

__all__ = ["FrameReader", "FrameTooLarge", "pack_frame"]


class FrameTooLarge(PortwayError, ValueError):
    code = 234  # ERROR_MORE_DATA


def pack_frame(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


class FrameReader:
    """Bytes in, whole messages out; what is left over is `pending`."""

    def __init__(self, max_message: int = 1 << 20, pending: bytes = b"") -> None:
        self.max_message = max_message
        self._buffer = bytearray(pending)

    @property
    def pending(self) -> bytes:
        """Bytes of a frame that is not complete yet, with its prefix."""
        return bytes(self._buffer)

    def receive(self, data: bytes) -> list[bytes]:
        """The messages complete by now. `FrameTooLarge` as soon as a prefix announces more than `max_message`."""
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= 4:
            size = int.from_bytes(self._buffer[at : at + 4], "big")
            if size > self.max_message:
                raise FrameTooLarge(f"a frame of {size} bytes: at most {self.max_message}", hint="raise max_message")
            if len(self._buffer) - at - 4 < size:
                break
            messages.append(bytes(self._buffer[at + 4 : at + 4 + size]))
            at += 4 + size
        del self._buffer[:at]
        return messages
