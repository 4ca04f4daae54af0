/* The page of a synchronisation object, robust words, futex calls, and the process's bodies.
 *
 * Mapping of a process: [4 pages of holder slots][page 0, shared][one page, private to the process]. The kernel's robust
 * list runs through the private page only: the node of the word at page-end - 24 lies at end + 8, that of the word at
 * end - 8 at end + 24 (glibc's distance of word and node is 32 bytes, and it writes `prev` at node - 8). So no pointer
 * that anybody follows lies where others can write.
 *
 * Two words are watched. S: a mutex's owner, or of the other kinds who sleeps. L: the lock of the page, held for some
 * tens of nanoseconds, with the GIL kept, and never across a wait of the object itself.
 *
 * An owner is written as its thread id (native), or as bit 29 and its holder slot: without a robust list, in another pid
 * namespace than the creator's, and with PORTWAY_SYNC=slices. Thread ids of two namespaces never meet in one word, and
 * a slot's death is asked of the kernel (its file lock), not read. */
#ifndef PORTWAY_SYNC_PAGE_H
#define PORTWAY_SYNC_PAGE_H
#include <Python.h>
#include "sync_fork.h"
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#define PW_W 0x80000000u    /* someone sleeps (FUTEX_WAITERS) */
#define PW_DIED 0x40000000u /* FUTEX_OWNER_DIED */
#define PW_TID 0x3fffffffu
#define PW_SLOT 0x20000000u /* the owner is a holder slot */
/* S of the kinds that have no owner: two phases of sleeping, so that a late sleeper never sleeps on a newer state */
#define PW_ASLEEP_A 0x80000000u
#define PW_ASLEEP_B 0x40000000u
#define PW_LOOK 0xc0000000u

enum { PW_MUTEX = 1, PW_SEMAPHORE, PW_EVENT, PW_TIMER };
enum {
    PW_OK, PW_ABANDONED, PW_TIMEOUT, PW_ALERTED, PW_NOT_OWNER, PW_TOO_MANY, PW_CORRUPT, PW_STUCK, PW_CLOSED, PW_DENIED,
    PW_SIGNALLED /* never leaves the headers: a signal came while a lock was held */
};
#define PW_NEVER INT64_MAX
#define PW_PAGE 4096
#define PW_ROOT 256 /* bytes of a root's path */
#define PW_MS 1000000LL
#define PW_KEPT 28

typedef struct {
    int64_t due, period;
    uint64_t realtime;
    uint64_t spare;
} pw_cfg;

typedef struct {
    uint8_t common[0x800];
    uint64_t decided; /* the last transaction this object decided, as coordinator */
    uint64_t scopes;  /* bit i: participant i is Global */
    uint32_t participants, uid; /* uid: whose Local objects those not Global are */
    uint64_t spare1;
    uint8_t participant[64][16]; /* file names, binary, in locking order */
    struct { uint64_t txn, mask; } kept[PW_KEPT]; /* decided, with participants that the recoverer might not open */
    uint8_t gap1[0xe00 - 0xc20 - 16 * PW_KEPT];
    uint64_t redo_txn, redo_value; /* redo_value: what the transaction makes of this object; of a mutex: its phase */
    uint8_t redo_coordinator[16];
    uint32_t redo_scope, redo_old; /* redo_old: S of a mutex before it */
    uint32_t redo_owner, redo_index; /* what the transaction writes into S; our place in the coordinator's list */
    uint8_t gap2[0xe40 - 0xe30];
    pw_cfg timer[2];
    uint32_t timer_now, spare2;
    uint64_t maximum;
    uint8_t gap3[0xfc0 - 0xe90];
    uint32_t bell, multi; /* multi-object and asyncio waits sleep on the bell */
    uint64_t value;       /* semaphore: count; event: signalled | grants << 1 | epoch << 32 */
    uint8_t gap4[0xfe8 - 0xfd0];
    union {
        struct {
            uint32_t S, phase; /* phase: of the sleepers on S, by its lowest bit; of a mutex: how often it was undone */
        };
        uint64_t S_phase;
    };
    uint32_t gap5[2];
    uint32_t L;
    uint32_t gap6;
} pw_page;

typedef char pw_check_page[sizeof(pw_page) == PW_PAGE ? 1 : -1];

