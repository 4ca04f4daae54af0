/* Sleeping on one word, and waiting for one semaphore, event or timer. The rules are those of sync_state.h. */
#ifndef PORTWAY_SYNC_WAIT_H
#define PORTWAY_SYNC_WAIT_H
#include "sync_state.h"

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
        if ((got == EINTR || me->main) && pw_signals(me)) {
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
#endif
