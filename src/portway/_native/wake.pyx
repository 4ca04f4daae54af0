# cython: freethreading_compatible=True
"""A word in a file that others write: sleep until it changes, wake who sleeps.

The page is mapped but never touched from here: the word is read with pread(2), and the kernel compares it with what was
read when it puts the thread to sleep. So a file that its owner cuts is an error number, never SIGBUS. FUTEX_WAIT works
through a read-only mapping. Source: futex(2).
"""

import os
from portway import errors

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EFAULT, EINTR, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint32_t

cdef extern from *:
    """
    #include <limits.h>
    #include <linux/futex.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    static int pw_word_wait(char *at, unsigned value, long nanoseconds) {
        struct timespec t = {nanoseconds / 1000000000, nanoseconds % 1000000000};
        return (int)syscall(SYS_futex, at, FUTEX_WAIT, value, &t, NULL, 0);
    }
    static int pw_word_wake(char *at, int count) { return (int)syscall(SYS_futex, at, FUTEX_WAKE, count, NULL, NULL, 0); }
    """
    int pw_word_wait(char *, unsigned, long) nogil
    int pw_word_wake(char *, int) nogil
    void *mmap(void *, size_t, int, int, int, long) nogil
    int munmap(void *, size_t) nogil
    int PROT_READ, MAP_SHARED
    void *MAP_FAILED


cdef class Word:
    """The 32-bit word at offset `at` of the first page of a file. Keeps the file mapped until `close`."""

    cdef char *page
    cdef int fd
    cdef long at

    def __init__(self, int fd, long at):
        cdef void *page
        if not 0 <= at <= 4092 or at % 4:
            raise ValueError(f"at={at}: give a multiple of 4 below 4,096")
        page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0)
        if page == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.page, self.at, self.fd = <char *>page, at, fd

    def wait(self, uint32_t value, double seconds):
        """Sleeps until somebody wakes, at most so long; at once when the word is not `value` any more. True: woken or
        changed, False: the time is over. Ctrl-C ends it."""
        cdef int got, wrong
        cdef long nanoseconds = <long>(seconds * 1e9)
        if self.page == NULL:
            raise errors.ObjectClosed("this word is closed")
        cdef char *at = self.page + self.at
        with nogil:
            got = pw_word_wait(at, value, nanoseconds)
            wrong = errno
        if got == 0 or wrong == EAGAIN:
            return True
        if wrong == EINTR:
            PyErr_CheckSignals()
            return True
        if wrong == ETIMEDOUT or wrong == EFAULT:
            return False
        raise OSError(wrong, os.strerror(wrong))

    def change(self, uint32_t value, int wake=1):
        """Writes the word, then wakes up to `wake` sleepers; how many were woken."""
        os.pwrite(self.fd, value.to_bytes(4, "little"), self.at)
        return pw_word_wake(self.page + self.at, wake)

    def close(self):
        """Nobody may be in `wait`."""
        cdef char *page = self.page
        self.page = NULL
        if page != NULL:
            munmap(page, 4096)

    def __dealloc__(self):
        if self.page != NULL:
            munmap(self.page, 4096)
