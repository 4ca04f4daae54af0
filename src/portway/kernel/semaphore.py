"""A named semaphore. Win32: CreateSemaphore, OpenSemaphore, ReleaseSemaphore."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .._accel import sync as _native
from .namespace import Kind
from .sync_base import MAXIMUM_AT, VALUE_AT, KernelObject

if TYPE_CHECKING:
    from .security import Security

__all__ = ["MAXIMUM", "Semaphore"]

MAXIMUM = 2**31 - 1


class Semaphore(KernelObject, _native.Semaphore):  # type: ignore[misc,name-defined]
    """A count between 0 and `maximum`: a wait takes one or waits for one, `release` adds.

    ``with`` takes one and gives it back. What a killed process has taken stays taken, as on Windows: a semaphore has
    no owner. `acquire` is `wait` by its Python name.
    """

    __slots__ = ("__weakref__",)
    kind = Kind.SEMAPHORE

    def __init__(
        self, initial: int = 1, maximum: int | None = None, name: str | None = None, *, exclusive: bool = False,
        security: Security | None = None, root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """`maximum` is 2,147,483,647 unless given. ``ValueError`` unless 0 <= initial <= maximum and maximum > 0."""
        top = MAXIMUM if maximum is None else maximum
        if not isinstance(initial, int) or not isinstance(top, int):
            raise TypeError(f"Semaphore({initial!r}, {maximum!r}, name): initial and maximum are numbers")
        if not 0 < top <= MAXIMUM:
            raise ValueError(f"maximum={top}: give 1 to {MAXIMUM}")
        if not 0 <= initial <= top:
            raise ValueError(f"initial={initial}: give 0 to the maximum, {top}")
        fields = {VALUE_AT: initial.to_bytes(8, "little"), MAXIMUM_AT: top.to_bytes(8, "little")}
        self._create(name, exclusive=exclusive, security=security, root=root, fields=fields)

    def acquire(self, timeout: float | None = None, *, alertable: bool = False) -> bool:
        """`wait`."""
        return bool(self.wait(timeout, alertable=alertable))

    def release(self, count: int = 1) -> int:
        """Adds `count`; the count as it was before. `TooManyPosts` above the maximum: nothing changes."""
        return int(super().release(count))

    def __enter__(self) -> Self:
        self.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
