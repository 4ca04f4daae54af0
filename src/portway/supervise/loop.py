"""The supervisor's one thread: descriptors, timers and signals in one wait."""

from __future__ import annotations

import heapq
import itertools
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Loop", "Timer"]

Callback = Callable[[], None]


class Timer:
    """``at`` on the monotonic clock, which goes on across exec; cancel() any time."""

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: Callback | None) -> None:
        self.at = at
        self.call = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Readable descriptors and due timers call back, one at a time, until stop(). Owns none of the descriptors."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._running = True
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self.watch(self._woken, self._on_signals)

    def watch(self, file: Any, call: Callback, *, write: bool = False) -> None:
        self._selector.register(file, selectors.EVENT_WRITE if write else selectors.EVENT_READ, call)

    def forget(self, file: Any) -> None:
        try:
            self._selector.unregister(file)
        except (KeyError, ValueError):
            pass  # never watched, or closed already

    def at(self, when: float, call: Callback) -> Timer:
        timer = Timer(when, call)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def after(self, seconds: float, call: Callback) -> Timer:
        return self.at(time.monotonic() + seconds, call)

    def on_signal(self, number: int, call: Callback) -> None:
        self._signals[number] = call
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(number, lambda *_: None)

    def _on_signals(self) -> None:
        try:
            numbers = self._woken.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if number in self._signals:
                self._signals[number]()

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            self.step()

    def step(self) -> None:
        """Wait for the next thing and do it."""
        wait = None if not self._timers else max(0.0, self._timers[0][0] - time.monotonic())
        for key, _ in self._selector.select(wait):
            # An earlier callback of this round may have closed it; its number may mean another by now.
            if self._selector.get_map().get(key.fd) is key:
                self._guarded(key.data)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            call, timer.call = timer.call, None
            if call is not None:
                self._guarded(call)

    def _guarded(self, call: Callback) -> None:
        """A mistake of ours in one callback must not take a service down."""
        try:
            call()
        except Exception:
            traceback.print_exc()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._waker.close()
        self._woken.close()
