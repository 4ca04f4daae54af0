/* The life of a body, this process's hold on one object's page: mapped, closed, in a fork child, at a thread's end. */
#ifndef PORTWAY_SYNC_BODY_H
#define PORTWAY_SYNC_BODY_H
#include "sync_multi.h"

static void pw_free(pw_body *b) {
    pw_body **at;
    for (at = &pw_bodies; *at; at = &(*at)->next)
        if (*at == b) {
            __atomic_store_n(at, b->next, __ATOMIC_SEQ_CST);
            break;
        }
    munmap(b->slots, 6 * PW_PAGE);
    free(b);
}

static void pw_unpin(pw_body *b) {
    if (--b->pins == 0 && b->closing) pw_free(b);
}

static int pw_native_here(pw_body *b) {
    return !pw_slices && pw_self()->head && b->home && b->home == pw_home;
}

/* Maps an object's page, the holders before it and a private page behind it. NULL: errno. */
static pw_body *pw_map(int fd, int slot, int kind, int manual, uint64_t home) {
    struct stat info;
    uint8_t *at;
    pw_body *b = calloc(1, sizeof *b);
    if (!b || fstat(fd, &info) != 0 || info.st_size < 5 * PW_PAGE) {
        if (b) errno = EIO;
        free(b);
        return NULL;
    }
    at = mmap(NULL, 6 * PW_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED ||
        mmap(at, 4 * PW_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, PW_PAGE) == MAP_FAILED ||
        mmap(at + 4 * PW_PAGE, PW_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int wrong = errno;
        if (at != MAP_FAILED) munmap(at, 6 * PW_PAGE);
        free(b);
        errno = wrong;
        return NULL;
    }
    b->slots = (uint32_t *)at;
    b->page = (pw_page *)(at + 4 * PW_PAGE);
    b->nodes = (pw_private *)(at + 5 * PW_PAGE);
    *(volatile char *)b->nodes = 0; /* its memory is there before it is needed */
    b->fd = fd, b->slot = slot, b->kind = kind, b->manual = manual, b->home = home;
    b->dev = (uint64_t)info.st_dev, b->ino = (uint64_t)info.st_ino;
    b->native = pw_native_here(b);
    b->next = pw_bodies;
    __atomic_store_n(&pw_bodies, b, __ATOMIC_SEQ_CST);
    return b;
}

/* The new holder of a slot: whatever its last holder owned by it is abandoned. */
static void pw_take_over_slot(pw_body *b) {
    uint32_t S = PW_LOAD(b->page->S), L = PW_LOAD(b->page->L), mine = PW_SLOT | (uint32_t)b->slot;
    if (b->kind == PW_MUTEX && (S & PW_TID) == mine) pw_mark_dead(&b->page->S, S);
    if ((L & PW_TID) == mine) pw_mark_dead(&b->page->L, L);
    b->slots[4 * b->slot + 1] = 0;
}

/* A last close. A mutex of this thread is abandoned; one of another thread that lives keeps its memory, as the kernel
 * will look there when that thread ends. */
static void pw_close(pw_body *b) {
    pw_thread *me = pw_self();
    if (b->kind == PW_MUTEX && b->owner) {
        uint32_t S = PW_LOAD(b->page->S);
        if (b->owner_thread == me->serial) pw_mutex_abandon(b);
        else if (b->native && (S & PW_TID) == b->owner_tid) return;
        else if (!b->native && (S & PW_TID) == pw_mine(b, me)) pw_mark_dead(&b->page->S, S);
    }
    b->closing = 1;
    if (b->pins == 0) pw_free(b);
}

static void pw_thread_ended(void *thread) {
    pw_thread *me = thread;
    pw_body *b;
    while ((b = me->held) != NULL) {
        uint32_t S = PW_LOAD(b->page->S);
        me->held = b->held;
        if ((S & PW_TID) == (PW_SLOT | (uint32_t)b->slot)) pw_mark_dead(&b->page->S, S);
    }
}

/* In a fork child: it owns nothing, its descriptors have slots of their own, its thread has a new id. */
static void pw_in_child(void) {
    pw_body *b;
    memset(&pw_me, 0, sizeof pw_me);
    pw_home = pw_pid_namespace();
    pw_txn ^= (uint64_t)getpid() << 40 ^ (uint64_t)pw_clock(0);
    for (b = pw_bodies; b; b = b->next) {
        b->owner = b->owner_thread = 0;
        b->count = 0;
        b->l_busy = b->pins = 0;
        b->held = NULL;
        memset(b->nodes, 0, sizeof *b->nodes);
        b->slot = pw_hold_slot(b->fd, 0);
        if (b->slot < 0) b->broken = 1;
        b->native = pw_native_here(b);
        if (b->slot >= 0) pw_take_over_slot(b);
    }
}

/* ---- once per process ---- */

static int pw_load(int slices, int old_kernel) {
    struct sigaction action;
    pw_waiter one;
    uint32_t word = 1;
    pw_slices = slices;
    pw_old_kernel = old_kernel;
    pw_home = pw_pid_namespace();
    pw_txn = ((uint64_t)getpid() << 40 ^ (uint64_t)pw_clock(1)) | 1;
    if (pthread_key_create(&pw_end_of_thread, pw_thread_ended) != 0 || pw_fork_arm() != 0) return -1;
    pw_waiter_set(&one, &word, 0, 1);
    pw_waitv = pw_futex_waitv(&one, 1, 0) == EAGAIN;
    pw_child_hook = pw_in_child;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = pw_on_bus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGBUS, &action, &pw_bus_before);
    return 0;
}
#endif
