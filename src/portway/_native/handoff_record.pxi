# Part of `handoff.pyx`: what a socket is, and plain records of sockets.

cdef struct Facts:
    int family
    int kind
    int protocol
    int listening
    int connected
    int local_size
    int peer_size
    char local[112]
    char peer[112]


cdef int _address(int family, const char *raw, socklen_t size, char *out) noexcept:
    # sockaddr_in: family 2, port 2, address 4. sockaddr_in6: family 2, port 2, flow 4, address 16, scope 4.
    cdef int length
    if family == AF_INET and size >= 8:
        memcpy(out, raw + 4, 4)
        memcpy(out + 4, raw + 2, 2)
        return 6
    if family == AF_INET6 and size >= 28:
        memcpy(out, raw + 8, 16)
        memcpy(out + 16, raw + 2, 2)
        memcpy(out + 18, raw + 4, 4)
        memcpy(out + 22, raw + 24, 4)
        return 26
    if family == AF_UNIX and size > 2:
        length = size - 2
        if raw[2] != 0:  # a path; the kernel may count its final zero
            length = strnlen(raw + 2, length)
        memcpy(out, raw + 2, length)
        return length
    return 0


cdef int _facts(int fd, Facts *out) except -1:
    """Four system calls for a connected socket, five for any other."""
    cdef char raw[128]
    cdef socklen_t length = 110, size = sizeof(int)
    memset(out, 0, 7 * sizeof(int))
    memset(raw, 0, 32)
    if getsockname(fd, <sockaddr *>raw, &length) < 0:
        PyErr_SetFromErrno(OSError)
    out.family = (<sockaddr *>raw).sa_family
    out.local_size = _address(out.family, raw, length if length < 110 else 110, out.local)
    if getsockopt(fd, SOL_SOCKET, SO_TYPE, &out.kind, &size) < 0:
        PyErr_SetFromErrno(OSError)
    if getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &out.protocol, &size) < 0:
        PyErr_SetFromErrno(OSError)
    length = 110
    memset(raw, 0, 32)
    if getpeername(fd, <sockaddr *>raw, &length) == 0:
        out.connected = 1
        out.peer_size = _address(out.family, raw, length if length < 110 else 110, out.peer)
    elif getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &out.listening, &size) < 0:
        out.listening = 0
    return 0


def facts(int fd):
    """(family, type, protocol, listening, connected, local, peer) as the kernel tells them; addresses are encoded
    as `portway.wire.handoff` says. OSError(ENOTSOCK, EBADF) for anything that is no socket."""
    cdef Facts f
    _facts(fd, &f)
    return (f.family, f.kind, f.protocol, f.listening != 0, f.connected != 0,
            PyBytes_FromStringAndSize(f.local, f.local_size), PyBytes_FromStringAndSize(f.peer, f.peer_size))


# -- the hot path: many plain sockets to records, records to sockets. portway.wire.handoff is the specification --------

cdef struct Head:
    uint8_t magic[4]
    uint16_t flags, family, kind, protocol
    uint32_t target_pid
    uint64_t target_start
    uint32_t source_pid
    uint64_t source_start
    uint32_t source_uid
    int32_t source_fd
    int64_t expires_ns
    double timeout
    uint8_t nonce[16]
    uint16_t descriptors, local_size, peer_size, provider_size
    uint32_t reserved_size, unread_size, state_size


cdef inline void _put(char **at, const void *value, size_t size) noexcept:
    memcpy(at[0], value, size)
    at[0] += size