typedef struct pw_node {
    struct pw_node *prev, *next; /* the list's pointers are addresses of `next`; glibc's list does the same */
} pw_node;

typedef struct {
    pw_node s, l; /* at end + 0 (next at + 8) and end + 16 (next at + 24) */
} pw_private;

typedef struct pw_body {
    pw_page *page;
    uint32_t *slots; /* 1,024 x {pid, waiting, start} */
    pw_private *nodes;
    uint64_t owner, owner_thread; /* this process's owner of the mutex, 0: none. Never read from the page */
    uint32_t count;
    int native, broken, l_busy, fd, slot, kind, manual, scope, pins, closing, temporary;
    int rank; /* see pw_below */
    int luck, tries; /* whether giving up the core once has been worth it, see pw_give_way */
    uint64_t dev, ino, home;
    int64_t ask; /* see pw_owner_gone: not before */
    uint32_t uid; /* of the file */
    uint8_t hash[16];
    char root[PW_ROOT];
    struct pw_body *next, *spare; /* all of the process; those free to be used again */
    struct pw_body *held;         /* those the thread owns by slot */
    struct pw_thread *held_by;
} pw_body;

/* A call, or a wait for several objects, that is going on: their memory stays although the last handle is closed. */
typedef struct pw_use {
    struct pw_use *next, **at;
    pw_body **bodies;
    int count;
    uint64_t serial; /* the thread's */
} pw_use;

typedef struct pw_thread {
    uint64_t serial; /* of this thread, never used again; 0: not asked yet */
    uint32_t tid;
    int main, recovering;
    struct robust_list_head *head;
    pw_body *held;
} pw_thread;

static __thread pw_thread pw_me __attribute__((tls_model("initial-exec")));
static uint64_t pw_serials = 1;
static pw_body *pw_bodies, *pw_spares;
static pw_use *pw_uses;
static int pw_slices, pw_waitv = 1, pw_old_kernel; /* see pw_load */
static uint64_t pw_home;
static pthread_mutex_t pw_held_lock = PTHREAD_MUTEX_INITIALIZER; /* pw_thread.held and pw_body.held */
static pthread_key_t pw_end_of_thread;

#ifdef PORTWAY_CRASH_POINTS
static const char *pw_crash_name, *pw_stop_name;
static long pw_crash_skip;
static void pw_crash(const char *name) {
    if (pw_stop_name && strcmp(pw_stop_name, name) == 0) { /* once; others act meanwhile, then SIGCONT */
        pw_stop_name = NULL;
        kill(getpid(), SIGSTOP);
    }
    if (pw_crash_name && strcmp(pw_crash_name, name) == 0 && pw_crash_skip-- == 0) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
}
#define PW_CRASH(name) pw_crash(name)
#else
#define PW_CRASH(name) ((void)0)
#endif

#define PW_COLD __attribute__((noinline, cold))
#define PW_LOAD(at) __atomic_load_n(&(at), __ATOMIC_SEQ_CST)
#define PW_STORE(at, value) __atomic_store_n(&(at), (value), __ATOMIC_SEQ_CST)
#if defined(__x86_64__) || defined(__i386__)
#define PW_PAUSE() __builtin_ia32_pause()
#else
#define PW_PAUSE() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#endif
#define PW_FENCE() __atomic_signal_fence(__ATOMIC_SEQ_CST)

