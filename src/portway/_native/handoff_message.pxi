# Part of `handoff.pyx`: messages with descriptors.

cdef ssize_t _send(int sock, const char *data, size_t size, const int *fds, Py_ssize_t count) noexcept:
    """One sendmsg() that does not wait; -1 with errno set."""
    cdef msghdr message
    cdef iovec part
    cdef char control[CONTROL]
    cdef cmsghdr *head
    cdef ssize_t sent
    memset(&message, 0, sizeof(message))
    part.iov_base, part.iov_len = <void *>data, size
    message.msg_iov, message.msg_iovlen = &part, 1
    if count:
        memset(control, 0, CMSG_SPACE(count * sizeof(int)))
        message.msg_control, message.msg_controllen = control, CMSG_SPACE(count * sizeof(int))
        head = CMSG_FIRSTHDR(&message)
        head.cmsg_level, head.cmsg_type, head.cmsg_len = SOL_SOCKET, SCM_RIGHTS, CMSG_LEN(count * sizeof(int))
        memcpy(CMSG_DATA(head), fds, count * sizeof(int))
    while True:
        with nogil:
            sent = c_sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0 or errno != EINTR:
            return sent


def send_message(int sock, data, list fds):
    """One sendmsg() with SCM_RIGHTS, without waiting; returns the bytes sent. At most 253 descriptors. OSError as the
    kernel says."""
    cdef const unsigned char[::1] view = data
    cdef int out[MAX_FDS]
    cdef Py_ssize_t count = len(fds), i
    if count > MAX_FDS:
        raise ValueError(f"{count} descriptors in one message: the kernel takes {MAX_FDS}")
    for i in range(count):
        out[i] = fds[i]
    cdef ssize_t sent = _send(sock, <const char *>&view[0] if view.shape[0] else NULL, view.shape[0], out, count)
    if sent < 0:
        PyErr_SetFromErrno(OSError)
    return sent


cdef list _descriptors(msghdr *message):
    cdef list fds = []
    cdef cmsghdr *head = CMSG_FIRSTHDR(message)
    cdef Py_ssize_t count, i
    cdef int *got
    while head != NULL:
        if head.cmsg_level == SOL_SOCKET and head.cmsg_type == SCM_RIGHTS:
            count = (head.cmsg_len - CMSG_LEN(0)) // sizeof(int)
            got = <int *>CMSG_DATA(head)
            for i in range(count):
                fds.append(got[i])
        head = CMSG_NXTHDR(message, head)
    return fds


cdef ssize_t _receive(int sock, char *buffer, size_t size, char *control, msghdr *message, int flags) except -1:
    cdef iovec part
    cdef ssize_t got
    part.iov_base, part.iov_len = buffer, size
    while True:
        memset(message, 0, sizeof(msghdr))
        message.msg_iov, message.msg_iovlen = &part, 1
        message.msg_control, message.msg_controllen = control, CONTROL if control != NULL else 0
        with nogil:
            got = c_recvmsg(sock, message, flags | MSG_CMSG_CLOEXEC)
        if got >= 0:
            return got
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        PyErr_CheckSignals()


def receive_message(int sock, Py_ssize_t max_bytes, int flags=0):
    """One recvmsg() of at most 65,536 bytes: (bytes, descriptors, flags). The descriptors are close-on-exec and the
    caller's to close. flags has MSG_TRUNC or MSG_CTRUNC when something did not fit."""
    cdef char buffer[65536]
    cdef char control[CONTROL]
    cdef msghdr message
    if not 0 <= max_bytes <= 65536:
        raise ValueError("max_bytes: 0 to 65536")
    cdef ssize_t size = _receive(sock, buffer, max_bytes, control, &message, flags)
    return PyBytes_FromStringAndSize(buffer, min(size, max_bytes)), _descriptors(&message), message.msg_flags


cdef ssize_t _drop(int sock) except -1:
    """Takes the first message off the queue, with its own descriptors. 0 when it was empty, or when there is none and
    the other end is closed."""
    cdef char byte[1]
    cdef msghdr message
    try:
        return _receive(sock, byte, 1, NULL, &message, MSG_DONTWAIT)
    except ConnectionResetError:  # the sender ended between our two looks; that is said once
        return _receive(sock, byte, 1, NULL, &message, MSG_DONTWAIT)


def take_message(int sock):
    """`receive_message` of a whole seqpacket message without waiting; None when there is none. If there is no room for
    its descriptors (MSG_CTRUNC in flags) it stays in the queue, and those that came are the caller's to close."""
    cdef char buffer[65536]
    cdef char control[CONTROL]
    cdef msghdr message
    cdef iovec part
    cdef ssize_t size
    while True:
        memset(&message, 0, sizeof(message))
        part.iov_base, part.iov_len = buffer, sizeof(buffer)
        message.msg_iov, message.msg_iovlen = &part, 1
        message.msg_control, message.msg_controllen = control, CONTROL
        with nogil:
            size = c_recvmsg(sock, &message, MSG_DONTWAIT | MSG_PEEK | MSG_CMSG_CLOEXEC)
        if size >= 0:
            break
        if errno == EAGAIN:
            return None  # not an exception: it is what happens most
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
    cdef list fds = _descriptors(&message)
    cdef bint ours = message.msg_flags & MSG_CTRUNC
    if not ours:
        try:
            ours = _drop(sock) > 0 or size == 0
        except OSError as error:
            if error.errno != EAGAIN:
                raise
        finally:
            if not ours:
                for fd in fds:
                    c_close(fd)
    if not ours:
        return None  # somebody else has taken it between our two looks
    return PyBytes_FromStringAndSize(buffer, size), fds, message.msg_flags
