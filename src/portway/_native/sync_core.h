/* The lock of a page, and what one object does. All of it runs with the GIL held, except for the sleeping.
 *
 * Rules that the kill tests rely on:
 * - A change is one store, under L. What has to be woken is told to the kernel before it (list_op_pending names S): a
 *   process killed between change and wake, or woken and killed before it took, has the kernel wake the next.
 * - The kernel wakes one. So whoever takes and leaves the object signalled wakes the next itself.
 * - Who sleeps on S registers under L; whoever signals turns S to LOOK before the change, so that nobody falls asleep
 *   on what is over. S goes back to 0 only under L, when it is LOOK and a wake found nobody.
 * - A mutex's W bit stays while anybody may sleep; a wake that found nobody takes it away, of a free mutex only.
 * - Every sleep is cut at half a second (see pw_slice), whatever a hostile page says. */
#ifndef PORTWAY_SYNC_CORE_H
#define PORTWAY_SYNC_CORE_H
#include "sync_page.h"

#define PW_L_SLEEP (10 * PW_MS)
#define PW_L_PATIENCE 10 /* seconds */

static int pw_recover(pw_body *b);

static inline uint32_t pw_mine(pw_body *b, pw_thread *me) { return b->native ? me->tid : PW_SLOT | (uint32_t)b->slot; }

/* Is the owner in this word a holder slot that nobody holds any more? (A thread id's death marks the word by itself.) */
static int pw_slot_dead(pw_body *b, uint32_t word) {
    uint32_t slot = word & PW_TID & ~PW_SLOT;
    if (!(word & PW_SLOT) || slot == (uint32_t)b->slot) return 0;
    if (slot >= PW_HOLDERS) return 0;
    return pw_ofd_held(b->fd, PW_FIRST + (int)slot) == 0;
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

/* PW_OK, PW_TIMEOUT, PW_CORRUPT, PW_STUCK, or -1 with an exception set. `at`: monotonic, PW_NEVER without limit. */
static int pw_L_lock_slow(pw_body *b, pw_thread *me, int64_t at) {
    int64_t patience = pw_clock(0) + PW_L_PATIENCE * 1000 * PW_MS;
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
                if (wrong) pw_L_unlock_as(b, PW_DIED); /* the next one tries again */
                return wrong;
            }
            continue;
        }
        if (!b->l_busy && spins++ < 40) {
            PW_PAUSE();
            continue;
        }
        if (pw_slot_dead(b, seen)) {
            pw_mark_dead(&b->page->L, seen);
            continue;
        }
        now = pw_clock(0);
        if (now >= at) return PW_TIMEOUT;
        if (now >= patience) return PW_STUCK;
        if (b->l_busy || (seen & PW_W) || pw_cas(&b->page->L, seen, seen | PW_W)) {
            int64_t until = pw_sooner(at, now + (b->l_busy ? PW_MS : PW_L_SLEEP));
            Py_BEGIN_ALLOW_THREADS
            pw_futex_wait(&b->page->L, b->l_busy ? PW_LOAD(b->page->L) : seen | PW_W, until);
            Py_END_ALLOW_THREADS
            if (pw_signals(me)) return -1;
        }
    }
}

static inline int pw_L_lock(pw_body *b, pw_thread *me, int64_t at) {
    if (__builtin_expect(!b->l_busy, 1) && pw_L_try(b, me, 0)) return PW_OK;
    return pw_L_lock_slow(b, me, at);
}

/* ---- who waits, for `ls` and pulse ---- */

static void pw_waiting(pw_body *b, int step) {
    if (b->slot >= 0) b->slots[4 * b->slot + 1] += (uint32_t)step; /* only this process writes it, with the GIL */
}

static uint32_t pw_waiters(pw_body *b) {
    struct flock lock;
    uint32_t sum = b->slot >= 0 ? b->slots[4 * b->slot + 1] : 0;
    long at = PW_FIRST;
    while (at < PW_FIRST + PW_HOLDERS) {
        lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = PW_FIRST + PW_HOLDERS - at};
        if (fcntl(b->fd, F_OFD_GETLK, &lock) != 0 || lock.l_type == F_UNLCK) break;
        if (lock.l_start < at) lock.l_start = at;
        sum += b->slots[4 * (lock.l_start - PW_FIRST) + 1];
        at = lock.l_start + 1;
    }
    return sum;
}

