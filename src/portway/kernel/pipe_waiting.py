"""Those of one process who wait until an instance of a pipe is free: they stand in line.

Every instance that begins to listen is news for everybody who waits, and only one can have it. So of each process's
threads, and of each event loop's tasks, one waits for the news and looks; the others wait for their turn. They share
one record, two descriptors, and what is known of instances that are gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from .pipe_record import Record

if TYPE_CHECKING:
    import asyncio

__all__ = ["Crowd", "Line"]

_crowds: dict[str, Crowd] = {}
_lock = threading.Lock()


class Line:
    """A lock of threads that goes from one to the next in the order in which they came; `asyncio.Lock` does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float | None) -> bool:
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            if mine.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
                return True
        except BaseException:  # Ctrl-C
            if not self._withdrawn(mine):
                self.release()
            raise
        return not self._withdrawn(mine)

    def _withdrawn(self, mine: threading.Lock) -> bool:
        """False: it was handed over meanwhile."""
        with self._lock:
            try:
                self._waiting.remove(mine)
            except ValueError:
                return False
            return True

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class Crowd:
    """The line at one pipe. ``Crowd.of(record)`` joins it, ``leave()`` ends that."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.gone: dict[int, int] = {}
        """The last generation of each slot that was found taken or dead, which it stays."""
        self.turn = Line()
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._users = 0

    @classmethod
    def of(cls, record: Record) -> Crowd:
        """The record is the crowd's from now on."""
        with _lock:
            crowd = _crowds.get(record.folder)
            if crowd is None or not os.path.samestat(os.fstat(crowd.record.fd), os.fstat(record.fd)):
                crowd = _crowds[record.folder] = cls(record)
            else:
                record.close()
            crowd._users += 1
            return crowd

    def leave(self) -> None:
        with _lock:
            self._users -= 1
            if not self._users:
                if _crowds.get(self.record.folder) is self:
                    del _crowds[self.record.folder]
                self.record.close()

    def turn_of_tasks(self) -> asyncio.Lock:
        """Of the running loop's."""
        import asyncio

        with _lock:
            return self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def _after_fork() -> None:
    """The parent's crowds stay open in the child as long as somebody refers to them; nobody joins them."""
    global _lock
    _lock = threading.Lock()
    _crowds.clear()


os.register_at_fork(after_in_child=_after_fork)
