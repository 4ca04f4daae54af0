/* What semaphores, events and timers are and how they change.
 *
 * Rules that the kill tests rely on, here and in sync_wait.h:
 * - A change is one store, under L. What has to be woken is told to the kernel before it (list_op_pending names S): a
 *   process killed between change and wake, or woken and killed before it took, has the kernel wake the next.
 * - The kernel wakes one. So whoever takes and leaves the object signalled wakes the next itself.
 * - Who sleeps on S registers under L; whoever signals turns S to LOOK before the change, so that nobody falls asleep
 *   on what is over. S goes back to 0 only under L, when it is LOOK and a wake found nobody. */
#ifndef PORTWAY_SYNC_STATE_H
#define PORTWAY_SYNC_STATE_H
#include "sync_lock.h"

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

/* A copy, each field read once: others may write there at any moment. */
static pw_cfg pw_timer_read(pw_body *b) {
    pw_cfg *at = pw_timer(b);
    return (pw_cfg){PW_LOAD(at->due), PW_LOAD(at->period), PW_LOAD(at->realtime), 0};
}

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
        pw_cfg cfg = pw_timer_read(b);
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
    cfg = pw_timer_read(b);
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
        pw_cfg cfg = pw_timer_read(b);
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

/* Unset, one pulse more, and of an auto-reset event one more release, at most as many as there are waiters. Under L. */
static uint64_t pw_pulsed(pw_body *b, uint64_t value) {
    uint64_t grants = 0;
    if (!b->manual) {
        uint64_t waiters = pw_waiters(b);
        grants = PW_GRANTS(value) + 1 < waiters ? PW_GRANTS(value) + 1 : waiters;
    }
    return ((uint64_t)(PW_EPOCH(value) + 1) << 32) | grants << 1;
}

/* On Windows a set releases who waits at once; here they have to wake up and look. So that a reset in between takes
 * nothing from them, it leaves behind what a pulse would. */
static int pw_event_reset(pw_body *b, int *previous) {
    int wrong = pw_begin(b, pw_self(), PW_NEVER);
    uint64_t value;
    if (wrong) return wrong;
    value = PW_LOAD(b->page->value);
    *previous = (int)(value & 1);
    if (value & 1) PW_STORE(b->page->value, pw_pulsed(b, value));
    pw_L_unlock(b);
    return b->broken ? PW_CORRUPT : PW_OK;
}

static int pw_event_pulse(pw_body *b) {
    pw_thread *me = pw_self();
    int wrong = pw_begin(b, me, PW_NEVER);
    if (wrong) return wrong;
    pw_signal(b, me, pw_pulsed(b, PW_LOAD(b->page->value)), b->manual ? INT_MAX : 1);
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
#endif
