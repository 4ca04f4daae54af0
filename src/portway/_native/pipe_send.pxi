# Sending.

cdef class Sender(Receiver):
    """Part of `Channel`."""

    cdef int no_reader(self, int wrong) except -1:
        if self._closed or self.gone:
            self.refuse()
        self.look()
        if wrong == EPIPE or wrong == ECONNRESET:
            raise errors.NoData(f"the other end of the pipe {self.name} has gone")
        raise OSError(wrong, os.strerror(wrong))

    cdef Py_ssize_t put(self, const char *data, Py_ssize_t size, Py_ssize_t at, bint block) except -2:
        """One system call's worth from `at` on: the place reached, -1: the queue is full. `block`: for the time of
        SO_SNDTIMEO, which is short."""
        cdef Py_ssize_t part = min(size - at, <Py_ssize_t>(PACKET if self.message else 4 * PACKET))
        cdef ssize_t got
        cdef int wrong, fd = self._fd
        cdef bint message = self.message
        cdef uint64_t left = size - at
        cdef int flags = MSG_NOSIGNAL if block else MSG_DONTWAIT | MSG_NOSIGNAL
        if block or part > PACKET + 64:
            with nogil:
                if message:
                    got = pw_send_packet(fd, left, data + at, part, flags)
                else:
                    got = c_send(fd, data + at, part, flags)
                wrong = errno
        else:
            if message:
                got = pw_send_packet(fd, left, data + at, part, flags)
            else:
                got = c_send(fd, data + at, part, flags)
            wrong = errno
        if got >= 0:
            self.sent_bytes += got
            return at + got
        if wrong == EAGAIN or wrong == EINTR:
            return -1
        self.no_reader(wrong)

    cdef int settle(self) except -1:
        """What is owed to the reader of a message that was given up: 1 done, 0 the queue is full."""
        if self.owes_abandoned:
            if pw_send_abandoned(self._fd) != 0:
                if errno != EAGAIN:
                    self.no_reader(errno)
                return 0
            self.owes_abandoned = False
        return 1

    cdef Py_ssize_t put_all(self, const char *data, Py_ssize_t size, double seconds, uint64_t cancels) except -1:
        """With the lock held. Whole, or an exception with `sent`."""
        cdef Py_ssize_t at = 0, now
        cdef int64_t until = 0 if seconds == 0 else -1
        cdef bint begun = False, block = False, may_block = not 0 <= seconds < 0.004
        if not self.message and not size:
            return 0
        try:
            while True:
                now = self.put(data, size, at, block) if not self.owes_abandoned or self.settle() else -1
                if now >= 0:
                    begun, at, block = True, now, False
                    if at == size:
                        self.sent_messages += 1
                        return size
                    if self.cancels != cancels or self._closed:
                        self.interrupted(cancels)
                    continue
                if may_block and not block:  # most often there is room in a moment
                    PyErr_CheckSignals()
                    self.interrupted(cancels)
                    block = True
                    continue
                block = False
                if until == -1:
                    until = at_of(seconds)
                if until == 0 or not self.wait(POLLOUT, until, cancels):
                    raise self.late(seconds, "sending to")
        except BaseException as error:
            if begun and self.message and not isinstance(error, errors.BrokenPipe) and self._fd >= 0:
                self.give_up()
            if isinstance(error, errors.PortwayError):
                error.sent = at
            raise

    cdef int give_up(self) except -1:
        """The reader is told that the rest of the message does not come."""
        if pw_send_abandoned(self._fd) != 0 and errno == EAGAIN:
            self.owes_abandoned = True
        return 0

    cdef Py_ssize_t put_locked(self, object data, double seconds, uint64_t cancels) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if not PyThread_acquire_lock(self.slock, 0) and not self.lock(self.slock, at_of(seconds), cancels):
                raise self.late(seconds, "sending to")
            try:
                if self.midway:
                    self.not_there(0, view.len)
                return self.put_all(<const char *>view.buf, view.len, seconds, cancels)
            finally:
                PyThread_release_lock(self.slock)
        finally:
            PyBuffer_Release(&view)

    def send(self, data, timeout=_UNSET):
        cdef double seconds = self.limit(timeout)
        self.enter(2)
        try:
            return self.put_locked(data, seconds, self.cancels)
        finally:
            self.leave()

    def send_nowait(self, data, Py_ssize_t at=0):
        """For event loops: the place reached, -1 when nothing could be sent now; complete when it is len(data)."""
        cdef Py_buffer view
        cdef Py_ssize_t now, begun = at
        self.enter(2)
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            try:
                if not 0 <= at <= view.len or (self.message and at != self.midway):
                    self.not_there(at, view.len)
                if not self.message and not view.len:
                    return 0
                if self.owes_abandoned and not self.settle():
                    return -1
                while True:
                    now = self.put(<const char *>view.buf, view.len, at, False)
                    if now < 0:
                        self.midway = at if self.message else 0
                        return at if at > begun else -1
                    at = now
                    if at == view.len:
                        self.midway = 0
                        self.sent_messages += 1
                        return at
            finally:
                PyBuffer_Release(&view)
        finally:
            self.leave()

    cdef int not_there(self, Py_ssize_t at, Py_ssize_t size) except -1:
        if self.midway and not at:
            raise errors.PipeBusy(f"the pipe {self.name} is in the middle of another message")
        raise errors.InvalidParameter(f"at={at} of {size}: the message is at {self.midway}")

    def abandon(self):
        """For event loops: the message that send_nowait began is given up."""
        self.enter(2)
        try:
            if self.midway:
                self.midway = 0
                self.give_up()
        finally:
            self.leave()

    def transact(self, data, size=None, timeout=_UNSET):
        cdef double seconds = self.limit(timeout)
        cdef int64_t at = 0 if seconds == 0 else -1
        cdef uint64_t cancels = self.cancels
        self.enter(3)
        try:
            if not self.by_message:
                raise errors.BadPipe(f"the pipe {self.name}: only an end that reads messages can transact")
            if not PyThread_acquire_lock(self.rlock, 0) and not self.lock(self.rlock, at_of(seconds), cancels):
                raise self.late(seconds, "transacting on")
            try:
                if self.g != NULL or self.expect or self.any_packet():
                    raise errors.PipeBusy(f"unread data waits in the pipe {self.name}", hint="receive it first")
                if seconds > 0:
                    at = at_of(seconds)
                self.put_locked(data, seconds, cancels)
                answer = self.some(size, &at, seconds, cancels)
                if self.map != NULL:
                    self.look()
            finally:
                PyThread_release_lock(self.rlock)
            if answer is None:
                raise self.late(seconds, "transacting on")
            return answer
        finally:
            self.leave()

    cdef bint any_packet(self) noexcept:
        """Whether a packet waits; the end of the stream is none."""
        cdef int from_start = 0
        cdef char head[8]
        setsockopt(self._fd, SOL_SOCKET, SO_PEEK_OFF, &from_start, sizeof(from_start))
        return c_recv(self._fd, head, 8, MSG_PEEK | MSG_DONTWAIT) > 0

    def flush(self, timeout=_UNSET):
        cdef double seconds = self.limit(timeout)
        cdef int64_t at = at_of(seconds), now
        cdef uint64_t cancels = self.cancels
        cdef int queued, pause = 20000, reset
        cdef unsigned size
        self.enter(2)
        try:
            while True:
                queued = 0
                if ioctl(self._fd, SIOCOUTQ, &queued) != 0:
                    self.no_reader(errno)
                if queued == 0:
                    reset, size = 0, sizeof(reset)
                    getsockopt(self._fd, SOL_SOCKET, SO_ERROR, &reset, &size)
                    self.look()
                    if reset == ECONNRESET or reset == EPIPE:
                        raise errors.BrokenPipe(f"the other end of the pipe {self.name} has gone without reading everything")
                    return
                now = pw_pipe_now()
                if at == 0 or now >= at:
                    raise self.late(seconds, "until everything is read in")
                self.wait(0, min(at, now + pause), cancels)
                pause = min(pause * 2, 1000000)
        finally:
            self.leave()
