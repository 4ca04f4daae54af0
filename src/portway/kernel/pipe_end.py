"""An end of a connected pipe: the native `Channel`, and what Python expects of a connection."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .._accel import pipe as _native
from ..errors import BadPipe, BrokenPipe, InvalidParameter
from ..wire.pipe import Direction

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from .._native.pipe import Channel
    from .pipe_identity import Identity
else:
    Channel = _native.Channel

__all__ = ["DEFAULT_MAX_MESSAGE", "PipeEnd", "PipeFile", "access_of", "mode_is_message"]

DEFAULT_MAX_MESSAGE = 64 << 20
_DIRECTIONS = {
    "inbound": 1, "in": 1, "r": 1, "outbound": 2, "out": 2, "w": 2, "duplex": 3, "inout": 3, "rw": 3,
}  # fmt: skip


def access_of(direction: str | Direction) -> int:
    """What an end of this direction may do, 1 read and 2 write: *inbound* is what comes in at this end."""
    if isinstance(direction, Direction):
        return int(direction)
    try:
        return _DIRECTIONS[direction.lower()]
    except (KeyError, AttributeError):
        raise InvalidParameter(f"direction={direction!r}: give 'inbound', 'outbound' or 'duplex'") from None


def mode_is_message(mode: str, what: str = "mode") -> bool:
    if mode not in ("byte", "message"):
        raise InvalidParameter(f"{what}={mode!r}: give 'byte' or 'message'")
    return mode == "message"


class PipeEnd(Channel):
    """One end of a connected pipe. Safe for threads: one sends and one receives at a time, in turn; any may `cancel`.

    ``send(data)``, ``receive()``, ``receive(size)``, ``receive_into(buffer)``, ``peek(size)``, ``transact(data)``,
    ``flush()``, all with ``timeout=`` in seconds (None: no limit, 0: do not wait; left out: the end's own ``timeout``).
    Whoever opened it closes it; leaving ``with`` does, and never loses what was written: the other end can read it
    still.

    Errors: `BrokenPipe` (the other end has gone and all was read), `NoData` (writing to one that has gone),
    `PipeNotConnected` (after `disconnect`), `MoreData`, `MessageTooLarge`, `MessageAbandoned`, `AccessDenied` (the
    wrong direction), `BadPipe`, `OperationTimeout`, `OperationAborted`, `ObjectClosed`.
    """

    is_server = False
    place: tuple[int, int, str] = 0, 0, ""
    """Slot, generation and folder of its instance; no folder for a pipe of .NET's."""
    borrowed: Any = None

    @property
    def mode(self) -> Literal["byte", "message"]:
        """The type of the pipe."""
        return "message" if self.message else "byte"

    @property
    def read_mode(self) -> Literal["byte", "message"]:
        """How this end reads a message pipe; may be changed in the middle of a message."""
        return "message" if self.read_message else "byte"

    @read_mode.setter
    def read_mode(self, mode: str) -> None:
        self.read_message = mode_is_message(mode, "read_mode")

    @property
    def direction(self) -> Direction:
        """What this end may do: INBOUND reads, OUTBOUND writes."""
        return Direction(self.access)

    @property
    def peer(self) -> Identity:
        """Who is at the other end, as the kernel vouches: pid, uid, gid, groups, start time of the process that
        connected, or that called listen()."""
        from .pipe_identity import identity_of

        return identity_of(self.fileno())

    def impersonate(self) -> AbstractContextManager[Identity]:
        """``with pipe.impersonate():`` this thread acts as the client's user. See `pipe_identity.impersonate` for what
        it is not. Source: ImpersonateNamedPipeClient, RevertToSelf."""
        from .pipe_identity import impersonate

        context: AbstractContextManager[Identity] = impersonate(self.peer)
        return context

    def leave(self) -> None:
        """For the hand-off provider: closed here, and nothing else; the conversation goes on in another process."""
        os.close(self.detach())

    def makefile(
        self, mode: str = "rb", buffering: int = -1, *, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None,
    ) -> Any:  # fmt: skip
        """A file object, as of a socket: modes r, w, rw with or without b. Its close() leaves the pipe open. Only a
        stream of bytes is a file: `BadPipe` for an end that reads messages."""
        plain = mode.replace("b", "")
        if plain not in ("r", "w", "rw") or mode.count("b") > 1:
            raise ValueError(f"mode={mode!r}: give r, w or rw, with or without b")
        raw = PipeFile(self, plain)
        if buffering == 0:
            if "b" not in mode:
                raise ValueError("unbuffered files must be binary")
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any
        if plain == "rw":
            buffered = io.BufferedRWPair(raw, PipeFile(self, plain), size)
        else:
            buffered = io.BufferedReader(raw, size) if plain == "r" else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    def __iter__(self) -> Iterator[bytes]:
        """What comes, message by message (chunk by chunk of a byte pipe), until the other end has gone."""
        while True:
            try:
                yield self.receive()
            except BrokenPipe:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self.fileno()}"
        return f"<{type(self).__name__} {self.name!r} {self.mode} {self.direction.name.lower()} {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"{self!r} cannot be pickled")


class PipeFile(io.RawIOBase):
    """The bytes of an end as a raw file."""

    def __init__(self, end: PipeEnd, mode: str) -> None:
        if end.read_message and "r" in mode:
            raise BadPipe(f"{end!r} reads messages, a file has none")
        self._end, self._mode = end, mode

    def readable(self) -> bool:
        return "r" in self._mode

    def writable(self) -> bool:
        return "w" in self._mode

    def fileno(self) -> int:
        return self._end.fileno()

    def readinto(self, buffer: Any) -> int:
        try:
            return self._end.receive_into(buffer)
        except BrokenPipe:
            return 0

    def write(self, data: Any) -> int:
        return self._end.send(data)
