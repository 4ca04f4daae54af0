"""Locks on bytes of a file that belong to the open file description: the kernel drops them when that goes, however.

A description does not see its own locks; threads that share it need a lock of their own. Source: fcntl(2), F_OFD_SETLK.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import OperationTimeout, TooManyHolders

__all__ = ["GATE", "all_locked", "gate", "locked_from", "try_lock", "unlock"]

GATE = 0
_PATIENCE = 5.0
_FLOCK = struct.Struct("hhqqi4x")


def _lock(fd: int, command: int, kind: int, start: int, length: int = 1) -> bytes:
    return fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def try_lock(fd: int, start: int, kind: int = fcntl.F_WRLCK) -> bool:
    """Locks one byte; False when another description has it."""
    try:
        _lock(fd, fcntl.F_OFD_SETLK, kind, start)
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno == errno.ENOLCK:
            raise TooManyHolders("the kernel has no room for another file lock") from error
        raise


def unlock(fd: int, start: int) -> None:
    _lock(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, start)


def locked_from(fd: int, start: int, length: int) -> int | None:
    """One byte of the range that another description has locked, not always the first; None when none is."""
    kind, _, at, _, _ = _FLOCK.unpack(_lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, length))
    return None if kind == fcntl.F_UNLCK else max(at, start)


def all_locked(fd: int, start: int, length: int) -> list[int]:
    """Every byte of the range that other descriptions have locked, in order.

    The kernel tells of one conflicting lock, not of the lowest, and joins neighbouring ones of one owner.
    """
    found: set[int] = set()
    ranges = [(start, start + length)]
    while ranges:
        low, high = ranges.pop()
        if low >= high:
            continue
        kind, _, at, size, _ = _FLOCK.unpack(_lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, low, high - low))
        if kind == fcntl.F_UNLCK:
            continue
        first, last = max(at, low), min(at + size, high) if size else high
        found.update(range(first, last))
        ranges += [(low, first), (last, high)]
    return sorted(found)


@contextmanager
def gate(fd: int, path: str, writable: bool = True, patience: float = _PATIENCE) -> Iterator[None]:
    """Byte 0: joining and leaving exclude each other. A gate that somebody keeps is an error, never a hang."""
    kind = fcntl.F_WRLCK if writable else fcntl.F_RDLCK
    pause, limit = 0.00005, time.monotonic() + patience
    while not try_lock(fd, GATE, kind):
        if time.monotonic() > limit:
            raise OperationTimeout(
                f"{path}: somebody has held the gate of this object for {patience:g} s",
                hint="see who with `lslocks`; a stopped process goes on after kill -CONT",
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.005)
    try:
        yield
    finally:
        unlock(fd, GATE)
