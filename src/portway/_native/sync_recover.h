/* What a killed process left in the middle of a wait-all is finished or dropped.
 *
 * Who finds L marked by its owner's death resolves the redo record there: apply when the coordinator has decided that
 * transaction, else drop. The coordinator itself first resolves all it lists, so that its `decided` stands as long as
 * anybody needs it. Every step may be repeated: the recoverer may be killed too. */
#ifndef PORTWAY_SYNC_RECOVER_H
#define PORTWAY_SYNC_RECOVER_H
#include "sync_body.h"

/* Opens what a record names, for a moment. NULL and *denied: it is there, or may be, but we may not open it. */
static pw_body *pw_temporary(pw_body *by, int scope, uint32_t uid, const uint8_t *hash, int *denied) {
    char path[PW_ROOT + 64];
    struct { uint8_t magic[8]; uint32_t version, kind, flags, length; uint64_t home; } head;
    pw_body *b = NULL;
    int fd, i, slot, at;
    at = scope ? snprintf(path, sizeof path, "%s/portway-global/", by->root)
               : snprintf(path, sizeof path, "%s/portway-%u/", by->root, (unsigned)uid);
    for (i = 0; i < 16; i++) at += sprintf(path + at, "%02x", hash[i]);
    fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    *denied = fd < 0 && errno != ENOENT && errno != ELOOP && errno != ENXIO && errno != EISDIR;
    if (fd < 0) return NULL;
    if (pread(fd, &head, sizeof head, 0) == (ssize_t)sizeof head && memcmp(head.magic, "PWOBJECT", 8) == 0 &&
        head.version == 1 && head.kind >= PW_MUTEX && head.kind <= PW_TIMER)
        b = pw_map(fd, -1, (int)head.kind, (int)(head.flags & 1), head.home, scope);
    if (!b) {
        close(fd);
        return NULL;
    }
    b->temporary = 1;
    memcpy(b->hash, hash, 16);
    memcpy(b->root, by->root, sizeof b->root);
    if (b->native) { /* by its thread id it needs no slot, and must not be taken for a holder */
        pw_ofd(fd, F_RDLCK, PW_REPAIRING);
        return b;
    }
    for (slot = 0; slot < PW_HOLDERS && pw_ofd(fd, F_WRLCK, PW_FIRST + slot) != 0; slot++) {}
    if (slot < PW_HOLDERS) {
        b->slot = slot;
        pw_take_over_slot(b);
        return b;
    }
    pw_free(b);
    close(fd);
    *denied = 1;
    return NULL;
}

static void pw_done(pw_body *b) {
    int fd = b->fd;
    if (!b->temporary) return;
    pw_free(b);
    close(fd);
}

/* What a record names: our own body of it, or a temporary one; pw_done afterwards. */
static pw_body *pw_reach(pw_body *by, int scope, uint32_t uid, const uint8_t *hash, int *denied) {
    pw_body *b;
    *denied = 0;
    for (b = pw_bodies; b; b = b->next)
        if (!b->closing && !b->temporary && b->scope == (scope != 0) && memcmp(b->hash, hash, 16) == 0 &&
            (b->scope || b->uid == uid) && strcmp(b->root, by->root) == 0)
            return b;
    return pw_temporary(by, scope, uid, hash, denied);
}

/* ---- decisions that are kept for participants which the recoverer of their coordinator might not open ---- */

static uint64_t *pw_kept(pw_page *page, uint64_t txn) {
    int i;
    for (i = 0; i < PW_KEPT; i++)
        if (PW_LOAD(page->kept[i].mask) && PW_LOAD(page->kept[i].txn) == txn) return &page->kept[i].mask;
    return NULL;
}

/* Under L of the coordinator. A full table forgets: whoever asks for what was forgotten drops it. */
static void pw_keep(pw_page *page, uint64_t txn, uint64_t mask) {
    int i;
    for (i = 0; i < PW_KEPT - 1; i++)
        if (!PW_LOAD(page->kept[i].mask) || PW_LOAD(page->kept[i].txn) == txn) break;
    PW_STORE(page->kept[i].txn, txn);
    PW_STORE(page->kept[i].mask, mask);
}

