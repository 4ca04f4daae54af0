r"""Where named objects live: names, roots, and create, open and list of their files.

Names (Win32): up to 259 characters, case-sensitive; ``Local\x`` and plain ``x`` are the same object of this user,
``Global\x`` is one for all users; both prefixes exact; ``/`` is an ordinary character; any other backslash is an error.
All kinds share the names.

The root is ``/run/portway`` if an administrator made it, else ``/dev/shm``; the environment does not matter, but for
``PORTWAY_ROOT``, which like ``root=`` names a world of one's own. In it ``portway-UID`` (mode 0700) holds a user's
objects and ``portway-global`` (1777) the Global ones: one file per object, named by a hash of its name. Nothing that
another user could have put there in advance is trusted: see `Scope.folder`.

When every holder of an object was killed its name is free at once; the file itself goes with the next create, open or
close that meets it, or with the next listing.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from .._accel import sync as _native
from ..errors import (
    AccessDenied,
    AlreadyExists,
    InvalidAddress,
    InvalidHandle,
    NotEnoughMemory,
    NotSupported,
    ObjectCorrupt,
    ObjectNotFound,
    OperationTimeout,
)
from . import folders, objectfile
from .folders import check_folder, make_folder
from .object_name import MAX_NAME, Name, parse_name
from .objectfile import (
    SLOTS,
    Header,
    Holder,
    Kind,
    ObjectFile,
    claim_slot,
    full,
    pack_header,
    read_header,
    remove,
)
from .ofdlock import gate
from .process import user_name

__all__ = ["Entry", "Kind", "MAX_NAME", "Name", "Namespace", "ObjectFile", "check_folder", "default_root", "parse_name"]

MIN_SIZE = objectfile.FREE_PAGES
ATTEMPTS = 1000
MAX_ROOT = 255


def default_root() -> str:
    """See the module."""
    return folders.default_root("/dev/shm")


class Entry(NamedTuple):
    """One object of a listing."""

    kind: Kind
    name: str | None
    owner: int
    """uid of its creator."""
    holders: list[Holder]
    header: Header
    path: str


_lock = threading.RLock()
_open: dict[tuple[int, int], ObjectFile] = {}
_swept: set[str] = set()
BeforeUnlink = Callable[[int, str], None]
recover: list[BeforeUnlink] = []
"""Called with descriptor and path before a file without holders is removed (`sync_base` finishes transactions)."""


class Namespace:
    """The objects under one root; cheap to make. ``Namespace()`` is the machine's own."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = os.path.abspath(os.fspath(root) if root is not None else default_root())
        if len(os.fsencode(self.root)) > MAX_ROOT:
            raise InvalidAddress(f"root {self.root!r} has more than {MAX_ROOT} bytes", hint="use a shorter path")

    def folder(self, scope: str, make: bool = True) -> str:
        """The checked folder of ``Local`` or ``Global``; made when it is missing (`ObjectNotFound` with make=False)."""
        uid = os.geteuid()
        path = os.path.join(self.root, f"portway-{uid}" if scope == "Local" else "portway-global")
        mode = 0o700 if scope == "Local" else 0o1777
        for _ in range(3):
            try:
                if scope == "Local":
                    check_folder(path, (uid,), mode, f"remove it, or as root: rm -r {path}")
                else:
                    fix = f"as root: chown root {path}; chmod 1777 {path}"
                    check_folder(path, (0, uid), mode, fix)
                return path
            except FileNotFoundError:
                if not make:
                    raise ObjectNotFound(f"no object exists under {path}") from None
                try:
                    make_folder(path, mode)
                except OSError as error:
                    raise full(error, path) from error
        raise AccessDenied(f"{path} comes and goes", hint="end what removes it")

    def create(
        self, kind: Kind, name: str | None, *, exclusive: bool = False, size: int = 0, flags: int = 0,
        mode: int = 0o600, prepare: Callable[[int], None] | None = None,
        ready: Callable[[ObjectFile], None] | None = None,
    ) -> tuple[ObjectFile, bool]:  # fmt: skip
        """The object of this name, made if there is none; True when it was there already. `release` it later.

        ``prepare(fd)`` fills a new file before it has a name, ``ready(file)`` is called when it is complete but still
        has none: whatever they raise leaves nothing behind. `size` goes into the header, `mode` is exact whatever the
        umask. `InvalidHandle` when another kind has the name,
        `AlreadyExists` for an existing one with ``exclusive=True``.
        """
        parsed = parse_name(name) if name else Name("Local", "")
        folder = self.folder(parsed.scope)
        self.sweep_once(folder)
        path = os.path.join(folder, parsed.file if parsed.text else os.urandom(16).hex())
        for _ in range(ATTEMPTS):
            if parsed.text:
                found = self._open(path, kind, parsed)
                if found is not None:
                    if exclusive:
                        release(found)
                        raise AlreadyExists(f"{kind} {parsed} exists already", hint="open it, or leave out exclusive")
                    return found, True
            made = self._create(folder, path, kind, parsed, size, flags, mode, prepare, ready)
            if made is not None:
                return made, False
        raise OperationTimeout(f"{kind} {parsed}: others make and remove it all the time")

    def open(self, kind: Kind, name: str) -> ObjectFile:
        """The existing object; `release` it later. `ObjectNotFound`, `AccessDenied`, `InvalidHandle`: another kind."""
        if name is None:
            raise TypeError("name=None: an unnamed object cannot be opened by name")
        parsed = parse_name(name)
        missing = ObjectNotFound(f"no {kind} named {parsed}", hint="create it first")
        try:
            folder = self.folder(parsed.scope, make=False)
        except ObjectNotFound:
            raise missing from None
        self.sweep_once(folder)
        found = self._open(os.path.join(folder, parsed.file), kind, parsed)
        if found is None:
            raise missing
        return found

    def open_path(self, kind: Kind, path: str, number: int) -> ObjectFile:
        """One object by its file, as a pickled handle names it; `ObjectNotFound` when it is gone or another by now."""
        scope = scope_of(path)
        if os.path.dirname(path) != self.folder(scope, make=False):
            raise AccessDenied(f"{path} does not belong to this user's objects")
        found = self._open(path, kind, None, scope)
        if found is not None and found.header.number != number:
            release(found)
            found = None
        if found is None:
            raise ObjectNotFound(f"the {kind} that was sent has gone meanwhile", hint="keep it open in the sender")
        return found

    def _create(
        self, folder: str, path: str, kind: Kind, name: Name, size: int, flags: int, mode: int,
        prepare: Callable[[int], None] | None, ready: Callable[[ObjectFile], None] | None,
    ) -> ObjectFile | None:  # fmt: skip
        """None when another process was first."""
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
                raise NotSupported(f"{folder}: this file system lacks O_TMPFILE", hint="use tmpfs or ext4") from error
            raise full(error, folder) from error
        made: ObjectFile | None = None
        try:
            os.fchmod(fd, mode)
            os.truncate(fd, MIN_SIZE)
            _native.allocate(fd, 0, SLOTS + objectfile.PAGE)  # the other pages of slots are seldom needed
            home = _native.pid_namespace()
            os.pwrite(fd, pack_header(kind, name.text, flags=flags, size=size, pid_namespace=home), 0)
            if prepare is not None:
                prepare(fd)
            made = ObjectFile(fd, path, read_header(fd, path), scope=name.scope)
            made.claim()
            if ready is not None:
                ready(made)
            with _lock:
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)  # by linkat, which follows
                _register(made)
            return made
        except BaseException as error:
            if made is not None and made.sync is not None:
                made.sync.close()
            _native.guard_remove(fd)
            os.close(fd)
            if isinstance(error, FileExistsError):
                return None
            if isinstance(error, OSError) and not isinstance(error, NotEnoughMemory):
                raise full(error, path) from error
            raise

    def _open(self, path: str, kind: Kind | None, name: Name | None, scope: str | None = None) -> ObjectFile | None:
        """None when there is no such file, also when it had no holders left and was removed now."""
        for _ in range(ATTEMPTS):
            try:
                fd, writable = _open_file(path)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise full(error, path) from error
            try:
                found = _join(fd, path, kind, name, scope or (name.scope if name else "Local"), writable)
            except BaseException:
                os.close(fd)
                raise
            if found is None or found.fd != fd:
                os.close(fd)
            if found is not _AGAIN:
                return found
        raise OperationTimeout(f"{path}: others make and remove it all the time")

    def list(self) -> list[Entry]:
        """Every live object of this user and of Global that we may look at; what has no holder is removed."""
        return [*self._list("Local"), *self._list("Global")]

    def _list(self, scope: str) -> Iterator[Entry]:
        try:
            folder = self.folder(scope, make=False)
        except ObjectNotFound:
            return
        for one in sorted(os.listdir(folder)):
            path = os.path.join(folder, one)
            entry = _look(path, scope) if _is_ours(one) else None
            if entry is not None:
                yield entry
        with _lock:
            _swept.add(folder)

    def sweep_once(self, folder: str) -> None:
        """Removes what has no holders, the first time this process uses the folder."""
        with _lock:
            if folder in _swept:
                return
            _swept.add(folder)
        for one in os.listdir(folder):
            if _is_ours(one):
                _look(os.path.join(folder, one), "Local")


