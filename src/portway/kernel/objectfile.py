"""The file of one kernel object: its first page, and who holds it.

Layout, little-endian. Page 0 is common to all kinds; everything in it was written by others and is checked.

    0x000  8   magic "PWOBJECT"
    0x008  4   layout version
    0x00c  4   kind (`Kind`)
    0x010  4   flags of the kind (1: manual reset)
    0x014  4   bytes of the name; 0: unnamed
    0x018  8   pid namespace of the creator (inode), or 0
    0x020  8   random number of the object
    0x028  8   a mapping's size in bytes; 0 for other kinds
    0x030 80   free for the kind (mappings)
    0x080      the name as given without prefix, UTF-8, at most 1,036 bytes
    0x500      free for the kind (mappings), to 0x7ff
    0x800      the synchronisation objects, see `_native/sync_page.h`
    0x1000     4 pages of holders: 1,024 slots of 16 bytes {pid, waiting, start time in ticks}
    0x5000     free for the kind, to 0xffff
    0x10000    the bytes of a mapping

**Who holds it** is told by the kernel, not by the page: a process holds byte ``16 + slot`` by an open-file-description
lock as long as it has a handle. Byte 0 is the gate, locked to join and to leave. No slot locked: every holder is gone,
and whoever meets the file removes it. A process has one descriptor, one slot and one `ObjectFile` per object; its
handles share them and count. A fork child gets a descriptor and a slot of its own (`_native/sync_fork.h`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from .._accel import sync as _native
from ..errors import (
    AccessDenied,
    NotEnoughMemory,
    ObjectClosed,
    ObjectCorrupt,
    OperationTimeout,
    TooManyDescriptors,
    TooManyHolders,
)
from .ofdlock import all_locked, gate, locked_from, try_lock, unlock
from .process import start_time

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BODY", "FREE_PAGES", "HEADER", "Header", "Holder", "Kind", "MAX_HOLDERS", "ObjectFile", "PAGE", "SLOTS",
    "VERSION", "holders_of", "pack_header", "read_header",
]  # fmt: skip

MAGIC = b"PWOBJECT"
VERSION = 1
PAGE = 4096
SLOTS = PAGE  # offset of the holders
MAX_HOLDERS = 1024
FREE_PAGES = 0x5000
BODY = 0x10000
HEADER = struct.Struct("<8sIIIIQQQ")
NAME_AT, NAME_MAX = 0x80, 1036
FIRST = 16
_SLOT = struct.Struct("<IIQ")


class Kind(IntEnum):
    """What an object is. JOB is a name only, reserved."""

    MUTEX = 1
    SEMAPHORE = 2
    EVENT = 3
    TIMER = 4
    MAPPING = 5
    JOB = 6

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def article(self) -> str:
        return f"an {self}" if self is Kind.EVENT else f"a {self}"


class Header(NamedTuple):
    """The checked beginning of page 0."""

    kind: Kind
    flags: int
    name: str
    """Without prefix; "" when unnamed."""
    pid_namespace: int
    number: int
    size: int
    """Bytes of a mapping, else 0."""


class Holder(NamedTuple):
    """A process that has the object open. `pid` and `start` are its own word; that it lives, the kernel's."""

    slot: int
    pid: int
    waiting: int
    start: int


def pack_header(kind: Kind, name: str, *, flags: int = 0, size: int = 0, pid_namespace: int = 0) -> bytes:
    """The first 0x500 bytes of a new object's page."""
    text = name.encode()
    number = int.from_bytes(os.urandom(8), "little") or 1
    head = HEADER.pack(MAGIC, VERSION, kind, flags, len(text), pid_namespace, number, size)
    return (head.ljust(NAME_AT, b"\0") + text).ljust(0x500, b"\0")


def read_header(fd: int, path: str) -> Header:
    """`ObjectCorrupt` for anything that is not an object of this layout; nothing is trusted."""
    page = os.pread(fd, 0x500, 0)
    if len(page) < 0x500 or page[:8] != MAGIC:
        raise ObjectCorrupt(f"{path} is not a portway object", hint="remove it, if you are sure that nobody needs it")
    _, version, kind, flags, length, namespace, number, size = HEADER.unpack_from(page)
    if version != VERSION:
        raise ObjectCorrupt(
            f"{path} has layout version {version}, this portway knows {VERSION}",
            hint="end the programs of the other version first, or give one of them another root",
        )
    try:
        name = page[NAME_AT : NAME_AT + length].decode()
        if length > NAME_MAX:
            raise ValueError(length)
        return Header(Kind(kind), flags, name, namespace, number, size)
    except ValueError:
        raise ObjectCorrupt(f"{path}: kind {kind} or name of {length} bytes cannot be") from None


def held_by_others(fd: int) -> bool:
    return locked_from(fd, FIRST, MAX_HOLDERS) is not None


