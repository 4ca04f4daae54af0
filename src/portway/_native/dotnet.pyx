"""The page of a .NET named mutex: taken, released and watched as glibc's robust mutexes are; see dotnet.h.

Native only: the protocol is made of atomic stores and the kernel's robust list. `portway.kernel.dotnet_mutex` finds
the file and holds its locks.
"""

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EFAULT, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

from portway._native cimport guard

import time

cdef extern from "dotnet.h" nogil:
    ctypedef struct dn_page:
        uint32_t lock
        uint32_t process
    ctypedef struct dn_mutex:
        dn_page *page
        uint64_t owner
        uint64_t count
        int broken
    ctypedef struct dn_step:
        dn_mutex *mutex
        uint32_t flags
        int result
    ctypedef int (*dn_guard)(guard.body_t, void *) noexcept
    int DN_SUPPORTED, DN_TAKEN, DN_ABANDONED, DN_HELD, DN_CORRUPT, DN_NOT_OWNER, DN_TOO_MANY
    int dn_start()
    int dn_start_keeper_locked "dn_start_keeper_with_lock"()
    int dn_try(dn_mutex *, uint64_t, int, uint32_t *, dn_guard)
    int dn_release(dn_mutex *, uint64_t, dn_guard)
    uint64_t dn_me(dn_guard)
    void dn_wake_all(dn_mutex *)
    int dn_sleep(dn_mutex *, uint32_t, int64_t)
    void dn_watch(dn_mutex *)
    dn_mutex *dn_map(int)
    void dn_unmap(dn_mutex *, dn_guard)
    void dn_fill(void *) noexcept
    void dn_check(void *) noexcept
    void dn_leave(void *) noexcept

TAKEN, ABANDONED, HELD, CORRUPT, NOT_OWNER, TOO_MANY = (
    DN_TAKEN, DN_ABANDONED, DN_HELD, DN_CORRUPT, DN_NOT_OWNER, DN_TOO_MANY)
SUPPORTED = bool(DN_SUPPORTED)
"""False: not glibc on a 64-bit little-endian machine, whose mutexes have another layout."""

# A wait looks again after that: the main thread for a signal, others for close(), that came just before it fell asleep.
cdef int64_t MAIN_SLICE = 40_000_000
cdef int64_t SLICE = 10_000_000_000

if dn_start() != 0:
    raise MemoryError("pthread_atfork")


cdef class Page:
    """A mapped page; `close` unmaps it, and abandons the mutex if a thread of this process owns it."""

    cdef dn_mutex *mutex
    cdef int waiting
    cdef bint closing

    def __init__(self, int fd, *, bint fresh):
        """Maps the first page of `fd`; writes the layout into it when `fresh`. OSError from mmap."""
        if self.mutex != NULL:
            raise RuntimeError("already mapped")
        if guard.install() != 0:
            PyErr_SetFromErrno(OSError)
        self.mutex = dn_map(fd)
        if self.mutex == NULL:
            PyErr_SetFromErrno(OSError)
        if fresh and guard.guarded(dn_fill, <void *>self.mutex.page) != 0:
            self.mutex.broken = True

    def fits(self) -> bool:
        """Whether the page has the layout we know; False also when it has nothing behind it."""
        cdef dn_step step
        step.mutex = self.alive()
        step.result = 0
        return guard.guarded(dn_check, &step) == 0 and step.result != 0

    cdef dn_mutex *alive(self) except NULL:
        if self.mutex == NULL or self.closing:
            raise ValueError("closed")
        return self.mutex

    def acquire(self, int64_t timeout, bint main) -> int:
        """TAKEN, ABANDONED, HELD (`timeout` nanoseconds passed; -1: no limit), CORRUPT or TOO_MANY."""
        cdef dn_mutex *mutex = self.alive()
        cdef uint64_t me = dn_me(guard.guarded)
        cdef uint32_t seen = 0
        cdef int result, error = dn_start_keeper_locked()
        if me == 0 or error != 0:
            raise OSError(error, "no thread can be started for owning .NET mutexes")
        result = dn_try(mutex, me, False, &seen, guard.guarded)
        if result != DN_HELD or timeout == 0:
            return result
        self.waiting += 1
        try:
            return self.wait(mutex, me, timeout, main)
        finally:
            self.waiting -= 1
            self.finish()

    cdef int wait(self, dn_mutex *mutex, uint64_t me, int64_t timeout, bint main) except -1:
        cdef int64_t until = 0 if timeout < 0 else <int64_t>time.monotonic_ns() + timeout, left
        cdef int64_t slice = MAIN_SLICE if main else SLICE
        cdef uint32_t seen = 0
        cdef int error, result = DN_HELD
        cdef dn_step step
        step.mutex = mutex
        dn_watch(mutex)
        try:
            while not self.closing:
                result = dn_try(mutex, me, True, &seen, guard.guarded)
                left = -1 if timeout < 0 else until - <int64_t>time.monotonic_ns()
                if result != DN_HELD or (timeout >= 0 and left <= 0):
                    break
                if left < 0 or left > slice:
                    left = slice
                with nogil:
                    error = dn_sleep(mutex, seen, left)
                if error == EFAULT:
                    result = DN_CORRUPT
                    break
                PyErr_CheckSignals()
            return result
        finally:
            if result == DN_HELD:
                guard.guarded(dn_leave, &step)
            dn_watch(NULL)

    def release(self) -> int:
        """TAKEN (it is let go, or one level of it), NOT_OWNER or CORRUPT."""
        return dn_release(self.alive(), dn_me(guard.guarded), guard.guarded)

    @property
    def depth(self) -> int:
        """How often this thread holds it."""
        cdef dn_mutex *mutex = self.alive()
        return mutex.count if mutex.owner != 0 and mutex.owner == dn_me(guard.guarded) else 0

    cdef void finish(self):
        if self.closing and self.waiting == 0 and self.mutex != NULL:
            dn_unmap(self.mutex, guard.guarded)
            self.mutex = NULL

    def close(self) -> None:
        """Ends the waits of other threads too."""
        self.closing = True
        if self.waiting:
            dn_wake_all(self.mutex)
        self.finish()

    def __dealloc__(self):
        if self.mutex != NULL:
            dn_unmap(self.mutex, guard.guarded)
