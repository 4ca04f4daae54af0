/* Waits for several objects.
 *
 * wait-all changes several pages as one step: each gets a redo record, the lowest one (the coordinator) the list of all;
 * then one store there, `decided`, makes it so. Who finds L marked by its owner's death resolves the record: see
 * sync_recover.h. Locks are taken in one order, always, see pw_below. */
#ifndef PORTWAY_SYNC_MULTI_H
#define PORTWAY_SYNC_MULTI_H
#include "sync_mutex.h"

#define PW_MAX 64

typedef struct {
    pw_body *bodies[PW_MAX];  /* as given */
    pw_body *sorted[PW_MAX];  /* distinct, in locking order */
    uint32_t epochs[PW_MAX];  /* of sorted: pulses seen at the beginning */
    uint32_t bells[PW_MAX];   /* of sorted, read under L */
    int count, distinct, all;
    uint64_t owner;           /* who will own mutexes; 0: this thread */
    int index;                /* any: which one */
    uint64_t abandoned;       /* bit per bodies[i] */
} pw_many;

static uint64_t pw_txn;

/* The order of locking. The coordinator is the lowest, and whoever repairs must read it: so Global objects that everyone
 * may open come first, Local ones last. (`rank` is made of the file's mode; one that was changed meanwhile costs order,
 * no deadlock: nobody sleeps while it holds another lock.) */
static int pw_below(pw_body *a, pw_body *b) {
    if (a->rank != b->rank) return a->rank < b->rank;
    return a->dev != b->dev ? a->dev < b->dev : a->ino < b->ino;
}

static void pw_many_sort(pw_many *many) {
    int i, at;
    many->distinct = 0;
    for (i = 0; i < many->count; i++) {
        pw_body *one = many->bodies[i];
        for (at = many->distinct; at > 0 && pw_below(one, many->sorted[at - 1]); at--) {}
        if (at > 0 && many->sorted[at - 1] == one) continue;
        memmove(&many->sorted[at + 1], &many->sorted[at], sizeof(pw_body *) * (size_t)(many->distinct - at));
        many->sorted[at] = one;
        many->distinct++;
    }
}

static int pw_many_index(pw_many *many, pw_body *b) {
    int i;
    for (i = 0; i < many->distinct && many->sorted[i] != b; i++) {}
    return i;
}

static void pw_unlock_many(pw_many *many, int count) {
    while (count-- > 0) pw_L_unlock(many->sorted[count]);
}

static int pw_lock_many(pw_many *many, pw_thread *me, int64_t at) {
    int i, wrong;
    for (i = 0; i < many->distinct; i++) {
        pw_body *b = many->sorted[i];
        if (pw_L_brief(b, me)) continue;
        pw_unlock_many(many, i); /* nobody waits for those because of this one, no handler finds them locked */
        wrong = pw_L_lock(b, me, at);
        if (wrong) return wrong;
        pw_L_unlock(b);
        i = -1;
    }
    for (i = 0; i < many->distinct; i++)
        if (many->sorted[i]->kind != PW_MUTEX && !pw_sane(many->sorted[i])) {
            pw_unlock_many(many, many->distinct);
            return PW_CORRUPT;
        }
    return PW_OK;
}

static int pw_owned(pw_body *b, pw_thread *me, uint64_t owner) {
    return b->owner == owner && b->owner_thread == me->serial;
}

/* Under L. Free, abandoned, ours already, or signalled. */
static int pw_ready(pw_body *b, pw_thread *me, uint64_t owner, uint32_t epoch, uint64_t *after) {
    uint32_t S;
    if (b->kind != PW_MUTEX) return pw_signalled(b, epoch, after);
    S = PW_LOAD(b->page->S);
    if (pw_owned(b, me, owner)) return 1;
    if (pw_slot_dead(b, S) || pw_owner_gone(b, S)) pw_mark_dead(&b->page->S, S), S = PW_LOAD(b->page->S);
    return !(S & PW_TID);
}

/* Under L. 0: another was faster (mutexes only). */
static int pw_take_one(pw_body *b, pw_thread *me, uint64_t owner, uint64_t after, int *abandoned) {
    uint32_t S;
    *abandoned = 0;
    if (b->kind != PW_MUTEX) {
        PW_CRASH("any.before");
        if (!b->manual) pw_set_value(b, after);
        PW_CRASH("any.taken");
        return 1;
    }
    if (pw_owned(b, me, owner)) {
        b->count++;
        return 1;
    }
    S = PW_LOAD(b->page->S);
    if (!(S & PW_TID) && pw_mutex_cas(b, me, owner, S, S & PW_W)) {
        *abandoned = (S & PW_DIED) != 0;
        return 1;
    }
    if (b->native) pw_pending(me, NULL);
    return 0;
}

