"""Where .NET on Linux keeps a named mutex: the folders, their lock, the file and the lock on it.

::

    /tmp/.dotnet/shm/session<sid>/NAME       Local\\NAME, NAME              0777 folders, 0666 files: any user
    /tmp/.dotnet/shm/global/NAME             Global\\NAME
    /tmp/.dotnet-uid<uid>/shm/...            the same with current_user_only: 0700 and 0600 (.NET 10)

The file is opened, created and removed only under ``flock(LOCK_EX)`` on the ``shm`` folder; whoever has it open holds
``flock(LOCK_SH)`` on it, so an exclusive lock that succeeds says that nobody has, whatever the bytes claim. Source:
CoreCLR sharedmemory.cpp (.NET Core 3.1) and SharedMemoryManager.Unix.cs; checked against both with strace.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ..deadline import Deadline
from ..errors import AccessDenied, InvalidAddress, NotSupported, PortwayError

__all__ = ["PAGE", "Place", "close_file", "folder_lock", "open_file", "place_of", "remove", "share"]

PAGE = 4096
MAX_NAME = 255
_BASE = "/tmp"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Place(NamedTuple):
    """Which file: ``/tmp/<root>/shm/<scope>/<name>``."""

    root: str
    scope: str
    name: str
    private: bool

    @property
    def path(self) -> str:
        return f"{_BASE}/{self.root}/shm/{self.scope}/{self.name}"


def place_of(name: str, current_user_only: bool) -> Place:
    """The file of `name` as .NET chooses it. `InvalidAddress` for a name .NET refuses too."""
    scope, bare = f"session{os.getsid(0)}", name
    if name.startswith("Global\\"):
        scope, bare = "global", name[7:]
    elif name.startswith("Local\\"):
        bare = name[6:]
    if not bare or bare in (".", "..") or any(sign in bare for sign in "/\\\0"):
        raise InvalidAddress(
            f"DotnetMutex name {name!r}: .NET on Linux makes a file of it",
            hint="give a name without / and \\, except for one Local\\ or Global\\ in front",
        )
    if len(os.fsencode(bare)) > MAX_NAME:
        raise InvalidAddress(f"DotnetMutex name of {len(os.fsencode(bare))} bytes: .NET takes at most {MAX_NAME}")
    root = f".dotnet-uid{os.geteuid()}" if current_user_only else ".dotnet"
    return Place(root, scope, bare, current_user_only)


def _refuse(path: str, why: str) -> PortwayError:
    return AccessDenied(f"{path}: {why}", hint="somebody made it who is not .NET; remove it, then try again")


def _check_folder(fd: int, path: str, private: bool) -> None:
    """As .NET: a private folder is ours and nobody else's; a common one has to let its owner in, no more."""
    found = os.fstat(fd)
    wanted = 0o700 if private else 0o777
    if private and found.st_uid != os.geteuid():
        raise _refuse(path, f"belongs to uid {found.st_uid}, not to us")
    if stat.S_IMODE(found.st_mode) & 0o777 != wanted:
        with suppress(OSError):
            os.fchmod(fd, wanted)
            return
        if private:
            raise _refuse(path, f"has mode {stat.S_IMODE(found.st_mode):o}, not {wanted:o}")


def _folder(parent: int, name: str, path: str, private: bool, *, create: bool) -> int:
    """A descriptor of the folder `name` in `parent`; made whole under another name, then renamed into place."""
    mode = 0o700 if private else 0o777
    for _ in range(10):
        try:
            fd = os.open(name, _FOLDER, dir_fd=parent)
        except FileNotFoundError:
            if not create:
                raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _refuse(path, "is not a folder") from None
            raise
        else:
            try:
                _check_folder(fd, path, private)
            except BaseException:
                os.close(fd)
                raise
            return fd
        fresh = f"{_BASE}/.dotnet.{os.urandom(6).hex()}"
        os.mkdir(fresh, 0o700)
        os.chmod(fresh, mode)
        try:
            os.rename(fresh, name, dst_dir_fd=parent)
        except OSError:  # somebody was faster: look at theirs
            os.rmdir(fresh)
    raise AccessDenied(f"{path}: cannot be made")


