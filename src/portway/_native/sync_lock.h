/* L, the lock of a page, and who waits for its object. All of it runs with the GIL held, except for the sleeping.
 *
 * Whoever finds L marked by its owner's death first finishes what that owner was doing (sync_recover.h). Every sleep is
 * cut, here at 10 ms, whatever a hostile page says. */
#ifndef PORTWAY_SYNC_LOCK_H
#define PORTWAY_SYNC_LOCK_H
#include "sync_page.h"

#define PW_L_SLEEP (10 * PW_MS)
#define PW_L_PATIENCE 10 /* seconds */
#define PW_L_GRACE (20 * PW_MS)
#define PW_L_GRACE (1000 * PW_MS)

static int pw_recover(pw_body *b);

static inline uint32_t pw_mine(pw_body *b, pw_thread *me) { return b->native ? me->tid : PW_SLOT | (uint32_t)b->slot; }

/* Is the owner in this word a holder slot that nobody holds any more? (A thread id's death marks the word by itself.) */
static int pw_slot_dead(pw_body *b, uint32_t word) {
    uint32_t slot = word & PW_TID & ~PW_SLOT;
    if (!(word & PW_SLOT) || slot == (uint32_t)b->slot) return 0;
    if (slot >= PW_HOLDERS) return 0;
    return pw_ofd_held(b->fd, PW_FIRST + (int)slot) == 0;
}

static int pw_thread_lives(pid_t pid, pid_t tid) {
    return pid <= 0 || syscall(SYS_tgkill, pid, tid, 0) == 0 || errno != ESRCH; /* or cannot tell */
}

/* A dying thread's words are marked by the kernel, which walks the thread's list, but stops at a page that somebody cut,
 * and after 2,048. So who has to wait asks now and then whether the owner is a thread of any process that has the object
 * open. (Signal 0 says so whatever /proc hides. The holders' pids are their own word; a false one makes us wait on.) */
static int pw_owner_gone(pw_body *b, uint32_t word) {
    int64_t now = pw_clock(0);
    pid_t tid = (pid_t)(word & PW_TID), pid;
    uint16_t slots[PW_HOLDERS];
    int count;
    if (!b->home || b->home != pw_home || tid == 0 || word & PW_SLOT || now < b->ask) return 0;
    b->ask = now + 250 * PW_MS;
    if (pw_thread_lives(getpid(), tid) || pw_ofd_held(b->fd, PW_REPAIRING) != 0) return 0;
    count = pw_held_slots(b->fd, slots);
    while (count > 0) {
        pid = (pid_t)b->slots[4 * slots[--count]];
        if (pw_thread_lives(pid, tid)) return 0;
    }
    return count == 0;
}

static void pw_mark_dead(uint32_t *at, uint32_t seen) {
    if (pw_cas(at, seen, (seen & PW_W) | PW_DIED)) pw_futex_wake(at, 1);
}

/* ---- L ---- */

static inline int pw_L_try(pw_body *b, pw_thread *me, uint32_t seen) {
    uint32_t mine = pw_mine(b, me) | (seen & PW_W);
    b->l_busy = 1;
    if (b->native) pw_link(me, &b->nodes->l);
    PW_CRASH("L.linked");
    if (pw_cas(&b->page->L, seen, mine)) {
        PW_CRASH("L.taken");
        return 1;
    }
    if (b->native) pw_unlink(&b->nodes->l);
    b->l_busy = 0;
    return 0;
}

static void pw_L_unlock_as(pw_body *b, uint32_t free) {
    uint32_t old;
    PW_CRASH("L.unlocking");
    old = __atomic_exchange_n(&b->page->L, free, __ATOMIC_SEQ_CST);
    PW_CRASH("L.free");
    if (old & PW_W) pw_futex_wake(&b->page->L, 1);
    if (b->native) pw_unlink(&b->nodes->l);
    b->l_busy = 0;
}

static void pw_L_unlock(pw_body *b) { pw_L_unlock_as(b, 0); }

/* 1: end this, an exception is set. While recovering another lock is held, which a handler written in Python may want:
 * then handlers run after that was unlocked. */
