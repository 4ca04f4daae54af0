/* The mutex: S names its owner, whose death the kernel marks there.
 *
 * The W bit stays while anybody may sleep; a wake that found nobody takes it away, of a free mutex only. */
#ifndef PORTWAY_SYNC_MUTEX_H
#define PORTWAY_SYNC_MUTEX_H
#include "sync_wait.h"

static PW_COLD void pw_hold_by_slot(pw_body *b, pw_thread *me) {
    pthread_mutex_lock(&pw_held_lock);
    b->held = me->held;
    b->held_by = me;
    me->held = b;
    pthread_mutex_unlock(&pw_held_lock);
}

static PW_COLD void pw_drop_by_slot(pw_body *b) {
    pw_body **at;
    pthread_mutex_lock(&pw_held_lock);
    for (at = b->held_by ? &b->held_by->held : NULL; at && *at; at = &(*at)->held)
        if (*at == b) {
            *at = b->held;
            break;
        }
    b->held_by = NULL;
    pthread_mutex_unlock(&pw_held_lock);
}

static inline void pw_own(pw_body *b, pw_thread *me, uint64_t owner) {
    b->owner = owner;
    b->owner_thread = me->serial;
    b->count = 1;
    if (__builtin_expect(b->native, 1)) {
        pw_link(me, &b->nodes->s);
        PW_CRASH("mutex.linked");
        pw_pending(me, NULL);
    } else
        pw_hold_by_slot(b, me);
}

static inline void pw_disown(pw_body *b) {
    b->owner = b->owner_thread = 0;
    b->count = 0;
    if (__builtin_expect(b->native, 1)) pw_unlink(&b->nodes->s);
    else pw_drop_by_slot(b);
}

/* Multi-object waits look at a mutex again every 20 ms: its release does not hold L, and death rings no bell. A bell that
 * nobody heard is taken down under L, where those who listen hang it up, or every later release would ring it. */
static PW_COLD void pw_mutex_ring_now(pw_body *b, pw_thread *me) {
    __atomic_fetch_add(&b->page->bell, 1, __ATOMIC_SEQ_CST);
    if (pw_futex_wake(&b->page->bell, INT_MAX) > 0 || b->l_busy || !pw_L_try(b, me, 0)) return;
    pw_ring(b);
    pw_L_unlock(b);
}

static inline void pw_mutex_ring(pw_body *b, pw_thread *me) {
    if (__builtin_expect(PW_LOAD(b->page->multi) != 0, 0)) pw_mutex_ring_now(b, me);
}

/* S: owner -> free (or -> DIED when `died`), and the wake. */
static PW_COLD int pw_mutex_free_and_wake(pw_body *b, uint32_t mine, uint32_t free) {
    uint32_t S = PW_LOAD(b->page->S);
    while ((S & PW_TID) == mine && !pw_cas(&b->page->S, S, PW_W | free)) S = PW_LOAD(b->page->S);
    PW_CRASH("mutex.freed");
    if ((S & PW_TID) != mine) return 0;
    if (pw_futex_wake(&b->page->S, 1) == 0) pw_cas(&b->page->S, PW_W | free, free);
    PW_CRASH("mutex.woken");
    return 1;
}

static inline int pw_mutex_free(pw_body *b, pw_thread *me, uint32_t free) {
    uint32_t mine = pw_mine(b, me);
    if (b->native) pw_pending(me, &b->nodes->s);
    pw_disown(b);
    PW_CRASH("mutex.unlinked");
    if (!pw_cas(&b->page->S, mine, free) && !pw_mutex_free_and_wake(b, mine, free)) {
        if (b->native) pw_pending(me, NULL);
        return PW_CORRUPT;
    }
    pw_mutex_ring(b, me);
    if (b->native) pw_pending(me, NULL);
    return b->broken ? PW_CORRUPT : PW_OK;
}

