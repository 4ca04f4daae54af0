# The connection under a channel: state, waiting, cancelling.

cdef class Bell:
    """Rung once, for all who wait now. Closed by the last who lets go."""

    cdef int fd

    def __cinit__(self):
        self.fd = -1
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))

    cdef void ring(self) noexcept:
        cdef uint64_t one = 1
        c_write(self.fd, &one, 8)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)


cdef class Connection:
    """The socket, and how calls begin, wait and end: part of `Channel`."""

    cdef int _fd, pid, pins, _closed, gone, broken
    cdef readonly bint message
    cdef readonly int access
    cdef bint by_message
    cdef readonly object name
    cdef public Py_ssize_t max_message
    cdef double seconds_default
    cdef readonly uint64_t sent_messages, received_messages, sent_bytes, received_bytes
    # receiving
    cdef PyThread_type_lock rlock
    cdef Py_ssize_t guess           # size of the last packet
    cdef PyObject *g                # bytes gathered of the current message, this object's alone; may be NULL
    cdef Py_ssize_t g_size, g_at    # filled so far, handed out so far
    cdef uint64_t expect            # what the kernel has, or will have, of the current message; 0: the next packet begins one
    cdef size_t offset              # handed out of the packet at the head of the queue
    cdef bint owes_notice           # a MessageAbandoned that was held back behind data
    # sending
    cdef PyThread_type_lock slock
    cdef bint owes_abandoned
    cdef Py_ssize_t midway          # how far send_nowait is in the message that it began; 0: in none
    # waiting
    cdef uint64_t cancels
    cdef Bell bell
    cdef char *map
    cdef pw_watch watching

    def __cinit__(self, *args, **options):
        self._fd = -1
        self.rlock = PyThread_allocate_lock()
        self.slock = PyThread_allocate_lock()
        if self.rlock == NULL or self.slock == NULL:
            raise MemoryError

    def __init__(self, int fd, *, bint message, int access, bint read_message=True, max_message=64 << 20, timeout=None,
                 name=""):
        self.timeout = timeout
        if max_message < 0:
            raise errors.InvalidParameter(f"max_message={max_message}: give bytes >= 0")
        if pw_pipe_ready(fd):
            raise errors.InvalidParameter(f"descriptor {fd} is no socket: {os.strerror(errno)}")
        self.message, self.access, self.by_message, self.name = message, access, message and read_message, name
        self.max_message, self.pid, self.guess = max_message, getpid(), 64
        self._fd = fd

    def __dealloc__(self):
        if self._fd >= 0:
            c_close(self._fd)
        self.drop_gathered()
        if self.map != NULL:
            munmap(self.map, 8192)
        PyThread_free_lock(self.rlock)
        PyThread_free_lock(self.slock)

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def read_message(self):
        return self.by_message

    @read_message.setter
    def read_message(self, bint on):
        if on and not self.message:
            raise errors.InvalidParameter(f"the pipe {self.name} is a byte pipe: it has no messages to read")
        self.by_message = on

    @property
    def timeout(self):
        """Seconds that the calls wait when they are not told; None: without limit."""
        return None if self.seconds_default == NO_LIMIT else self.seconds_default

    @timeout.setter
    def timeout(self, value):
        self.seconds_default = seconds_of(value)

    @property
    def closed(self):
        return self._closed != 0

    @property
    def buffered(self):
        """Whether part of a message lies here and not in the socket."""
        return self.g_size > self.g_at

    def fileno(self):
        """Readable when something waits in the socket. `ObjectClosed` after close()."""
        if self._closed:
            self.refuse()
        return self._fd

    # -- beginning and ending a call -----------------------------------------------------------------------------------

    cdef int enter(self, int access) except -1:
        """Every call: `leave` ends it, also after an exception."""
        if self._closed or self.gone:
            self.refuse()
        if not self.access & access:
            raise errors.AccessDenied(
                f"this end of the pipe {self.name} may only {'read' if self.access == 1 else 'write'}",
                hint="the direction decides",
            )
        if self.map != NULL:
            self.look()
        self.pins += 1
        return 0

    cdef int refuse(self) except -1:
        if self.gone:
            raise errors.PipeNotConnected(f"the pipe {self.name}: the server has disconnected", hint="open it again")
        raise errors.ObjectClosed(f"this end of the pipe {self.name} is closed")

    cdef void leave(self) noexcept:
        self.pins -= 1
        if self._closed and not self.pins:
            self.release_fd()

    cdef int look(self) except -1:
        """`PipeNotConnected` when the server has disconnected this client."""
        if self.map != NULL and not self.gone:
            self.watching.found = 0
            guarded(pw_watch_look, &self.watching)
            if self.watching.found:
                self.gone = 1
                self.drop_gathered()
        if self.gone:
            self.refuse()
        return 0

    cdef int interrupted(self, uint64_t cancels) except -1:
        """In the middle of a wait."""
        if self._closed or self.gone:
            self.refuse()
        if self.cancels != cancels:
            raise errors.OperationAborted(f"cancelled: the pipe {self.name}")
        self.look()
        return 0

    cdef void release_fd(self) noexcept:
        cdef int fd = self._fd
        self._fd = -1
        if fd >= 0:
            c_close(fd)
        if self.map != NULL:
            munmap(self.map, 8192)
            self.map = NULL

    cdef int ring(self) except -1:
        cdef Bell bell = self.bell
        self.bell = None
        if bell is not None:
            bell.ring()
        return 0

    cdef int wait(self, short events, int64_t at, uint64_t cancels) except -1:
        """1: look again, 0: the time is over."""
        cdef int got, wrong, fd = self._fd
        cdef int64_t until = at, slice
        cdef Bell bell
        PyErr_CheckSignals()  # it may have come between two system calls, or to another thread
        if pw_is_main_thread():
            slice = pw_pipe_now() + 40000000
            until = min(at, slice)
        if self.bell is None:
            self.bell = Bell()
        bell = self.bell
        self.interrupted(cancels)
        # A disconnect leaves no mark in the socket before the server closes it, which comes right after: no slices.
        with nogil:
            got = pw_pipe_poll(fd, events, bell.fd, until)
            wrong = errno
        if got < 0:
            if wrong != EINTR:
                raise OSError(wrong, os.strerror(wrong))
        PyErr_CheckSignals()
        self.interrupted(cancels)
        return 1 if got or until != at else 0

    cdef int lock(self, PyThread_type_lock which, int64_t at, uint64_t cancels) except -1:
        """1: ours, 0: the time is over."""
        cdef int got
        cdef int64_t until
        while True:
            until = pw_pipe_now() + 20000000
            if at < until:
                until = at
            if at == 0:
                return PyThread_acquire_lock(which, 0)
            with nogil:
                got = PyThread_acquire_lock_timed(which, max((until - pw_pipe_now()) // 1000, 0), 1)
            if got == 1:
                self.interrupted_unlock(which, cancels)
                return 1
            PyErr_CheckSignals()
            self.interrupted(cancels)
            if at != INT64_MAX and pw_pipe_now() >= at:
                return 0

    cdef int interrupted_unlock(self, PyThread_type_lock which, uint64_t cancels) except -1:
        try:
            self.interrupted(cancels)
        except BaseException:
            PyThread_release_lock(which)
            raise
        return 0

    cdef double limit(self, object timeout) except? -2:
        return self.seconds_default if timeout is _UNSET else seconds_of(timeout)

    cdef object late(self, double seconds, str doing):
        return errors.OperationTimeout(f"timed out after {seconds:g} s {doing} the pipe {self.name}")

    cdef void drop_gathered(self) noexcept:
        """What was received of a message and not handed out."""
        cdef PyObject *g = self.g
        self.g = NULL
        self.g_size = self.g_at = 0
        self.expect = 0
        self.offset = 0
        if g != NULL:
            Py_DECREF(<object>g)


cdef double seconds_of(object timeout) except? -2:
    cdef double seconds
    if timeout is None:
        return NO_LIMIT
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout={timeout!r}: give seconds >= 0, or None to wait without limit")
    return seconds


cdef inline int64_t at_of(double seconds) noexcept:
    """The deadline; 0: do not wait."""
    if seconds == NO_LIMIT or seconds > 4e9:
        return INT64_MAX
    return 0 if seconds == 0 else pw_pipe_now() + <int64_t>(seconds * 1e9)
