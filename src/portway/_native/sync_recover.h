/* What a killed process left in the middle of a wait-all is finished or dropped.
 *
 * Who finds L marked by its owner's death resolves the redo record there: apply when the coordinator has decided that
 * transaction, else drop. The coordinator itself first resolves all it lists, so that its `decided` stands as long as
 * anybody needs it. Every step may be repeated: the recoverer may be killed too. */
#ifndef PORTWAY_SYNC_RECOVER_H
#define PORTWAY_SYNC_RECOVER_H
#include "sync_body.h"

static pw_body *pw_temporary(pw_body *by, int scope, const uint8_t *hash) {
    char path[320];
    struct { uint8_t magic[8]; uint32_t version, kind, flags, length; uint64_t home; } head;
    pw_body *b;
    int fd, i, slot, at = snprintf(path, sizeof path - 34, "%s/", by->folder[scope != 0]);
    if (!by->folder[scope != 0][0]) return NULL;
    for (i = 0; i < 16; i++) at += sprintf(path + at, "%02x", hash[i]);
    fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return NULL;
    for (slot = 0; slot < PW_HOLDERS && pw_ofd(fd, F_WRLCK, PW_FIRST + slot) != 0; slot++) {}
    b = NULL;
    if (slot < PW_HOLDERS && pread(fd, &head, sizeof head, 0) == (ssize_t)sizeof head &&
        memcmp(head.magic, "PWOBJECT", 8) == 0 && head.version == 1 && head.kind >= PW_MUTEX && head.kind <= PW_TIMER)
        b = pw_map(fd, slot, (int)head.kind, (int)(head.flags & 1), head.home);
    if (!b) {
        close(fd);
        return NULL;
    }
    memcpy(b->hash, hash, 16);
    memcpy(b->folder, by->folder, sizeof b->folder);
    b->scope = scope != 0;
    pw_take_over_slot(b);
    return b;
}

static void pw_temporary_end(pw_body *b) {
    int fd = b->fd;
    pw_free(b);
    close(fd);
}

static pw_body *pw_known(pw_body *by, int scope, const uint8_t *hash) {
    pw_body *b;
    for (b = pw_bodies; b; b = b->next)
        if (!b->closing && b->scope == (scope != 0) && memcmp(b->hash, hash, 16) == 0 &&
            strcmp(b->folder[scope != 0], by->folder[scope != 0]) == 0)
            return b;
    return NULL;
}

static int pw_has_decided(pw_body *by, int scope, const uint8_t *hash, uint64_t txn) {
    pw_body *known = pw_known(by, scope, hash), *b = known ? known : pw_temporary(by, scope, hash);
    int decided = b && PW_LOAD(b->page->decided) == txn;
    if (b && !known) pw_temporary_end(b);
    return decided;
}

static void pw_resolve(pw_body *b, int decided) {
    pw_page *page = b->page;
    uint32_t S = PW_LOAD(page->S), old = page->redo_old & PW_DIED;
    PW_CRASH("recover.before");
    if (b->kind != PW_MUTEX) {
        if (decided && !b->manual) pw_set_value(b, page->redo_value);
    } else if (!decided && ((S & PW_TID) == (page->redo_owner & PW_TID) || (!(S & PW_TID) && (S & PW_DIED)))) {
        if (pw_cas(&page->S, S, (S & PW_W) | old) && (S & PW_W)) pw_futex_wake(&page->S, 1);
    }
    PW_CRASH("recover.applied");
    PW_STORE(page->redo_txn, 0);
}

/* b is the coordinator: everything it lists is resolved before it may be used again. */
static int pw_finish_others(pw_body *b, uint64_t txn, int decided) {
    uint32_t count = b->page->participants, i;
    uint64_t scopes = b->page->scopes;
    pw_thread *me = pw_self();
    for (i = 1; i < count && i < PW_MAX; i++) {
        int scope = (int)(scopes >> i & 1), wrong;
        uint8_t hash[16];
        pw_body *known, *one;
        memcpy(hash, b->page->participant[i], 16);
        known = pw_known(b, scope, hash);
        one = known ? known : pw_temporary(b, scope, hash);
        if (!one) continue;
        wrong = PW_OK;
        if (pw_below(b, one) && PW_LOAD(one->page->redo_txn) == txn) { /* only in locking order, whatever the page says */
            wrong = pw_L_lock(one, me, PW_NEVER); /* resolves it by itself if the owner's death marked it */
            if (wrong == PW_OK) {
                if (PW_LOAD(one->page->redo_txn) == txn) pw_resolve(one, decided);
                pw_L_unlock(one);
            }
        }
        if (!known) pw_temporary_end(one);
        if (wrong) return wrong;
        PW_CRASH("recover.one");
    }
    return PW_OK;
}

static int pw_recover(pw_body *b) {
    uint64_t txn = PW_LOAD(b->page->redo_txn);
    uint8_t hash[16];
    int decided, wrong;
    if (txn == 0) return PW_OK;
    memcpy(hash, b->page->redo_coordinator, 16);
    if (memcmp(hash, b->hash, 16) == 0) {
        decided = PW_LOAD(b->page->decided) == txn;
        wrong = pw_finish_others(b, txn, decided);
        if (wrong) {
            b->page->redo_txn = txn;
            return wrong;
        }
    } else
        decided = pw_has_decided(b, (int)b->page->redo_scope, hash, txn);
    pw_resolve(b, decided);
    return PW_OK;
}
#endif
