# cython: boundscheck=False, wraparound=False, freethreading_compatible=True
"""System calls that Python lacks or makes slow: descriptors in messages, what a socket is, pidfd_getfd.

`portway._handoff_python` is the same in Python and is the specification; tests run on both.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

include "handoff_c.pxi"

DEF MAX_FDS = 253  # SCM_MAX_FD, kernel include/net/scm.h
DEF CONTROL = 1040  # CMSG_SPACE(253 * 4)
MAX_DESCRIPTORS = MAX_FDS


def pidfd_getfd(int pidfd, int fd):
    """pidfd_getfd(2): a close-on-exec duplicate of another process's descriptor. OSError as the kernel says."""
    cdef long got
    with nogil:
        got = c_syscall(438, pidfd, fd, 0)
    if got < 0:
        PyErr_SetFromErrno(OSError)
    return got


def set_ptracer(unsigned long pid):
    """prctl(PR_SET_PTRACER): lets `pid` inspect this process under Yama; 0 withdraws. OSError(EINVAL) without Yama."""
    if c_prctl(0x59616D61, pid, 0, 0, 0) < 0:
        PyErr_SetFromErrno(OSError)


def readable(int fd):
    """Whether poll() would report the descriptor readable, or ended, right now."""
    cdef pollfd p
    p.fd = fd
    p.events = POLLIN
    p.revents = 0
    cdef int got = c_poll(&p, 1, 0)
    if got < 0 and errno != EINTR:
        PyErr_SetFromErrno(OSError)
    return got > 0


include "handoff_message.pxi"
include "handoff_record.pxi"
