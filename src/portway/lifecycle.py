"""Who owns a descriptor, and the life of everything that opens and closes.

`Handle` owns one descriptor. `NEXT` is the one table of states that every session, inbox, channel, listener and pool
goes through; `Life` walks it.
"""

from __future__ import annotations

import os
from enum import IntEnum
from types import TracebackType
from typing import Self

from .errors import ObjectClosed

__all__ = ["Handle", "Input", "Life", "NEXT", "State"]


class State(IntEnum):
    CREATED = 0
    OPENING = 1
    OPENED = 2
    CLOSING = 3
    CLOSED = 4
    FAULTED = 5


class Input(IntEnum):
    OPEN = 0
    DONE = 1
    CLOSE = 2
    FAIL = 3
    ABORT = 4


CREATED, OPENING, OPENED, CLOSING, CLOSED, FAULTED = State
OPEN, DONE, CLOSE, FAIL, ABORT = Input

NEXT: dict[State, dict[Input, State]] = {
    CREATED: {OPEN: OPENING, CLOSE: CLOSING, ABORT: CLOSING, FAIL: FAULTED},
    OPENING: {DONE: OPENED, FAIL: FAULTED, CLOSE: CLOSING, ABORT: CLOSING},
    OPENED: {CLOSE: CLOSING, FAIL: FAULTED, ABORT: CLOSING},
    CLOSING: {DONE: CLOSED, FAIL: CLOSING, CLOSE: CLOSING, ABORT: CLOSING},
    FAULTED: {CLOSE: CLOSING, FAIL: FAULTED, ABORT: CLOSING},
    CLOSED: {CLOSE: CLOSED, FAIL: CLOSED, ABORT: CLOSED},
}


class Life:
    """Walks `NEXT`; a step the table lacks is `ObjectClosed` that names the object, its state and the step."""

    __slots__ = ("state", "what")

    def __init__(self, what: str, state: State = CREATED) -> None:
        self.what = what
        self.state = state

    def step(self, by: Input) -> State:
        try:
            self.state = NEXT[self.state][by]
        except KeyError:
            raise ObjectClosed(f"{self.what} is {self.state.name.lower()}: cannot {by.name.lower()} it") from None
        return self.state

    def require(self, state: State = OPENED) -> None:
        if self.state is not state:
            raise ObjectClosed(f"{self.what} is {self.state.name.lower()}, not {state.name.lower()}")


class Handle:
    """Owns one descriptor; closing twice is fine; leaving ``with`` closes."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, still owned by this handle; `ObjectClosed` after close() or detach()."""
        if self._fd < 0:
            raise ObjectClosed("this handle is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # first forget, then close: a retry cannot close a reused number
        if fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """The descriptor, which the caller owns from now on."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
