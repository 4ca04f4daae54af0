# cython: boundscheck=False, wraparound=False, binding=False
"""Words the kernel watches: mutexes, semaphores, events and timers in pages shared by unrelated processes.

Native only. A thin layer over the headers `sync_*.h`, where the protocol is explained; its classes are in the included
files `sync_*.pxi`, and `portway.kernel` has the public ones. The GIL is kept except while a thread sleeps; it also is
what keeps two threads of one process out of one page's lock.
"""

import os
from portway import errors

from cpython.exc cimport PyErr_CheckSignals, PyErr_Fetch, PyErr_Restore
from cpython.ref cimport PyObject
from libc.errno cimport EINTR, ENAMETOOLONG, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from portway._native cimport guard

include "sync_c.pxi"

NEVER = PW_NEVER
DUE_LIMIT = 1 << 62  # ns; beyond it clocks would overflow


def guard_add(int fd, int slot, int writable):
    """This process holds the file `fd` by `slot`: a fork child gets a descriptor (same number) and a slot of its own."""
    if pw_hold_add(fd, slot, writable) != 0:
        raise MemoryError("no room to note another object")


def guard_remove(int fd):
    """The slot that was noted for `fd`, which is forgotten; -1 when there was none."""
    return pw_hold_slot(fd, 1)


def guard_slot(int fd):
    return pw_hold_slot(fd, 0)


def pid_namespace():
    """Which pid namespace we are in (an inode number); 0 when /proc does not tell."""
    return pw_pid_namespace()


def runs_for_another():
    """A set-uid or set-gid program, or one with file capabilities: who started it chose the environment, not its user."""
    return getauxval(AT_SECURE) != 0


def allocate(int fd, long at, long size):
    """posix_fallocate(3): space behind these bytes, or OSError. In pieces, as a signal makes tmpfs undo the one at hand."""
    cdef int wrong
    cdef long piece, end = at + size
    while True:
        piece = min(end - at, 16 << 20)
        with nogil:
            wrong = posix_fallocate(fd, at, piece)
        if wrong == EINTR:
            PyErr_CheckSignals()
        elif wrong:
            raise OSError(wrong, "no space for the object")
        else:
            at += piece
            if at >= end:
                return


cdef dict _late = {}  # address of a closed body that is still needed: what is to be done after that


cdef void finish_late() noexcept:
    """A call has ended that was the last one in a closed body. An exception of the call itself may be set."""
    cdef PyObject *kind
    cdef PyObject *error
    cdef PyObject *at
    PyErr_Fetch(&kind, &error, &at)
    try:
        for address in list(_late):
            if address in _late and pw_close(<pw_body *><size_t>address):  # `done` may let another thread do the same
                done = _late.pop(address)
                if done is not None:
                    done()
    finally:
        PyErr_Restore(kind, error, at)


cdef int finish_soon(void *ignored) noexcept:
    finish_late()
    return 0


def finish_closed():
    """In a fork child: what only waits in threads of the parent kept."""
    finish_late()


cdef inline void end_use(pw_use *use) noexcept:
    if pw_use_end(use):
        finish_late()


cdef class Body:
    """The mapped page of one object in this process; `close` once."""

    cdef pw_body *b

    def __init__(self, int fd, int slot, int kind, bint manual, uint64_t home, str root, int scope, bytes name):
        cdef bytes path = os.fsencode(root)
        if len(path) >= PW_ROOT:
            raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))
        guard.install()
        if _late:
            finish_late()
        self.b = pw_map(fd, slot, kind, manual, home, scope)
        if self.b == NULL:
            raise OSError(errno, os.strerror(errno))
        memcpy(self.b.root, <char *>path, len(path))
        memcpy(self.b.hash, <char *>name, 16)
        pw_take_over_slot(self.b)

    def close(self, done=None):
        """True when it is closed. False while a call goes on in it or another thread owns it: after that, at the latest
        with the next open or close, it is closed and `done` called."""
        cdef pw_body *b = self.b
        if _late:
            finish_late()
        self.b = NULL
        if b == NULL or pw_close(b):
            return True
        _late[<size_t>b] = done
        return False

    def settle(self):
        """Finishes what a killed process left undone in the page."""
        cdef pw_use use
        cdef int wrong
        if self.b == NULL or not self.b.page.L:
            return True
        pw_use_begin(&use, &self.b, 1)
        wrong = pw_L_lock(self.b, pw_self(), pw_clock(0) + 1000000000)
        if wrong == PW_OK:
            pw_L_unlock(self.b)
        end_use(&use)
        if wrong == -1:
            pw_failed()
        return wrong == PW_OK


cdef class AlertWord:
    """What `portway.alert` sets and an alertable wait of its thread looks at."""

    cdef uint32_t word

    def set(self):
        self.word = 1
        pw_futex_wake_own(&self.word)


cdef int64_t deadline(object timeout) except -1:
    """A monotonic time in ns, 0: do not wait."""
    cdef double seconds
    if timeout is None:
        return PW_NEVER
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout={timeout!r}: give seconds >= 0, or None to wait without limit")
    if seconds == 0:
        return 0
    return PW_NEVER if seconds > 4e9 else pw_clock(0) + <int64_t>(seconds * 1e9)


include "sync_handle.pxi"
include "sync_kinds.pxi"
include "sync_mutex.pxi"
include "sync_many.pxi"


def new_owner():
    """An owner's number that no thread and no task has had."""
    cdef uint64_t number
    global pw_serials
    pw_self()
    number = pw_serials
    pw_serials += 1
    return number


def monotonic_ns():
    return pw_clock(0)


def crash_at(bytes name, long skip=0, bytes stop=b""):
    """For tests, in the build with crash points: SIGKILL at that point, after `skip` passes; SIGSTOP at another before."""
    if not pw_arm(name, skip, stop):
        raise RuntimeError("this build has no crash points")


def fallbacks():
    """What is missing here, as short words: ``slices``, ``futex_waitv``, ``robust list``, ``kernel before 6.2``."""
    found = []
    if pw_slices:
        found.append("slices")
    if not pw_waitv:
        found.append("futex_waitv")
    if not pw_robust():
        found.append("robust list")
    if pw_old_kernel:
        found.append("kernel before 6.2")
    return found


cdef AlertWord alert_word():
    from portway.kernel.alert import word_of_this_thread

    return word_of_this_thread()


def _load():
    wanted = os.environ.get("PORTWAY_SYNC", "")
    if wanted not in ("", "slices"):
        raise ImportError(f"PORTWAY_SYNC={wanted!r}: give slices, or nothing")
    release = os.uname().release.split(".")
    try:
        old = (int(release[0]), int(release[1].split("-")[0])) < (6, 2)
    except (ValueError, IndexError):
        old = False
    if pw_load(wanted == "slices", old) != 0:
        raise ImportError("no thread key or no memory left in this process")
    guard.hook(pw_heal)
    global pw_finish_closed
    pw_finish_closed = finish_soon


_load()
