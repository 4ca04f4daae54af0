# cython: freethreading_compatible=True
"""The identity of one thread. libc's setuid() and the like, and so Python's, change every thread of the process; these are
the system calls themselves, of which the kernel knows only the thread that makes them. Source: setresuid(2), "C
library/kernel differences"; credentials(7).
"""

import os

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc

cdef extern from *:
    """
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static int pw_setgroups(long count, const unsigned *groups) { return (int)syscall(SYS_setgroups, count, groups); }
    static int pw_setresgid(unsigned r, unsigned e, unsigned s) { return (int)syscall(SYS_setresgid, r, e, s); }
    static int pw_setresuid(unsigned r, unsigned e, unsigned s) { return (int)syscall(SYS_setresuid, r, e, s); }
    static int pw_getresuid(unsigned *all) { return (int)syscall(SYS_getresuid, all, all + 1, all + 2); }
    static int pw_getresgid(unsigned *all) { return (int)syscall(SYS_getresgid, all, all + 1, all + 2); }
    static long pw_getgroups(long count, unsigned *groups) { return syscall(SYS_getgroups, count, groups); }
    static int pw_dumpable(long set) { return set < 0 ? prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) : prctl(PR_SET_DUMPABLE, set, 0, 0, 0); }
    """
    int pw_setgroups(long, const uint32_t *)
    int pw_setresgid(uint32_t, uint32_t, uint32_t)
    int pw_setresuid(uint32_t, uint32_t, uint32_t)
    int pw_getresuid(uint32_t *)
    int pw_getresgid(uint32_t *)
    long pw_getgroups(long, uint32_t *)
    int pw_dumpable(long)

DEF KEEP = 0xFFFFFFFF


def get():
    """((real, effective, saved uid), (gids), groups) of this thread."""
    cdef uint32_t u[3]
    cdef uint32_t g[3]
    cdef long count
    cdef uint32_t *groups
    if pw_getresuid(u) or pw_getresgid(g):
        PyErr_SetFromErrno(OSError)
    count = pw_getgroups(0, NULL)
    groups = <uint32_t *>malloc(max(count, 1) * sizeof(uint32_t))
    if groups == NULL:
        raise MemoryError
    try:
        count = pw_getgroups(count, groups)
        if count < 0:
            PyErr_SetFromErrno(OSError)
        return (u[0], u[1], u[2]), (g[0], g[1], g[2]), tuple([groups[i] for i in range(count)])
    finally:
        free(groups)


def set_groups(groups):
    """The supplementary groups of this thread. OSError without CAP_SETGID."""
    cdef list all = list(groups)
    cdef uint32_t *raw = <uint32_t *>malloc(max(len(all), 1) * sizeof(uint32_t))
    if raw == NULL:
        raise MemoryError
    try:
        for i, one in enumerate(all):
            raw[i] = one
        if pw_setgroups(len(all), raw):
            PyErr_SetFromErrno(OSError)
    finally:
        free(raw)


def set_gids(uint32_t real, uint32_t effective, uint32_t saved):
    if pw_setresgid(real, effective, saved):
        PyErr_SetFromErrno(OSError)


def set_uids(uint32_t real, uint32_t effective, uint32_t saved):
    if pw_setresuid(real, effective, saved):
        PyErr_SetFromErrno(OSError)


def dumpable(int to=-1):
    """PR_GET_DUMPABLE, or PR_SET_DUMPABLE."""
    cdef int got = pw_dumpable(to)
    if got < 0:
        PyErr_SetFromErrno(OSError)
    return got
