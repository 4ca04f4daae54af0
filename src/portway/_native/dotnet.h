/* .NET's named mutex on Linux, spoken without pthread: glibc's robust mutex protocol on a word in a shared page.
 *
 * The page (CoreCLR PAL, sharedmemory.cpp and mutex.cpp, .NET Core 2.0 to .NET 10):
 *     0   1   type, 0 = mutex          8  40  pthread_mutex_t: lock, count, owner, nusers, kind, (spins), prev, next
 *     1   1   version, 1              48   4  process id of the owner, or -1
 *     2   6   not written             52   4  padding, 0 (.NET 11 has the thread id here: another layout)
 *                                     56   8  thread id of the owner, or -1
 *                                     64   1  abandoned by a thread that ended
 *
 * What is ours: the kernel marks a dead owner's words by walking a list that starts in the owner thread's memory. glibc
 * would put that list's links (prev, next) into the shared page, where any peer could redirect them. Here one keeper
 * thread of the process owns every word, with a list head of its own whose futex_offset points from a node in a private
 * page, mapped right behind the shared one, back to the word. So no pointer that we or the kernel follow can be written
 * by a peer, and glibc's list of the calling thread is never touched, except for its list_op_pending while waiting.
 */
#ifndef PORTWAY_DOTNET_H
#define PORTWAY_DOTNET_H
#define _GNU_SOURCE 1
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__GLIBC__) && defined(__LP64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define DN_SUPPORTED 1
#else
#define DN_SUPPORTED 0
#endif

#define DN_PAGE 4096
#define DN_TID_MASK 0x3fffffffu
#define DN_WAITERS 0x80000000u
#define DN_DIED 0x40000000u
#define DN_KIND 0x91u /* PTHREAD_MUTEX_RECURSIVE | robust 0x10 | process-shared 0x80 */
#define DN_NOT_RECOVERABLE 0x7ffffffeu
enum { DN_TAKEN = 0, DN_ABANDONED = 1, DN_HELD = 2, DN_CORRUPT = 3, DN_NOT_OWNER = 4, DN_TOO_MANY = 5 };

typedef struct dn_node { struct dn_node *next, *prev; } dn_node;

typedef struct dn_page { /* offset 8 of the file: pthread_mutex_t of glibc, then what .NET adds */
    uint8_t type, version, unused[6];
    uint32_t lock, count, owner, nusers, kind;
    uint8_t rest[sizeof(pthread_mutex_t) - 20];
    uint32_t process;
    uint32_t padding;
    uint64_t thread;
    uint8_t abandoned;
} dn_page;

typedef struct dn_mutex {
    volatile dn_page *page;
    dn_node *node; /* at the start of the private page behind the shared one */
    uint64_t owner; /* our serial of the owning thread, 0: none of this process */
    uint64_t count;
    int linked, broken;
    struct dn_mutex *next; /* every open one of this process */
} dn_mutex;

typedef struct { dn_node *list; long futex_offset; void *pending; } dn_head;

static dn_head dn_keeper = {(dn_node *)&dn_keeper, (long)offsetof(dn_page, lock) - DN_PAGE, NULL};
static uint32_t dn_keeper_tid;
static dn_mutex *dn_open_ones;
static pthread_mutex_t dn_lock = PTHREAD_MUTEX_INITIALIZER; /* guards all of the above; held for a few stores only */
static pthread_key_t dn_key;
static int dn_key_made;
static uint64_t dn_last_serial;
static __thread uint64_t dn_serial;
static __thread uint32_t dn_tid; /* for .NET's field only; forgotten by fork */
static uint32_t dn_pid;

/* -- the keeper ---------------------------------------------------------------------------------------------------- */

static void *dn_keep(void *ready) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    if (syscall(SYS_set_robust_list, &dn_keeper, sizeof dn_keeper) == 0)
        __atomic_store_n((uint32_t *)ready, (uint32_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
    else
        __atomic_store_n((uint32_t *)ready, DN_TID_MASK, __ATOMIC_RELEASE);
    syscall(SYS_futex, ready, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    for (;;) pause();
    return NULL;
}

/* 0 or an errno. With dn_lock held. The keeper lives as long as the process; a fork child starts its own. */
static int dn_start_keeper(void) {
    static uint32_t ready;
    pthread_attr_t attributes;
    pthread_t thread;
    int error;
    if (dn_keeper_tid != 0) return 0;
    ready = 0;
    if ((error = pthread_attr_init(&attributes)) != 0) return error;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 65536);
    error = pthread_create(&thread, &attributes, dn_keep, &ready);
    pthread_attr_destroy(&attributes);
    if (error != 0) return error;
    while (__atomic_load_n(&ready, __ATOMIC_ACQUIRE) == 0)
        syscall(SYS_futex, &ready, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    if (ready == DN_TID_MASK) return ENOSYS;
    dn_keeper_tid = ready;
    dn_pid = (uint32_t)getpid();
    return 0;
}

static int dn_start_keeper_with_lock(void) {
    int error = 0;
    pthread_mutex_lock(&dn_lock);
    error = dn_start_keeper();
    pthread_mutex_unlock(&dn_lock);
    return error;
}

static void dn_link(dn_node *node) {
    node->next = dn_keeper.list;
    node->prev = (dn_node *)&dn_keeper;
    if (dn_keeper.list != (dn_node *)&dn_keeper) dn_keeper.list->prev = node;
    __atomic_store_n(&dn_keeper.list, node, __ATOMIC_RELEASE); /* last: the kernel may walk at any moment */
}

static void dn_unlink(dn_node *node) {
    if (node->next != (dn_node *)&dn_keeper) node->next->prev = node->prev;
    if (node->prev == (dn_node *)&dn_keeper) __atomic_store_n(&dn_keeper.list, node->next, __ATOMIC_RELEASE);
    else __atomic_store_n(&node->prev->next, node->next, __ATOMIC_RELEASE);
}

static void dn_pending(dn_node *node) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(&dn_keeper.pending, node, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* -- steps that touch the page: bodies of guarded() ---------------------------------------------------------------- */

typedef struct { dn_mutex *mutex; uint32_t flags; uint32_t seen; int result; uint64_t serial; uint32_t thread; } dn_step;

static void dn_wake(volatile uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

static int dn_layout(volatile dn_page *page) {
    return page->type == 0 && page->version == 1 && page->kind == DN_KIND && page->padding == 0;
}

static void dn_give_up_word(volatile dn_page *page) {
    if (__atomic_exchange_n(&page->lock, 0, __ATOMIC_RELEASE) & DN_WAITERS) dn_wake(&page->lock, 1);
}

/* Takes a free or dead owner's word, or says what it saw and marks that somebody sleeps. */
static void dn_take(void *argument) {
    dn_step *step = argument;
    volatile dn_page *page = step->mutex->page;
    uint32_t seen = __atomic_load_n(&page->lock, __ATOMIC_ACQUIRE);
    step->result = DN_CORRUPT;
    if (!dn_layout(page)) return;
    for (;;) {
        uint32_t want;
        if ((seen & ~DN_WAITERS) == 0 || (seen & DN_DIED)) {
            want = dn_keeper_tid | step->flags | (seen & DN_WAITERS);
            if (!__atomic_compare_exchange_n(&page->lock, &seen, want, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) continue;
            break;
        }
        step->result = DN_HELD;
        if ((seen & DN_WAITERS) == 0 && step->flags) {
            if (!__atomic_compare_exchange_n(&page->lock, &seen, seen | DN_WAITERS, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE))
                continue;
            seen |= DN_WAITERS;
        }
        step->seen = seen;
        return;
    }
    if (page->owner == DN_NOT_RECOVERABLE) { /* glibc's word for "given up"; .NET never leaves it so */
        dn_give_up_word(page);
        step->result = DN_CORRUPT;
        return;
    }
    step->result = (seen & DN_DIED) || page->abandoned ? DN_ABANDONED : DN_TAKEN;
    page->count = 1;
    page->owner = dn_keeper_tid;
    if (!(seen & DN_DIED)) page->nusers++; /* as glibc: the dead one's use is taken over */
    page->process = dn_pid;
    page->thread = step->thread;
    page->abandoned = 0;
}

static void dn_clear_owner(void *argument) {
    dn_step *step = argument;
    volatile dn_page *page = step->mutex->page;
    if (step->flags) page->abandoned = 1;
    page->process = UINT32_MAX;
    page->thread = UINT64_MAX;
    page->count = 0;
    page->owner = 0;
    page->nusers--;
    step->seen = __atomic_load_n(&page->lock, __ATOMIC_ACQUIRE);
    step->result = (step->seen & DN_TID_MASK) == dn_keeper_tid ? DN_TAKEN : DN_CORRUPT;
}

static void dn_free_word(void *argument) {
    dn_give_up_word(((dn_step *)argument)->mutex->page);
}

/* Before a waiter leaves without the mutex: a wake it may have swallowed must reach the next one. */
static void dn_leave(void *argument) {
    volatile dn_page *page = ((dn_step *)argument)->mutex->page;
    uint32_t seen = __atomic_load_n(&page->lock, __ATOMIC_ACQUIRE);
    for (;;) {
        if ((seen & DN_TID_MASK) == 0) {
            dn_wake(&page->lock, 1);
            return;
        }
        if (seen & DN_WAITERS) return;
        if (__atomic_compare_exchange_n(&page->lock, &seen, seen | DN_WAITERS, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE))
            return;
    }
}

static void dn_fill(void *argument) { /* a new file, all zero */
    volatile dn_page *page = argument;
    page->kind = DN_KIND;
    page->process = UINT32_MAX;
    page->thread = UINT64_MAX;
    page->type = 0;
    page->version = 1;
}

static void dn_check(void *argument) {
    dn_step *step = argument;
    step->result = dn_layout(step->mutex->page);
}

/* -- whole operations ---------------------------------------------------------------------------------------------- */

typedef int (*dn_guard)(void (*)(void *), void *);

/* Takes or reports; never waits. `willing`: mark that a waiter is about to sleep. */
static int dn_try(dn_mutex *mutex, uint64_t serial, int willing, uint32_t *seen, dn_guard guard) {
    dn_step step = {mutex, willing ? DN_WAITERS : 0, 0, DN_CORRUPT, serial, 0};
    int result;
    pthread_mutex_lock(&dn_lock);
    if (mutex->broken) result = DN_CORRUPT;
    else if (mutex->owner == serial) result = mutex->count == UINT64_MAX ? DN_TOO_MANY : (mutex->count++, DN_TAKEN);
    else {
        if (dn_tid == 0) dn_tid = (uint32_t)syscall(SYS_gettid);
        step.thread = dn_tid;
        dn_pending(mutex->node);
        if (guard(dn_take, &step) != 0) {
            step.result = DN_CORRUPT;
            mutex->broken = 1;
        }
        if (step.result == DN_TAKEN || step.result == DN_ABANDONED) {
            dn_link(mutex->node);
            mutex->linked = 1;
            mutex->owner = serial;
            mutex->count = 1;
        }
        dn_pending(NULL);
        *seen = step.seen;
        result = step.result;
    }
    pthread_mutex_unlock(&dn_lock);
    return result;
}

/* With dn_lock held: lets go, whatever the count. */
static int dn_let_go(dn_mutex *mutex, int abandoned, dn_guard guard) {
    dn_step step = {mutex, (uint32_t)abandoned, 0, DN_CORRUPT, 0, 0};
    mutex->owner = 0;
    mutex->count = 0;
    dn_pending(mutex->node);
    if (mutex->linked) dn_unlink(mutex->node);
    mutex->linked = 0;
    if (guard(dn_clear_owner, &step) != 0) mutex->broken = 1;
    else if (step.result == DN_TAKEN && guard(dn_free_word, &step) != 0) mutex->broken = 1;
    dn_pending(NULL);
    return mutex->broken || step.result != DN_TAKEN ? DN_CORRUPT : DN_TAKEN;
}

static int dn_release(dn_mutex *mutex, uint64_t serial, dn_guard guard) {
    int result = DN_TAKEN;
    pthread_mutex_lock(&dn_lock);
    if (mutex->owner != serial) result = DN_NOT_OWNER;
    else if (mutex->count > 1) mutex->count--;
    else result = dn_let_go(mutex, 0, guard);
    pthread_mutex_unlock(&dn_lock);
    return result;
}

static dn_guard dn_guard_at_exit;

static void dn_thread_ends(void *value) { /* pthread key destructor: runs in the ending thread, without the GIL */
    uint64_t serial = (uint64_t)(uintptr_t)value;
    pthread_mutex_lock(&dn_lock);
    for (dn_mutex *one = dn_open_ones; one != NULL; one = one->next)
        if (one->owner == serial) dn_let_go(one, 1, dn_guard_at_exit);
    pthread_mutex_unlock(&dn_lock);
}

/* This thread's number, never used twice in the process; 0 when no key can be made. */
static uint64_t dn_me(dn_guard guard) {
    if (dn_serial != 0) return dn_serial;
    pthread_mutex_lock(&dn_lock);
    dn_guard_at_exit = guard;
    if (!dn_key_made) dn_key_made = pthread_key_create(&dn_key, dn_thread_ends) == 0;
    if (dn_key_made) {
        dn_serial = ++dn_last_serial;
        if (pthread_setspecific(dn_key, (void *)(uintptr_t)dn_serial) != 0) dn_serial = 0;
    }
    pthread_mutex_unlock(&dn_lock);
    return dn_serial;
}

/* Sleeps while the word is `seen`, at most `ns`; 0 woken or changed, EINTR, ETIMEDOUT, EFAULT. Without the GIL. */
static int dn_sleep(dn_mutex *mutex, uint32_t seen, int64_t ns) {
    struct timespec left = {ns / 1000000000, ns % 1000000000};
    if (syscall(SYS_futex, &mutex->page->lock, FUTEX_WAIT, seen, ns < 0 ? NULL : &left, NULL, 0) == 0) return 0;
    return errno == EAGAIN ? 0 : errno;
}

/* Waiters of other processes wake too, look and sleep again. */
static void dn_wake_all(dn_mutex *mutex) { dn_wake(&mutex->page->lock, 0x7fffffff); }

/* While it waits, this thread's own head names the word: woken and killed, the kernel wakes the next (as glibc does). */
static void dn_watch(dn_mutex *mutex) {
    static __thread dn_head *head;
    size_t size = 0;
    if (head == NULL) {
        if (syscall(SYS_get_robust_list, 0, &head, &size) != 0 || head == NULL || size != sizeof(dn_head)) return;
    }
    if (mutex == NULL) head->pending = NULL;
    else if (head->pending == NULL) head->pending = (char *)&mutex->page->lock - head->futex_offset;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Maps `fd` with a private page behind it. NULL with errno. */
static dn_mutex *dn_map(int fd) {
    dn_mutex *mutex = calloc(1, sizeof *mutex);
    char *base;
    if (mutex == NULL) return NULL;
    base = mmap(NULL, 2 * DN_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) goto no_memory;
    if (mmap(base, DN_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        munmap(base, 2 * DN_PAGE);
        goto no_memory;
    }
    mutex->page = (volatile dn_page *)base;
    mutex->node = (dn_node *)(base + DN_PAGE);
    pthread_mutex_lock(&dn_lock);
    mutex->next = dn_open_ones;
    dn_open_ones = mutex;
    pthread_mutex_unlock(&dn_lock);
    return mutex;
no_memory:
    free(mutex);
    return NULL;
}

/* Abandons it if a thread of this process owns it; the next owner is told. */
static void dn_unmap(dn_mutex *mutex, dn_guard guard) {
    pthread_mutex_lock(&dn_lock);
    if (mutex->owner != 0) dn_let_go(mutex, 1, guard);
    for (dn_mutex **at = &dn_open_ones; *at != NULL; at = &(*at)->next)
        if (*at == mutex) {
            *at = mutex->next;
            break;
        }
    munmap((void *)mutex->page, 2 * DN_PAGE);
    pthread_mutex_unlock(&dn_lock);
    free(mutex);
}

/* -- fork: the child owns nothing, and has no keeper --------------------------------------------------------------- */

static void dn_before_fork(void) { pthread_mutex_lock(&dn_lock); }
static void dn_in_parent(void) { pthread_mutex_unlock(&dn_lock); }
static void dn_in_child(void) {
    dn_keeper.list = (dn_node *)&dn_keeper;
    dn_keeper.pending = NULL;
    dn_keeper_tid = 0;
    dn_tid = 0;
    for (dn_mutex *one = dn_open_ones; one != NULL; one = one->next) one->owner = one->count = one->linked = 0;
    pthread_mutex_unlock(&dn_lock);
}
static int dn_start(void) { return pthread_atfork(dn_before_fork, dn_in_parent, dn_in_child); }
#endif
