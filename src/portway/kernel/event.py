"""A named event. Win32: CreateEvent, OpenEvent, SetEvent, ResetEvent, PulseEvent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._accel import sync as _native
from .namespace import Kind
from .sync_base import MANUAL_RESET, VALUE_AT, ClosingObject

if TYPE_CHECKING:
    from .security import Security

__all__ = ["Event"]


class Event(ClosingObject, _native.Event):  # type: ignore[misc,name-defined]
    """Set or not. An auto-reset event (the default) lets one wait through and is unset by it; a manual-reset one lets
    all through until `reset`. Sets do not add up.

    ``pulse()`` lets through who waits now (of an auto-reset event at most one) and leaves it unset. ``with`` closes.
    """

    __slots__ = ("__weakref__",)
    kind = Kind.EVENT

    def __init__(
        self, name: str | None = None, *, manual_reset: bool = False, initially_set: bool = False,
        exclusive: bool = False, security: Security | None = None, root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        self._create(
            name, exclusive=exclusive, security=security, root=root, flags=MANUAL_RESET if manual_reset else 0,
            fields={VALUE_AT: int(initially_set).to_bytes(8, "little")},
        )  # fmt: skip
