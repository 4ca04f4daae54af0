"""A view of a file mapping: mapped memory as a buffer, and copies in and out of it that cannot end the process.

Native because ``mmap.mmap`` can neither say how many buffers are exported nor survive a file that somebody cut, and
because leaving ``with`` may have to put the unmapping off until the last buffer has gone.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, ENODEV, ENOMEM, ENOSPC, EDQUOT, EPERM, EACCES, EINVAL, errno
from libc.stdint cimport int64_t
from libc.string cimport memcpy

import os

from portway._native cimport guard
from portway.errors import AccessDenied, InvalidHandle, InvalidParameter, NotEnoughMemory, ObjectClosed, ObjectCorrupt
from portway.errors import ViewInUse

cdef extern from "<sys/mman.h>" nogil:
    void *c_mmap "mmap"(void *, size_t, int, int, int, int64_t)
    int c_munmap "munmap"(void *, size_t)
    int c_msync "msync"(void *, size_t, int)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_NORESERVE, MS_SYNC
    void *MAP_FAILED

cdef extern from "<fcntl.h>" nogil:
    int posix_fallocate(int, int64_t, int64_t)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int)

cdef size_t LARGE = 65536  # from here on copies are made without the GIL
cdef size_t PAGE = 4096

cdef struct Copy:
    void *to
    const void *source
    size_t size


cdef void copy_body(void *argument) noexcept nogil:
    cdef Copy *copy = <Copy *>argument
    memcpy(copy.to, copy.source, copy.size)


cdef int guarded_copy(void *to, const void *source, size_t size) noexcept nogil:
    cdef Copy copy
    copy.to, copy.source, copy.size = to, source, size
    return guard.guarded(copy_body, &copy)


cdef class View:
    """Made by `FileMapping.view`. A buffer: ``memoryview(view)``, ``numpy.frombuffer(view, ...)`` share its bytes.

    ``read``, ``write``, ``view[a:b]`` copy, with bounds and access checked; they raise where a pointer would end the
    process: `ObjectCorrupt` when somebody cut the file, `NotEnoughMemory` when a sparse mapping finds no space. Through
    an exported buffer the same is SIGBUS.

    Outlives its mapping's handle. ``unmap()`` (or ``close()``) with exported buffers alive is `ViewInUse`, a
    BufferError, and changes nothing. Leaving ``with`` never raises: the view is closed for its own methods and the
    memory goes with the last exported buffer. A fork child has the view too; copy-on-write stays its own.
    """

    cdef char *base
    cdef size_t length
    cdef Py_ssize_t _exports
    cdef Py_ssize_t busy
    cdef bint writable, shared, _closed
    cdef int reserve_fd
    cdef int64_t position
    cdef readonly str access
    """``read``, ``read-write`` or ``copy``."""
    cdef readonly object offset
    """Where it begins in its mapping, in bytes."""

    def __cinit__(self):
        self.reserve_fd = -1
        self._closed = True

    def __init__(self, int fd, int64_t position, size_t length, str access, offset=0, int reserve_fd=-1):
        """Maps `length` bytes of `fd` at `position`; owns `reserve_fd`, through which sparse pages are allocated."""
        cdef int protection = PROT_READ
        cdef void *base
        if self.base != NULL or length == 0:
            raise InvalidParameter("a view maps at least one byte, once")
        if access not in ("read", "read-write", "copy"):
            raise InvalidParameter(f"access={access!r}: give read, read-write or copy")
        guard.install()
        self.writable, self.shared = access != "read", access != "copy"
        if self.writable:
            protection |= PROT_WRITE
        with nogil:
            base = c_mmap(NULL, length, protection, MAP_SHARED if self.shared else MAP_PRIVATE, fd, position)
        if base == MAP_FAILED:
            raise refused(errno, length)
        self.base, self.length, self.position = <char *>base, length, position
        self.access, self.offset, self.reserve_fd = access, offset, reserve_fd
        self._closed = False

    def __dealloc__(self):
        self.drop()

    cdef void drop(self) noexcept:
        cdef char *base = self.base
        cdef int fd = self.reserve_fd
        self.base, self.reserve_fd = NULL, -1
        if base != NULL:
            c_munmap(base, self.length)
        if fd >= 0:
            c_close(fd)

    cdef int alive(self) except -1:
        if self._closed:
            raise ObjectClosed("this view is unmapped")
        return 0

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def exports(self) -> int:
        """Buffers of it that are alive, and copies under way in other threads."""
        return self._exports + self.busy

    def __len__(self):
        return self.length

    # -- copies ------------------------------------------------------------------------------------------------------

    cdef int span(self, Py_ssize_t offset, object length, size_t *size) except -1:
        cdef Py_ssize_t count
        self.alive()
        if offset < 0 or <size_t>offset > self.length:
            raise InvalidParameter(f"offset={offset}: this view has {self.length} bytes")
        count = <Py_ssize_t>self.length - offset if length is None else length
        if count < 0 or <size_t>count > self.length - <size_t>offset:
            raise InvalidParameter(f"{count} bytes at offset {offset}: this view has {self.length} bytes")
        size[0] = <size_t>count
        return 0

    cdef int copy(self, void *to, const void *source, size_t size) except -1:
        cdef int failed
        self.busy += 1
        try:
            if size >= LARGE:
                with nogil:
                    failed = guarded_copy(to, source, size)
            else:
                failed = guarded_copy(to, source, size)
        finally:
            self.idle()
        if failed:
            raise ObjectCorrupt(
                "the memory of this view is gone: somebody cut the file behind it, or its disk is full or failing",
                hint="unmap it, and look at the file",
            )
        return 0

    cdef void idle(self) noexcept:
        self.busy -= 1
        if self._closed and self._exports + self.busy == 0:
            self.drop()

    def read(self, Py_ssize_t offset=0, length=None) -> bytes:
        """A copy of `length` bytes (None: to the end) at `offset`. `InvalidParameter` beyond the view."""
        cdef size_t size = 0
        cdef object out
        self.span(offset, length, &size)
        out = PyBytes_FromStringAndSize(NULL, size)
        self.alive()  # again: what allocates may run somebody's finalizer
        try:
            self.copy(PyBytes_AS_STRING(out), self.base + offset, size)
        except ObjectCorrupt:
            if self.reserve_fd < 0 or not self.holds(offset + size):
                raise
            return self.sparse(offset, size)
        return out

    cdef bint holds(self, int64_t end):
        return os.fstat(self.reserve_fd).st_size >= self.position + end

    def sparse(self, offset, size) -> bytes:
        """Reading a hole by its file needs no memory, reading it through the mapping does."""
        self.alive()
        found = os.pread(self.reserve_fd, size, self.position + offset)
        return found.ljust(size, b"\0")

    def write(self, data, Py_ssize_t offset=0) -> int:
        """Copies `data`, any contiguous buffer, to `offset`; the number of bytes. All of it or none.

        `InvalidParameter` when it does not fit, `AccessDenied` on a view for reading, `NotEnoughMemory` when a mapping
        made with ``reserve=True`` finds no space for it.
        """
        cdef Py_buffer source
        cdef size_t size = 0
        PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
        try:
            self.span(offset, source.len, &size)
            self.writing()
            if size:
                self.allocate(offset, size)
                self.copy(self.base + offset, source.buf, size)
            return size
        finally:
            PyBuffer_Release(&source)

    cdef int writing(self) except -1:
        if not self.writable:
            raise AccessDenied("this view is for reading", hint='ask for mapping.view(access="read-write")')
        return 0

    cdef int allocate(self, int64_t offset, size_t size) except -1:
        cdef int error, fd = self.reserve_fd
        cdef int64_t at = self.position + offset
        if fd < 0 or not self.shared:
            return 0
        self.busy += 1
        with nogil:
            error = posix_fallocate(fd, at, size)
            while error == EINTR:
                error = posix_fallocate(fd, at, size)
        self.idle()
        if error in (ENOSPC, EDQUOT, ENOMEM):
            raise NotEnoughMemory(
                f"no space for {size} bytes at offset {offset} of a mapping made with reserve=True; nothing was written",
                hint="free memory in its file system (docker run --shm-size), or create it without reserve",
            )
        if error:
            raise ObjectCorrupt(f"the file behind this view cannot be allocated: {os.strerror(error)}")
        self.alive()
        return 0

    def __getitem__(self, index):
        cdef Py_ssize_t start, stop, step
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step != 1:
                raise InvalidParameter(f"step {step}: a view gives contiguous bytes", hint="use memoryview(view)")
            return self.read(start, max(stop - start, 0))
        return self.read(self.place(index), 1)[0]

    def __setitem__(self, index, value):
        cdef Py_ssize_t start, stop, step
        if not isinstance(index, slice):
            self.write(bytes((value,)), self.place(index))
            return
        start, stop, step = index.indices(self.length)
        with memoryview(value) as data:
            if step != 1 or data.nbytes != max(stop - start, 0):
                raise InvalidParameter(f"{data.nbytes} bytes for a slice of {max(stop - start, 0)}, step {step}")
            self.write(data, start)

    cdef Py_ssize_t place(self, object index) except -1:
        cdef Py_ssize_t at = index
        if at < 0:
            at += self.length
        if at < 0 or <size_t>at >= self.length:
            raise IndexError(f"index {index}: this view has {self.length} bytes")
        return at

    def flush(self, Py_ssize_t offset=0, length=None) -> None:
        """Returns when the range is on the disk of a file-backed mapping; nothing to do for the others."""
        cdef size_t size = 0, start
        cdef int failed, number
        self.span(offset, length, &size)
        start = <size_t>offset & ~(PAGE - 1)
        self.busy += 1
        with nogil:
            failed = c_msync(self.base + start, <size_t>offset - start + size, MS_SYNC) if size else 0
            number = errno
        self.idle()
        PyErr_CheckSignals()
        if failed and number != EINTR:
            raise OSError(number, f"flush: {os.strerror(number)}")

    # -- exported buffers and the end --------------------------------------------------------------------------------

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.alive()
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("this view is for reading; its buffer cannot be writable")
        PyBuffer_FillInfo(buffer, self, self.base, self.length, not self.writable, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self._exports -= 1
        if self._closed and self._exports + self.busy == 0:
            self.drop()

    def unmap(self) -> None:
        """Gives the memory back now; doing so twice is fine. `ViewInUse` while buffers of it are alive."""
        if self._closed:
            return
        if self._exports + self.busy:
            raise ViewInUse(
                f"{self._exports + self.busy} exported buffers of this view are alive; nothing was unmapped",
                hint="release them (memoryview.release(), del array), or leave it to `with`",
            )
        self._closed = True
        self.drop()

    def close(self) -> None:
        """`unmap`."""
        self.unmap()

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, kind, error, at):
        self._closed = True
        if self._exports + self.busy == 0:
            self.drop()

    def __repr__(self):
        return f"<View of {self.length} bytes at {self.offset}, {self.access}{', unmapped' if self._closed else ''}>"


cdef object refused(int number, size_t length):
    if number == ENOMEM:
        return NotEnoughMemory(f"no room in the address space for a view of {length} bytes", hint="map a part of it")
    if number in (EPERM, EACCES):
        return AccessDenied(f"mmap: {os.strerror(number)}")
    if number in (ENODEV, EINVAL):
        return InvalidHandle(f"mmap: {os.strerror(number)}: this file cannot be mapped")
    return OSError(number, f"mmap: {os.strerror(number)}")
