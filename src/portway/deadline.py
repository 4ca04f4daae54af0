"""One point in time that a whole operation must meet, however many waits it is made of."""

from __future__ import annotations

import math
import time

from .errors import OperationTimeout

__all__ = ["Deadline"]

_LONGEST = 2_000_000.0  # in milliseconds it fits an int


class Deadline:
    """A point on the monotonic clock, or never.

    ``Deadline(5)`` is five seconds from now, ``Deadline(None)`` never, ``Deadline(0)`` now: look, do not wait.
    Accepted wherever portway takes ``timeout=`` is a number of seconds or None; internally one Deadline is made at the
    edge and passed down, so that three waits of one call share one limit.
    """

    __slots__ = ("at", "timeout")

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout >= 0:  # also refuses NaN
            raise ValueError(f"timeout={timeout!r}: give seconds >= 0, or None to wait without limit")
        self.timeout = timeout
        self.at = math.inf if timeout is None else time.monotonic() + timeout

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def remaining(self) -> float | None:
        """Seconds left, never negative; None when there is no limit. What select() and Condition.wait() take, which
        is 23 days at most."""
        return None if self.at == math.inf else min(max(0.0, self.at - time.monotonic()), _LONGEST)

    def poll_ms(self) -> int | None:
        """Milliseconds left, rounded up, within what poll() takes; None when there is no limit."""
        left = self.remaining()
        return None if left is None else math.ceil(left * 1000)

    def check(self, doing: str) -> None:
        """Raises OperationTimeout when the time is over; ``doing`` completes "timed out after 5 s ..."."""
        if self.expired:
            raise self.error(doing)

    def error(self, doing: str) -> OperationTimeout:
        return OperationTimeout(f"timed out after {self.timeout:g} s {doing}")

    def __repr__(self) -> str:
        left = self.remaining()
        return "Deadline(never)" if left is None else f"Deadline({left:.3f} s left)"
