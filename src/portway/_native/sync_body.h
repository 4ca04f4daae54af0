/* The life of a body, this process's hold on one object's page: mapped, closed, in a fork child, at a thread's end. */
#ifndef PORTWAY_SYNC_BODY_H
#define PORTWAY_SYNC_BODY_H
#include "sync_multi.h"

/* A body's memory is only ever used for another one: pw_heal may be looking at it. */
static pw_body *pw_new_body(void) {
    pw_body *b = pw_spares, clean = {0};
    if (!b) return calloc(1, sizeof *b);
    pw_spares = b->spare;
    clean.next = b->next;
    *b = clean;
    return b;
}

static void pw_free(pw_body *b) {
    pw_body **at;
    void *pages = b->slots;
    for (at = &pw_bodies; *at; at = &(*at)->next)
        if (*at == b) {
            __atomic_store_n(at, b->next, __ATOMIC_SEQ_CST);
            break;
        }
    PW_STORE(b->nodes, NULL);
    b->slots = NULL;
    if (pages) munmap(pages, 6 * PW_PAGE);
    b->spare = pw_spares;
    pw_spares = b;
}

/* ---- calls that are going on ---- */

static void pw_use_begin(pw_use *use, pw_body **bodies, int count) {
    int i;
    use->bodies = bodies, use->count = count, use->serial = pw_self()->serial;
    for (i = 0; i < count; i++) bodies[i]->pins++;
    use->next = pw_uses, use->at = &pw_uses;
    if (pw_uses) pw_uses->at = &use->next;
    pw_uses = use;
}

static void pw_use_drop(pw_use *use) {
    *use->at = use->next;
    if (use->next) use->next->at = use->at;
    use->at = NULL;
}

/* 1: it was the last one in a body that was closed meanwhile; pw_close has to be called again. */
static int pw_use_end(pw_use *use) {
    int i, late = 0;
    if (!use->at) return 0;
    pw_use_drop(use);
    for (i = 0; i < use->count; i++)
        if (--use->bodies[i]->pins == 0 && use->bodies[i]->closing) late = 1;
    return late;
}

/* ---- mapped, closed ---- */

static int pw_native_here(pw_body *b) {
    return !pw_slices && pw_self()->head && b->home && b->home == pw_home;
}

/* Maps an object's page, the holders before it and a private page behind it. NULL: errno. */
static pw_body *pw_map(int fd, int slot, int kind, int manual, uint64_t home, int scope) {
    struct stat info;
    uint8_t *at;
    pw_body *b = pw_new_body();
    if (!b) return NULL;
    if (fstat(fd, &info) != 0 || info.st_size < 5 * PW_PAGE) {
        pw_free(b);
        errno = EIO;
        return NULL;
    }
    at = mmap(NULL, 6 * PW_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED ||
        mmap(at, 4 * PW_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, PW_PAGE) == MAP_FAILED ||
        mmap(at + 4 * PW_PAGE, PW_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int wrong = errno;
        if (at != MAP_FAILED) munmap(at, 6 * PW_PAGE);
        pw_free(b);
        errno = wrong;
        return NULL;
    }
    b->page = (pw_page *)(at + 4 * PW_PAGE);
    b->slots = (uint32_t *)at;
    PW_STORE(b->nodes, (pw_private *)(at + 5 * PW_PAGE)); /* last: pw_heal goes by it */
    *(volatile char *)b->nodes = 0; /* its memory is there before it is needed */
    b->fd = fd, b->slot = slot, b->kind = kind, b->manual = manual, b->home = home, b->scope = scope != 0;
    b->dev = (uint64_t)info.st_dev, b->ino = (uint64_t)info.st_ino, b->uid = info.st_uid;
    b->rank = !b->scope ? 2 : (info.st_mode & 6) == 6 ? 0 : 1;
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

/* A last close; 0: a call is going on in it, or a mutex is owned by another thread that lives; then this is to be called
 * again. (Then pw_thread_ended and the kernel look there. Who owns it is not asked of the page.) A mutex of this thread
 * is abandoned. */
static int pw_close(pw_body *b) {
    pw_thread *me = pw_self();
    b->closing = 1;
    if (b->kind == PW_MUTEX && b->owner && b->owner_thread == me->serial) pw_mutex_abandon(b);
    if (b->pins || b->held_by || b->nodes->s.next) return 0;
    pw_free(b);
    return 1;
}

static int (*pw_finish_closed)(void *); /* the module's: calls pw_close again */

/* Without the GIL. What the thread owns is abandoned; no other thread unmaps a body that names this one as its owner. */
static void pw_thread_ended(void *thread) {
    pw_thread *me = thread;
    pw_body *b;
    int late = 0;
    for (b = pw_bodies; b; b = b->next) {
        uint32_t S;
        if (b->owner_thread != me->serial || !b->native) continue;
        pw_pending(me, &b->nodes->s);
        pw_disown(b);
        S = PW_LOAD(b->page->S);
        while ((S & PW_TID) == me->tid && !pw_cas(&b->page->S, S, (S & PW_W) | PW_DIED)) S = PW_LOAD(b->page->S);
        if (S & PW_W) pw_futex_wake(&b->page->S, 1);
        pw_pending(me, NULL);
        late |= b->closing;
    }
    pthread_mutex_lock(&pw_held_lock);
    while ((b = me->held) != NULL) {
        uint32_t S = PW_LOAD(b->page->S);
        me->held = b->held;
        b->held_by = NULL;
        if ((S & PW_TID) == (PW_SLOT | (uint32_t)b->slot)) pw_mark_dead(&b->page->S, S);
        late |= b->closing;
    }
    pthread_mutex_unlock(&pw_held_lock);
    if (late && Py_IsInitialized()) Py_AddPendingCall(pw_finish_closed, NULL);
}

/* In a fork child: it owns nothing, its descriptors have slots of their own, its thread has a new id, and the calls that
 * go on in other threads of the parent do not go on here. */
static void pw_in_child(void) {
    uint64_t serial = pw_me.serial;
    pw_body *b, *next;
    pw_use *use, *after;
    int i;
    memset(&pw_me, 0, sizeof pw_me);
    pthread_mutex_init(&pw_held_lock, NULL);
    pw_home = pw_pid_namespace();
    pw_txn ^= (uint64_t)getpid() << 40 ^ (uint64_t)pw_clock(0);
    for (b = pw_bodies; b; b = next) {
        next = b->next;
        b->owner = b->owner_thread = 0;
        b->count = 0;
        b->l_busy = b->pins = 0;
        b->held = NULL, b->held_by = NULL;
        memset(b->nodes, 0, sizeof *b->nodes);
        if (b->temporary) { /* another thread was recovering */
            if (b->fd >= 0) close(b->fd);
            pw_free(b);
            continue;
        }
        b->slot = b->fd < 0 ? -1 : pw_hold_slot(b->fd, 0);
        if (b->slot < 0) b->broken = 1;
        b->native = pw_native_here(b);
        if (b->slot >= 0) pw_take_over_slot(b);
    }
    for (use = pw_uses; use; use = after) {
        after = use->next;
        if (use->serial != serial) {
            pw_use_drop(use);
            continue;
        }
        use->serial = pw_self()->serial;
        for (i = 0; i < use->count; i++) use->bodies[i]->pins++;
    }
}

/* ---- once per process ---- */

static int pw_load(int slices, int old_kernel) {
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
    return 0;
}
#endif