def holders_of(fd: int) -> list[Holder]:
    """All live holders, seen through a descriptor that holds no slot itself; at most `MAX_HOLDERS`."""
    found = []
    for at in all_locked(fd, FIRST, MAX_HOLDERS):
        slot = at - FIRST
        data = os.pread(fd, _SLOT.size, SLOTS + slot * _SLOT.size).ljust(_SLOT.size, b"\0")
        pid, waiting, start = _SLOT.unpack(data)
        found.append(Holder(slot, pid, waiting, start))
    return found


class ObjectFile:
    """This process's one hold on an object: descriptor, slot, page. Made by `kernel.namespace`, shared by its handles.

    Every handle counts by `Namespace.create`/`open` or `retain()`, and gives back by `release()`; the last one leaves.
    ``fd`` stays the same number in a fork child but is a descriptor and a hold of its own there.
    """

    def __init__(self, fd: int, path: str, header: Header, *, writable: bool = True, scope: str = "Local") -> None:
        info = os.fstat(fd)
        self.fd, self.path, self.header, self.writable, self.scope = fd, path, header, writable, scope
        self.key = (info.st_dev, info.st_ino)
        self.owner = info.st_uid
        self.references = 1
        self.sync: Any = None
        """The mapped page of a synchronisation object (`kernel.sync_base`)."""

    @property
    def name(self) -> str | None:
        """With prefix when it is Global; None when unnamed."""
        name = self.header.name
        return (f"Global\\{name}" if self.scope == "Global" else name) if name else None

    @property
    def slot(self) -> int:
        return int(_native.guard_slot(self.fd))

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def claim(self) -> None:
        """Takes the first free slot; called under the gate, or before the file has a name."""
        claim_slot(self.fd, self.path, self.writable)

    def holders(self) -> list[Holder]:
        """Every process that has the object open, this one too."""
        if self.fd < 0:
            raise ObjectClosed("this object is closed")
        with reopened(self.fd) as other:
            return holders_of(other)

    def unname(self) -> None:
        """Removes the name if no other process has the object open; ours goes on holding it for a call in progress."""
        try:
            with gate(self.fd, self.path, self.writable):
                if not held_by_others(self.fd):
                    remove(self.fd, self.path)
        except OperationTimeout:
            pass

    def leave(self) -> None:
        """Gives the hold back; the last holder removes the name. Called once, by the registry of `namespace`."""
        fd, self.fd = self.fd, -1
        try:
            with gate(fd, self.path, self.writable):
                if not held_by_others(fd):
                    remove(fd, self.path)
                slot = _native.guard_remove(fd)
                unlock(fd, FIRST + slot)
        except OperationTimeout:  # the next one who meets the file removes it
            _native.guard_remove(fd)
        finally:
            os.close(fd)


def lock_slot(fd: int, path: str, writable: bool = True) -> int:
    """Locks a free slot for this descriptor and notes who we are in it."""
    kind = fcntl.F_WRLCK if writable else fcntl.F_RDLCK
    for slot in range(MAX_HOLDERS):
        if try_lock(fd, FIRST + slot, kind):
            break
    else:
        raise TooManyHolders(f"{path}: {MAX_HOLDERS} processes have it open, more cannot")
    if writable:
        pid = os.getpid()
        try:
            os.pwrite(fd, _SLOT.pack(pid, 0, start_time(pid)), SLOTS + slot * _SLOT.size)
        except OSError as error:
            raise full(error, path) from error
    return slot


def claim_slot(fd: int, path: str, writable: bool = True) -> int:
    """`lock_slot` for as long as the process has the object: the fork guard is told."""
    slot = lock_slot(fd, path, writable)
    _native.guard_add(fd, slot, int(writable))
    return slot


def full(error: OSError, path: str) -> Exception:
    """What a failed write or open under the root means to the caller."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        folder = os.path.dirname(path) or path
        info = os.statvfs(folder)
        return NotEnoughMemory(
            f"no room for {path}: {folder} has {info.f_blocks * info.f_frsize:,} bytes, "
            f"{info.f_bavail * info.f_frsize:,} of them free",
            hint="enlarge it (mount -o remount,size=...; docker run --shm-size), or remove what fills it",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{path}: {os.strerror(error.errno)}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyDescriptors(f"no descriptor left to open {path}", hint="raise RLIMIT_NOFILE")
    return error


@contextmanager
def reopened(fd: int) -> Iterator[int]:
    """The same file by another open file description: one that sees our own locks."""
    mode = os.O_RDWR if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR else os.O_RDONLY
    other = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
    try:
        yield other
    finally:
        os.close(other)


def remove(fd: int, path: str) -> bool:
    """Removes the name if it is still this file's; False when we may not."""
    try:
        info, named = os.fstat(fd), os.lstat(path)
        if (info.st_dev, info.st_ino) == (named.st_dev, named.st_ino) and stat.S_ISREG(named.st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        return False
    return True
