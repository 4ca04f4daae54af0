"""Those of one process who wait until an instance of a pipe is free: they stand in line.

Every instance that begins to listen is news for everybody who waits, and only one can have it. So of each process's
threads, and of each event loop's tasks, one waits for the news and looks; the others wait for their turn. They share
one record, two descriptors, and what is known of instances that are gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from .pipe_record import Record

if TYPE_CHECKING:
    import asyncio

__all__ = ["Crowd", "Line"]

_crowds: dict[str, Crowd] = {}
_lock = threading.Lock()


class Line:
    """Threads in the order in which they came; whoever is `first` has the turn, until it leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.first: object = None
        self.behind: dict[object, threading.Lock] = {}

    def stand(self, who: object, timeout: float | None) -> None:
        """Returns when `who` is the first, or the time is over. Whatever happens, `leave` ends it."""
        with self._lock:
            if self.first is None:
                self.first = who
            if self.first is who:
                return
            mine = self.behind.get(who)
            if mine is None:
                mine = self.behind[who] = threading.Lock()
                mine.acquire()
        mine.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))

    def leave(self, who: object) -> None:
        with self._lock:
            self.behind.pop(who, None)
            if self.first is who:
                self.first = next(iter(self.behind), None)
                if self.first is not None:
                    self.behind.pop(self.first).release()


class Crowd:
    """The line at one pipe. ``Crowd.of(record)`` joins it, ``leave()`` ends that."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.gone: dict[int, int] = {}
        """The last generation of each slot that was found taken or dead, which it stays."""
        self.line = Line()
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._users = 0

    @classmethod
    def of(cls, record: Record) -> Crowd:
        """The record is the crowd's from now on."""
        with _lock:
            crowd = _crowds.get(record.folder)
            if crowd is None or not crowd.is_at(record):
                crowd = _crowds[record.folder] = cls(record)
            else:
                record.close()
            crowd._users += 1
            return crowd

    def is_at(self, record: Record) -> bool:
        return record is self.record or os.path.samestat(os.fstat(self.record.fd), os.fstat(record.fd))

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
