"""`DotnetMutex`: .NET's named mutex on Linux, shared with real .NET processes by name alone.

.NET has no other named object on Linux: named maps, semaphores and events throw there. Measured against .NET Core 3.1
and .NET 10; layouts and locks are in `_native/dotnet.h` and `_dotnet_files`.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .._accel import dotnet as _native
from ..deadline import Deadline
from ..errors import AccessDenied, NotOwner, NotSupported, ObjectClosed, ObjectCorrupt, ObjectNotFound
from . import _dotnet_files as files

if TYPE_CHECKING:
    from .._native.dotnet import Page

__all__ = ["DotnetMutex"]

_lock = threading.RLock()
_shared: dict[str, _Shared]


def _require_glibc() -> None:
    if not _native.SUPPORTED:
        raise NotSupported("DotnetMutex: .NET's mutex is glibc's, on a 64-bit little-endian machine; this is another")


class _Shared:
    """What every handle of this process on one file shares: ownership is a thread's, not a handle's."""

    def __init__(self, place: files.Place, deadline: Deadline, *, create: bool) -> None:
        self.place, self.handles, self.twin = place, 0, -1
        _require_glibc()
        with files.folder_lock(place, deadline, create=create) as shm:
            self.fd, self.fresh = files.open_file(place, shm, create=create)
            try:
                self.page: Page = _native.Page(self.fd, fresh=self.fresh)
                if not self.page.fits():
                    raise NotSupported(
                        f"{place.path}: not the layout of .NET Core 2.0 to .NET 10 with glibc on this architecture",
                        hint="it was made by a .NET of another version, architecture or C library; it is left alone",
                    )
            except BaseException:
                if self.fresh:
                    files.remove(place, shm, self.fd)
                os.close(self.fd)
                raise

    def close(self) -> None:
        self.page.close()
        self.leave(5)

    def leave(self, patience: float) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            files.close_file(self.place, fd, Deadline(patience))


_shared = {}


def _open(place: files.Place, deadline: Deadline, *, create: bool) -> tuple[_Shared, bool]:
    with _lock:
        shared = _shared.get(place.path)
        fresh = shared is None
        if shared is None:
            try:
                shared = _Shared(place, deadline, create=create)
            except FileNotFoundError:
                raise ObjectNotFound(f"no .NET mutex has the name {place.name!r} ({place.path})") from None
            except BlockingIOError:
                raise AccessDenied(f"{place.path}: somebody who is not .NET holds it exclusively") from None
            fresh = shared.fresh
            _shared[place.path] = shared
        shared.handles += 1
        return shared, fresh


def _leave_all() -> None:
    """At a normal exit: without this the file would wait for the next to open it.

    The page stays mapped, since daemon threads may be waiting; what is owned the kernel tells to the next owner.
    """
    with _lock:
        while _shared:
            _shared.popitem()[1].leave(1)


atexit.register(_leave_all)


# -- fork: the child gets a lock of its own on every file, so that neither's close is taken for the last ---------------


def _before_fork() -> None:
    _lock.acquire()
    for shared in _shared.values():
        with suppress(OSError):  # no descriptor left: the child shares ours, and its close may remove the name early
            shared.twin = os.open(f"/proc/self/fd/{shared.fd}", os.O_RDWR | os.O_CLOEXEC)
            files.share(shared.twin)


def _after_fork_in_parent() -> None:
    for shared in _shared.values():
        if shared.twin >= 0:
            os.close(shared.twin)
        shared.twin = -1
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    for shared in _shared.values():
        if shared.twin >= 0:
            os.close(shared.fd)
            shared.fd, shared.twin = shared.twin, -1


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)


class DotnetMutex:
    r"""A handle of ``new Mutex(false, name)`` of .NET on this machine. Recursive; owned by a thread.

    ``name`` is one of this Unix session (``Local\x``, ``x``) or of the machine (``Global\x``). Plain names are open to
    every user, as .NET makes them; ``current_user_only=True`` is .NET 10's ``NamedWaitHandleOptions``.
    ``initially_owned`` takes it only if this call made it (`already_exists` is False). `open` only opens.

    ``with`` acquires and releases. An acquire after its owner's death succeeds and sets `abandoned` until the next one.

    `NotSupported`: not glibc, or a file of another layout (.NET 11, musl, another architecture),
    which stays untouched. `AccessDenied`: a folder or file that a stranger put there. `OperationTimeout`: somebody
    holds .NET's lock on the folder for `timeout` seconds.

    Whoever may write the file can lie in it, and in a plain name's folder that is every user of the machine: they can
    keep the mutex taken or free it, as with .NET. They cannot make this process crash or write elsewhere.

    Closed by ``close()`` or with its last reference. Closing a process's last handle while
    one of its threads owns the mutex abandons it. A mutex owned by a thread that ends, or by a process that is killed
    or calls exec, is abandoned. A fork child owns none.
    """

    def __init__(
        self, name: str, *, current_user_only: bool = False, initially_owned: bool = False, timeout: float | None = 5.0
    ) -> None:
        self._join(name, current_user_only, timeout, create=True)
        if initially_owned and self._fresh:
            self.acquire(0)

    @classmethod
    def open(cls, name: str, *, current_user_only: bool = False, timeout: float | None = 5.0) -> Self:
        """One that somebody has open; else `ObjectNotFound`."""
        self = cls.__new__(cls)
        self._join(name, current_user_only, timeout, create=False)
        return self

    def _join(self, name: str, current_user_only: bool, timeout: float | None, *, create: bool) -> None:
        self.name, self.abandoned, self._closed = name, False, True
        place = files.place_of(name, current_user_only)
        self._shared, self._fresh = _open(place, Deadline(timeout), create=create)
        self._closed = False

    @property
    def already_exists(self) -> bool:
        """True: somebody had it before this call; .NET's ``createdNew`` the other way round."""
        return not self._fresh

    @property
    def path(self) -> str:
        """The file that .NET knows it by."""
        return self._shared.place.path

    @property
    def closed(self) -> bool:
        return self._closed

    abandoned: bool
    """The last acquire through this handle took it from an owner that had died. One owner is told."""

    def _page(self) -> Page:
        if self._closed:
            raise ObjectClosed(f"DotnetMutex {self.name!r} is closed")
        return self._shared.page

    def acquire(self, timeout: float | None = None) -> bool:
        """Owns it after that; `abandoned` says whether its last owner ended without releasing it. Always True.

        Waits up to `timeout` seconds, None without limit: `OperationTimeout`. Every acquire needs one release.
        `ObjectCorrupt`: the file was cut or holds what no .NET writes. Ctrl-C ends the wait.
        """
        page, deadline = self._page(), Deadline(timeout)
        limit = -1 if timeout is None else min(math.ceil(timeout * 1e9), 2**62)
        got = page.acquire(limit, threading.current_thread() is threading.main_thread())
        if got == _native.HELD:
            if self._closed:
                raise ObjectClosed(f"DotnetMutex {self.name!r} was closed while waiting")
            raise deadline.error(f"waiting for DotnetMutex {self.name!r}")
        self._check(got)
        if page.depth == 1:
            self.abandoned = got == _native.ABANDONED
        return True

    def _check(self, got: int) -> None:
        if got == _native.CORRUPT:
            raise ObjectCorrupt(
                f"DotnetMutex {self.name!r}: {self.path} was cut, or holds what no .NET writes",
                hint="close every handle; the next to open it makes it anew",
            )
        if got == _native.TOO_MANY:
            raise OverflowError(f"DotnetMutex {self.name!r}: acquired too often")

    def release(self) -> None:
        """Undoes one acquire of this thread; `NotOwner`, nothing changed, if this thread does not own it."""
        got = self._page().release()
        if got == _native.NOT_OWNER:
            raise NotOwner(f"DotnetMutex {self.name!r}: this thread does not own it")
        self._check(got)

    @property
    def owned(self) -> bool:
        """This thread owns it."""
        return self.depth > 0

    @property
    def depth(self) -> int:
        """How many releases this thread owes."""
        return int(self._page().depth)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def close(self) -> None:
        """Gives up this handle; closing twice is fine."""
        with _lock:
            if self._closed:
                return
            self._closed = True
            self._shared.handles -= 1
            if self._shared.handles == 0:
                _shared.pop(self._shared.place.path, None)
                self._shared.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            self.close()

    def __repr__(self) -> str:
        return f"<DotnetMutex {self.name!r}{' closed' if self._closed else ''}>"
