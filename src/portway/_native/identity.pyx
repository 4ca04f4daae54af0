# cython: freethreading_compatible=True
"""One thread takes another user's effective identity, and gives it back.

Only raw system calls: libc's setgroups, setresgid and setresuid (and so os.setresuid) change every thread of the
process. The change and the way back are each one call of C, so no signal handler of Python runs in the middle. Sources:
setresuid(2) "C library/kernel differences", capabilities(7) "Effect of user ID changes", prctl(2), unix(7).
"""

import os
from portway import errors

from cpython.exc cimport PyErr_SetFromErrno
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EINVAL, EPERM, ERANGE, errno
from libc.stdlib cimport free, malloc

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/capability.h>
    #include <pthread.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #ifdef SYS_setresuid32 /* the plain numbers take 16 bits on these machines */
    #define PW_(name) SYS_##name##32
    #else
    #define PW_(name) SYS_##name
    #endif

    typedef struct {
        uid_t u[3];
        gid_t g[3];
        int count, death;
        gid_t *groups;
        struct __user_cap_data_struct caps[2];
    } pw_who;

    static __thread void *pw_inside; /* the Impersonation this thread is in */

    /* Dumpable belongs to the process: the first thread to enter notes it, the last to leave restores it. */
    static pthread_mutex_t pw_gate = PTHREAD_MUTEX_INITIALIZER;
    static int pw_count, pw_dumpable;

    static void pw_before_fork(void) { pthread_mutex_lock(&pw_gate); }
    static void pw_in_parent(void) { pthread_mutex_unlock(&pw_gate); }
    static void pw_in_child(void) { /* only this thread is left */
        int had = pw_count;
        pw_count = pw_inside != NULL;
        if (had && !pw_count && pw_dumpable == 1)
            prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
        pthread_mutex_unlock(&pw_gate);
    }
    static int pw_start(void) { return pthread_atfork(pw_before_fork, pw_in_parent, pw_in_child); }

    /* Notes that `self` is entered; -1 when a thread is in it already, or this thread in another. */
    static int pw_enter(void *self, int *entered) {
        int wrong = 0;
        pthread_mutex_lock(&pw_gate);
        if (*entered || pw_inside)
            wrong = -1;
        else {
            *entered = 1;
            pw_inside = self;
            if (pw_count++ == 0)
                pw_dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
        }
        pthread_mutex_unlock(&pw_gate);
        return wrong;
    }
    static int pw_is_inside(void *self) { return pw_inside == self; }
    static void pw_leave(int *entered) {
        pthread_mutex_lock(&pw_gate);
        *entered = 0;
        pw_inside = NULL;
        if (--pw_count == 0 && pw_dumpable == 1)
            prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
        pthread_mutex_unlock(&pw_gate);
    }

    static int pw_caps(int call, struct __user_cap_data_struct *caps) {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        return (int)syscall(call, &head, caps);
    }
    static int pw_effective(const struct __user_cap_data_struct *wanted) { /* NULL: none */
        struct __user_cap_data_struct caps[2];
        int i;
        if (pw_caps(SYS_capget, caps))
            return -1;
        if (caps[0].effective == (wanted ? wanted[0].effective : 0) &&
            caps[1].effective == (wanted ? wanted[1].effective : 0))
            return 0;
        for (i = 0; i < 2; i++)
            caps[i].effective = wanted ? wanted[i].effective : 0;
        return pw_caps(SYS_capset, caps);
    }

    /* Who this thread is. The caller frees groups. */
    static int pw_read(pw_who *w) {
        int room;
        w->groups = NULL;
        w->death = 0;
        if (syscall(PW_(getresuid), &w->u[0], &w->u[1], &w->u[2]) ||
            syscall(PW_(getresgid), &w->g[0], &w->g[1], &w->g[2]) || pw_caps(SYS_capget, w->caps))
            return -1;
        prctl(PR_GET_PDEATHSIG, &w->death, 0, 0, 0);
        room = (int)syscall(PW_(getgroups), 0, NULL);
        if (room < 0 || !(w->groups = malloc(sizeof(gid_t) * (room + 1))))
            return -1;
        w->count = (int)syscall(PW_(getgroups), room, w->groups);
        return w->count < 0 ? -1 : 0;
    }

    /* NULL when this thread is `w` again, else what failed. */
    static const char *pw_back(const pw_who *w) {
        pw_effective(w->caps); /* for ids that are neither real nor saved; setresuid says whether it was needed */
        if (syscall(PW_(setresuid), w->u[0], w->u[1], w->u[2]))
            return "setresuid";
        if (pw_effective(w->caps))
            return "capset";
        if (syscall(PW_(setresgid), w->g[0], w->g[1], w->g[2]))
            return "setresgid";
        if (syscall(PW_(setgroups), w->count, w->groups))
            return "setgroups";
        if (w->death)
            prctl(PR_SET_PDEATHSIG, w->death, 0, 0, 0);
        return NULL;
    }
    static void pw_back_or_abort(const pw_who *w) {
        const char *failed = pw_back(w);
        char text[300];
        int size;
        if (!failed)
            return;
        size = snprintf(text, sizeof text,
                        "portway: impersonate: thread %ld cannot go back to uid %u: %s: %s. "
                        "A process with half an identity must not go on: aborting.\\n",
                        (long)syscall(SYS_gettid), (unsigned)w->u[1], failed, strerror(errno));
        if (write(2, text, size) < 0) {}
        abort();
    }

    /* The effective ids and the groups of this thread; our own stay as real and saved ones. NULL when done, else what
       failed, with errno, and then this thread is `old` again. */
    static const char *pw_take(const pw_who *old, uid_t uid, gid_t gid, int count, const gid_t *groups) {
        const char *failed = NULL;
        int wrong;
        if (syscall(PW_(setgroups), count, groups))
            return "setgroups"; /* nothing has changed */
        if (syscall(PW_(setresgid), -1, gid, old->g[1]))
            failed = "setresgid";
        else if (syscall(PW_(setresuid), -1, uid, old->u[1]))
            failed = "setresuid";
        else if (uid && pw_effective(NULL)) /* the kernel does that only when it was uid 0 before */
            failed = "capset";
        if (failed) {
            wrong = errno;
            pw_back_or_abort(old);
            errno = wrong;
        }
        return failed;
    }
    static int pw_capable(void) {
        struct __user_cap_data_struct caps[2];
        if (pw_caps(SYS_capget, caps))
            return -1;
        return (caps[0].effective >> CAP_SETUID & 1) | (caps[0].effective >> CAP_SETGID & 1) << 1;
    }
    """
    ctypedef unsigned uid_t
    ctypedef unsigned gid_t
    ctypedef unsigned socklen_t
    ctypedef struct pw_who:
        uid_t u[3]
        gid_t g[3]
        int count
        gid_t *groups
    int pw_start()
    int pw_enter(void *, int *)
    int pw_is_inside(void *)
    void pw_leave(int *)
    int pw_read(pw_who *)
    void pw_back_or_abort(const pw_who *)
    const char *pw_take(const pw_who *, uid_t, gid_t, int, const gid_t *)
    int pw_capable()
    int getsockopt(int, int, int, void *, socklen_t *)
    int SOL_SOCKET

if pw_start():
    raise MemoryError


def peer_option(int fd, int option, int size=0):
    """What getsockopt(SOL_SOCKET, option) gives, as bytes; asks for as much room as the kernel says it needs."""
    cdef socklen_t length = size
    cdef bytearray room
    while True:
        size, room = length, bytearray(length)
        if getsockopt(fd, SOL_SOCKET, option, <char *>room, &length) == 0:
            return bytes(room[:length])
        if errno != ERANGE or length <= <socklen_t>size:
            PyErr_SetFromErrno(OSError)


def missing_capabilities():
    """Which of the two that `Impersonation` needs this thread has not."""
    cdef int has = pw_capable()
    if has < 0:
        PyErr_SetFromErrno(OSError)
    return [name for bit, name in ((1, "CAP_SETUID"), (2, "CAP_SETGID")) if not has & bit]


def thread_identity():
    """Of this thread: ((real, effective, saved uid), (real, effective, saved gid), supplementary groups)."""
    cdef pw_who who
    try:
        if pw_read(&who):
            PyErr_SetFromErrno(OSError)
        return ((who.u[0], who.u[1], who.u[2]), (who.g[0], who.g[1], who.g[2]),
                tuple([who.groups[i] for i in range(who.count)]))
    finally:
        free(who.groups)


cdef class Impersonation:
    """``with Impersonation(uid, gid, groups, value, check):`` this thread, and no other, has these effective ids.

    Entering calls `check` first: what it raises is raised, and when it gives False nothing is changed. The value is
    `value`. A way back that fails aborts the process.
    """

    cdef uid_t uid
    cdef gid_t gid
    cdef gid_t *groups
    cdef int count, entered
    cdef bint changed
    cdef object value, check
    cdef pw_who before

    def __cinit__(self, uid_t uid, gid_t gid, tuple groups, value, check):
        self.uid, self.gid, self.value, self.check = uid, gid, value, check
        self.count = len(groups)
        self.groups = <gid_t *>malloc(sizeof(gid_t) * (self.count + 1))
        if self.groups == NULL:
            raise MemoryError
        for i in range(self.count):
            self.groups[i] = groups[i]

    def __dealloc__(self):
        free(self.groups)
        free(self.before.groups)

    def __enter__(self):
        cdef const char *failed
        cdef int wrong
        if not pw_is_inside(NULL):
            raise errors.NotSupported("this thread impersonates somebody already", hint="leave that block first")
        change = self.check()
        wrong = pw_enter(<void *>self, &self.entered)
        if wrong:
            raise errors.NotSupported("another thread is in this block", hint="call impersonate() for each thread")
        self.changed = change
        if self.changed:
            free(self.before.groups)
            if pw_read(&self.before):
                wrong = errno
                pw_leave(&self.entered)
                raise OSError(wrong, os.strerror(wrong))
            failed = pw_take(&self.before, self.uid, self.gid, self.count, self.groups)
            if failed != NULL:
                wrong = errno
                pw_leave(&self.entered)
                what = f"{failed.decode()} for uid {self.uid}, gid {self.gid}: {os.strerror(wrong)}"
                if wrong == EPERM:
                    raise errors.AccessDenied(what, hint="a container or user namespace forbids it; see setgroups(2)")
                if wrong == EINVAL:
                    raise errors.AccessDenied(what, hint="the id is not mapped in this user namespace")
                raise OSError(wrong, what)
        Py_INCREF(self)
        return self.value

    def __exit__(self, kind, error, at):
        if not pw_is_inside(<void *>self):
            raise errors.NotSupported("this thread is not in this block", hint="leave it on the thread that entered it")
        if self.changed:
            pw_back_or_abort(&self.before)
        pw_leave(&self.entered)
        Py_DECREF(self)
        return False
