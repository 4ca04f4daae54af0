"""The synchronisation objects for asyncio. Win32 has no such thing; the rules are those of the awaited twins."""

from __future__ import annotations

import asyncio
import datetime
import os
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

from .._accel import sync as _native
from ..deadline import Deadline
from . import event, mutex, semaphore, timer
from .sync_bells import Listener, listen
from .wait import Waited, check, result

__all__ = ["Event", "Mutex", "Semaphore", "WaitableTimer", "signal_and_wait", "wait_all", "wait_any"]


class _Owner:
    """A task as an owner of mutexes."""

    def __init__(self) -> None:
        self.number: int = _native.new_owner()
        self.held: set[Any] = set()
        """Handles through which it acquired; kept open as long as it owns."""

    def abandon(self, task: asyncio.Task[Any]) -> None:
        """The task has ended: what it still owns goes to the next owner, who is told."""
        for one in self.held:
            if not one.closed:
                one._abandon(self.number)
        self.held.clear()


_owners: weakref.WeakKeyDictionary[asyncio.Task[Any], _Owner] = weakref.WeakKeyDictionary()


def _owner() -> _Owner:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("no task is running: in asyncio a mutex belongs to a task")
    owner = _owners.get(task)
    if owner is None:
        owner = _owners[task] = _Owner()
        task.add_done_callback(owner.abandon)
    return owner


class _Place:
    """A wait's place in the line of a handle."""

    def __init__(self, line: deque[_Place]) -> None:
        self.line, self.future, self.late = line, asyncio.get_running_loop().create_future(), False
        line.append(self)

    @property
    def first(self) -> bool:
        return self.line[0] is self

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def expire(self) -> None:
        self.late = True
        self.wake()

    async def sleep(self, many: Any) -> None:
        """Until woken; the first in line by the objects themselves, the others by the one before them."""
        if self.future.done() and not self.late:
            self.future = asyncio.get_running_loop().create_future()
        listener = Listener(many, self.future) if self.first else None
        if listener is not None:
            listen(listener)
        try:
            await self.future
        finally:
            if listener is not None:
                listener.close()

    def leave(self) -> None:
        was_first = self.first
        self.line.remove(self)
        if was_first and self.line:
            self.line[0].wake()


