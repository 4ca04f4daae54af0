# cython: boundscheck=False, wraparound=False, freethreading_compatible=True
"""System calls that Python lacks or makes slow: descriptors in messages, what a socket is, pidfd_getfd.

`portway._handoff_python` is the same in Python and is the specification; tests run on both.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EINTR, errno
from libc.string cimport memset

cdef extern from "<sys/types.h>":
    ctypedef long ssize_t
    ctypedef unsigned int socklen_t

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    struct sockaddr:
        unsigned short sa_family
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)
    ssize_t c_sendmsg "sendmsg"(int, msghdr *, int)
    ssize_t c_recvmsg "recvmsg"(int, msghdr *, int)
    int getsockopt(int, int, int, void *, socklen_t *)
    int getsockname(int, sockaddr *, socklen_t *)
    int getpeername(int, sockaddr *, socklen_t *)
    int SOL_SOCKET, SO_TYPE, SO_DOMAIN, SO_PROTOCOL, SO_ACCEPTCONN, SCM_RIGHTS
    int MSG_CTRUNC, MSG_TRUNC, MSG_CMSG_CLOEXEC, MSG_NOSIGNAL
    int AF_INET, AF_INET6, AF_UNIX

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int)
    long c_syscall "syscall"(long, ...)

cdef extern from "<sys/prctl.h>" nogil:
    int c_prctl "prctl"(int, unsigned long, unsigned long, unsigned long, unsigned long)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd *, unsigned long, int)
    int POLLIN

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


cdef bytes _address(int family, char *raw, socklen_t size):
    # sockaddr_in: family 2, port 2, address 4. sockaddr_in6: family 2, port 2, flow 4, address 16, scope 4.
    if family == AF_INET and size >= 8:
        return PyBytes_FromStringAndSize(raw + 4, 4) + PyBytes_FromStringAndSize(raw + 2, 2)
    if family == AF_INET6 and size >= 28:
        return (PyBytes_FromStringAndSize(raw + 8, 16) + PyBytes_FromStringAndSize(raw + 2, 2)
                + PyBytes_FromStringAndSize(raw + 4, 4) + PyBytes_FromStringAndSize(raw + 24, 4))
    if family == AF_UNIX and size > 2:
        if raw[2] == 0:
            return PyBytes_FromStringAndSize(raw + 2, size - 2)
        raw[size if size < 110 else 110] = 0
        return <bytes>(raw + 2)
    return b""


def facts(int fd):
    """(family, type, protocol, listening, connected, local, peer) as the kernel tells them; addresses are encoded
    as `portway.wire.handoff` says. OSError(ENOTSOCK, EBADF) for anything that is no socket."""
    cdef int family = 0, kind = 0, protocol = 0, listening = 0
    cdef socklen_t size = sizeof(int)
    cdef char raw[128]
    cdef socklen_t length
    if getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) < 0:
        PyErr_SetFromErrno(OSError)
    size = sizeof(int)
    if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) < 0:
        PyErr_SetFromErrno(OSError)
    size = sizeof(int)
    if getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) < 0:
        PyErr_SetFromErrno(OSError)
    size = sizeof(int)
    if getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0:
        listening = 0
    memset(raw, 0, sizeof(raw))
    length = 112
    cdef bytes local = b"", peer = b""
    if getsockname(fd, <sockaddr *>raw, &length) == 0:
        local = _address(family, raw, length)
    cdef bint connected = False
    if not listening:
        memset(raw, 0, sizeof(raw))
        length = 112
        if getpeername(fd, <sockaddr *>raw, &length) == 0:
            connected = True
            peer = _address(family, raw, length)
    return family, kind, protocol, listening != 0, connected, local, peer


def send_message(int sock, data, list fds, int flags=0):
    """One sendmsg() with SCM_RIGHTS; returns the bytes sent. At most 253 descriptors. OSError as the kernel says."""
    cdef const unsigned char[::1] view = data
    cdef msghdr message
    cdef iovec part
    cdef char control[CONTROL]
    cdef cmsghdr *head
    cdef int *out
    cdef Py_ssize_t count = len(fds), i
    cdef ssize_t sent
    if count > MAX_FDS:
        raise ValueError(f"{count} descriptors in one message: the kernel takes {MAX_FDS}")
    memset(&message, 0, sizeof(message))
    part.iov_base = <void *>&view[0] if view.shape[0] else NULL
    part.iov_len = view.shape[0]
    message.msg_iov = &part
    message.msg_iovlen = 1
    if count:
        memset(control, 0, CMSG_SPACE(count * sizeof(int)))
        message.msg_control = control
        message.msg_controllen = CMSG_SPACE(count * sizeof(int))
        head = CMSG_FIRSTHDR(&message)
        head.cmsg_level = SOL_SOCKET
        head.cmsg_type = SCM_RIGHTS
        head.cmsg_len = CMSG_LEN(count * sizeof(int))
        out = <int *>CMSG_DATA(head)
        for i in range(count):
            out[i] = fds[i]
    while True:
        with nogil:
            sent = c_sendmsg(sock, &message, flags | MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        PyErr_CheckSignals()


def receive_message(int sock, Py_ssize_t max_bytes, int flags=0):
    """One recvmsg(): (bytes, descriptors, flags). The descriptors are close-on-exec and the caller's to close.
    flags has MSG_TRUNC or MSG_CTRUNC when something did not fit."""
    cdef bytes data = PyBytes_FromStringAndSize(NULL, max_bytes)
    cdef msghdr message
    cdef iovec part
    cdef char control[CONTROL]
    cdef cmsghdr *head
    cdef int *got
    cdef Py_ssize_t count, i
    cdef ssize_t size
    memset(&message, 0, sizeof(message))
    part.iov_base = PyBytes_AS_STRING(data)
    part.iov_len = max_bytes
    while True:
        message.msg_iov = &part
        message.msg_iovlen = 1
        message.msg_control = control
        message.msg_controllen = CONTROL
        message.msg_flags = 0
        with nogil:
            size = c_recvmsg(sock, &message, flags | MSG_CMSG_CLOEXEC)
        if size >= 0:
            break
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        PyErr_CheckSignals()
    cdef list fds = []
    head = CMSG_FIRSTHDR(&message)
    while head != NULL:
        if head.cmsg_level == SOL_SOCKET and head.cmsg_type == SCM_RIGHTS:
            count = (head.cmsg_len - CMSG_LEN(0)) // sizeof(int)
            got = <int *>CMSG_DATA(head)
            for i in range(count):
                fds.append(got[i])
        head = CMSG_NXTHDR(&message, head)
    if size > max_bytes:
        size = max_bytes  # MSG_TRUNC asked for in flags gives the real size
    return data[:size], fds, message.msg_flags