@contextmanager
def folder_lock(place: Place, deadline: Deadline, *, create: bool) -> Iterator[int]:
    """The ``shm`` folder, exclusively locked. FileNotFoundError when it is missing and not to be made."""
    with _opened(_BASE, f"{_BASE}/{place.root}", place, create) as root:
        shm = _folder(root, "shm", f"{_BASE}/{place.root}/shm", place.private, create=create)
        try:
            lock_within(shm, deadline, f"waiting for the lock on {_BASE}/{place.root}/shm")
            yield shm
        finally:
            os.close(shm)  # and with it the lock


@contextmanager
def _opened(base: str, path: str, place: Place, create: bool) -> Iterator[int]:
    top = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _folder(top, place.root, path, place.private, create=create)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


def lock_within(fd: int, deadline: Deadline, doing: str) -> None:
    """flock has no timeout; .NET holds this lock for microseconds, so looking again is rare."""
    pause = 0.0002
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline.check(doing)
            time.sleep(min(pause := pause * 2, 0.02))


def open_file(place: Place, shm: int, *, create: bool) -> tuple[int, bool]:
    """(descriptor holding LOCK_SH, whether its page is fresh zeros). Under `folder_lock`.

    FileNotFoundError when nobody has it open and `create` is false.
    """
    scope = _folder(shm, place.scope, os.path.dirname(place.path), place.private, create=create)
    try:
        fd, fresh = _open_or_make(place, scope, create)
    finally:
        os.close(scope)
    try:
        fresh = fresh or _unused(fd)
        if fresh and not create:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place.path)
        if fresh:
            os.ftruncate(fd, 0)  # all that a dead one left
            os.ftruncate(fd, PAGE)
        elif os.fstat(fd).st_size != PAGE:
            raise NotSupported(f"{place.path}: {os.fstat(fd).st_size} bytes, not {PAGE}: not a mutex of a .NET we know")
        share(fd)
        return fd, fresh
    except BaseException:
        os.close(fd)
        raise


def _open_or_make(place: Place, scope: int, create: bool) -> tuple[int, bool]:
    mode = 0o600 if place.private else 0o666
    try:
        fd = os.open(place.name, _FILE, dir_fd=scope)
    except FileNotFoundError:
        if not create:
            raise
        fd = os.open(place.name, _FILE | os.O_CREAT | os.O_EXCL, mode, dir_fd=scope)
        os.fchmod(fd, mode)  # past the umask, as .NET does
        return fd, True
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _refuse(place.path, "is not a regular file") from None
        if error.errno == errno.EACCES:
            raise AccessDenied(f"{place.path}: {error.strerror}") from None
        raise
    try:
        _check_file(fd, place)
    except BaseException:
        os.close(fd)
        raise
    return fd, False


def _check_file(fd: int, place: Place) -> None:
    """Also against a link to a file of ours, which a stranger may put here to have it emptied."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise _refuse(place.path, f"is not a regular file with one name ({found.st_nlink} links)")
    if place.private and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o777 != 0o600):
        mode = stat.S_IMODE(found.st_mode)
        raise _refuse(place.path, f"belongs to uid {found.st_uid} with mode {mode:o}; it must be ours, with 600")


def _unused(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def share(fd: int) -> None:
    """Says: this file is in use. BlockingIOError when somebody holds it exclusively, which .NET does for an instant."""
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def remove(place: Place, shm: int, fd: int) -> None:
    """Under `folder_lock`: gives up our lock; the last one removes the file and, when empty, its folder."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    if not _unused(fd):
        return
    with suppress(OSError):
        scope = os.open(place.scope, _FOLDER, dir_fd=shm)
        try:
            named, ours = os.stat(place.name, dir_fd=scope, follow_symlinks=False), os.fstat(fd)
            if (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino):
                os.unlink(place.name, dir_fd=scope)
        finally:
            os.close(scope)
        os.rmdir(place.scope, dir_fd=shm)


def close_file(place: Place, fd: int, deadline: Deadline) -> None:
    """`remove` under the folder's lock, then close; without the lock in time the file stays for the next to find."""
    try:
        with folder_lock(place, deadline, create=False) as shm:
            remove(place, shm, fd)
    except (OSError, PortwayError):
        pass
    finally:
        os.close(fd)