static int pw_take_any(pw_many *many, pw_thread *me) {
    int i, abandoned;
    uint64_t after = 0;
    for (i = 0; i < many->count; i++) {
        pw_body *b = many->bodies[i];
        uint32_t epoch = many->epochs[pw_many_index(many, b)];
        if (!pw_ready(b, me, many->owner, epoch, &after)) continue;
        if (!pw_take_one(b, me, many->owner, after, &abandoned)) continue;
        many->index = i;
        many->abandoned = (uint64_t)abandoned << i;
        return 1;
    }
    return 0;
}

static void pw_note_redo(pw_body *b, pw_thread *me, pw_body *coordinator, int index, uint64_t after, uint64_t txn) {
    pw_page *page = b->page;
    page->redo_index = (uint32_t)index;
    page->redo_value = b->kind == PW_MUTEX ? PW_LOAD(page->phase) : after;
    page->redo_old = PW_LOAD(page->S);
    page->redo_owner = pw_mine(b, me);
    memcpy(page->redo_coordinator, coordinator->hash, 16);
    page->redo_scope = (uint32_t)coordinator->scope;
    PW_CRASH("all.noting");
    PW_STORE(page->redo_txn, txn);
    PW_CRASH("all.noted");
}

static void pw_list_participants(pw_body *coordinator, pw_body **changed, int count) {
    int i;
    uint64_t scopes = 0;
    for (i = 0; i < count; i++) {
        memcpy(coordinator->page->participant[i], changed[i]->hash, 16);
        scopes |= (uint64_t)(changed[i]->scope != 0) << i;
    }
    coordinator->page->scopes = scopes;
    coordinator->page->uid = (uint32_t)geteuid();
    coordinator->page->participants = (uint32_t)count;
    PW_CRASH("all.listed");
}

static void pw_undo(pw_body **changed, int count, pw_thread *me, uint64_t owner, const int *taken) {
    int i;
    for (i = 0; i < count; i++)
        if (taken[i] && pw_owned(changed[i], me, owner)) pw_mutex_undo(changed[i], me);
    for (i = count - 1; i >= 0; i--) PW_STORE(changed[i]->page->redo_txn, 0);
}

/* Under all locks. 1: all were taken, as one step for everybody else; 0: a mutex was taken by another meanwhile. */
static int pw_commit(pw_body **changed, uint64_t *after, int count, pw_thread *me, uint64_t owner, int *abandoned) {
    pw_body *first = changed[0];
    uint64_t txn = pw_txn++;
    int taken[PW_MAX] = {0}, i, ignored;
    if (count == 1) return pw_take_one(first, me, owner, after[0], &abandoned[0]);
    pw_list_participants(first, changed, count);
    for (i = 0; i < count; i++) pw_note_redo(changed[i], me, first, i, after[i], txn);
    for (i = 0; i < count; i++) {
        if (changed[i]->kind != PW_MUTEX) continue;
        taken[i] = pw_take_one(changed[i], me, owner, 0, &abandoned[i]);
        PW_CRASH("all.mutex");
        if (!taken[i]) {
            pw_undo(changed, count, me, owner, taken);
            return 0;
        }
    }
    PW_STORE(first->page->decided, txn);
    PW_CRASH("all.decided");
    for (i = count - 1; i >= 0; i--) { /* the coordinator last */
        if (changed[i]->kind != PW_MUTEX) pw_take_one(changed[i], me, owner, after[i], &ignored);
        PW_CRASH("all.applied");
        PW_STORE(changed[i]->page->redo_txn, 0);
        PW_CRASH("all.cleared");
    }
    return 1;
}

