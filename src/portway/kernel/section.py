r"""`FileMapping`: shared memory by name, or a file, as Windows' sections are.

A mapping is an object of `kernel.namespace` (kind mapping). Page-file backed, its bytes follow in the object's own file
at 64 KiB. File-backed, that file names the other one: device, inode and path. An opener takes the path if it still
leads to that inode, else a living holder's descriptor, with its own rights in both cases.

Free fields of the object's page that are used here (little-endian):

    0x010  4   flags: 1 sparse, 2 file-backed
    0x500 24   protection of the section (index into ACCESS), length of the path, device, inode
    0x5000     the path, UTF-8 with surrogateescape, at most 4,096 bytes

Rights (win32-semantics, file mappings): a handle for reading, or for copying, maps views for reading or copying; one
for reading and writing maps all three.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ..errors import (
    AccessDenied,
    InvalidParameter,
    MappedAlignment,
    NotEnoughMemory,
    ObjectClosed,
    ObjectCorrupt,
)
from . import namespace as names
from .namespace import Kind, Namespace
from .objectfile import BODY, FIRST, FREE_PAGES, MAX_HOLDERS, ObjectFile
from .section_file import PATH_MAX, AnyFile, Backing, backing_of, extend, open_backing, own_descriptor, size_of
from .sync_base import _arrived, _transit, land

if TYPE_CHECKING:
    from .._native.view import View
    from .namespace import Entry
    from .security import Security
else:
    from .._accel import view as _native

    View = _native.View

__all__ = ["GRANULARITY", "Access", "FileMapping", "View", "file_behind"]

Access = Literal["read", "read-write", "copy"]
ACCESS: tuple[Access, ...] = ("read", "read-write", "copy")
GRANULARITY = 65536
MAX_SIZE = 2**62
_SPARSE, _FILE = 1, 2
_EXTRA = struct.Struct("<IIQQ")
_EXTRA_AT = 0x500
_VIEWS: dict[str, tuple[str, ...]] = {"read": ("read", "copy"), "copy": ("read", "copy"), "read-write": ACCESS}


class FileMapping:
    r"""A handle of a mapping. Made by `create`, `open` and `from_file`.

    >>> with portway.FileMapping.create(r"Local\prices", 1 << 20) as mapping, mapping.view() as view:
    ...     view[0:5] = b"hello"

    The name goes with the last handle of all processes, also when they are killed; views outlive their handle. A
    handle can be an argument of a ``multiprocessing`` process. Closed by ``close()``, ``with`` or its last reference.
    """

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("use FileMapping.create, FileMapping.open or FileMapping.from_file")

    _object: ObjectFile
    _access: Access
    _existed: bool
    _fd: int
    _backing: Backing | None
    _closed = True

    @classmethod
    def _made(cls, found: ObjectFile, access: Access, existed: bool, fd: int, backing: Backing | None) -> Self:
        self = cls.__new__(cls)
        self._object, self._access, self._existed = found, access, existed
        self._fd, self._backing = fd, backing
        self._closed = False
        return self

    @classmethod
    def create(
        cls, name: str | None, size: int, *, access: Access = "read-write", exclusive: bool = False,
        reserve: bool = False, security: Security | None = None, root: str | os.PathLike[str] | None = None,
    ) -> Self:  # fmt: skip
        r"""`size` bytes of zeros under `name` (None: unnamed); an existing mapping of that name is opened instead.

        Then `size` and `security` do not count (`size` is the existing one's, `already_exists` is True) and `access` is
        asked for; ``exclusive=True`` makes it `AlreadyExists`. A mapping made with less than ``read-write`` is
        never opened for more. By default all memory is there when this returns, or
        it raises `NotEnoughMemory` and leaves nothing: containers have 64 MB of ``/dev/shm`` unless started with
        ``--shm-size``. ``reserve=True`` is sparse: a view's own methods allocate what they write, or raise; a write
        through an exported buffer that finds no space is SIGBUS.

        `InvalidParameter` for a size below 1, `InvalidHandle` when another kind has the name, and the names' errors
        (`kernel.namespace`). Source: CreateFileMappingW with INVALID_HANDLE_VALUE.
        """
        _check_access(access)
        _check_size(size, 1)
        extra = _EXTRA.pack(ACCESS.index(access), 0, 0, 0)

        def prepare(fd: int) -> None:
            os.ftruncate(fd, BODY + _round_up(size))
            if not reserve:
                os.posix_fallocate(fd, BODY, _round_up(size))
            os.pwrite(fd, extra, _EXTRA_AT)
            if security is not None:
                security.apply(fd)

        return cls._create(name, access, exclusive, size, _SPARSE if reserve else 0, prepare, root)

    @classmethod
    def _create(
        cls, name: str | None, access: Access, exclusive: bool, size: int, flags: int, prepare: Any, root: Any
    ) -> Self:
        try:
            found, existed = Namespace(root).create(
                Kind.MAPPING, name or None, exclusive=exclusive, size=size, flags=flags, prepare=prepare
            )
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EOVERFLOW) and type(error) is OSError:
                raise NotEnoughMemory(f"{size} bytes: {error.strerror}", hint="see ulimit -f") from error
            raise
        return cls._joined(found, access, existed)

    @classmethod
    def open(
        cls, name: str, access: Access = "read-write", *, root: str | os.PathLike[str] | None = None
    ) -> Self:
        """The mapping of that name, which somebody else made.

        `ObjectNotFound` when there is none, or its file cannot be reached: the path leads elsewhere and no living
        holder lets us at its descriptor. `AccessDenied`: the file's rights do not allow `access`, the mapping was made
        for less, or it is of another user and names a file that is not that user's. `ObjectCorrupt`: cut, or damaged.
        """
        _check_access(access)
        if name is None or name == "":
            raise InvalidParameter("open needs a name; an unnamed mapping is passed as an argument of a process")
        return cls._joined(Namespace(root).open(Kind.MAPPING, name), access, True)

    @classmethod
    def _joined(cls, found: ObjectFile, access: Access, existed: bool) -> Self:
        """Takes over the caller's reference to `found`."""
        try:
            protection, backing = _read_extra(found)
            if access == "read-write" and protection != "read-write":
                raise AccessDenied(f"mapping {found.name or 'without name'} was made for {protection}")
            if backing is not None:
                fd = open_backing(found, backing, access)
            elif access == "read-write" and not found.writable:
                raise AccessDenied(f"mapping {found.name}: we may only read it", hint='open it with access="read"')
            else:
                fd = -1
                _check_whole(found)
            return cls._made(found, access, existed, fd, backing)
        except BaseException:
            names.release(found)
            raise

    @classmethod
    def from_file(
        cls, file: AnyFile, size: int = 0, *, name: str | None = None, access: Access = "read-write",
        exclusive: bool = False, reserve: bool = False, security: Security | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> Self:  # fmt: skip
        """A mapping of a file: a path, an open file or a descriptor, of which this handle has its own duplicate.

        ``size=0`` is the file's size; more extends the file (space allocated, unless `reserve`), which needs
        ``read-write``. `security` is for the name; the file's own rights decide about its bytes. What `access` asks for
        the file must allow: read-write needs a file open for both, the others one that can be read.

        `FileInvalid`: the file is empty and `size` 0. `NotEnoughMemory`: `size` over the file's without ``read-write``,
        or no space. `AccessDenied`, `InvalidHandle` (no regular file), and what `create` raises. Source:
        CreateFileMappingW.
        """
        _check_access(access)
        _check_size(size, 0)
        fd = own_descriptor(file, access)
        try:
            size = size_of(fd, size, access)
            backing = backing_of(fd)
            path = os.fsencode(backing.path)
            extra = _EXTRA.pack(ACCESS.index(access), len(path), backing.device, backing.inode)

            def prepare(page: int) -> None:
                extend(fd, size, reserve)
                os.pwrite(page, path, FREE_PAGES)
                os.pwrite(page, extra, _EXTRA_AT)
                if security is not None:
                    security.apply(page)

            found, existed = Namespace(root).create(
                Kind.MAPPING, name or None, exclusive=exclusive, size=size, flags=_FILE, prepare=prepare
            )
            if existed:
                return cls._joined(found, access, True)
            own, fd = fd, -1
            return cls._made(found, access, False, own, backing)
        finally:
            if fd >= 0:
                os.close(fd)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        r"""With ``Global\`` where it is global; None when unnamed."""
        return self._object.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._object.header.size

    @property
    def access(self) -> Access:
        """What this handle may map."""
        return self._access

    @property
    def already_exists(self) -> bool:
        """True: `create` or `from_file` found it."""
        return self._existed

    @property
    def path(self) -> str | None:
        """Of a file-backed mapping: the file's path when it was made, if it had one."""
        return self._backing.path or None if self._backing else None

    @property
    def closed(self) -> bool:
        return self._closed

    def view(self, offset: int = 0, length: int = 0, access: Access | None = None) -> View:
        """`length` bytes (0: to the end) from `offset`, a multiple of 65,536, as a buffer. The caller unmaps it.

        `access` is the handle's own unless given. A ``copy`` view sees the mapping's bytes until it writes, and keeps
        its writes to itself. `MappedAlignment`, `InvalidParameter` (offset at or past the end, negative),
        `AccessDenied` (length past the end, more rights than the handle has), `NotEnoughMemory` (address space).
        Source: MapViewOfFile.
        """
        chosen: Access = self._access if access is None else access
        length = self._span(offset, length, chosen)
        with names.lock():
            fd = self._descriptor()
            reserve = _sparse_descriptor(fd, chosen) if self._object.header.flags & _SPARSE else -1
            position = offset if self._backing else BODY + offset
            try:
                return View(fd, position, length, chosen, offset, reserve)
            except BaseException:
                if reserve >= 0:
                    os.close(reserve)
                raise

    def _span(self, offset: int, length: int, access: Access) -> int:
        _check_access(access)
        if self._closed:
            raise ObjectClosed("this FileMapping is closed")
        if access not in _VIEWS[self._access]:
            raise AccessDenied(f"a handle with access={self._access!r} maps no view with access={access!r}")
        if offset < 0 or length < 0:
            raise InvalidParameter(f"offset={offset}, length={length}: neither can be negative")
        if offset % GRANULARITY:
            raise MappedAlignment(f"offset={offset}: give a multiple of {GRANULARITY}")
        if offset >= self.size:
            raise InvalidParameter(f"offset={offset}: the mapping has {self.size} bytes")
        if length > self.size - offset:
            raise AccessDenied(f"{length} bytes at offset {offset}: the mapping has {self.size}")
        return length or self.size - offset

    def _descriptor(self) -> int:
        if self._closed:
            raise ObjectClosed("this FileMapping is closed")
        return self._fd if self._backing else self._object.fd

    # -- the end, and the way to another process ---------------------------------------------------------------------

    def close(self) -> None:
        """Gives up this handle; views stay. Closing twice is fine."""
        if self._closed:
            return
        land()
        with names.lock():
            closing, self._closed = not self._closed, True
        if closing:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
            names.release(self._object)

    def __enter__(self) -> Self:
        if self._closed:
            raise ObjectClosed("this FileMapping is closed")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the kernel closes, and the namespace has left in order
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """As an argument of a multiprocessing process; other pickles open it again while somebody has it open."""
        if self._closed:
            raise ObjectClosed("this FileMapping is closed")
        sent = _transit(self._object) if self._object.writable else None
        return _again, (self._object.path, self._object.header.number, self._access, sent)

    def __repr__(self) -> str:
        if self._closed:
            return "<FileMapping closed>"
        return f"<FileMapping {self.name or 'without name'}: {self.size} bytes, {self._access}>"


def _again(path: str, number: int, access: Access, sent: int | None) -> FileMapping:
    root = os.path.dirname(os.path.dirname(path))
    arrived = _arrived(sent)
    try:
        return FileMapping._joined(Namespace(root).open_path(Kind.MAPPING, path, number), access, True)
    finally:
        if arrived is not None:  # unlocked by word, since the sender's copy of this descriptor is the same hold
            fcntl.fcntl(arrived, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, FIRST, MAX_HOLDERS, 0))
            os.close(arrived)


def file_behind(entry: Entry) -> str | None:
    """The path in the page of a listed mapping; None when it has none, "?" when it cannot be read."""
    if not entry.header.flags & _FILE:
        return None
    try:
        with open(entry.path, "rb") as page:
            _, length, _, _ = _EXTRA.unpack(os.pread(page.fileno(), _EXTRA.size, _EXTRA_AT))
            return os.fsdecode(os.pread(page.fileno(), min(length, PATH_MAX), FREE_PAGES)) or None
    except (OSError, struct.error):
        return "?"


def _sparse_descriptor(fd: int, access: Access) -> int:
    """For a view's own methods. No dup, which would be a hold on the object; -1 if we may not open it again."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_CLOEXEC | (os.O_RDWR if access == "read-write" else os.O_RDONLY))
    except PermissionError:
        return -1


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_access(access: str) -> None:
    if access not in ACCESS:
        raise InvalidParameter(f"access={access!r}: give one of {', '.join(map(repr, ACCESS))}")


def _check_size(size: int, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size={size!r}: give a number of bytes")
    if not least <= size <= MAX_SIZE:
        raise InvalidParameter(f"size={size}: a mapping has 1 to {MAX_SIZE} bytes")


def _round_up(size: int) -> int:
    return -(-size // 4096) * 4096


def _check_whole(found: ObjectFile) -> None:
    size, there = found.header.size, os.fstat(found.fd).st_size
    if size < 1 or BODY + size > there:
        raise ObjectCorrupt(
            f"mapping {found.name or found.path}: its file has {there} bytes, {BODY + size} are needed",
            hint="somebody cut it; close it everywhere and it goes",
        )


def _read_extra(found: ObjectFile) -> tuple[Access, Backing | None]:
    """What others wrote: checked, never trusted."""
    data = os.pread(found.fd, _EXTRA.size, _EXTRA_AT)
    wrong = ObjectCorrupt(f"mapping {found.name or found.path}: its first page is damaged", hint="close it everywhere")
    if len(data) < _EXTRA.size:
        raise wrong
    protection, length, device, inode = _EXTRA.unpack(data)
    if protection >= len(ACCESS) or length > PATH_MAX or found.header.flags & ~(_SPARSE | _FILE):
        raise wrong
    if not found.header.flags & _FILE:
        return ACCESS[protection], None
    path = os.pread(found.fd, length, FREE_PAGES)
    if len(path) != length or b"\0" in path or (path and not path.startswith(b"/")) or found.header.size < 1:
        raise wrong
    return ACCESS[protection], Backing(device, inode, os.fsdecode(path))
