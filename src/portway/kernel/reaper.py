"""One thread for what must happen later whether or not anybody calls: expiry, and news on a descriptor.

It starts with the first thing to watch and ends with the last. After a fork the child has none and nothing to watch.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from ..deadline import Deadline

__all__ = ["forget", "watch"]


class _Watched:
    __slots__ = ("call", "deadline", "fd", "key")

    def __init__(self, key: object, fd: int | None, deadline: Deadline, call: Callable[[], float | None]) -> None:
        self.key, self.fd, self.deadline, self.call = key, fd, deadline, call


class _Reaper:
    def __init__(self) -> None:
        self.lock = threading.RLock()  # the collector may close what is watched in the middle of a call here
        self.watched: dict[int, _Watched] = {}
        self.thread: threading.Thread | None = None
        self.bell = -1  # an eventfd: the list has changed

    def watch(self, key: object, fd: int | None, seconds: float, call: Callable[[], float | None]) -> None:
        with self.lock:
            self.watched[id(key)] = _Watched(key, fd, Deadline(seconds), call)
            if self.thread is None:
                self._start()
            else:
                os.eventfd_write(self.bell, 1)

    def forget(self, key: object) -> None:
        with self.lock:
            if self.watched.pop(id(key), None) and self.thread is not None:
                os.eventfd_write(self.bell, 1)

    def _start(self) -> None:
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.thread = threading.Thread(target=self._run, args=(self.bell,), name="portway-reaper", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # an isolated subinterpreter, or one that is ending, starts no daemon thread:
            os.close(self.bell)  # what is watched ends with the process instead
            self.thread, self.bell = None, -1

    def _run(self, bell: int) -> None:
        while True:
            with self.lock:
                watched = list(self.watched.values())
                if not watched:
                    self.thread, self.bell = None, -1
                    os.close(bell)
                    return
            for one in self._due(watched, bell):
                again = self._call(one)
                with self.lock:
                    if self.watched.get(id(one.key)) is one:
                        if again is None:
                            del self.watched[id(one.key)]
                        else:
                            one.deadline = Deadline(again)

    def _call(self, one: _Watched) -> float | None:
        try:
            return one.call()
        except Exception:  # one that fails must not keep the others from expiring
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            return None

    def _due(self, watched: list[_Watched], bell: int) -> list[_Watched]:
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        for one in watched:
            if one.fd is not None:
                poll.register(one.fd, select.POLLIN)
        first = min(watched, key=lambda one: one.deadline.at)
        ready = {fd for fd, _ in poll.poll(first.deadline.poll_ms())}
        if bell in ready:
            with suppress(BlockingIOError):
                os.eventfd_read(bell)
        return [one for one in watched if one.fd in ready or one.deadline.expired]


_reaper = _Reaper()


def watch(key: object, fd: int | None, seconds: float, call: Callable[[], float | None]) -> None:
    """Calls `call()` in the reaper's thread when `fd` is readable or ended, and at the latest after `seconds`.

    It returns None to be forgotten, or the seconds until the next call. It must not block.
    """
    _reaper.watch(key, fd, seconds, call)


def forget(key: object) -> None:
    """`key` is not watched any more. A call that runs right now may still finish."""
    _reaper.forget(key)


def _after_fork() -> None:
    global _reaper
    if _reaper.bell >= 0:
        os.close(_reaper.bell)
    _reaper = _Reaper()


os.register_at_fork(after_in_child=_after_fork)