static int pw_take_all(pw_many *many, pw_thread *me) {
    pw_body *changed[PW_MAX];
    uint64_t after[PW_MAX];
    int abandoned[PW_MAX] = {0}, count = 0, i, k;
    for (i = 0; i < many->distinct; i++) {
        pw_body *b = many->sorted[i];
        uint64_t value = 0;
        /* Only what is signalled now counts: a pulse, or a set that was reset, that found another one unsignalled is over. */
        if (!pw_ready(b, me, many->owner, PW_EPOCH(b->page->value), &value)) return 0;
        if (b->kind == PW_MUTEX ? pw_owned(b, me, many->owner) : b->manual) continue;
        changed[count] = b;
        after[count++] = value;
    }
    /* what is ours already gains its recursion after the others were taken: that is private to the process */
    if (count && !pw_commit(changed, after, count, me, many->owner, abandoned)) return 0;
    for (i = 0; i < many->distinct; i++) {
        pw_body *b = many->sorted[i];
        for (k = 0; k < count && changed[k] != b; k++) {}
        if (k == count && b->kind == PW_MUTEX) b->count++;
    }
    many->index = 0;
    many->abandoned = 0;
    for (i = 0; i < many->count; i++)
        for (k = 0; k < count; k++)
            if (changed[k] == many->bodies[i] && abandoned[k]) many->abandoned |= 1ULL << i;
    return 1;
}

/* Locks, judges; when nothing was taken and `listen`, registers at the bells. PW_OK taken, PW_TIMEOUT not. */
static int pw_many_try(pw_many *many, pw_thread *me, int64_t at, int first, int listen) {
    int wrong = pw_lock_many(many, me, at), i, taken;
    if (wrong) return wrong;
    for (i = 0; first && i < many->distinct; i++) many->epochs[i] = PW_EPOCH(many->sorted[i]->page->value);
    taken = many->all ? pw_take_all(many, me) : pw_take_any(many, me);
    if (!taken && listen) {
        for (i = 0; i < many->distinct; i++) {
            PW_STORE(many->sorted[i]->page->multi, 1);
            many->bells[i] = PW_LOAD(many->sorted[i]->page->bell);
        }
        taken = many->all ? pw_take_all(many, me) : pw_take_any(many, me); /* a mutex may be freed without L */
    }
    for (i = 0; i < many->distinct; i++)
        if (many->sorted[i]->broken) wrong = PW_CORRUPT;
    pw_unlock_many(many, many->distinct);
    return wrong ? wrong : taken ? PW_OK : PW_TIMEOUT;
}

/* When to look again without a bell: due times, a mutex whose owner may die, a page that may be hostile. */
static int64_t pw_many_look_at(pw_many *many, pw_thread *me) {
    int64_t at = PW_NEVER, now = pw_clock(0);
    int i;
    for (i = 0; i < many->distinct; i++) {
        pw_body *b = many->sorted[i];
        at = pw_sooner(at, pw_look_at(b));
        at = pw_sooner(at, now + (b->kind == PW_MUTEX ? 20 * PW_MS : pw_slice(b, me)));
    }
    return at;
}

static int pw_many_sleep(pw_many *many, int64_t at, uint32_t *alert) {
    pw_waiter waiters[PW_MAX + 1];
    unsigned count = 0;
    int got, i;
    if (!pw_waitv || pw_slices) {
        at = pw_sooner(at, pw_clock(0) + 20 * PW_MS);
        Py_BEGIN_ALLOW_THREADS
        got = pw_futex_wait(&many->sorted[0]->page->bell, many->bells[0], at);
        Py_END_ALLOW_THREADS
        return got;
    }
    for (i = 0; i < many->distinct; i++)
        pw_waiter_set(&waiters[count++], &many->sorted[i]->page->bell, many->bells[i], 0);
    if (alert) pw_waiter_set(&waiters[count++], alert, 0, 1);
    Py_BEGIN_ALLOW_THREADS
    got = pw_futex_waitv(waiters, count, at);
    Py_END_ALLOW_THREADS
    return got;
}

static int pw_many_wait(pw_many *many, int64_t at, uint32_t *alert) {
    pw_thread *me = pw_self();
    int wrong, i, got, slept = 0;
    if (many->owner == 0) many->owner = me->serial;
    pw_many_sort(many);
    for (;;) {
        wrong = pw_many_try(many, me, at ? at : pw_clock(0) + 100 * PW_MS, !slept, at != 0);
        if (wrong != PW_TIMEOUT) break;
        if (at == 0 || pw_clock(0) >= at) break;
        if (pw_alerted(alert)) {
            wrong = PW_ALERTED;
            break;
        }
        for (i = 0; !slept && i < many->distinct; i++) pw_waiting(many->sorted[i], 1);
        slept = 1;
        got = pw_many_sleep(many, pw_sooner(at, pw_many_look_at(many, me)), alert);
        PW_CRASH("many.awake");
        if ((got == EINTR || me->main) && pw_signals(me)) {
            wrong = -1;
            break;
        }
    }
    for (i = 0; slept && i < many->distinct; i++) pw_waiting(many->sorted[i], -1);
    return wrong;
}
#endif
