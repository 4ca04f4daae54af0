/* Holds on object files, and how a fork child gets its own.
 *
 * An open-file-description lock belongs to the description, and fork shares descriptions: the child would hold the
 * parent's slot. So before every fork (pthread_atfork: fork() of C code too) each file is opened anew and a slot is
 * claimed there; the child puts the new description in the place of the old one, the parent closes it. */
#ifndef PORTWAY_SYNC_FORK_H
#define PORTWAY_SYNC_FORK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PW_FIRST 16
#define PW_REPAIRING 8 /* read-locked by who is no holder, but finishes what a killed process left */
#define PW_HOLDERS 1024
#define PW_SLOTS 4096

typedef struct {
    int fd, slot, writable;
    int fresh, fresh_slot; /* between prepare and parent/child */
} pw_hold;

static pw_hold *pw_holds;
static size_t pw_hold_count, pw_hold_room;
static pthread_mutex_t pw_hold_lock = PTHREAD_MUTEX_INITIALIZER;
static void (*pw_child_hook)(void); /* sync_core.h: words and owners of the child */

static int pw_ofd(int fd, int type, int at) {
    struct flock lock = {.l_type = (short)type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    return fcntl(fd, F_OFD_SETLK, &lock);
}

/* 1: another description holds that byte, 0: nobody, -1: cannot tell. */
static int pw_ofd_held(int fd, int at) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0) return -1;
    return lock.l_type != F_UNLCK;
}

/* The slots that other descriptions hold, in no order; at most PW_HOLDERS, -1: cannot tell. GETLK names any lock of the
 * range, not the first: where a slot was given anew, that is a later one, and the gap before it has to be asked too. */
static int pw_held_slots(int fd, uint16_t *slots) {
    struct { int from, to; } todo[PW_HOLDERS + 1];
    int count = 0, open = 1;
    todo[0].from = 0, todo[0].to = PW_HOLDERS;
    while (open > 0) {
        int from = todo[--open].from, to = todo[open].to, hit;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = PW_FIRST + from, .l_len = to - from};
        if (fcntl(fd, F_OFD_GETLK, &lock) != 0) return -1;
        if (lock.l_type == F_UNLCK) continue;
        hit = lock.l_start < PW_FIRST + from ? from : (int)lock.l_start - PW_FIRST;
        if (hit >= to) return -1;
        slots[count++] = (uint16_t)hit;
        if (hit > from) todo[open].from = from, todo[open++].to = hit;
        if (hit + 1 < to) todo[open].from = hit + 1, todo[open++].to = to;
    }
    return count;
}

static uint64_t pw_start_time(void) {
    char text[1024], *at;
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC), field;
    ssize_t size;
    if (fd < 0) return 0;
    size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0) return 0;
    text[size] = 0;
    at = strrchr(text, ')');
    if (at == NULL) return 0;
    for (field = 2; field < 22 && at; field++) at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

static uint64_t pw_pid_namespace(void) {
    struct stat info;
    return stat("/proc/self/ns/pid", &info) == 0 ? (uint64_t)info.st_ino : 0;
}

static void pw_before_fork(void) {
    size_t i;
    pthread_mutex_lock(&pw_hold_lock);
    for (i = 0; i < pw_hold_count; i++) {
        pw_hold *one = &pw_holds[i];
        char path[40];
        int slot, type = one->writable ? F_WRLCK : F_RDLCK;
        snprintf(path, sizeof path, "/proc/self/fd/%d", one->fd);
        one->fresh = open(path, (one->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
        one->fresh_slot = -1;
        if (one->fresh < 0) continue; /* no descriptor left: the child's handle will be closed */
        for (slot = 0; slot < PW_HOLDERS; slot++)
            if (pw_ofd(one->fresh, type, PW_FIRST + slot) == 0) break;
        if (slot == PW_HOLDERS) {
            close(one->fresh);
            one->fresh = -1;
            continue;
        }
        one->fresh_slot = slot;
    }
}

static void pw_after_fork_parent(void) {
    size_t i;
    for (i = 0; i < pw_hold_count; i++) {
        pw_hold *one = &pw_holds[i];
        if (one->fresh >= 0) close(one->fresh);
        one->fresh = -1;
    }
    pthread_mutex_unlock(&pw_hold_lock);
}

static void pw_after_fork_child(void) {
    struct { uint32_t pid, waiting; uint64_t start; } me = {(uint32_t)getpid(), 0, pw_start_time()};
    size_t i;
    for (i = 0; i < pw_hold_count; i++) {
        pw_hold *one = &pw_holds[i];
        one->slot = one->fresh_slot;
        if (one->fresh < 0) { /* a descriptor that leads nowhere: using it is an error, sharing the parent's is worse */
            int null = open("/dev/null", O_RDWR | O_CLOEXEC);
            if (null >= 0) {
                dup3(null, one->fd, O_CLOEXEC);
                close(null);
            } else
                close(one->fd);
            continue;
        }
        dup3(one->fresh, one->fd, O_CLOEXEC);
        close(one->fresh);
        one->fresh = -1;
        if (one->writable && pwrite(one->fd, &me, sizeof me, PW_SLOTS + 16 * one->slot) < 0) continue;
    }
    pthread_mutex_init(&pw_hold_lock, NULL);
    if (pw_child_hook) pw_child_hook();
}

/* Once, when the module is loaded: a child of a process without objects, too, has thread ids of its own. */
static int pw_fork_arm(void) { return pthread_atfork(pw_before_fork, pw_after_fork_parent, pw_after_fork_child); }

static int pw_hold_add(int fd, int slot, int writable) {
    int good = 0;
    pthread_mutex_lock(&pw_hold_lock);
    if (pw_hold_count == pw_hold_room) {
        size_t room = pw_hold_room ? 2 * pw_hold_room : 16;
        pw_hold *more = realloc(pw_holds, room * sizeof *more);
        if (more) {
            pw_holds = more;
            pw_hold_room = room;
        }
    }
    if (pw_hold_count < pw_hold_room) {
        pw_holds[pw_hold_count++] = (pw_hold){fd, slot, writable, -1, -1};
        good = 1;
    }
    pthread_mutex_unlock(&pw_hold_lock);
    return good ? 0 : -1;
}

/* The slot, or -1 when the file is not known (any more). */
static int pw_hold_slot(int fd, int forget) {
    size_t i;
    int slot = -1;
    pthread_mutex_lock(&pw_hold_lock);
    for (i = 0; i < pw_hold_count; i++)
        if (pw_holds[i].fd == fd) {
            slot = pw_holds[i].slot;
            if (forget) pw_holds[i] = pw_holds[--pw_hold_count];
            break;
        }
    pthread_mutex_unlock(&pw_hold_lock);
    return slot;
}
#endif