static int pw_L_sleep(pw_body *b, pw_thread *me, uint32_t expected, int64_t until) {
    int got;
    Py_BEGIN_ALLOW_THREADS
    got = pw_futex_wait(&b->page->L, expected, until);
    Py_END_ALLOW_THREADS
    return me->recovering ? got == EINTR : pw_signals(me);
}

/* PW_OK, PW_TIMEOUT, PW_CORRUPT, PW_STUCK, PW_DENIED, or -1 with an exception set. `at`: monotonic, or PW_NEVER. */
static int pw_L_lock_slow(pw_body *b, pw_thread *me, int64_t at) {
    int64_t began = pw_clock(0), patience = began + PW_L_PATIENCE * 1000 * PW_MS;
    /* Whoever has L is about to give it back: "it is held" must not be the answer because its core was taken away. */
    if (at < began + PW_L_GRACE) at = began + PW_L_GRACE;
    int64_t denied = 0;
    int spins = 0;
    for (;;) {
        uint32_t seen = PW_LOAD(b->page->L);
        int64_t now;
        if (b->broken) return PW_CORRUPT;
        if (!b->l_busy && !(seen & PW_TID)) {
            if (pw_L_try(b, me, seen)) {
                int wrong;
                if (!(seen & PW_DIED)) return PW_OK;
                wrong = pw_recover(b);
                if (!wrong) return PW_OK;
                pw_L_unlock_as(b, PW_DIED); /* the next one tries again */
                if (wrong == PW_SIGNALLED && !me->recovering) {
                    if (pw_signals(me)) return -1;
                    continue;
                }
                if (wrong != PW_DENIED) return wrong;
                now = pw_clock(0); /* somebody who may is perhaps about to */
                if (!denied) denied = now + PW_L_GRACE;
                if (me->recovering || now >= denied || now >= at) return PW_DENIED;
                if (pw_L_sleep(b, me, PW_DIED, pw_sooner(at, now + PW_L_SLEEP))) return -1;
            }
            continue;
        }
        if (!b->l_busy && spins++ < 40) {
            PW_PAUSE();
            continue;
        }
        if (pw_slot_dead(b, seen) || (!b->l_busy && pw_owner_gone(b, seen))) {
            pw_mark_dead(&b->page->L, seen);
            continue;
        }
        now = pw_clock(0);
        if (now >= at) return PW_TIMEOUT;
        if (now >= patience) return PW_STUCK;
        if (b->l_busy || (seen & PW_W) || pw_cas(&b->page->L, seen, seen | PW_W)) {
            uint32_t expected = b->l_busy ? PW_LOAD(b->page->L) : seen | PW_W;
            if (pw_L_sleep(b, me, expected, pw_sooner(at, now + (b->l_busy ? PW_MS : PW_L_SLEEP))))
                return me->recovering ? PW_SIGNALLED : -1;
        }
    }
}

static inline int pw_L_lock(pw_body *b, pw_thread *me, int64_t at) {
    if (__builtin_expect(!b->l_busy, 1) && pw_L_try(b, me, 0)) return PW_OK;
    return pw_L_lock_slow(b, me, at);
}

/* Without sleeping: 0 when somebody holds it or died with it. */
static inline int pw_L_brief(pw_body *b, pw_thread *me) {
    int spins;
    for (spins = 0; spins < 40; spins++) {
        if (b->l_busy) return 0;
        if (pw_L_try(b, me, 0)) return 1;
        PW_PAUSE();
    }
    return 0;
}

/* ---- who waits, for `ls` and pulse ---- */

static void pw_waiting(pw_body *b, int step) {
    uint32_t *mine = b->slot >= 0 ? &b->slots[4 * b->slot + 1] : NULL; /* only this process writes it, with the GIL */
    if (mine && (step > 0 || *mine)) *mine += (uint32_t)step;          /* a wait that began before a fork is not counted */
}

static uint32_t pw_waiters(pw_body *b) {
    uint16_t slots[PW_HOLDERS];
    uint32_t sum = b->slot >= 0 ? b->slots[4 * b->slot + 1] : 0;
    int count = pw_held_slots(b->fd, slots);
    while (count > 0) sum += b->slots[4 * slots[--count] + 1];
    return sum;
}
#endif
