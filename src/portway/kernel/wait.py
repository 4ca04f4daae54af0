"""One wait for several objects. Win32: WaitForMultipleObjects, SignalObjectAndWait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._accel import sync as _native
from ..errors import InvalidHandle
from .event import Event
from .mutex import Mutex
from .semaphore import Semaphore
from .timer import WaitableTimer

__all__ = ["MAXIMUM_WAIT_OBJECTS", "Waited", "signal_and_wait", "wait_all", "wait_any"]

MAXIMUM_WAIT_OBJECTS = 64
Waitable = Mutex | Semaphore | Event | WaitableTimer


@dataclass(frozen=True, slots=True)
class Waited:
    """What ended a wait."""

    index: int
    """`wait_any`: the place of `object` in the list, the lowest that was signalled. `wait_all`: 0."""
    object: Any
    """`wait_any`: the one that was taken. `wait_all`: the list as given."""
    abandoned: tuple[Any, ...] = ()
    """The mutexes taken now whose last owner had died; their ``abandoned`` is set as well."""


def check(objects: Sequence[Any]) -> list[Any]:
    """`InvalidHandle` for what is no object of ours, ``ValueError`` for none or more than 64."""
    given = list(objects)
    if not 1 <= len(given) <= MAXIMUM_WAIT_OBJECTS:
        raise ValueError(f"{len(given)} objects: a wait takes 1 to {MAXIMUM_WAIT_OBJECTS}")
    for one in given:
        if not isinstance(one, _native.Handle):
            raise InvalidHandle(f"{one!r} cannot be waited for", hint="Mutex, Semaphore, Event and WaitableTimer can")
    return given


def result(given: list[Any], every: bool, index: int, bits: int) -> Waited:
    abandoned = tuple(one for at, one in enumerate(given) if bits >> at & 1)
    return Waited(0, given, abandoned) if every else Waited(index, given[index], abandoned)


def wait_any(objects: Sequence[Waitable], timeout: float | None = None, *, alertable: bool = False) -> Waited:
    """Waits until one of 1 to 64 objects of any kinds is signalled and takes it: the first in the list, no other.

    `OperationTimeout` after `timeout` seconds, `WaitInterrupted` by `portway.alert`, `InvalidHandle`, `ObjectClosed`,
    ``ValueError`` for a wrong number of objects. The same object may be given twice.
    """
    given = check(objects)
    return result(given, False, *_native.Many(given, False).wait(timeout, alertable))


def wait_all(objects: Sequence[Waitable], timeout: float | None = None, *, alertable: bool = False) -> Waited:
    """Waits until all of 1 to 64 different objects are signalled at one instant and takes them all then, or none.

    While it waits it holds nothing; killed at any instant it took all or none. A mutex that is this thread's already
    counts as signalled. Errors as `wait_any`; ``ValueError`` also for the same object twice.
    """
    given = check(objects)
    return result(given, True, *_native.Many(given, True).wait(timeout, alertable))


def signal_and_wait(
    signal: Mutex | Semaphore | Event, wait: Waitable, timeout: float | None = None, *, alertable: bool = False
) -> Waited:
    """Releases a mutex, adds one to a semaphore or sets an event; then waits for `wait`. Not one step, as on Windows.

    If the signal fails (`NotOwner`, `TooManyPosts`) there is no wait. Errors of the wait: as `wait_any`.
    """
    given = check([wait])
    if isinstance(signal, Event):
        signal.set()
    elif isinstance(signal, Mutex | Semaphore):
        signal.release()
    else:
        raise InvalidHandle(f"{signal!r} cannot be signalled", hint="a Mutex, Semaphore or Event can")
    return result(given, False, *_native.Many(given, False).wait(timeout, alertable))
