"""What mutexes, semaphores, events and timers share: create, open, close, pass on to another process.

Win32: CreateMutex, OpenMutex, CloseHandle and so on. The native classes of `_native/sync.pyx` do the waiting.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .._accel import sync as _native
from ..errors import AccessDenied, ObjectCorrupt
from . import namespace, objectfile
from .namespace import Kind, Namespace
from .objectfile import FIRST, ObjectFile

if TYPE_CHECKING:
    from .security import Security

__all__ = ["ClosingObject", "KernelObject", "open_entry"]

VALUE_AT, MAXIMUM_AT, TIMER_AT = 0xFC8, 0xE88, 0xE40
MANUAL_RESET = 1


class KernelObject:
    """A handle on a named or unnamed object.

    A call of the class creates it or opens what exists (`already_exists`); ``open`` only opens. Close it when done; a
    handle that is collected closes itself. A fork child has its own handles, `multiprocessing` may be given them as
    arguments with every start method, and other pickles open the object again while it lives.
    """

    __slots__ = ()
    kind: ClassVar[Kind]
    file: ObjectFile | None
    if TYPE_CHECKING:

        @property
        def already_exists(self) -> bool: ...

        @already_exists.setter
        def already_exists(self, value: bool) -> None: ...

    closed: bool
    _attach: Callable[[ObjectFile, Any], None]
    _detach: Callable[[], ObjectFile | None]

    @classmethod
    def open(cls, name: str, *, root: str | os.PathLike[str] | None = None) -> Self:
        """The existing object; `ObjectNotFound`, `InvalidHandle` if another kind has the name, `AccessDenied`."""
        self = cls.__new__(cls)
        self.already_exists = True
        self._join(Namespace(root).open(self.kind, name))
        return self

    def _create(
        self, name: str | None, *, exclusive: bool, security: Security | None,
        root: str | os.PathLike[str] | None, flags: int = 0, fields: dict[int, bytes] | None = None,
        ready: Callable[[ObjectFile], None] | None = None,
    ) -> None:  # fmt: skip
        def prepare(fd: int) -> None:
            for at, data in (fields or {}).items():
                os.pwrite(fd, data, at)
            if security is not None:
                security.apply(fd)

        file, self.already_exists = Namespace(root).create(
            self.kind, name, exclusive=exclusive, flags=flags, prepare=prepare, ready=ready
        )
        self._join(file)

    def _join(self, file: ObjectFile) -> None:
        try:
            with namespace.lock():
                if file.sync is None:
                    file.sync = body_of(file)
        except BaseException:
            namespace.release(file)
            raise
        self._attach(file, file.sync)

    def close(self) -> None:
        """Closes this handle; the object goes with the last one. Twice is fine. Closing what a thread waits for with
        this handle does not end the wait. A mutex that this thread owns is abandoned by its process's last handle.
        """
        land()
        file = self._detach()
        if file is not None:
            namespace.release(file)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    @property
    def name(self) -> str | None:
        """As other processes open it; None when it has none."""
        return self.file.name if self.file is not None else None

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self.file is None:
            return f"{kind}(closed)"
        return f"{kind}({self.name!r})" if self.name else f"{kind}(unnamed)"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            raise ValueError(f"this {type(self).__name__} is closed: it cannot be sent")
        return _received, (type(self), self.kind, self.file.path, self.file.header.number, _transit(self.file))


class ClosingObject(KernelObject):
    """Leaving ``with`` closes the handle (mutexes and semaphores are acquired and released by theirs)."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def body_of(file: ObjectFile) -> Any:
    """Maps the object's page; synchronisation objects need a file that may be written."""
    if not file.writable:
        raise AccessDenied(f"{file.path} may only be read; waiting and signalling need to write", hint="see Security")
    root = os.path.dirname(os.path.dirname(file.path))
    head = file.header
    try:
        return _native.Body(
            file.fd, file.slot, int(head.kind), bool(head.flags & MANUAL_RESET), head.pid_namespace, root,
            int(file.scope == "Global"), bytes.fromhex(os.path.basename(file.path)),
        )  # fmt: skip
    except OSError as error:
        raise ObjectCorrupt(f"{file.path} cannot be mapped: {error.strerror}") from error


def _finish(fd: int, path: str) -> None:
    """Before a file that nobody holds is removed: a wait-all that its last holder had decided is finished elsewhere."""
    if os.pread(fd, 8, 0xE00).strip(b"\0") and os.access(path, os.W_OK):
        try:
            header = objectfile.read_header(fd, path)
        except ObjectCorrupt:
            return
        if header.kind in (Kind.MUTEX, Kind.SEMAPHORE, Kind.EVENT, Kind.TIMER):
            with objectfile.reopened(fd) as other:
                file = ObjectFile(other, path, header, scope=namespace.scope_of(path))
                slot = objectfile.lock_slot(other, path)
                body = body_of_slot(file, slot)
                body.settle()
                body.close()


def body_of_slot(file: ObjectFile, slot: int) -> Any:
    _native.guard_add(file.fd, slot, 1)
    try:
        return body_of(file)
    finally:
        _native.guard_remove(file.fd)


namespace.recover.append(_finish)


# ---- to another process ----

_flying: list[tuple[Any, int]] = []  # descriptors that keep an object alive until the child has opened it


def _transit(file: ObjectFile) -> int | None:
    """For a child that is being spawned: a descriptor of its own, with a slot, that the child inherits."""
    context = sys.modules.get("multiprocessing.context")
    popen = context.get_spawning_popen() if context is not None else None
    if popen is None:
        return None
    land()
    fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR | os.O_CLOEXEC)
    objectfile.lock_slot(fd, file.path)
    _flying.append((weakref.ref(popen), fd))
    sent: int = popen.duplicate_for_child(fd)
    return sent


def land() -> None:
    """Closes what was sent to children that have started: their copies keep it."""
    for one in list(_flying):
        popen = one[0]()
        if popen is None or getattr(popen, "pid", None) is not None:
            _flying.remove(one)
            os.close(one[1])


def _received(kind: type[KernelObject], number_kind: Kind, path: str, number: int, sent: int | None) -> KernelObject:
    self = kind.__new__(kind)
    self.already_exists = True
    arrived = _arrived(sent)
    try:
        self._join(Namespace(os.path.dirname(os.path.dirname(path))).open_path(number_kind, path, number))
    finally:
        if arrived is not None:
            lock = struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, FIRST, objectfile.MAX_HOLDERS, 0)
            fcntl.fcntl(arrived, fcntl.F_OFD_SETLK, lock)
            os.close(arrived)
    return self


def open_entry(kind: type[KernelObject], entry: namespace.Entry) -> KernelObject:
    """A handle on an object of a listing; `ObjectNotFound` when it has gone meanwhile."""
    return _received(kind, entry.kind, entry.path, entry.header.number, None)


def _arrived(sent: int | None) -> int | None:
    """The inherited descriptor; forkserver sends an index into a list instead of a number."""
    if sent is None:
        return None
    forkserver = sys.modules.get("multiprocessing.forkserver")
    inherited = getattr(getattr(forkserver, "_forkserver", None), "_inherited_fds", None)
    fd = inherited[sent] if inherited else sent
    try:
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