/* Multi-object and asyncio waits: woken all, before the change, so that they queue up at L. Under L. */
static void pw_ring(pw_body *b) {
    if (!PW_LOAD(b->page->multi)) return;
    __atomic_fetch_add(&b->page->bell, 1, __ATOMIC_SEQ_CST);
    PW_CRASH("bell.rung");
    if (pw_futex_wake(&b->page->bell, INT_MAX) == 0) PW_STORE(b->page->multi, 0);
    PW_CRASH("bell.woken");
}

/* ---- state of the kinds without owner; under L ---- */

#define PW_EPOCH(value) ((uint32_t)((value) >> 32))
#define PW_GRANTS(value) ((uint32_t)((value) >> 1) & 0x7fffffffu)

static int64_t pw_timer_clock(pw_cfg *cfg) { return pw_clock(cfg->realtime != 0); }

static pw_cfg *pw_timer(pw_body *b) { return &b->page->timer[PW_LOAD(b->page->timer_now) & 1]; }

static int64_t pw_timer_next(int64_t due, int64_t period, int64_t now) {
    if (period <= 0) return PW_NEVER;
    if (due > now || due < 0) return now + period; /* no due of ours: scribbled */
    return due + ((now - due) / period + 1) * period;
}

/* 1: signalled, and *after is the value a wait leaves behind. `epoch`: pulses seen when this wait began. */
static int pw_signalled(pw_body *b, uint32_t epoch, uint64_t *after) {
    uint64_t value = PW_LOAD(b->page->value);
    if (b->kind == PW_SEMAPHORE) {
        *after = value - 1;
        return value != 0;
    }
    if (b->kind == PW_EVENT) {
        int pulsed = PW_EPOCH(value) != epoch && (b->manual || PW_GRANTS(value));
        *after = b->manual ? value : value & 1 ? value & ~1ULL : value - 2;
        return (value & 1) || pulsed;
    }
    {
        pw_cfg cfg = *pw_timer(b);
        int64_t now = pw_timer_clock(&cfg);
        *after = (uint64_t)(b->manual ? cfg.due : pw_timer_next(cfg.due, cfg.period, now));
        return cfg.due <= now;
    }
}

static void pw_set_value(pw_body *b, uint64_t value) {
    if (b->kind == PW_TIMER) __atomic_store_n(&pw_timer(b)->due, (int64_t)value, __ATOMIC_SEQ_CST);
    else PW_STORE(b->page->value, value);
}

/* When a sleeper must look again by itself: the due time of a timer, on the monotonic clock. */
static int64_t pw_look_at(pw_body *b) {
    pw_cfg cfg;
    int64_t now, left;
    if (b->kind != PW_TIMER) return PW_NEVER;
    cfg = *pw_timer(b);
    if (cfg.due == PW_NEVER) return PW_NEVER;
    if (!cfg.realtime) return cfg.due < 0 ? 0 : cfg.due;
    now = pw_clock(0);
    left = cfg.due - pw_clock(1);
    return now + (left < 0 ? 0 : pw_sooner(left, 1000 * PW_MS)); /* the wall clock may be set meanwhile */
}

/* What the page may say; anything else was not written by us. */
static int pw_sane(pw_body *b) {
    if (b->broken) return 0;
    if (b->kind == PW_SEMAPHORE) return b->page->maximum - 1 < INT64_MAX && PW_LOAD(b->page->value) <= b->page->maximum;
    if (b->kind == PW_TIMER) {
        pw_cfg cfg = *pw_timer(b);
        return cfg.due >= 0 && cfg.period >= 0 && cfg.period < PW_NEVER / 4;
    }
    return 1;
}

/* ---- waking those on S ---- */

/* Under L, before the change. Whether anybody may sleep. */
static int pw_look(pw_body *b) {
    if (PW_LOAD(b->page->S) == 0) return 0;
    PW_STORE(b->page->S, PW_LOOK);
    PW_CRASH("S.look");
    return 1;
}