/* S: `owner` (or dead) -> `free`, and the phase one on, as one step. So a recoverer tells a mutex that was given back
 * before from one that it must give back; whoever has owned it since is none of its business. 0: it was. */
static int pw_mutex_restore(pw_page *page, uint32_t owner, uint32_t free, uint32_t phase) {
    uint64_t seen = PW_LOAD(page->S_phase), next;
    uint32_t S;
    do {
        S = (uint32_t)seen; /* little-endian */
        if ((uint32_t)(seen >> 32) != phase || !(S & PW_TID ? (S & PW_TID) == owner : S & PW_DIED)) return 0;
        next = (uint64_t)(phase + 1) << 32 | (S & PW_W) | free;
    } while (!__atomic_compare_exchange_n(&page->S_phase, &seen, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    if (S & PW_W) pw_futex_wake(&page->S, 1);
    return 1;
}

/* Taken in the middle of a transaction that will not be: as if it had never been. */
static void pw_mutex_undo(pw_body *b, pw_thread *me) {
    if (b->native) pw_pending(me, &b->nodes->s);
    pw_disown(b);
    PW_CRASH("all.undoing");
    pw_mutex_restore(b->page, pw_mine(b, me), b->page->redo_old & PW_DIED, (uint32_t)b->page->redo_value);
    PW_CRASH("all.undone");
    pw_mutex_ring(b, me);
    if (b->native) pw_pending(me, NULL);
}

static inline int pw_mutex_release(pw_body *b, uint64_t owner) {
    pw_thread *me = pw_self();
    if (owner == 0) owner = me->serial;
    if (b->owner != owner || b->owner_thread != me->serial) return PW_NOT_OWNER;
    if (b->count > 1) {
        b->count--;
        return PW_OK;
    }
    return pw_mutex_free(b, me, 0);
}

/* Given up by its task or by a last close: the next owner is told. */
static int pw_mutex_abandon(pw_body *b) {
    pw_thread *me = pw_self();
    if (b->owner == 0 || b->owner_thread != me->serial) return PW_NOT_OWNER;
    return pw_mutex_free(b, me, PW_DIED);
}

/* The last handle was closed while this waited: nobody could release it. */
static void pw_mutex_give_back(pw_body *b, int got) {
    pw_mutex_free(b, pw_self(), got == PW_ABANDONED ? PW_DIED : 0);
}

/* S is free as seen; takes it. */
static int pw_mutex_cas(pw_body *b, pw_thread *me, uint64_t owner, uint32_t seen, uint32_t bits) {
    if (b->native) pw_pending(me, &b->nodes->s);
    if (!pw_cas(&b->page->S, seen, pw_mine(b, me) | bits)) return 0;
    PW_CRASH("mutex.taken");
    pw_own(b, me, owner);
    return 1;
}

/* Under L: abandoned ones are told to exactly one, and "it is held" is no state in the middle of a transaction. */
static int pw_mutex_look(pw_body *b, pw_thread *me, uint64_t owner, int64_t at) {
    int wrong = pw_L_lock(b, me, at);
    uint32_t S;
    if (wrong) return wrong;
    S = PW_LOAD(b->page->S);
    wrong = PW_TIMEOUT;
    if (!(S & PW_TID) && pw_mutex_cas(b, me, owner, S, S & PW_W)) wrong = S & PW_DIED ? PW_ABANDONED : PW_OK;
    else if (b->native) pw_pending(me, NULL);
    pw_L_unlock(b);
    return wrong;
}

/* One who slept goes without it: perhaps it was the one woken, or its W was the last. */
static void pw_mutex_leave(pw_body *b) {
    uint32_t S = PW_LOAD(b->page->S);
    while (S & PW_TID && !(S & PW_W) && !pw_cas(&b->page->S, S, S | PW_W)) S = PW_LOAD(b->page->S);
    if (!(S & PW_TID)) pw_futex_wake(&b->page->S, 1);
}

static int pw_mutex_slow(pw_body *b, pw_thread *me, uint64_t owner, int64_t at, uint32_t *alert) {
    int wrong, slept = 0;
    for (;;) {
        uint32_t S = PW_LOAD(b->page->S);
        int64_t now, until;
        int got;
        if (b->broken) {
            wrong = PW_CORRUPT;
            break;
        }
        if (b->owner == owner && b->owner_thread == me->serial) {
            b->count++; /* a signal handler took it meanwhile and kept it */
            wrong = PW_OK;
            break;
        }
        if (pw_slot_dead(b, S) || pw_owner_gone(b, S)) {
            pw_mark_dead(&b->page->S, S);
            continue;
        }
        now = pw_clock(0);
        if (!(S & PW_TID)) {
            if (!(S & PW_DIED)) {
                if (!pw_mutex_cas(b, me, owner, S, slept ? PW_W : S & PW_W)) continue;
                wrong = PW_OK;
                break;
            }
            wrong = pw_mutex_look(b, me, owner, at == 0 ? now + 100 * PW_MS : at);
            if (wrong != PW_TIMEOUT || (at != PW_NEVER && pw_clock(0) >= at)) break;
            continue;
        }
        if (at == 0 || now >= at) {
            wrong = pw_mutex_look(b, me, owner, now + 100 * PW_MS);
            break;
        }
        if (pw_alerted(alert)) {
            wrong = PW_ALERTED;
            break;
        }
        if (!(S & PW_W) && !pw_cas(&b->page->S, S, S | PW_W)) continue;
        PW_CRASH("mutex.asleep");
        if (!slept) pw_waiting(b, 1);
        slept = 1;
        if (b->native) pw_pending(me, &b->nodes->s);
        until = now + ((S & PW_SLOT) || !b->native ? 20 * PW_MS : pw_slice(b, me));
        got = pw_sleep_on(me, &b->page->S, S | PW_W, pw_sooner(at, until), alert);
        PW_CRASH("mutex.awake");
        if (got == EFAULT) b->broken = 1;
        if ((got == EINTR || me->main) && pw_signals(me)) {
            wrong = -1;
            break;
        }
    }
    if (slept && wrong != PW_OK && wrong != PW_ABANDONED) pw_mutex_leave(b);
    if (b->native) pw_pending(me, NULL);
    if (slept) pw_waiting(b, -1);
    return wrong;
}

/* Without a wait: PW_OK, or PW_TIMEOUT when it takes more than one word to say. */
static inline int pw_mutex_fast(pw_body *b) {
    pw_thread *me = pw_self();
    if (b->owner == me->serial) {
        if (__builtin_expect(b->count == UINT32_MAX, 0)) return PW_TOO_MANY;
        b->count++;
        return PW_OK;
    }
    if (__builtin_expect(!b->native, 0)) return PW_TIMEOUT;
    pw_pending(me, &b->nodes->s);
    if (__builtin_expect(!pw_cas(&b->page->S, 0, me->tid), 0)) {
        pw_pending(me, NULL);
        return PW_TIMEOUT;
    }
    PW_CRASH("mutex.taken");
    pw_own(b, me, me->serial);
    return __builtin_expect(b->broken, 0) ? PW_CORRUPT : PW_OK;
}

/* `owner` 0: this thread. PW_OK, PW_ABANDONED, PW_TIMEOUT, PW_ALERTED, PW_CORRUPT, PW_STUCK, or -1: exception. */
static int pw_mutex_acquire(pw_body *b, uint64_t owner, int64_t at, uint32_t *alert) {
    pw_thread *me = pw_self();
    if (owner == 0) owner = me->serial;
    if (b->owner == owner && b->owner_thread == me->serial) {
        if (b->count == UINT32_MAX) return PW_TOO_MANY;
        b->count++;
        return PW_OK;
    }
    return pw_mutex_slow(b, me, owner, at, alert);
}
#endif
