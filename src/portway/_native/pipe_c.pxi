# What the channel takes from C.

cdef extern from "pythread.h" nogil:
    ctypedef void *PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock)
    int PyThread_acquire_lock(PyThread_type_lock, int)
    int PyThread_acquire_lock_timed(PyThread_type_lock, long long, int)
    void PyThread_release_lock(PyThread_type_lock)

cdef extern from "pipe_io.h" nogil:
    ctypedef long ssize_t
    ctypedef struct pw_watch:
        uint32_t *at
        uint32_t generation
        int found
    int64_t pw_pipe_now()
    ssize_t pw_send_packet(int, uint64_t, const char *, size_t, int)
    ssize_t pw_recv_packet(int, uint64_t *, char *, size_t, char *, size_t, int, int *)
    ssize_t pw_peek_packet(int, uint64_t *, char *, size_t, size_t, size_t *, int, int *)
    void pw_drop_packet(int)
    int pw_pipe_ready(int)
    void pw_pipe_plain(int)
    int pw_pipe_poll(int, short, int, int64_t)
    int pw_is_main_thread()
    int pw_pipe_gone(int)
    int pw_send_abandoned(int)
    void pw_watch_look(void *)
    unsigned PW_KIND(uint64_t)
    uint64_t PW_LEFT(uint64_t)
    int PW_OVERSIZE
    int MSG_DONTWAIT, MSG_PEEK, MSG_NOSIGNAL, MSG_TRUNC, SHUT_RDWR, SOL_SOCKET, SO_PEEK_OFF, SO_ERROR
    int POLLIN, POLLOUT, EFD_CLOEXEC, EFD_NONBLOCK, PROT_READ, MAP_SHARED, FIONREAD, SIOCOUTQ
    void *MAP_FAILED
    int setsockopt(int, int, int, const void *, unsigned)
    int getsockopt(int, int, int, void *, unsigned *)
    int shutdown(int, int)
    ssize_t c_recv "recv"(int, void *, size_t, int)
    ssize_t c_send "send"(int, const void *, size_t, int)
    ssize_t c_write "write"(int, const void *, size_t)
    int c_close "close"(int)
    int getpid()
    int eventfd(unsigned, int)
    int ioctl(int, unsigned long, ...)
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