/* After L was freed, with `pending` set. A wake that found nobody makes the next signal cheap again. */
static void pw_wake(pw_body *b, pw_thread *me, int count) {
    PW_CRASH("wake.before");
    if (pw_futex_wake(&b->page->S, count) > 0 || b->l_busy || !pw_L_try(b, me, 0)) return;
    if (PW_LOAD(b->page->S) == PW_LOOK && pw_futex_wake(&b->page->S, count) == 0) PW_STORE(b->page->S, 0);
    pw_L_unlock(b);
    PW_CRASH("wake.after");
}

static void pw_unlock_and_wake(pw_body *b, pw_thread *me, int sleepers, int count) {
    if (sleepers && b->native) pw_pending(me, &b->nodes->s);
    pw_L_unlock(b);
    if (sleepers) {
        pw_wake(b, me, count);
        if (b->native) pw_pending(me, NULL);
    }
}

/* Locks L and checks the page. */
static int pw_begin(pw_body *b, pw_thread *me, int64_t at) {
    int wrong = pw_L_lock(b, me, at);
    if (wrong == PW_OK && !pw_sane(b)) {
        pw_L_unlock(b);
        return PW_CORRUPT;
    }
    return wrong;
}

/* A change that makes the object signalled: everything that must come before and after that one store. */
static void pw_signal(pw_body *b, pw_thread *me, uint64_t value, int count) {
    int sleepers;
    pw_ring(b);
    sleepers = pw_look(b);
    if (sleepers && b->native) pw_pending(me, &b->nodes->s);
    PW_CRASH("signal.before");
    pw_set_value(b, value);
    PW_CRASH("signal.changed");
    pw_unlock_and_wake(b, me, sleepers, count);
}

static int pw_semaphore_release(pw_body *b, uint64_t count, uint64_t *previous) {
    pw_thread *me = pw_self();
    int wrong = pw_begin(b, me, PW_NEVER);
    if (wrong) return wrong;
    *previous = PW_LOAD(b->page->value);
    if (count > b->page->maximum - *previous) {
        pw_L_unlock(b);
        return PW_TOO_MANY;
    }
    pw_signal(b, me, *previous + count, count > INT_MAX ? INT_MAX : (int)count);
    return b->broken ? PW_CORRUPT : PW_OK;
}

static int pw_event_set(pw_body *b, int *previous) {
    pw_thread *me = pw_self();
    int wrong = pw_begin(b, me, PW_NEVER);
    uint64_t value;
    if (wrong) return wrong;
    value = PW_LOAD(b->page->value);
    *previous = (int)(value & 1);
    if (value & 1) pw_L_unlock(b);
    else pw_signal(b, me, value | 1, b->manual ? INT_MAX : 1);
    return b->broken ? PW_CORRUPT : PW_OK;
}

static int pw_event_reset(pw_body *b, int *previous) {
    int wrong = pw_begin(b, pw_self(), PW_NEVER);
    if (wrong) return wrong;
    *previous = (int)(PW_LOAD(b->page->value) & 1);
    PW_STORE(b->page->value, PW_LOAD(b->page->value) & ~1ULL);
    pw_L_unlock(b);
    return b->broken ? PW_CORRUPT : PW_OK;
}

/* One store: unset, one pulse more, and of an auto-reset event one more release, at most as many as there are waiters. */
static int pw_event_pulse(pw_body *b) {
    pw_thread *me = pw_self();
    int wrong = pw_begin(b, me, PW_NEVER);
    uint64_t value, grants = 0;
    if (wrong) return wrong;
    value = PW_LOAD(b->page->value);
    if (!b->manual) {
        uint64_t waiters = pw_waiters(b);
        grants = PW_GRANTS(value) + 1 < waiters ? PW_GRANTS(value) + 1 : waiters;
    }
    pw_signal(b, me, ((uint64_t)(PW_EPOCH(value) + 1) << 32) | grants << 1, b->manual ? INT_MAX : 1);
    return b->broken ? PW_CORRUPT : PW_OK;
}

