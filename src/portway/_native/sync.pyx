# cython: boundscheck=False, wraparound=False, binding=False
"""Words the kernel watches: mutexes, semaphores, events and timers in pages shared by unrelated processes.

Native only. A thin layer over the headers `sync_*.h`, where the protocol is explained; its classes are in the included
files `sync_*.pxi`, and `portway.kernel` has the public ones. The GIL is kept except while a thread sleeps; it also is
what keeps two threads of one process out of one page's lock.
"""

import os
from portway import errors

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

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


def allocate(int fd, long at, long size):
    """posix_fallocate(3): space behind these bytes, or OSError."""
    cdef int wrong
    with nogil:
        wrong = posix_fallocate(fd, at, size)
    if wrong:
        raise OSError(wrong, "no space for the object")


cdef class Body:
    """The mapped page of one object in this process; `close` once."""

    cdef pw_body *b

    def __init__(self, int fd, int slot, int kind, bint manual, uint64_t home, str local, str global_, int scope,
                 bytes name):
        cdef bytes folder
        self.b = pw_map(fd, slot, kind, manual, home)
        if self.b == NULL:
            raise OSError(errno, os.strerror(errno))
        for i, path in enumerate((local, global_)):
            folder = os.fsencode(path)
            if len(folder) < 256:
                memcpy(self.b.folder[i], <char *>folder, len(folder))
        self.b.scope = scope
        memcpy(self.b.hash, <char *>name, 16)
        pw_take_over_slot(self.b)

    def close(self):
        cdef pw_body *b = self.b
        self.b = NULL
        if b != NULL:
            pw_close(b)

    def settle(self):
        """Finishes what a killed process left undone in the page."""
        cdef int wrong
        self.b.pins += 1
        wrong = pw_L_lock(self.b, pw_self(), pw_clock(0) + 1000000000)
        if wrong == PW_OK:
            pw_L_unlock(self.b)
        pw_unpin(self.b)
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


def crash_at(bytes name, long skip=0):
    """For tests, in the build with crash points: SIGKILL at that point, after `skip` passes."""
    if not pw_arm(name, skip):
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


_load()
