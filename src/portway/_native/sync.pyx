# cython: boundscheck=False, wraparound=False
"""Words the kernel watches: mutexes, semaphores, events and timers in pages shared by unrelated processes.

Native only. A thin layer over `sync_core.h`, where the protocol is explained; `portway.kernel` has the public classes.
"""

from cpython.exc cimport PyErr_SetFromErrno

cdef extern from "sync_fork.h" nogil:
    int pw_hold_add(int, int, int)
    int pw_hold_slot(int, int)
    unsigned long long pw_pid_namespace()
    int posix_fallocate(int, long, long)

from libc.errno cimport errno


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