_AGAIN = ObjectFile.__new__(ObjectFile)
_AGAIN.fd = -1


def scope_of(path: str) -> str:
    return "Global" if os.path.basename(os.path.dirname(path)) == "portway-global" else "Local"


def _is_ours(file: str) -> bool:
    return len(file) == 32 and not file.strip("0123456789abcdef")


def _open_file(path: str) -> tuple[int, bool]:
    """Descriptor, and whether it may write; never follows a symlink, never blocks on a FIFO put there."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd, writable = os.open(path, os.O_RDWR | flags), True
    except PermissionError:
        fd, writable = os.open(path, os.O_RDONLY | flags), False
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise AccessDenied(f"{path} is no object but something put there", hint="remove it") from None
        raise
    info = os.fstat(fd)
    folder = os.stat(os.path.dirname(path))
    private = stat.S_IMODE(folder.st_mode) == 0o700
    if not stat.S_ISREG(info.st_mode) or (private and info.st_uid != folder.st_uid):
        os.close(fd)
        raise AccessDenied(f"{path} is not an object of uid {user_name(folder.st_uid)}", hint="remove it")
    return fd, writable


def _join(fd: int, path: str, kind: Kind | None, name: Name | None, scope: str, writable: bool) -> ObjectFile | None:
    """The `ObjectFile` (this one's, or the one this process has already), None or _AGAIN: the file has gone."""
    info = os.fstat(fd)
    with _lock:
        known = _open.get((info.st_dev, info.st_ino))
        if known is not None and info.st_nlink:
            known.references += 1  # first of all: a handle collected from here on does not take it away
            if known.fd >= 0:
                try:
                    _check(known.header, kind, name, path)
                except BaseException:
                    release(known)
                    raise
                return known
        with gate(fd, path, writable):
            if os.fstat(fd).st_nlink == 0:
                return _AGAIN
            if not objectfile.held_by_others(fd):
                if not _remove(fd, path):
                    raise _kept(path, info.st_uid)
                return _AGAIN
            header = read_header(fd, path)
            _check(header, kind, name, path)
            if info.st_size < MIN_SIZE:
                raise ObjectCorrupt(f"{path} was cut to {info.st_size} bytes", hint="close it everywhere; it goes then")
            claim_slot(fd, path, writable)
        made = ObjectFile(fd, path, header, writable=writable, scope=scope)
        _register(made)
        return made


def _kept(path: str, owner: int) -> AccessDenied:
    return AccessDenied(
        f"{path} has no holder left, but only uid {user_name(owner)} may remove it",
        hint=f"as that user, or as root: portway sync ls, or rm {path}",
    )


def _check(header: Header, kind: Kind | None, name: Name | None, path: str) -> None:
    if name is not None and header.name != name.text:
        raise ObjectCorrupt(f"{path} says it is {header.name!r}, its place is that of {name.text!r}", hint="remove it")
    if kind is not None and header.kind is not kind:
        raise InvalidHandle(f"{name or path} is {header.kind.article}, not {kind.article}", hint="kinds share names")


def _remove(fd: int, path: str) -> bool:
    for finish in recover:
        finish(fd, path)
    return remove(fd, path)


def _look(path: str, scope: str) -> Entry | None:
    """What lies there, without joining; removed when nobody holds it. None when gone, removed or not readable."""
    try:
        fd, writable = _open_file(path)
    except (OSError, AccessDenied):
        return None
    try:
        holders = objectfile.holders_of(fd)
        if not holders:
            with gate(fd, path, writable):
                if os.fstat(fd).st_nlink and not objectfile.held_by_others(fd):
                    _remove(fd, path)
            return None
        header = read_header(fd, path)
        name = header.name and (header.name if scope == "Local" else f"Global\\{header.name}")
        return Entry(header.kind, name or None, os.fstat(fd).st_uid, holders, header, path)
    except (OperationTimeout, ObjectCorrupt):
        return None
    finally:
        os.close(fd)


def lock() -> AbstractContextManager[object]:
    """Held while this process joins or leaves; also for what handles of one object set up together."""
    return _lock


def retain(one: ObjectFile) -> ObjectFile:
    """Another handle of this process on the same object."""
    with _lock:
        one.references += 1
        return one


def release(one: ObjectFile) -> None:
    """A handle gone; the process's last one leaves, and removes the name if no other process holds it."""
    with _lock:
        one.references -= 1
        if one.references > 0 or one.fd < 0:
            return
        _open.pop(one.key, None)
        try:
            if one.sync is not None:
                one.sync.settle()  # may run a signal handler
        finally:
            if one.sync is None or one.sync.close(lambda: _leave_late(one)):
                one.leave()
            else:
                one.unname()


def _leave_late(one: ObjectFile) -> None:
    """A thread had gone on waiting for an object whose last handle was closed: now it holds it no more."""
    with _lock:
        one.leave()


def _register(one: ObjectFile) -> None:
    _open[one.key] = one
    _at_exit()


_armed = 0


def _at_exit() -> None:
    """Whatever is still open at a normal exit leaves in order; multiprocessing's children skip atexit."""
    global _armed
    if _armed == os.getpid():
        return
    if not _armed:
        atexit.register(_leave_all)
    _armed = os.getpid()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _leave_all, exitpriority=-100)


def _leave_all() -> None:
    with _lock:
        for one in list(_open.values()):
            one.references = 0
            release(one)


def _in_child() -> None:
    """A fork child has holds of its own (made by the native guard); its ends are those of another process."""
    global _lock, _armed
    _lock = threading.RLock()
    _native.finish_closed()
    util = sys.modules.get("multiprocessing.util")
    if util is not None and _armed:
        util.register_after_fork(_finalizer, _Finalizer.arm)
        _armed = os.getpid()


class _Finalizer:
    """multiprocessing forgets inherited finalizers in a child before it calls this."""

    def arm(self) -> None:
        sys.modules["multiprocessing.util"].Finalize(None, _leave_all, exitpriority=-100)


_finalizer = _Finalizer()
os.register_at_fork(
    before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_in_child
)