static int pw_timer_set(pw_body *b, int64_t due, int64_t period, int realtime, int cancel, int *was_set) {
    pw_thread *me = pw_self();
    int wrong = pw_begin(b, me, PW_NEVER), sleepers;
    uint32_t other;
    pw_cfg *now, *next;
    if (wrong) return wrong;
    now = pw_timer(b);
    *was_set = now->due != PW_NEVER && now->due > 0;
    other = (PW_LOAD(b->page->timer_now) & 1) ^ 1;
    next = &b->page->timer[other];
    *next = (pw_cfg){due, period, (uint64_t)realtime, 0};
    if (cancel) *next = (pw_cfg){now->due <= pw_timer_clock(now) ? 0 : PW_NEVER, 0, 0, 0};
    PW_CRASH("timer.written");
    pw_ring(b);
    sleepers = pw_look(b);
    if (sleepers && b->native) pw_pending(me, &b->nodes->s);
    PW_STORE(b->page->timer_now, other);
    PW_CRASH("timer.switched");
    pw_unlock_and_wake(b, me, sleepers, INT_MAX);
    return b->broken ? PW_CORRUPT : PW_OK;
}

/* ---- waiting for one semaphore, event or timer ---- */

/* `at` below 0: so many nanoseconds from now. */
static int pw_sleep_on(pw_thread *me, uint32_t *word, uint32_t expected, int64_t at, uint32_t *alert) {
    int got;
    if (alert && at < 0) at = pw_clock(0) - at;
    (void)me;
    Py_BEGIN_ALLOW_THREADS
    if (!alert)
        got = pw_futex_wait(word, expected, at);
    else if (pw_waitv && !pw_slices) {
        pw_waiter both[2];
        pw_waiter_set(&both[0], word, expected, 0);
        pw_waiter_set(&both[1], alert, 0, 1);
        got = pw_futex_waitv(both, 2, at);
    } else
        got = pw_futex_wait(word, expected, pw_sooner(at, pw_clock(0) + 20 * PW_MS));
    Py_END_ALLOW_THREADS
    return got;
}

static int pw_alerted(uint32_t *alert) { return alert && __atomic_exchange_n(alert, 0, __ATOMIC_SEQ_CST) != 0; }

static uint32_t pw_register(pw_body *b) {
    uint32_t S = PW_LOAD(b->page->S);
    if (S == PW_ASLEEP_A || S == PW_ASLEEP_B) return S;
    S = b->page->phase++ & 1 ? PW_ASLEEP_A : PW_ASLEEP_B; /* not the phase of those who slept before the last signal */
    PW_STORE(b->page->S, S);
    return S;
}

/* Takes it under L, frees L. `after` from pw_signalled. */
static void pw_take_and_unlock(pw_body *b, pw_thread *me, uint32_t epoch, uint64_t after) {
    uint64_t again;
    int more;
    PW_CRASH("take.before");
    if (!b->manual || b->kind == PW_SEMAPHORE) pw_set_value(b, after);
    PW_CRASH("take.taken");
    more = PW_LOAD(b->page->S) != 0 && pw_signalled(b, epoch, &again);
    pw_unlock_and_wake(b, me, more, b->manual ? INT_MAX : 1);
}

/* Before it sleeps a wait gives up the core once, as long as that has helped: two processes that take turns on one core
 * then need no futex call at all. Nothing is registered yet, so nothing can be lost. */
static void pw_give_way(pw_body *b) {
    uint64_t ignored;
    if (b->kind == PW_TIMER || pw_signalled(b, PW_EPOCH(b->page->value), &ignored)) return;
    if (b->luck < 0 && (++b->tries & 63)) return;
    Py_BEGIN_ALLOW_THREADS
    sched_yield();
    Py_END_ALLOW_THREADS
    if (pw_signalled(b, PW_EPOCH(b->page->value), &ignored)) b->luck = 4;
    else if (b->luck >= 0) b->luck--;
}

