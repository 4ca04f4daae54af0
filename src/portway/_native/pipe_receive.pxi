# Receiving.

cdef class Receiver(Connection):
    """Part of `Channel`."""

    cdef int own_gathered(self) except -1:
        """Bytes that came from elsewhere may be shared: a copy of our own."""
        cdef PyObject *old = self.g
        self.g = NULL
        fresh = PyBytes_FromStringAndSize(PyBytes_AS_STRING(<object>old), self.g_size)
        Py_DECREF(<object>old)
        Py_INCREF(fresh)
        self.g = <PyObject *>fresh
        return 0

    cdef int room(self, Py_ssize_t more) except -1:
        """So much room behind what was gathered; it grows as data comes, never by what a peer announces."""
        cdef Py_ssize_t size
        if self.g == NULL:
            fresh = PyBytes_FromStringAndSize(NULL, max(more, 2 * PACKET))
            Py_INCREF(fresh)
            self.g = <PyObject *>fresh
            self.g_size = self.g_at = 0
            return 0
        size = PyBytes_GET_SIZE(<object>self.g)
        if self.g_size + more > size:
            if _PyBytes_Resize(&self.g, max(2 * size, self.g_size + more)) != 0:
                self.g_size = self.g_at = 0
                return -1
        return 0

    cdef int keep(self, const char *data, Py_ssize_t size) except -1:
        if size:
            self.room(size)
            memcpy(PyBytes_AS_STRING(<object>self.g) + self.g_size, data, size)
            self.g_size += size
        return 0

    cdef int spoil(self, str why) except -1:
        """The peer does not keep to the protocol: for good, and it is told by the end of the connection."""
        self.broken = 1
        self.drop_gathered()
        if self._fd >= 0:
            shutdown(self._fd, SHUT_RDWR)
        raise errors.BrokenPipe(f"the other end of the pipe {self.name} broke the protocol: {why}")

    cdef int check_head(self, uint64_t head, size_t size) except -1:
        """Of a whole packet that was or is to be taken. `MessageAbandoned` is the caller's to raise: 1."""
        cdef uint64_t left = PW_LEFT(head)
        if PW_KIND(head) == 1 and size == 0 and self.expect:
            return 1
        if PW_KIND(head) or size > left or (size < left and size != PACKET) or (self.expect and left != self.expect):
            self.spoil(f"a packet of {size} bytes where {self.expect} of a message are due, kind {PW_KIND(head)}, {left} left")
        return 0

    cdef int abandoned(self) except -1:
        self.drop_gathered()
        raise errors.MessageAbandoned(f"the other end of the pipe {self.name} gave up in the middle of a message")

    cdef int again(self, int wrong, int64_t *at, double seconds, uint64_t cancels) except -1:
        """After a system call that gave no data: 1 try again (without blocking), 0 the time is over."""
        if wrong == ECONNRESET:  # it closed with unread input; what it had written comes yet
            return 1
        if wrong == EINTR:
            PyErr_CheckSignals()
            self.interrupted(cancels)
            return 1
        if wrong != EAGAIN:
            if self._closed or self.gone:
                self.refuse()
            raise OSError(wrong, os.strerror(wrong))
        if at[0] == 0:
            return 0
        if at[0] == -1:
            at[0] = at_of(seconds)
        return self.wait(POLLIN, at[0], cancels)

    cdef ssize_t packet(self, uint64_t *head, char *first, size_t first_size, char *second, size_t second_size,
                        int64_t *at, double seconds, uint64_t cancels) except -3:
        """The next packet's payload; its length, -1: the time is over, -2: the end. *at: 0 do not wait, -1 not known yet."""
        cdef ssize_t got
        cdef int wrong, end = 0, fd = self._fd
        cdef int flags = MSG_DONTWAIT if at[0] == 0 or (0 < seconds < 0.004) else 0
        while True:
            if flags:
                got = pw_recv_packet(fd, head, first, first_size, second, second_size, flags, &end)
                wrong = errno
            else:
                with nogil:
                    got = pw_recv_packet(fd, head, first, first_size, second, second_size, 0, &end)
                    wrong = errno
            if got >= 0 and not end:
                self.received_bytes += got
                return got
            if end:
                if self._closed or self.gone:
                    self.refuse()
                if not pw_pipe_gone(fd):
                    self.spoil("a packet of nothing")
                return -2
            if got == PW_OVERSIZE:
                self.spoil("a packet larger than 65,544 or smaller than 8 bytes")
            if not self.again(wrong, at, seconds, cancels):
                return -1
            flags = MSG_DONTWAIT

    cdef ssize_t peeked(self, uint64_t *head, char *data, size_t size, size_t offset, size_t *length, int64_t *at,
                        double seconds, uint64_t cancels) except -3:
        """As `packet`, for a packet that stays."""
        cdef ssize_t got
        cdef int wrong, end = 0, fd = self._fd
        cdef int flags = MSG_DONTWAIT if at[0] == 0 or (0 < seconds < 0.004) else 0
        while True:
            with nogil:
                got = pw_peek_packet(fd, head, data, size, offset, length, flags, &end)
                wrong = errno
            if got >= 0 and not end:
                return got
            if end:
                if self._closed or self.gone:
                    self.refuse()
                if not pw_pipe_gone(fd):
                    self.spoil("a packet of nothing")
                return -2
            if got == PW_OVERSIZE:
                self.spoil("a packet larger than 65,544 or smaller than 8 bytes")
            if not self.again(wrong, at, seconds, cancels):
                return -1
            flags = MSG_DONTWAIT

    cdef int ended(self) except -1:
        """The end of the stream: `BrokenPipe`, also in the middle of a message, whose part is no message; unless it came
        with a disconnect, which may have been noted after the last look."""
        if self._closed:
            self.refuse()
        self.look()
        what = "in the middle of a message" if self.expect or self.g_size > self.g_at else "and everything was read"
        self.drop_gathered()
        raise errors.BrokenPipe(f"the other end of the pipe {self.name} has gone, {what}")

    cdef object whole(self, int64_t *at, double seconds, uint64_t cancels):
        """The next message, or the rest of the current one. None: the time is over."""
        cdef PyObject *data = NULL
        cdef char scratch[65536]
        cdef Py_ssize_t guess = self.guess
        cdef uint64_t head = 0
        cdef ssize_t got
        if self.offset:
            self.take_offset()
        if self.g == NULL and not self.expect:
            fresh = PyBytes_FromStringAndSize(NULL, guess)
            Py_INCREF(fresh)
            data = <PyObject *>fresh
            fresh = None
            try:
                got = self.packet(&head, PyBytes_AS_STRING(<object>data), guess, scratch, PACKET - guess, at, seconds, cancels)
                if got == -1:
                    return None
                if got == -2:
                    self.ended()
                if self.check_head(head, got):
                    self.abandoned()
                self.guess = got if got else 64
                if <uint64_t>got == PW_LEFT(head) and got <= self.max_message:
                    self.received_messages += 1
                    if got < guess:
                        if _PyBytes_Resize(&data, got) != 0:
                            raise MemoryError
                    elif got > guess:
                        if _PyBytes_Resize(&data, got) != 0:
                            raise MemoryError
                        memcpy(PyBytes_AS_STRING(<object>data) + guess, scratch, got - guess)
                    return <object>data
                self.expect = PW_LEFT(head) - got
                self.keep(PyBytes_AS_STRING(<object>data), min(<Py_ssize_t>got, guess))
                if got > guess:
                    self.keep(scratch, got - guess)
            finally:
                if data != NULL:
                    Py_DECREF(<object>data)
        if <uint64_t>(self.g_size - self.g_at) + self.expect > <uint64_t>self.max_message:
            raise errors.MessageTooLarge(
                f"a message of {self.g_size - self.g_at + self.expect} bytes waits in the pipe {self.name}, max_message is "
                f"{self.max_message}", hint="receive(size) reads it in parts",
            )
        while self.expect:
            self.room(PACKET)
            got = self.packet(&head, PyBytes_AS_STRING(<object>self.g) + self.g_size, PACKET, NULL, 0, at, seconds, cancels)
            if got == -1:
                return None
            if got == -2:
                self.ended()
            if self.check_head(head, got):
                self.abandoned()
            self.g_size += got
            self.expect -= got
        return self.take_gathered()

    cdef object take_gathered(self):
        cdef PyObject *data = self.g
        cdef Py_ssize_t size = self.g_size, at = self.g_at
        self.received_messages += 1
        self.g = NULL
        self.g_size = self.g_at = 0
        if at:
            result = PyBytes_FromStringAndSize(PyBytes_AS_STRING(<object>data) + at, size - at)
            Py_DECREF(<object>data)
            return result
        if _PyBytes_Resize(&data, size) != 0:
            raise MemoryError
        result = <object>data
        Py_DECREF(result)
        return result

    cdef int take_offset(self) except -1:
        """The rest of a packet that was read in part is there: gathers it."""
        cdef char scratch[65536]
        cdef uint64_t head = 0
        cdef int end = 0
        cdef ssize_t got = pw_recv_packet(self._fd, &head, scratch, PACKET, NULL, 0, MSG_DONTWAIT, &end)
        cdef size_t offset = self.offset
        if got < 0 or end or <size_t>got < offset or self.check_head(head, got):
            self.spoil("a packet that was read in part has changed")
        self.offset = 0
        self.expect -= got
        self.received_bytes += got
        return self.keep(scratch + offset, got - offset)

    cdef ssize_t fill(self, char *out, size_t size, bint all, int64_t *at, double seconds, uint64_t cancels) except -3:
        """Up to `size` bytes of the current message into `out`: how many, -1: the time is over, -2: the end. With `all`
        it waits until it has them or the message ends, else for the first. What is left of the message is told by
        `left`; 0 there means that it is complete."""
        cdef size_t done = 0, take, length = 0
        cdef uint64_t head = 0
        cdef ssize_t got
        cdef int64_t now = 0
        cdef bint begun = self.g != NULL or self.expect != 0
        if self.g != NULL:
            take = min(<size_t>(self.g_size - self.g_at), size)
            memcpy(out, PyBytes_AS_STRING(<object>self.g) + self.g_at, take)
            self.g_at += take
            done = take
            if self.g_at == self.g_size:
                Py_DECREF(<object>self.g)
                self.g = NULL
                self.g_size = self.g_at = 0
        while not begun or (self.expect and done < size and self.g == NULL):
            if done and not all:
                at = &now
            if size - done >= PACKET and not self.offset:
                got = self.packet(&head, out + done, PACKET, NULL, 0, at, seconds, cancels)
                length = got
            else:
                got = self.peeked(&head, out + done, size - done, self.offset, &length, at, seconds, cancels)
            if got < 0:
                if done and not all:  # the end, too, is the next call's to tell
                    break
                if done and got == -1:  # nothing is lost
                    self.keep(out, done)
                return got
            if self.check_head(head, length):
                if size - done < PACKET or self.offset:
                    pw_drop_packet(self._fd)
                self.abandoned()
            if not begun:
                self.expect = PW_LEFT(head)
                begun = True
            if size - done >= PACKET and not self.offset:
                self.expect -= got
            elif self.offset + got == length:
                pw_drop_packet(self._fd)
                self.received_bytes += length
                self.offset = 0
                self.expect -= length
            else:
                self.offset += got
            done += got
            if not self.expect:
                break
        if self.g == NULL and not self.expect:
            self.received_messages += 1
        return done

    cdef uint64_t left(self) noexcept:
        """Of the current message, after `fill`."""
        return <uint64_t>(self.g_size - self.g_at) + self.expect - self.offset

    cdef ssize_t stream(self, char *out, size_t size, int64_t *at, double seconds, uint64_t cancels) except -3:
        """Byte read mode, of either type: what is there, at least one byte; -1 and -2 as in `fill`."""
        cdef ssize_t got
        cdef size_t done = 0
        cdef int64_t now = 0
        cdef int wrong, fd = self._fd
        cdef int flags = MSG_DONTWAIT if at[0] == 0 or (0 < seconds < 0.004) else 0
        if self.message:
            if self.owes_notice:
                self.owes_notice = False
                self.abandoned()
            if not size:
                return 0
            while done < size:
                try:
                    got = self.fill(out + done, size - done, False, at if not done else &now, seconds, cancels)
                except errors.MessageAbandoned:
                    if not done:
                        raise
                    self.owes_notice = True
                    break
                if got < 0:
                    if done:
                        break
                    return got
                done += got
            return done
        while True:
            if flags:
                got = c_recv(fd, out, size, flags)
                wrong = errno
            else:
                with nogil:
                    got = c_recv(fd, out, size, 0)
                    wrong = errno
            if got > 0 or (got == 0 and not size):
                self.received_bytes += got
                return got
            if got == 0:
                if self._closed or self.gone:
                    self.refuse()
                return -2
            if not self.again(wrong, at, seconds, cancels):
                return -1
            flags = MSG_DONTWAIT

    cdef object some(self, object size, int64_t *at, double seconds, uint64_t cancels):
        """`receive` with the lock held. None: the time is over."""
        cdef Py_ssize_t wanted
        cdef ssize_t got
        cdef PyObject *data
        cdef uint64_t left
        if self.broken:
            self.spoil("earlier")
        if self.by_message and size is None:
            if self.owes_notice:
                self.owes_notice = False
                self.abandoned()
            return self.whole(at, seconds, cancels)
        wanted = PACKET if size is None else size
        if wanted < 0:
            raise errors.InvalidParameter(f"size={size}: give bytes >= 0")
        # of a message no more than it may have is allocated: what is waiting, and one packet
        fresh = PyBytes_FromStringAndSize(NULL, min(wanted, self.most()))
        wanted = PyBytes_GET_SIZE(fresh)
        Py_INCREF(fresh)
        data = <PyObject *>fresh
        fresh = None
        try:
            if self.by_message:
                got = self.fill(PyBytes_AS_STRING(<object>data), wanted, True, at, seconds, cancels)
            else:
                got = self.stream(PyBytes_AS_STRING(<object>data), wanted, at, seconds, cancels)
            if got == -1:
                return None
            if got == -2:
                self.ended()
            if got < wanted and _PyBytes_Resize(&data, got) != 0:
                raise MemoryError
            left = self.left() if self.by_message else 0
            if left and got < <Py_ssize_t>(PACKET if size is None else size):  # the buffer was smaller than what was asked for
                rest = self.some_more(<object>data, size, at, seconds, cancels)
                return rest
            if left:
                raise errors.MoreData(f"{left} bytes of the message are left in the pipe {self.name}", data=<object>data, left=left)
            return <object>data
        finally:
            if data != NULL:
                Py_DECREF(<object>data)

    cdef Py_ssize_t most(self) noexcept:
        """What may be asked for in one go without trusting the caller's size with memory."""
        return (self.g_size - self.g_at) + 16 * PACKET

    cdef object some_more(self, bytes part, object size, int64_t *at, double seconds, uint64_t cancels):
        """A large size: piece by piece."""
        pieces, have = [part], len(part)
        while have < size:
            try:
                piece = self.some(size - have, at, seconds, cancels)
            except errors.MoreData as more:
                pieces.append(more.data)
                raise errors.MoreData(more.message, data=b"".join(pieces), left=more.left) from None
            except errors.MessageAbandoned:
                raise
            except BaseException:
                self.put_back(b"".join(pieces))
                raise
            if piece is None:
                self.put_back(b"".join(pieces))
                return None
            pieces.append(piece)
            have += len(piece)
            if not self.left():
                break
        return b"".join(pieces)

    cdef int put_back(self, bytes data) except -1:
        """In front of what is gathered: a call that gives up loses nothing."""
        rest = PyBytes_AS_STRING(<object>self.g)[self.g_at:self.g_size] if self.g != NULL else b""
        whole = data + rest
        if self.g != NULL:
            Py_DECREF(<object>self.g)
            self.g = NULL
        self.g_size = self.g_at = 0
        return self.keep(PyBytes_AS_STRING(whole), len(whole))

    cdef object waited(self, object size, double seconds):
        cdef int64_t at = 0 if seconds == 0 else -1
        cdef uint64_t cancels = self.cancels
        if not PyThread_acquire_lock(self.rlock, 0) and not self.lock(self.rlock, at_of(seconds), cancels):
            raise self.late(seconds, "receiving from")
        try:
            data = self.some(size, &at, seconds, cancels)
            if self.map != NULL:
                self.look()
        finally:
            PyThread_release_lock(self.rlock)
        if data is None:
            raise self.late(seconds, "receiving from")
        return data

    def receive(self, size=None, timeout=_UNSET):
        cdef double seconds = self.limit(timeout)
        self.enter(1)
        try:
            return self.waited(size, seconds)
        finally:
            self.leave()

    def receive_nowait(self, size=None):
        """For event loops: None when it would have to wait."""
        cdef int64_t at = 0
        self.enter(1)
        try:
            if not PyThread_acquire_lock(self.rlock, 0):
                return None
            try:
                return self.some(size, &at, 0, self.cancels)
            finally:
                PyThread_release_lock(self.rlock)
        finally:
            self.leave()

    def receive_into(self, buffer, timeout=_UNSET):
        cdef double seconds = self.limit(timeout)
        cdef int64_t at = 0 if seconds == 0 else -1
        cdef uint64_t cancels = self.cancels, left
        cdef Py_buffer view
        cdef ssize_t got
        self.enter(1)
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
            try:
                if not PyThread_acquire_lock(self.rlock, 0) and not self.lock(self.rlock, at_of(seconds), cancels):
                    raise self.late(seconds, "receiving from")
                try:
                    if self.broken:
                        self.spoil("earlier")
                    if self.by_message:
                        if self.owes_notice:
                            self.owes_notice = False
                            self.abandoned()
                        got = self.fill(<char *>view.buf, view.len, True, &at, seconds, cancels)
                    else:
                        got = self.stream(<char *>view.buf, view.len, &at, seconds, cancels)
                    if got == -2:
                        self.ended()
                    if self.map != NULL:
                        self.look()
                    left = self.left() if self.by_message and got >= 0 else 0
                finally:
                    PyThread_release_lock(self.rlock)
            finally:
                PyBuffer_Release(&view)
            if got == -1:
                raise self.late(seconds, "receiving from")
            if left:
                raise errors.MoreData(f"{left} bytes of the message are left in the pipe {self.name}", count=got, left=left)
            return got
        finally:
            self.leave()

    def peek(self, Py_ssize_t size=0):
        if size < 0:
            raise errors.InvalidParameter(f"size={size}: give bytes >= 0")
        self.enter(1)
        try:
            if not PyThread_acquire_lock(self.rlock, 0):  # somebody waits for data: there is none
                return b"", 0, 0
            try:
                if self.broken:
                    self.spoil("earlier")
                return self.peek_packets(size) if self.message else self.peek_bytes(size)
            finally:
                PyThread_release_lock(self.rlock)
        finally:
            self.leave()

    cdef object peek_bytes(self, Py_ssize_t size):
        cdef int total = 0
        cdef ssize_t got
        cdef char one
        ioctl(self._fd, FIONREAD, &total)
        if not total:
            got = c_recv(self._fd, &one, 1, MSG_PEEK | MSG_DONTWAIT)
            if got == 0 or (got < 0 and errno != EAGAIN):
                self.ended()
            return b"", 0, 0
        data = PyBytes_FromStringAndSize(NULL, min(size, <Py_ssize_t>total))
        got = c_recv(self._fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_PEEK | MSG_DONTWAIT) if size else 0
        data = data[:max(got, 0)]
        return data, total, -len(data)

    cdef object peek_packets(self, Py_ssize_t size):
        """Walks the queue; how much of it belongs to the current message is told by the counts."""
        cdef uint64_t head = 0, due = self.expect, total
        cdef Py_ssize_t have = self.g_size - self.g_at
        cdef int position = 0, peeked = 1
        cdef size_t length, skip = self.offset
        cdef ssize_t got
        cdef bint begun = self.g != NULL or self.expect != 0
        parts = [PyBytes_AS_STRING(<object>self.g)[self.g_at:self.g_at + min(have, size)]] if have else []
        cdef Py_ssize_t copied = min(have, size), take
        cdef uint64_t message = have + self.expect - self.offset
        cdef char buffer[8]
        cdef bint current = True, any_packet = False
        total = have
        while True:
            setsockopt(self._fd, SOL_SOCKET, SO_PEEK_OFF, &position, sizeof(position))
            got = c_recv(self._fd, &head, 8, MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC)
            if got < 0 and errno == ECONNRESET and not any_packet:
                continue
            if got <= 0:
                if got == 0 and not any_packet and not begun:
                    self.ended()
                break
            if got < 8 or got > 8 + PACKET:
                self.spoil("a packet larger than 65,544 or smaller than 8 bytes")
            any_packet = True
            length = got - 8
            if current and not begun:
                message = 0 if PW_KIND(head) else PW_LEFT(head)
                due = message
                begun = True
            elif current and due == 0:
                current = False
            total += length - skip
            if current:
                take = min(<Py_ssize_t>(length - skip), size - copied)
                if take > 0:
                    parts.append(self.peek_part(position + 8 + <int>skip, take))
                    copied += take
                due = due - length if due >= length else 0
            skip = 0
            position += <int>got
        return b"".join(parts), total, message - copied

    cdef object peek_part(self, int position, Py_ssize_t size):
        cdef ssize_t got
        data = PyBytes_FromStringAndSize(NULL, size)
        setsockopt(self._fd, SOL_SOCKET, SO_PEEK_OFF, &position, sizeof(position))
        got = c_recv(self._fd, PyBytes_AS_STRING(data), size, MSG_PEEK | MSG_DONTWAIT)
        return data[:max(got, 0)]
