"""A named waitable timer. Win32: CreateWaitableTimer, SetWaitableTimer, CancelWaitableTimer."""

from __future__ import annotations

import datetime
import math
import os
import struct
from typing import TYPE_CHECKING

from .._accel import sync as _native
from .namespace import Kind
from .sync_base import MANUAL_RESET, TIMER_AT, ClosingObject

if TYPE_CHECKING:
    from .security import Security

__all__ = ["WaitableTimer"]

LONGEST = 2**62 / 1e9


class WaitableTimer(ClosingObject, _native.Timer):  # type: ignore[misc,name-defined]
    """Signalled when its time has come, once or periodically. Nothing has to run for that: whoever looks computes it.

    An auto-reset timer (the default) lets one wait through a tick, ticks that nobody took are one; a manual-reset timer
    stays signalled until it is set again. ``with`` closes.
    """

    __slots__ = ("__weakref__",)
    kind = Kind.TIMER

    def __init__(
        self, name: str | None = None, *, manual_reset: bool = False, exclusive: bool = False,
        security: Security | None = None, root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        self._create(
            name, exclusive=exclusive, security=security, root=root, flags=MANUAL_RESET if manual_reset else 0,
            fields={TIMER_AT: struct.pack("<q", _native.NEVER)},
        )  # fmt: skip

    def set(self, due: float | datetime.datetime, period: float = 0) -> None:
        """Unsignalled now, signalled in `due` seconds or at a point in time; then every `period` seconds, 0: once.

        Seconds count on the monotonic clock. A ``datetime`` (naive: local time) is a point of the wall clock and
        follows it when it is set; one that has passed is due at once. ``ValueError`` for negative numbers.
        """
        if not 0 <= period < LONGEST / 8:
            raise ValueError(f"period={period!r}: give seconds >= 0, 0 for once")
        every = 0 if period == 0 else max(1, round(period * 1e9))
        if isinstance(due, datetime.datetime):
            self._set(max(0, round(due.timestamp() * 1e9)), every, True, False)
            return
        if not (0 <= due < LONGEST / 2) or math.isnan(due):
            raise ValueError(f"due={due!r}: give seconds >= 0 from now, or a datetime")
        self._set(_native.monotonic_ns() + round(due * 1e9), every, False, False)

    def cancel(self) -> None:
        """Stops it; if it is signalled it stays so, as on Windows."""
        self._set(0, 0, False, True)