static inline int pw_cas(uint32_t *at, uint32_t old, uint32_t fresh) {
    return __atomic_compare_exchange_n(at, &old, fresh, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static int64_t pw_clock(int realtime) {
    struct timespec now;
    clock_gettime(realtime ? CLOCK_REALTIME : CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* ---- threads ---- */

static void pw_thread_init(void) {
    struct robust_list_head *head = NULL;
    size_t size = 0;
    pw_me.tid = (uint32_t)syscall(SYS_gettid);
    pw_me.main = pw_me.tid == (uint32_t)getpid();
    if (sizeof(void *) == 8 && syscall(SYS_get_robust_list, 0, &head, &size) == 0 && head &&
        size == sizeof *head && head->futex_offset == -32)
        pw_me.head = head;
    pw_me.held = NULL;
    pw_me.serial = __atomic_fetch_add(&pw_serials, 1, __ATOMIC_SEQ_CST);
    pthread_setspecific(pw_end_of_thread, &pw_me);
}

static inline pw_thread *pw_self(void) {
    if (__builtin_expect(pw_me.serial == 0, 0)) pw_thread_init();
    return &pw_me;
}

static inline void pw_pending(pw_thread *me, pw_node *node) {
    PW_FENCE();
    me->head->list_op_pending = node ? (struct robust_list *)&node->next : NULL;
    PW_FENCE();
}

static inline void pw_link(pw_thread *me, pw_node *node) {
    uintptr_t first = (uintptr_t)me->head->list.next;
    node->next = (pw_node *)first;
    node->prev = (pw_node *)&me->head->list;
    PW_FENCE();
    *(void **)((first & ~(uintptr_t)1) - 8) = &node->next;
    me->head->list.next = (struct robust_list *)&node->next;
    PW_FENCE();
}

static inline void pw_unlink(pw_node *node) {
    PW_FENCE();
    *(void **)((uintptr_t)node->prev & ~(uintptr_t)1) = node->next;
    *(void **)(((uintptr_t)node->next & ~(uintptr_t)1) - 8) = node->prev;
    PW_FENCE();
    node->next = node->prev = NULL;
}

/* ---- futex ---- */

static struct timespec *pw_at(int64_t at, struct timespec *when) {
    if (at == PW_NEVER) return NULL;
    when->tv_sec = at / 1000000000LL;
    when->tv_nsec = at % 1000000000LL;
    return when;
}

/* 0 woken, else errno. `at` is monotonic, absolute; below 0: so many nanoseconds from now. */
static int pw_futex_wait(uint32_t *word, uint32_t expected, int64_t at) {
    struct timespec when;
    if (at < 0) return syscall(SYS_futex, word, FUTEX_WAIT, expected, pw_at(-at, &when), NULL, 0) == 0 ? 0 : errno;
    return syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, pw_at(at, &when), NULL, FUTEX_BITSET_MATCH_ANY) == 0
               ? 0 : errno;
}

static long pw_futex_wake(uint32_t *word, int count) {
    return syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

/* A word of this process, whichever way it is slept on. */
static void pw_futex_wake_own(uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, NULL, NULL, 0);
    pw_futex_wake(word, INT_MAX);
}

typedef struct {
    uint64_t val, uaddr;
    uint32_t flags, reserved;
} pw_waiter;

static void pw_waiter_set(pw_waiter *one, uint32_t *word, uint32_t expected, int private) {
    one->val = expected;
    one->uaddr = (uint64_t)(uintptr_t)word;
    one->flags = 2 | (private ? FUTEX_PRIVATE_FLAG : 0); /* FUTEX_32 */
    one->reserved = 0;
}

static int pw_futex_waitv(pw_waiter *waiters, unsigned count, int64_t at) {
    struct timespec when;
    return syscall(449, waiters, count, 0, pw_at(at, &when), CLOCK_MONOTONIC) >= 0 ? 0 : errno;
}

/* How long a sleep may last at most: signals may slip in just before it, and a page may have been scribbled over. */
static int64_t pw_slice(pw_body *b, pw_thread *me) {
    return ((b && !b->native) || pw_old_kernel ? 20 : me->main ? 40 : 500) * PW_MS;
}

static int64_t pw_sooner(int64_t a, int64_t b) { return a < b ? a : b; }

static int pw_signals(pw_thread *me) {
    struct robust_list *kept = me->head ? me->head->list_op_pending : NULL;
    int wrong;
    if (me->head) me->head->list_op_pending = NULL; /* a handler written in Python may use other objects */
    wrong = PyErr_CheckSignals();
    if (me->head) me->head->list_op_pending = kept;
    return wrong;
}

/* ---- a page that was cut: SIGBUS becomes a zero page and a mark ---- */

/* The guard's hook (guard.h). Bodies are never given back to malloc: this may run while another thread frees one. */
static int pw_heal(void *address) {
    uintptr_t at = (uintptr_t)address;
    pw_body *b;
    for (b = pw_bodies; b; b = b->next)
        if (at >= (uintptr_t)b->slots && at < (uintptr_t)b->nodes) {
            b->broken = 1;
            return mmap((void *)(at & ~(uintptr_t)(PW_PAGE - 1)), PW_PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
        }
    return 0;
}
#endif
