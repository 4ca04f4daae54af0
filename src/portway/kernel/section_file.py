"""The file behind a file-backed mapping: checked, extended, named in the object's page and found again by openers."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from typing import IO, Any, NamedTuple

from ..errors import AccessDenied, FileInvalid, InvalidHandle, NotEnoughMemory, ObjectCorrupt, ObjectNotFound
from .objectfile import ObjectFile, full
from .process import user_name

__all__ = ["PATH_MAX", "AnyFile", "Backing", "backing_of", "extend", "open_backing", "own_descriptor", "size_of"]

PATH_MAX = 4096
AnyFile = str | os.PathLike[str] | int | IO[Any]


class Backing(NamedTuple):
    """Which file; what lies in the object's page."""

    device: int
    inode: int
    path: str
    """Absolute; "" when it had no name."""


def _flags(access: str) -> int:
    return os.O_CLOEXEC | (os.O_RDWR if access == "read-write" else os.O_RDONLY)


def own_descriptor(file: AnyFile, access: str) -> int:
    """A descriptor of ours for `file`, with the rights that `access` needs."""
    if isinstance(file, (str, os.PathLike)):
        try:
            fd = os.open(file, _flags(access) | os.O_NONBLOCK)
        except IsADirectoryError:
            raise InvalidHandle(f"{os.fspath(file)} is a folder, not a file") from None
        except PermissionError as error:
            raise AccessDenied(f"{os.fspath(file)}: {error.strerror} with access={access!r}") from None
        except FileNotFoundError:
            raise ObjectNotFound(f"no file {os.fspath(file)!r}", hint="create it first") from None
    else:
        fd = _duplicate(file)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidHandle(f"{file!r} is not a regular file")
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_WRONLY or (access == "read-write" and mode != os.O_RDWR):
            raise AccessDenied(
                f"{file!r} is not open for what access={access!r} needs", hint='open it with "r+b", or ask for less'
            )
        return fd
    except BaseException:
        os.close(fd)
        raise


def _duplicate(file: int | IO[Any]) -> int:
    try:
        number = file if isinstance(file, int) else file.fileno()
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidHandle(f"{file!r} is no open file: {error}") from None


def size_of(fd: int, size: int, access: str) -> int:
    """The size of a mapping of `size` bytes, 0: the file's. Nothing is changed yet, see `extend`."""
    there = os.fstat(fd).st_size
    if size == 0 and there == 0:
        raise FileInvalid("an empty file cannot be mapped", hint="give a size, and the file is extended")
    if size > there and access != "read-write":
        raise NotEnoughMemory(
            f"size={size}: the file has {there} bytes, and access={access!r} does not extend it",
            hint='ask for access="read-write"',
        )
    return size or there


def extend(fd: int, size: int, reserve: bool) -> None:
    """Makes the file at least `size` bytes long, with space behind them; as it was when that fails."""
    there = os.fstat(fd).st_size
    if size <= there:
        return
    try:
        if reserve:
            os.ftruncate(fd, size)
        else:
            os.posix_fallocate(fd, there, size - there)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(fd, there)
        if error.errno == errno.EFBIG:
            raise NotEnoughMemory(f"size={size}: {error.strerror}", hint="see ulimit -f") from None
        raise full(error, backing_of(fd).path or "the file") from error


def backing_of(fd: int) -> Backing:
    info = os.fstat(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if not path.startswith("/") or len(os.fsencode(path)) > PATH_MAX or not _leads_to(path, info.st_dev, info.st_ino):
        path = ""  # deleted, a memfd, or beyond what fits: found through a holder
    return Backing(info.st_dev, info.st_ino, path)


def _leads_to(path: str, device: int, inode: int) -> bool:
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) == (device, inode)


def open_backing(found: ObjectFile, backing: Backing, access: str) -> int:
    """By path, else through a holder; opened as a fresh descriptor, so that our own rights decide."""
    refusal: Exception | None = None
    for path in _ways(found, backing):
        try:
            fd = _open_checked(path, found, backing, access)
        except AccessDenied:
            raise
        except PermissionError as error:
            refusal = error
            continue
        if fd is not None:
            return fd
    if refusal is not None:
        raise AccessDenied(f"mapping {found.name}: the file behind it does not allow access={access!r}") from refusal
    raise ObjectNotFound(
        f"mapping {found.name}: the file behind it ({backing.path or 'without a name'}) is gone or was replaced, and "
        "no living holder lets us at it",
        hint="open it as the holder's user, or map the new file",
    )


def _ways(found: ObjectFile, backing: Backing) -> list[str]:
    ways = [backing.path] if backing.path else []
    for holder in found.holders():
        folder = f"/proc/{holder.pid}/fd"
        with suppress(OSError):
            ways += [f"{folder}/{number}" for number in os.listdir(folder) if _is_it(f"{folder}/{number}", backing)]
    return ways


def _is_it(link: str, backing: Backing) -> bool:
    try:
        info = os.stat(link)
    except OSError:
        return False
    return (info.st_dev, info.st_ino) == (backing.device, backing.inode)


def _open_checked(path: str, found: ObjectFile, backing: Backing, access: str) -> int | None:
    """None when it is another file. Looked at before it is opened: opening a device or FIFO can do things."""
    try:
        look = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if path.startswith("/proc/") else os.O_NOFOLLOW))
    except FileNotFoundError:
        return None
    try:
        info = os.fstat(look)
        if not stat.S_ISREG(info.st_mode) or (info.st_dev, info.st_ino) != (backing.device, backing.inode):
            return None
        _check_owner(found, info)
        fd = os.open(f"/proc/self/fd/{look}", _flags(access))
    finally:
        os.close(look)
    if os.fstat(fd).st_size < found.header.size:
        os.close(fd)
        raise ObjectCorrupt(f"mapping {found.name}: the file behind it was cut below {found.header.size} bytes")
    return fd


def _check_owner(found: ObjectFile, info: os.stat_result) -> None:
    """Another user's object must not make us open a file of ours, or of a third, with our rights."""
    if found.owner not in (os.geteuid(), 0) and info.st_uid != found.owner:
        raise AccessDenied(
            f"mapping {found.name} of uid {user_name(found.owner)} names a file of uid {user_name(info.st_uid)}",
            hint="only root's mappings and one's own may name other users' files",
        )
