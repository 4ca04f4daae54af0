"""One place that checks bounds: every decoder reads through a `Cursor`."""

from __future__ import annotations

__all__ = ["Cursor", "Truncated"]


class Truncated(Exception):
    """More bytes were asked for than there are. Decoders turn it into "need more" or into their own error."""

    def __init__(self, at: int, wanted: int, there: int) -> None:
        super().__init__(f"{wanted} bytes wanted at offset {at}, {there} there")
        self.at, self.wanted, self.there = at, wanted, there


class Cursor:
    """A position in bytes that never leaves them."""

    __slots__ = ("at", "view")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.view = memoryview(data)
        self.at = 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes; `Truncated` when there are fewer, and the position stays."""
        end = self.at + size
        if size < 0 or end > len(self.view):
            raise Truncated(self.at, size, len(self.view) - self.at)
        part, self.at = self.view[self.at : end], end
        return part

    def uint(self, size: int) -> int:
        """A little-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> memoryview:
        return self.view[self.at :]

    @property
    def left(self) -> int:
        return len(self.view) - self.at
