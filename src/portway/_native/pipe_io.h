/* System calls of a pipe's channel. Nothing here knows Python; every function may run without the GIL. */
#ifndef PORTWAY_PIPE_IO_H
#define PORTWAY_PIPE_IO_H
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define PW_PACKET 65536
#define PW_KIND(head) ((unsigned)((head) >> 56))
#define PW_LEFT(head) ((head) & ((UINT64_C(1) << 56) - 1))
#define PW_ABANDONED (UINT64_C(1) << 56)
#define PW_OVERSIZE (-2)

static int64_t pw_pipe_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Short waits in the kernel, no O_NONBLOCK (somebody may have shared the socket with it), and room for whole packets. */
static int pw_pipe_ready(int fd) {
    struct timeval t = {0, 2000};
    int flags = fcntl(fd, F_GETFL), room = 0;
    socklen_t size = sizeof room;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t)) return -1;
    if (flags & O_NONBLOCK) fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, &size) == 0 && room < 2 * PW_PACKET) {
        room = PW_PACKET;
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    }
    return 0;
}

/* As it was before, for whoever gets the descriptor. */
static void pw_pipe_plain(int fd) {
    struct timeval t = {0, 0};
    int none = -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &none, sizeof none);
}

/* Header and payload as one packet. Bytes of payload sent, or -1. */
static ssize_t pw_send_packet(int fd, uint64_t head, const char *data, size_t size, int flags) {
    struct iovec parts[2] = {{&head, 8}, {(void *)data, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = size ? 2 : 1};
    ssize_t got = sendmsg(fd, &message, flags);
    return got < 0 ? -1 : got - 8;
}

/* One packet: its payload into `first`, then into `second`. Its payload's length; -1: errno; 0 with *end: end of stream;
 * PW_OVERSIZE: no packet of ours. */
static ssize_t pw_recv_packet(int fd, uint64_t *head, char *first, size_t first_size, char *second, size_t second_size,
                              int flags, int *end) {
    struct iovec parts[3] = {{head, 8}, {first, first_size}, {second, second_size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = second_size ? 3 : 2};
    ssize_t got = recvmsg(fd, &message, flags);
    *end = got == 0;
    if (got <= 0) return got;
    return got < 8 || (message.msg_flags & MSG_TRUNC) ? PW_OVERSIZE : got - 8;
}

/* Looks at the packet at the head of the queue: `size` bytes of its payload from `offset` on, and its header and length.
 * The bytes copied, or as above. */
static ssize_t pw_peek_packet(int fd, uint64_t *head, char *data, size_t size, size_t offset, size_t *length, int flags,
                              int *end) {
    int from = 0;
    uint64_t seen = 0;
    struct iovec part = {&seen, 8};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got;
    setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &from, sizeof from);
    got = recvmsg(fd, &message, flags | MSG_PEEK | MSG_TRUNC); /* MSG_TRUNC: the packet's real length */
    *end = got == 0;
    if (got <= 0) return got;
    if (got < 8 || got > 8 + PW_PACKET) return PW_OVERSIZE;
    *head = seen;
    *length = (size_t)got - 8;
    if (offset > *length) return PW_OVERSIZE;
    if (size > *length - offset) size = *length - offset;
    if (size == 0) return 0;
    from = 8 + (int)offset;
    setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &from, sizeof from);
    part = (struct iovec){data, size};
    return recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);
}

static void pw_drop_packet(int fd) {
    char none[8];
    recv(fd, none, sizeof none, MSG_DONTWAIT | MSG_TRUNC);
}

/* 1: look again, 0: the time is over, -1: errno. `bell` may be -1, `at` a monotonic time or INT64_MAX. */
static int pw_pipe_poll(int fd, short events, int bell, int64_t at) {
    struct pollfd both[2] = {{fd, events, 0}, {bell, POLLIN, 0}};
    struct timespec left, *limit = NULL;
    if (at != INT64_MAX) {
        int64_t ns = at - pw_pipe_now();
        if (ns <= 0) return 0;
        left = (struct timespec){ns / 1000000000, ns % 1000000000};
        limit = &left;
    }
    return ppoll(both, bell >= 0 ? 2 : 1, limit, NULL);
}

/* Only the main thread runs Python's signal handlers. */
static int pw_is_main_thread(void) { return (long)getpid() == syscall(SYS_gettid); }

/* The other end has closed, or will send no more. */
static int pw_pipe_gone(int fd) {
    struct pollfd one = {fd, POLLRDHUP, 0};
    return poll(&one, 1, 0) > 0 && (one.revents & (POLLHUP | POLLERR | POLLRDHUP));
}

/* A note that must get into a full queue: the send buffer is larger for this one packet. */
static int pw_send_abandoned(int fd) {
    int usual = 0, larger = INT_MAX / 2, half;
    socklen_t size = sizeof usual;
    ssize_t got;
    int wrong;
    getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &usual, &size);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &larger, sizeof larger);
    got = pw_send_packet(fd, PW_ABANDONED, NULL, 0, MSG_DONTWAIT | MSG_NOSIGNAL);
    wrong = errno;
    half = usual / 2; /* the kernel doubles what it is given */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &half, sizeof half);
    errno = wrong;
    return got < 0 ? -1 : 0;
}

/* ---- the list of disconnected generations, in a page that its owner may cut: read under the guard ---- */

typedef struct {
    const volatile uint32_t *at;
    uint32_t generation;
    int found;
} pw_watch;

static void pw_watch_look(void *argument) {
    pw_watch *watch = argument;
    int i;
    for (i = 0; i < 8; i++)
        if (watch->at[i] == watch->generation) watch->found = 1;
}
#endif
