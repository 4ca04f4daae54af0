# What `sync.pyx` uses of the headers.

cdef extern from "sync_fork.h" nogil:
    int pw_hold_add(int, int, int)
    int pw_hold_slot(int, int)
    uint64_t pw_pid_namespace()
    int posix_fallocate(int, long, long)

cdef extern from "<sys/auxv.h>" nogil:
    unsigned long getauxval(unsigned long)
    unsigned long AT_SECURE

cdef extern from "sync_recover.h":
    ctypedef struct pw_cfg:
        int64_t due, period
        uint64_t realtime
    ctypedef struct pw_page:
        uint64_t value, maximum, redo_txn
        uint32_t S, L, bell, multi
    ctypedef struct pw_body:
        pw_page *page
        uint64_t owner, owner_thread
        int64_t ask
        uint32_t count
        int native, broken, fd, slot, kind, manual, scope, closing
        uint8_t hash[16]
        char root[256]
    ctypedef struct pw_use:
        pw_use **at
    ctypedef struct pw_thread:
        uint64_t serial
    ctypedef struct pw_many:
        pw_body *bodies[64]
        pw_body *sorted[64]
        uint32_t bells[64]
        uint32_t epochs[64]
        int count, distinct, all, index
        uint64_t owner, abandoned
    ctypedef struct pw_waiter:
        pass
    int PW_OK, PW_ABANDONED, PW_TIMEOUT, PW_ALERTED, PW_NOT_OWNER, PW_TOO_MANY, PW_STUCK, PW_CLOSED, PW_DENIED
    int PW_ROOT
    int PW_MUTEX, PW_TIMER
    int64_t PW_NEVER
    uint32_t PW_DIED, PW_TID
    int pw_load(int, int)
    int pw_slices, pw_waitv, pw_old_kernel
    uint64_t pw_serials
    int64_t pw_clock(int)
    pw_thread *pw_self()
    pw_body *pw_map(int, int, int, int, uint64_t, int)
    void pw_take_over_slot(pw_body *)
    int pw_close(pw_body *)
    int (*pw_finish_closed)(void *) noexcept
    void pw_use_begin(pw_use *, pw_body **, int)
    int pw_use_end(pw_use *)
    int pw_heal(void *) noexcept nogil
    uint32_t pw_waiters(pw_body *)
    int pw_mutex_fast(pw_body *)
    int pw_mutex_acquire(pw_body *, uint64_t, int64_t, uint32_t *)
    int pw_mutex_release(pw_body *, uint64_t)
    int pw_mutex_abandon(pw_body *)
    void pw_mutex_give_back(pw_body *, int)
    int pw_wait(pw_body *, int64_t, uint32_t *)
    int pw_semaphore_release(pw_body *, uint64_t, uint64_t *)
    int pw_event_set(pw_body *, int *)
    int pw_event_reset(pw_body *, int *)
    int pw_event_pulse(pw_body *)
    int pw_timer_set(pw_body *, int64_t, int64_t, int, int, int *)
    pw_cfg pw_timer_read(pw_body *)
    int64_t pw_timer_clock(pw_cfg *)
    int pw_L_lock(pw_body *, pw_thread *, int64_t)
    void pw_L_unlock(pw_body *)
    int pw_many_wait(pw_many *, int64_t, uint32_t *)
    void pw_many_sort(pw_many *)
    int pw_many_try(pw_many *, pw_thread *, int64_t, int, int)
    int64_t pw_many_look_at(pw_many *, pw_thread *)
    void pw_waiter_set(pw_waiter *, uint32_t *, uint32_t, int)
    int pw_futex_waitv(pw_waiter *, unsigned, int64_t) nogil
    int pw_futex_wait(uint32_t *, uint32_t, int64_t) nogil
    void pw_futex_wake_own(uint32_t *) nogil
    void pw_waiting(pw_body *, int)
    int pw_slot_dead(pw_body *, uint32_t)
    int pw_owner_gone(pw_body *, uint32_t)

cdef extern from *:
    """
    static int pw_failed(void) { return -1; } /* the exception is set, by PyErr_CheckSignals */
    static int pw_arm(const char *name, long skip, const char *stop) {
    #ifdef PORTWAY_CRASH_POINTS
        free((char *)pw_crash_name);
        pw_crash_name = strdup(name);
        pw_crash_skip = skip;
        pw_stop_name = *stop ? strdup(stop) : NULL;
        return 1;
    #else
        (void)name, (void)skip, (void)stop;
        return 0;
    #endif
    }
    static int pw_robust(void) { return pw_self()->head != NULL; }
    """
    int pw_failed() except -1
    int pw_arm(const char *, long, const char *)
    int pw_robust()