/* Of a participant, whose place in the list is `index`. Its own bit nobody else clears. */
static int pw_has_decided(pw_page *page, uint64_t txn, uint32_t index, int forget) {
    uint64_t *kept = pw_kept(page, txn), bit = 1ULL << (index & 63);
    if (!kept || !(PW_LOAD(*kept) & bit)) return PW_LOAD(page->decided) == txn;
    if (forget) __atomic_fetch_and(kept, ~bit, __ATOMIC_SEQ_CST);
    return 1;
}

static void pw_resolve(pw_body *b, int decided) {
    pw_page *page = b->page;
    PW_CRASH("recover.before");
    if (b->kind != PW_MUTEX) {
        if (decided && !b->manual) pw_set_value(b, page->redo_value);
    } else if (!decided)
        pw_mutex_restore(page, page->redo_owner & PW_TID, page->redo_old & PW_DIED, (uint32_t)page->redo_value);
    PW_CRASH("recover.applied");
    PW_STORE(page->redo_txn, 0);
}

/* b is the coordinator: everything it lists is resolved before it may be used again; of what may not be opened, the
 * decision is kept. */
static int pw_finish_others(pw_body *b, uint64_t txn, int decided) {
    uint32_t count = b->page->participants, uid = b->page->uid, i;
    uint64_t scopes = b->page->scopes, unreached = 0;
    int64_t until = pw_clock(0) + PW_L_PATIENCE * 1000 * PW_MS;
    pw_thread *me = pw_self();
    for (i = 1; i < count && i < PW_MAX; i++) {
        uint8_t hash[16];
        int denied, wrong = PW_OK;
        pw_body *one;
        memcpy(hash, b->page->participant[i], 16);
        one = pw_reach(b, (int)(scopes >> i & 1), uid, hash, &denied);
        if (!one) {
            if (denied) unreached |= 1ULL << i;
            continue;
        }
        if (pw_below(b, one) && PW_LOAD(one->page->redo_txn) == txn) { /* only in locking order, whatever the page says */
            wrong = pw_L_lock(one, me, until); /* resolves it by itself if the owner's death marked it */
            if (wrong == PW_OK) {
                if (PW_LOAD(one->page->redo_txn) == txn) pw_resolve(one, decided);
                pw_L_unlock(one);
            }
        }
        pw_done(one);
        if (wrong) return wrong == PW_TIMEOUT ? PW_STUCK : wrong;
        PW_CRASH("recover.one");
    }
    if (decided && unreached) pw_keep(b->page, txn, unreached);
    return PW_OK;
}

static int pw_recover(pw_body *b) {
    uint64_t txn = PW_LOAD(b->page->redo_txn);
    pw_thread *me = pw_self();
    uint8_t hash[16];
    uint32_t index = b->page->redo_index;
    int decided, wrong, denied, before = me->recovering;
    pw_body *coordinator;
    if (txn == 0) return PW_OK;
    memcpy(hash, b->page->redo_coordinator, 16);
    if (memcmp(hash, b->hash, 16) == 0) {
        decided = PW_LOAD(b->page->decided) == txn;
        me->recovering = 1;
        wrong = pw_finish_others(b, txn, decided);
        me->recovering = before;
        if (wrong) return wrong;
        pw_resolve(b, decided);
        return PW_OK;
    }
    coordinator = pw_reach(b, (int)b->page->redo_scope, b->uid, hash, &denied);
    if (!coordinator) {
        if (denied) return PW_DENIED;
        pw_resolve(b, 0);
        return PW_OK;
    }
    decided = pw_has_decided(coordinator->page, txn, index, 0);
    pw_resolve(b, decided);
    pw_has_decided(coordinator->page, txn, index, 1);
    pw_done(coordinator);
    return PW_OK;
}
#endif
