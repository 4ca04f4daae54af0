"""A named mutex that survives ``kill -9``. Win32: CreateMutex, OpenMutex, ReleaseMutex.

The state is one word that the kernel watches (a robust futex): when the owner's thread ends without releasing, whether
it returned, its process ran ``exec`` or was killed, the next owner gets it at once and is told. The class is native
(`_native/sync_mutex.pxi`), here are its types.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .._accel import sync as _native
from .objectfile import Kind, ObjectFile
from .sync_base import body_of

if TYPE_CHECKING:
    from .security import Security

    class Mutex:
        """See `_native/sync_mutex.pxi`."""

        kind: ClassVar[Kind]
        abandoned: bool
        already_exists: bool
        file: ObjectFile | None

        def __init__(
            self, name: str | None = None, *, initially_owned: bool = False, exclusive: bool = False,
            security: Security | None = None, root: str | os.PathLike[str] | None = None,
        ) -> None: ...  # fmt: skip
        @classmethod
        def open(cls, name: str, *, root: str | os.PathLike[str] | None = None) -> Self: ...
        def acquire(self, timeout: float | None = None, *, alertable: bool = False) -> bool: ...
        def release(self) -> None: ...
        def close(self) -> None: ...
        def __enter__(self) -> Self: ...
        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
        ) -> None: ...
        @property
        def name(self) -> str | None: ...
        @property
        def closed(self) -> bool: ...
        @property
        def owned(self) -> bool: ...
        @property
        def state(self) -> str: ...
        @property
        def waiters(self) -> int: ...
else:
    Mutex = _native.Mutex
    _native.set_kind(Kind.MUTEX)

__all__ = ["Mutex"]


def create(
    self: Any, name: str | None, owned: bool, exclusive: bool, security: Security | None,
    root: str | os.PathLike[str] | None,
) -> None:  # fmt: skip
    """The constructor's work."""

    def ready(file: ObjectFile) -> None:
        file.sync = body_of(file)
        self._attach(file, file.sync)
        self.acquire(0)

    try:
        self._create(name, exclusive=exclusive, security=security, root=root, ready=ready if owned else None)
    except BaseException:
        self._detach()  # of a file that did not get its name: closed by the one who made it
        raise