cdef bytes _record(Head *h, Facts *f):
    # Field by field: the record is packed and little-endian, as the machines this module is compiled for are.
    cdef bytes record = PyBytes_FromStringAndSize(NULL, 96 + f.local_size + f.peer_size + 6)
    cdef char *at = PyBytes_AS_STRING(record)
    _put(&at, h.magic, 4)
    _put(&at, &h.flags, 2)
    _put(&at, &h.family, 2)
    _put(&at, &h.kind, 2)
    _put(&at, &h.protocol, 2)
    _put(&at, &h.target_pid, 4)
    _put(&at, &h.target_start, 8)
    _put(&at, &h.source_pid, 4)
    _put(&at, &h.source_start, 8)
    _put(&at, &h.source_uid, 4)
    _put(&at, &h.source_fd, 4)
    _put(&at, &h.expires_ns, 8)
    _put(&at, &h.timeout, 8)
    _put(&at, h.nonce, 16)
    _put(&at, &h.descriptors, 2)
    _put(&at, &h.local_size, 2)
    _put(&at, &h.peer_size, 2)
    _put(&at, &h.provider_size, 2)
    _put(&at, &h.reserved_size, 4)
    _put(&at, &h.unread_size, 4)
    _put(&at, &h.state_size, 4)
    _put(&at, f.local, f.local_size)
    _put(&at, f.peer, f.peer_size)
    _put(&at, b"kernel", 6)
    return record


cdef int _describe(sock, tuple types, Head *h, Facts *f, int flags) except -2:
    """Fills both in for one plain socket; its descriptor, or -1 when it is none of `types` or nothing we know."""
    cdef int fd
    if type(sock) not in types:
        return -1
    fd = sock.fileno()
    timeout = sock.gettimeout()
    try:
        _facts(fd, f)
    except OSError:
        return -1
    if f.family != AF_INET and f.family != AF_INET6 and f.family != AF_UNIX:
        return -1
    h.family, h.kind, h.protocol = f.family, f.kind, f.protocol
    h.flags = flags | (1 if f.listening else 0) | (2 if f.connected else 0)
    h.timeout = 0.0
    if timeout is not None:
        h.timeout = timeout
        h.flags |= 8 if h.timeout != 0.0 else 4
    h.local_size, h.peer_size = f.local_size, f.peer_size
    return fd


cdef void _begin(Head *h, uint32_t pid, uint64_t start, uint32_t me, uint64_t my_start, uint32_t uid,
                 int64_t expires_ns) noexcept:
    memset(h, 0, sizeof(Head))
    memcpy(h.magic, b"PWS\x01", 4)
    h.target_pid, h.target_start, h.source_pid, h.source_start = pid, start, me, my_start
    h.source_uid, h.source_fd, h.expires_ns, h.provider_size = uid, -1, expires_ns, 6


def send_plain(int line, int pidfd, sock, tuple types, uint32_t pid, uint64_t start, uint32_t me, uint64_t my_start,
               uint32_t uid, int64_t expires_ns, int flags, bytes nonce):
    """One plain socket to the target, checks and all, in one message. False when it is not plain, the target has ended
    or the message does not go out right now: nothing was sent, and the long way knows the reason."""
    cdef Head h
    cdef Facts f
    cdef char buffer[512]
    cdef uint32_t size
    cdef uint16_t one = 1
    if readable(pidfd) or len(nonce) != 16:
        return False
    _begin(&h, pid, start, me, my_start, uid, expires_ns)
    cdef int fd = _describe(sock, types, &h, &f, flags)
    if fd < 0:
        return False
    memcpy(h.nonce, PyBytes_AS_STRING(nonce), 16)
    cdef bytes record = _record(&h, &f)
    size = <uint32_t>len(record)
    buffer[0] = 1  # the message: kind, count, then length and record
    memcpy(buffer + 1, &one, 2)
    memcpy(buffer + 3, &size, 4)
    memcpy(buffer + 7, PyBytes_AS_STRING(record), size)
    return _send(line, buffer, 7 + size, &fd, 1) >= 0


