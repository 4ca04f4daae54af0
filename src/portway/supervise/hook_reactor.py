"""Where the hook's non-blocking engines get their events: an asyncio loop, or a thread of its own.

The engines (`hook_source`, `hook_core`) are written once against `Reactor`; everything but `call_soon` is called in the
reactor's own thread.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["LoopReactor", "Reactor", "ThreadReactor"]

Call = Callable[[], object]


class Reactor(Protocol):
    def watch(self, fd: int, read: Call | None, write: Call | None = None) -> None:
        """Calls `read` and `write` whenever `fd` is ready for it; None for both stops watching."""

    def call_later(self, seconds: float, call: Call) -> None: ...

    def call_soon(self, call: Call) -> None:
        """From any thread."""

    @property
    def closed(self) -> bool: ...


class LoopReactor:
    """An asyncio loop, also uvloop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    @property
    def closed(self) -> bool:
        return self.loop.is_closed()

    def watch(self, fd: int, read: Call | None, write: Call | None = None) -> None:
        if read is None:
            self.loop.remove_reader(fd)
        else:
            self.loop.add_reader(fd, read)
        if write is None:
            self.loop.remove_writer(fd)
        else:
            self.loop.add_writer(fd, write)

    def call_later(self, seconds: float, call: Call) -> None:
        self.loop.call_later(seconds, call)

    def call_soon(self, call: Call) -> None:
        self.loop.call_soon_threadsafe(call)


class ThreadReactor:
    """A daemon thread that waits for descriptors, timers and calls from other threads."""

    closed = False

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._calls: deque[Call] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._serial = itertools.count()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def watch(self, fd: int, read: Call | None, write: Call | None = None) -> None:
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events, (read, write))
        else:
            self._selector.register(fd, events, (read, write))

    def call_later(self, seconds: float, call: Call) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), call))

    def call_soon(self, call: Call) -> None:
        self._calls.append(call)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while True:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                self._dispatch(key, events)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
            while self._calls:
                self._calls.popleft()()

    def _dispatch(self, key: selectors.SelectorKey, events: int) -> None:
        if key.data is None:
            os.eventfd_read(self._wake)
            return
        for event, call in zip((selectors.EVENT_READ, selectors.EVENT_WRITE), key.data, strict=True):
            # An earlier call of this round may have stopped watching, even closed, this descriptor.
            if events & event and call and self._selector.get_map().get(key.fd) is key:
                call()
