"""A named mutex that survives ``kill -9``. Win32: CreateMutex, OpenMutex, ReleaseMutex.

The state is one word that the kernel watches (a robust futex): when the owner's thread ends without releasing, whether
it returned, its process ran ``exec`` or was killed, the next owner gets it at once and is told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._accel import sync as _native
from .namespace import Kind
from .objectfile import ObjectFile
from .sync_base import KernelObject, body_of

if TYPE_CHECKING:
    from .security import Security

__all__ = ["Mutex"]


class Mutex(KernelObject, _native.Mutex):  # type: ignore[misc,name-defined]
    r"""A mutual exclusion between threads of any processes, owned by a thread, recursive.

    ::

        with portway.Mutex("ledger") as mutex:      # waits without limit
            if mutex.abandoned:                     # the last owner died with it: look whether its work is whole
                repair()

    ``Mutex(name)`` creates it or opens the existing one; without a name it is known by its handle only. `acquire`
    waits, `release` gives back once for every acquire; ``with`` does both. It is the thread that owns, in asyncio the
    task: see `portway.aio.Mutex`.

    **Abandoned.** Acquiring after an owner's death succeeds, as on Windows (WAIT_ABANDONED), and sets `abandoned`
    until the next acquire; exactly one owner is told.
    """

    __slots__ = ("__weakref__",)
    kind = Kind.MUTEX

    def __init__(
        self, name: str | None = None, *, initially_owned: bool = False, exclusive: bool = False,
        security: Security | None = None, root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        """``initially_owned=True`` makes this thread the owner of a mutex it creates, not of an existing one."""

        def ready(file: ObjectFile) -> None:
            file.sync = body_of(file)
            self._attach(file, file.sync)
            _native.Mutex.acquire(self, 0)

        try:
            self._create(
                name, exclusive=exclusive, security=security, root=root, ready=ready if initially_owned else None
            )
        except BaseException:
            self._detach()  # of a file that did not get its name: closed by the one who made it
            raise