static int pw_wait(pw_body *b, int64_t at, uint32_t *alert) {
    pw_thread *me = pw_self();
    int wrong, waiting = 0;
    uint32_t epoch;
    uint64_t after;
    if (at != 0) pw_give_way(b);
    wrong = pw_begin(b, me, at == 0 ? pw_clock(0) + 100 * PW_MS : at);
    if (wrong) return wrong;
    epoch = PW_EPOCH(b->page->value);
    for (;;) {
        uint32_t expected;
        int got;
        int64_t until;
        if (pw_signalled(b, epoch, &after)) {
            pw_take_and_unlock(b, me, epoch, after);
            wrong = b->broken ? PW_CORRUPT : PW_OK;
            break;
        }
        if (at == 0 || (at != PW_NEVER && pw_clock(0) >= at)) {
            pw_L_unlock(b);
            wrong = PW_TIMEOUT;
            break;
        }
        if (pw_alerted(alert)) {
            pw_L_unlock(b);
            wrong = PW_ALERTED;
            break;
        }
        if (!waiting) {
            waiting = 1;
            pw_waiting(b, 1);
        }
        expected = pw_register(b);
        PW_CRASH("wait.registered");
        if (b->native) pw_pending(me, &b->nodes->s);
        until = pw_sooner(at, pw_look_at(b));
        until = until == PW_NEVER ? -pw_slice(b, me) : pw_sooner(until, pw_clock(0) + pw_slice(b, me));
        pw_L_unlock(b);
        got = pw_sleep_on(me, &b->page->S, expected, until, alert);
        PW_CRASH("wait.woken");
        if (got == EFAULT) b->broken = 1;
        if ((got == EINTR || (me->main && got == ETIMEDOUT)) && pw_signals(me)) {
            wrong = -1;
            break;
        }
        /* woken or not: whoever slept looks, even past its time, or a wake would be lost with it */
        wrong = pw_begin(b, me, at == PW_NEVER ? at : at + 1000 * PW_MS);
        if (wrong) break;
    }
    if (waiting && wrong != PW_OK && wrong != PW_TIMEOUT && wrong != PW_ALERTED) pw_futex_wake(&b->page->S, 1);
    if (b->native) pw_pending(me, NULL);
    if (waiting) pw_waiting(b, -1);
    return wrong;
}

/* ---- mutex ---- */

static void pw_own(pw_body *b, pw_thread *me, uint64_t owner) {
    b->owner = owner;
    b->owner_thread = me->serial;
    b->owner_tid = me->tid;
    b->count = 1;
    if (b->native) {
        pw_link(me, &b->nodes->s);
        PW_CRASH("mutex.linked");
        pw_pending(me, NULL);
    } else {
        b->held = me->held;
        me->held = b;
    }
}

static void pw_disown(pw_body *b, pw_thread *me) {
    pw_body **at;
    b->owner = b->owner_thread = 0;
    b->count = 0;
    if (b->native)
        pw_unlink(&b->nodes->s);
    else
        for (at = &me->held; *at; at = &(*at)->held)
            if (*at == b) {
                *at = b->held;
                break;
            }
}

/* Multi-object waits look at a mutex again every 20 ms: its release does not hold L, and death rings no bell. */
static void pw_mutex_ring(pw_body *b) {
    if (__builtin_expect(PW_LOAD(b->page->multi) != 0, 0)) {
        __atomic_fetch_add(&b->page->bell, 1, __ATOMIC_SEQ_CST);
        pw_futex_wake(&b->page->bell, INT_MAX);
    }
}

/* S: owner -> free (or -> DIED when `died`), and the wake. */
static int pw_mutex_free(pw_body *b, pw_thread *me, uint32_t free) {
    uint32_t mine = pw_mine(b, me), S;
    if (b->native) pw_pending(me, &b->nodes->s);
    pw_disown(b, me);
    PW_CRASH("mutex.unlinked");
    if (!pw_cas(&b->page->S, mine, free)) {
        S = PW_LOAD(b->page->S);
        while ((S & PW_TID) == mine && !pw_cas(&b->page->S, S, PW_W | free)) S = PW_LOAD(b->page->S);
        PW_CRASH("mutex.freed");
        if ((S & PW_TID) != mine) {
            if (b->native) pw_pending(me, NULL);
            return PW_CORRUPT;
        }
        if (pw_futex_wake(&b->page->S, 1) == 0) pw_cas(&b->page->S, PW_W | free, free);
        PW_CRASH("mutex.woken");
    }
    pw_mutex_ring(b);
    if (b->native) pw_pending(me, NULL);
    return b->broken ? PW_CORRUPT : PW_OK;
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
        if (pw_slot_dead(b, S)) {
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
        if ((got == EINTR || (me->main && got == ETIMEDOUT)) && pw_signals(me)) {
            wrong = -1;
            break;
        }
    }
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