class _Object:
    """A handle on the same objects as the class of the same name in `portway`, for the tasks of event loops."""

    _of: ClassVar[type[Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        """As the class of the same name in `portway`. Opening and signalling do not wait: they are plain calls."""
        self._sync = self._of(*args, **options)
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, deque[_Place]] = weakref.WeakKeyDictionary()

    @classmethod
    def open(cls, name: str, *, root: str | os.PathLike[str] | None = None) -> Self:
        self = cls.__new__(cls)
        self._sync = cls._of.open(name, root=root)
        self._lines = weakref.WeakKeyDictionary()
        return self

    @property
    def name(self) -> str | None:
        name: str | None = self._sync.name
        return name

    @property
    def already_exists(self) -> bool:
        return bool(self._sync.already_exists)

    @property
    def closed(self) -> bool:
        return bool(self._sync.closed)

    @property
    def waiters(self) -> int:
        return int(self._sync.waiters)

    def close(self) -> None:
        """Closes the handle; see `portway.Mutex.close`."""
        self._sync.close()

    def __repr__(self) -> str:
        return f"aio.{self._sync!r}"

    async def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is signalled and takes what a wait takes; those of one loop in the order they came.

        Cancelled or timed out (`OperationTimeout`) it has consumed nothing.
        """
        await _wait([self], False, Deadline(timeout), f"waiting for {self._sync!r}")
        return True

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


class Mutex(_Object):
    """`portway.Mutex` owned by a task: tasks of one loop exclude each other as threads and processes do.

    A task that ends while it owns the mutex abandons it. ``async with`` acquires and releases.
    """

    _of = mutex.Mutex

    async def acquire(self, timeout: float | None = None) -> bool:
        return await self.wait(timeout)

    def release(self) -> None:
        """`NotOwner` for any task but the one that owns it."""
        owner = _owner()
        self._sync._release_for(owner.number)
        if not self._sync._count_for(owner.number):
            owner.held.discard(self._sync)

    @property
    def abandoned(self) -> bool:
        """The last acquire took it from an owner that had died."""
        return bool(self._sync.abandoned)

    @property
    def owned(self) -> bool:
        """The running task owns it."""
        return bool(self._sync._count_for(_owner().number))

    @property
    def state(self) -> str:
        return str(self._sync.state)

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.release()


class Semaphore(_Object):
    """`portway.Semaphore`. ``async with`` takes one and gives it back."""

    _of = semaphore.Semaphore

    async def acquire(self, timeout: float | None = None) -> bool:
        return await self.wait(timeout)

    def release(self, count: int = 1) -> int:
        return int(self._sync.release(count))

    @property
    def value(self) -> int:
        return int(self._sync.value)

    @property
    def maximum(self) -> int:
        return int(self._sync.maximum)

    async def __aenter__(self) -> Self:
        await self.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.release()


class Event(_Object):
    """`portway.Event`."""

    _of = event.Event

    def set(self) -> None:
        self._sync.set()

    def reset(self) -> None:
        self._sync.reset()

    def pulse(self) -> None:
        self._sync.pulse()

    def is_set(self) -> bool:
        return bool(self._sync.is_set())

    @property
    def manual_reset(self) -> bool:
        return bool(self._sync.manual_reset)


class WaitableTimer(_Object):
    """`portway.WaitableTimer`."""

    _of = timer.WaitableTimer

    def set(self, due: float | datetime.datetime, period: float = 0) -> None:
        self._sync.set(due, period)

    def cancel(self) -> None:
        self._sync.cancel()

    def is_set(self) -> bool:
        return bool(self._sync.is_set())

    @property
    def due(self) -> float | None:
        due: float | None = self._sync.due
        return due

    @property
    def manual_reset(self) -> bool:
        return bool(self._sync.manual_reset)


async def wait_any(objects: Sequence[_Object], timeout: float | None = None) -> Waited:
    """`portway.wait_any`; the objects are those of `portway.aio`, and mutexes go to the running task."""
    return await _wait(list(objects), False, Deadline(timeout), f"waiting for any of {len(objects)} objects")


async def wait_all(objects: Sequence[_Object], timeout: float | None = None) -> Waited:
    """`portway.wait_all`."""
    return await _wait(list(objects), True, Deadline(timeout), f"waiting for all of {len(objects)} objects")


async def signal_and_wait(signal: Mutex | Semaphore | Event, wait: _Object, timeout: float | None = None) -> Waited:
    """`portway.signal_and_wait`."""
    if isinstance(signal, Event):
        signal.set()
    elif isinstance(signal, Mutex | Semaphore):
        signal.release()
    else:
        check([signal])
    return await wait_any([wait], timeout)


async def _wait(objects: list[Any], every: bool, deadline: Deadline, doing: str) -> Waited:
    handles = check([getattr(one, "_sync", one) for one in objects])
    owner = _owner()
    many = _native.Many(handles, every, owner.number)
    line = _line(objects[0]) if len(objects) == 1 else deque()
    got = many.attempt(False) if not line or deadline.timeout == 0 else None
    if got is None:
        if deadline.timeout == 0:
            raise deadline.error(doing)
        got = await _in_line(many, _Place(line), deadline, doing)
    taken = handles if every else [handles[got[0]]]
    owner.held.update(one for one in taken if isinstance(one, mutex.Mutex))
    done, given = result(handles, every, *got), {id(one._sync): one for one in objects}
    abandoned = tuple(given[id(one)] for one in done.abandoned)
    return Waited(done.index, objects if every else objects[done.index], abandoned)


def _line(one: _Object) -> deque[_Place]:
    """Those of this loop who wait for this handle alone: only the first of them listens."""
    lines, loop = one._lines, asyncio.get_running_loop()
    line = lines.get(loop)
    if line is None:
        line = lines[loop] = deque()
    return line


async def _in_line(many: Any, place: _Place, deadline: Deadline, doing: str) -> Any:
    """What `Many.attempt` gives, when it is this wait's turn."""
    alarm = None
    if deadline.timeout is not None:
        alarm = asyncio.get_running_loop().call_later(deadline.timeout, place.expire)
    many.enter()
    try:
        while True:
            got = many.attempt(True) if place.first else None
            if got is not None:
                return got
            if place.late:
                raise deadline.error(doing)
            await place.sleep(many)
    finally:
        if alarm is not None:
            alarm.cancel()
        many.leave()
        place.leave()
