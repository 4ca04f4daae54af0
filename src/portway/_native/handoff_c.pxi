# What `handoff.pyx` uses of the C library.

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
    int SOL_SOCKET, SO_TYPE, SO_PROTOCOL, SO_ACCEPTCONN, SCM_RIGHTS
    int MSG_CTRUNC, MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, MSG_DONTWAIT, MSG_PEEK
    int AF_INET, AF_INET6, AF_UNIX

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *, size_t)

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long, ...)
    int c_close "close"(int)

cdef extern from "<sys/prctl.h>" nogil:
    int c_prctl "prctl"(int, unsigned long, unsigned long, unsigned long, unsigned long)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd *, unsigned long, int)
    int POLLIN