def records(list socks, tuple types, fds_out, uint32_t pid, uint64_t start, uint32_t me, uint64_t my_start, uint32_t uid,
            int64_t expires_ns, int flags, const unsigned char[::1] nonces):
    """The records of plain sockets of exactly these `types`, without luggage; their descriptors are appended to
    `fds_out`. None when one of them is no plain case: the caller then takes the long way, which knows the reason."""
    cdef Head h
    cdef Facts f
    cdef list out = []
    cdef list fds = fds_out
    cdef Py_ssize_t i = 0
    cdef int fd
    if nonces.shape[0] < 16 * len(socks):
        raise ValueError("16 bytes of nonces for each socket")
    _begin(&h, pid, start, me, my_start, uid, expires_ns)
    for sock in socks:
        fd = _describe(sock, types, &h, &f, flags)
        if fd < 0:
            return None
        memcpy(h.nonce, &nonces[16 * i], 16)
        out.append(_record(&h, &f))
        fds.append(fd)
        i += 1
    return out


cdef inline uint16_t _u16(const unsigned char *at) noexcept:
    return at[0] | (at[1] << 8)


cdef inline uint32_t _u32(const unsigned char *at) noexcept:
    cdef uint32_t v
    memcpy(&v, at, 4)
    return v


cdef inline uint64_t _u64(const unsigned char *at) noexcept:
    cdef uint64_t v
    memcpy(&v, at, 8)
    return v


cdef bint _plain(const unsigned char *r, Py_ssize_t size) noexcept:
    """A record of version 1 whose lengths add up, of the kernel provider, without luggage or a strange timeout."""
    cdef double timeout
    if size < 96 or memcmp(r, b"PWS\x01", 4) != 0:
        return False
    if _u16(r + 82) != 6 or _u16(r + 76) != 0 or _u32(r + 84) != 0 or _u32(r + 88) != 0 or _u32(r + 92) != 0:
        return False
    if _u16(r + 4) & 8:
        memcpy(&timeout, r + 52, 8)
        if not 0 < timeout < INFINITY:
            return False
    cdef Py_ssize_t ends = 96 + _u16(r + 78) + _u16(r + 80)
    return size == ends + 6 and memcmp(r + ends, b"kernel", 6) == 0


def split(const unsigned char[::1] message, list fds, uint32_t pid, uint64_t start, uint32_t source_pid):
    """[(expires_ns, record, [descriptor])] of a message of records that are all plain and all from and for the right
    processes; None when they are not, and then the caller decodes the long way."""
    cdef list out = []
    cdef Py_ssize_t size = message.shape[0], at = 3, length
    if size < 3 or message[0] != 1 or _u16(&message[1]) != len(fds):
        return None
    cdef const unsigned char *r
    for fd in fds:
        if size - at < 4:
            return None
        length = _u32(&message[at])
        at += 4
        if size - at < length or length < 96:
            return None
        r = &message[at]
        if not _plain(r, length):
            return None
        if _u32(r + 12) != pid or _u64(r + 16) != start or _u32(r + 24) != source_pid:
            return None
        out.append((<int64_t>_u64(r + 44), PyBytes_FromStringAndSize(<char *>r, length), [fd]))
        at += length
    return out if at == size else None


def shared(cls, initialise, bytes record, fd):
    """A `SharedSocket` (`cls`) over `fd` for a plain blocking record, made without its Python-level constructor, whose
    base `initialise` is called directly; None for anything else, and `fd` is still the caller's."""
    cdef const unsigned char *r = <const unsigned char *>PyBytes_AS_STRING(record)
    if not _plain(r, len(record)) or _u16(r + 4) & 12:
        return None
    self = cls.__new__(cls)
    initialise(self, _u16(r + 6), _u16(r + 8), _u16(r + 10), fd)
    self._io_refs = 0
    self._closed = False
    self._mode = None
    self._record = record
    return self


def shared_many(cls, initialise, waiting, int64_t now):
    """`shared` for what stands at the left end of the deque `waiting`, (expires_ns, record, [descriptor]), as long as
    it is plain and not expired at `now`; what was made leaves the deque, and is returned."""
    cdef list out = []
    cdef list fds
    while waiting:
        expires, record, fds = waiting[0]
        if <int64_t>expires <= now or len(fds) != 1:
            break
        try:
            one = shared(cls, initialise, record, fds[0])
        except OSError:
            break  # no socket: the long way says so
        if one is None:
            break
        waiting.popleft()
        out.append(one)
    return out
