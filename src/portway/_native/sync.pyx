# cython: boundscheck=False, wraparound=False, binding=False
"""Words the kernel watches: mutexes, semaphores, events and timers in pages shared by unrelated processes.

Native only. A thin layer over `sync_page.h`, `sync_core.h` and `sync_multi.h`, where the protocol is explained;
`portway.kernel` has the public classes. The GIL is kept except while a thread sleeps; it also is what keeps two threads
of one process out of one page's lock.
"""

import os
from portway import errors

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

cdef extern from "sync_fork.h" nogil:
    int pw_hold_add(int, int, int)
    int pw_hold_slot(int, int)
    uint64_t pw_pid_namespace()
    int posix_fallocate(int, long, long)

cdef extern from "sync_multi.h":
    ctypedef struct pw_cfg:
        int64_t due, period
        uint64_t realtime
    ctypedef struct pw_page:
        uint64_t value, maximum, redo_txn
        uint32_t S, L, bell, multi
    ctypedef struct pw_body:
        pw_page *page
        uint64_t owner, owner_thread
        uint32_t count
        int native, broken, fd, slot, kind, manual, scope, pins, closing
        uint8_t hash[16]
        char folder[2][256]
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
    int PW_OK, PW_ABANDONED, PW_TIMEOUT, PW_ALERTED, PW_NOT_OWNER, PW_TOO_MANY, PW_CORRUPT, PW_STUCK
    int PW_MUTEX, PW_TIMER
    int64_t PW_NEVER
    uint32_t PW_DIED, PW_TID
    int pw_load(int, int)
    int pw_slices, pw_waitv, pw_old_kernel
    uint64_t pw_serials
    int64_t pw_clock(int)
    pw_thread *pw_self()
    pw_body *pw_map(int, int, int, int, uint64_t)
    void pw_take_over_slot(pw_body *)
    void pw_close(pw_body *)
    void pw_unpin(pw_body *)
    uint32_t pw_waiters(pw_body *)
    int pw_mutex_fast(pw_body *)
    int pw_mutex_acquire(pw_body *, uint64_t, int64_t, uint32_t *)
    int pw_mutex_release(pw_body *, uint64_t)
    int pw_mutex_abandon(pw_body *)
    int pw_wait(pw_body *, int64_t, uint32_t *)
    int pw_semaphore_release(pw_body *, uint64_t, uint64_t *)
    int pw_event_set(pw_body *, int *)
    int pw_event_reset(pw_body *, int *)
    int pw_event_pulse(pw_body *)
    int pw_timer_set(pw_body *, int64_t, int64_t, int, int, int *)
    pw_cfg *pw_timer(pw_body *)
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

cdef extern from *:
    """
    static int pw_failed(void) { return -1; } /* the exception is set, by PyErr_CheckSignals */
    static int pw_arm(const char *name, long skip) {
    #ifdef PORTWAY_CRASH_POINTS
        free((char *)pw_crash_name);
        pw_crash_name = strdup(name);
        pw_crash_skip = skip;
        return 1;
    #else
        (void)name, (void)skip;
        return 0;
    #endif
    }
    static int pw_robust(void) { return pw_self()->head != NULL; }
    """
    int pw_failed() except -1
    int pw_arm(const char *, long)
    int pw_robust()

NEVER = PW_NEVER
DUE_LIMIT = 1 << 62  # ns; beyond it clocks would overflow


def guard_add(int fd, int slot, int writable):
    """This process holds the file `fd` by `slot`: a fork child gets a descriptor (same number) and a slot of its own."""
    if pw_hold_add(fd, slot, writable) != 0:
        raise MemoryError("no room to note another object")


def guard_remove(int fd):
    """The slot that was noted for `fd`, which is forgotten; -1 when there was none."""
    return pw_hold_slot(fd, 1)


def guard_slot(int fd):
    return pw_hold_slot(fd, 0)


def pid_namespace():
    """Which pid namespace we are in (an inode number); 0 when /proc does not tell."""
    return pw_pid_namespace()


def allocate(int fd, long at, long size):
    """posix_fallocate(3): space behind these bytes, or OSError."""
    cdef int wrong
    with nogil:
        wrong = posix_fallocate(fd, at, size)
    if wrong:
        raise OSError(wrong, "no space for the object")


cdef class Body:
    """The mapped page of one object in this process; `close` once."""

    cdef pw_body *b

    def __init__(self, int fd, int slot, int kind, bint manual, uint64_t home, str local, str global_, int scope,
                 bytes name):
        cdef bytes folder
        self.b = pw_map(fd, slot, kind, manual, home)
        if self.b == NULL:
            raise OSError(errno, os.strerror(errno))
        for i, path in enumerate((local, global_)):
            folder = os.fsencode(path)
            if len(folder) < 256:
                memcpy(self.b.folder[i], <char *>folder, len(folder))
        self.b.scope = scope
        memcpy(self.b.hash, <char *>name, 16)
        pw_take_over_slot(self.b)

    def close(self):
        cdef pw_body *b = self.b
        self.b = NULL
        if b != NULL:
            pw_close(b)

    def settle(self):
        """Finishes what a killed process left undone in the page."""
        cdef int wrong
        self.b.pins += 1
        wrong = pw_L_lock(self.b, pw_self(), pw_clock(0) + 1000000000)
        if wrong == PW_OK:
            pw_L_unlock(self.b)
        pw_unpin(self.b)
        return wrong == PW_OK


cdef class AlertWord:
    """What `portway.alert` sets and an alertable wait of its thread looks at."""

    cdef uint32_t word

    def set(self):
        self.word = 1
        pw_futex_wake_own(&self.word)


cdef int64_t deadline(object timeout) except -1:
    """A monotonic time in ns, 0: do not wait."""
    cdef double seconds
    if timeout is None:
        return PW_NEVER
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout={timeout!r}: give seconds >= 0, or None to wait without limit")
    if seconds == 0:
        return 0
    return PW_NEVER if seconds > 4e9 else pw_clock(0) + <int64_t>(seconds * 1e9)


cdef class Handle:
    """A handle of any kind: points to the process's body of the object until it is closed."""

    cdef pw_body *b
    cdef object _body
    cdef readonly object file
    """The `ObjectFile`, None when closed."""
    cdef public bint already_exists
    """The object was there before; what creating was given beside the name has been ignored."""

    def _attach(self, file, Body body):
        self.file, self._body, self.b = file, body, body.b

    def _detach(self):
        """The `ObjectFile` that is to be released; None when closed before."""
        file, self.file, self._body, self.b = self.file, None, None, NULL
        return file

    cdef pw_body *live(self) except NULL:
        if self.b == NULL:
            raise errors.ObjectClosed(f"this {type(self).__name__} is closed")
        return self.b

    cdef pw_body *look(self) except NULL:
        """For a read: what a killed process was about to do to the page is finished or undone first."""
        cdef pw_body *b = self.live()
        cdef int wrong
        if b.page.L:
            b.pins += 1
            wrong = pw_L_lock(b, pw_self(), pw_clock(0) + 100000000)
            if wrong == PW_OK:
                pw_L_unlock(b)
            pw_unpin(b)
            if wrong == -1:
                pw_failed()
            self.live()
        return b

    cdef fail(self, int wrong, timeout, str doing):
        if wrong == -1:
            pw_failed()
        what = repr(self)
        if wrong == PW_TIMEOUT:
            raise errors.OperationTimeout(f"timed out after {timeout or 0:g} s {doing} {what}")
        if wrong == PW_ALERTED:
            raise errors.WaitInterrupted(f"{doing} {what} was ended by portway.alert()")
        if wrong == PW_NOT_OWNER:
            raise errors.NotOwner(f"{what} does not belong to this thread", hint="who acquires it releases it")
        if wrong == PW_TOO_MANY:
            raise errors.TooManyPosts(f"{what} was acquired 4,294,967,295 times without a release")
        if wrong == PW_STUCK:
            raise errors.ObjectCorrupt(
                f"{what}: its internal lock has been held for 10 s",
                hint="a process was stopped just there (kill -CONT it), or the page was overwritten",
            )
        raise errors.ObjectCorrupt(f"{what}: what lies in its page cannot be", hint="close it everywhere; it goes then")

    @property
    def closed(self):
        return self.b == NULL

    @property
    def waiters(self):
        """Waits for this object now, in all processes."""
        return pw_waiters(self.live())


cdef class Waitable(Handle):
    """Semaphores, events and timers."""

    def wait(self, timeout=None, *, bint alertable=False):
        """Waits until it is signalled, and takes what a wait takes. `OperationTimeout`, `WaitInterrupted`."""
        cdef pw_body *b = self.live()
        cdef int64_t at = deadline(timeout)
        cdef AlertWord alert = alert_word() if alertable else None
        b.pins += 1
        cdef int wrong = pw_wait(b, at, NULL if alert is None else &alert.word)
        pw_unpin(b)
        if wrong != PW_OK:
            self.fail(wrong, timeout, "waiting for")
        return True


cdef extern from *:
    """
    static int pw_set_kind(PyObject *type, PyObject *kind) {
        int wrong = PyDict_SetItemString(((PyTypeObject *)type)->tp_dict, "kind", kind);
        PyType_Modified((PyTypeObject *)type);
        return wrong;
    }
    """
    int pw_set_kind(object, object) except -1


def set_kind(kind):
    """`Mutex.kind`, which this module cannot import."""
    pw_set_kind(Mutex, kind)


_base = None


cdef base():
    """`KernelObject`, whose methods Mutex borrows: it is no Python subclass, as calling such a one's methods is slower
    than what they do."""
    global _base
    if _base is None:
        from portway.kernel.sync_base import KernelObject as _base
    return _base


cdef class Mutex(Handle):
    r"""A mutual exclusion between threads of any processes, owned by a thread, recursive.

    ::

        with portway.Mutex("ledger") as mutex:      # waits without limit
            if mutex.abandoned:                     # the last owner died with it: look whether its work is whole
                repair()

    ``Mutex(name)`` creates it or opens the existing one; without a name it is known by its handle only. `acquire`
    waits, `release` gives back once for every acquire; ``with`` does both. It is the thread that owns, in asyncio the
    task: see `portway.aio.Mutex`. ``initially_owned=True`` makes this thread the owner of a mutex it creates, not of an
    existing one.

    **Abandoned.** Acquiring after an owner's death succeeds, as on Windows (WAIT_ABANDONED), and sets `abandoned`
    until the next acquire; exactly one owner is told.
    """

    cdef public bint abandoned
    """The last acquire through this handle took it from an owner that had died."""
    cdef object __weakref__

    def __init__(self, name=None, *, initially_owned=False, exclusive=False, security=None, root=None):
        from portway.kernel.mutex import create

        create(self, name, initially_owned, exclusive, security, root)

    @classmethod
    def open(cls, name, *, root=None):
        """The existing mutex; `ObjectNotFound`, `InvalidHandle` if another kind has the name, `AccessDenied`."""
        return base().open.__func__(cls, name, root=root)

    def _create(self, name, **options):
        base()._create(self, name, **options)

    def _join(self, file):
        base()._join(self, file)

    def close(self):
        """Closes this handle; the mutex goes with the last one. If this thread owns it and this is its process's last
        handle, it is abandoned. Twice is fine."""
        base().close(self)

    def __del__(self):
        base().__del__(self)

    @property
    def name(self):
        """As other processes open it; None when it has none."""
        return base().name.fget(self)

    def __repr__(self):
        return base().__repr__(self)

    def __reduce__(self):
        return base().__reduce__(self)

    def acquire(self, timeout=None, *, bint alertable=False):
        cdef pw_body *b = self.b
        cdef int wrong
        if b != NULL:
            wrong = pw_mutex_fast(b)
            if wrong == PW_OK:
                if b.count == 1:
                    self.abandoned = False
                return True
            if wrong != PW_TIMEOUT:
                self.fail(wrong, timeout, "acquiring")
        return self.acquire_slowly(timeout, alertable)

    cdef acquire_slowly(self, timeout, bint alertable):
        cdef pw_body *b = self.live()
        cdef int64_t at = deadline(timeout)
        cdef AlertWord alert = alert_word() if alertable else None
        b.pins += 1
        cdef int wrong = pw_mutex_acquire(b, 0, at, NULL if alert is None else &alert.word)
        pw_unpin(b)
        if wrong > PW_ABANDONED or wrong < 0:
            self.fail(wrong, timeout, "acquiring")
        if b.count == 1:
            self.abandoned = wrong == PW_ABANDONED
        return True

    def release(self):
        cdef int wrong
        if self.b == NULL:
            self.live()
        wrong = pw_mutex_release(self.b, 0)
        if wrong != PW_OK:
            self.fail(wrong, None, "releasing")

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *exc):
        self.release()

    def _release_for(self, uint64_t owner):
        cdef int wrong = pw_mutex_release(self.live(), owner)
        if wrong != PW_OK:
            self.fail(wrong, None, "releasing")

    def _abandon(self, uint64_t owner):
        """Gives it up as if its owner had died; only by the thread that took it."""
        cdef pw_body *b = self.live()
        return b.owner == owner and pw_mutex_abandon(b) == PW_OK

    def _count_for(self, uint64_t owner):
        cdef pw_body *b = self.live()
        return b.count if b.owner == (owner or pw_self().serial) else 0

    @property
    def owned(self):
        """This thread owns it."""
        return self.live().owner == pw_self().serial

    @property
    def state(self):
        """``free``, ``held`` or ``abandoned``, as it was a moment ago."""
        cdef uint32_t S = self.look().page.S
        return "held" if S & PW_TID else "abandoned" if S & PW_DIED else "free"


cdef class Semaphore(Waitable):
    def release(self, count=1):
        cdef uint64_t previous = 0
        cdef uint64_t n
        cdef pw_body *b = self.live()
        if count != int(count) or count <= 0:
            raise ValueError(f"count={count!r}: give a number above 0")
        n = min(count, 2**63 - 1)
        b.pins += 1
        cdef int wrong = pw_semaphore_release(b, n, &previous)
        pw_unpin(b)
        if wrong == PW_TOO_MANY:
            raise errors.TooManyPosts(
                f"{self!r}: {count} more than {previous} are above the maximum of {self.maximum}; nothing changed"
            )
        if wrong != PW_OK:
            self.fail(wrong, None, "releasing")
        return previous

    @property
    def value(self):
        """The count, as it was a moment ago."""
        return self.look().page.value

    @property
    def maximum(self):
        return self.live().page.maximum


cdef class Event(Waitable):
    def set(self):
        cdef int previous = 0
        cdef pw_body *b = self.live()
        b.pins += 1
        cdef int wrong = pw_event_set(b, &previous)
        pw_unpin(b)
        if wrong != PW_OK:
            self.fail(wrong, None, "setting")

    def reset(self):
        cdef int previous = 0
        cdef pw_body *b = self.live()
        b.pins += 1
        cdef int wrong = pw_event_reset(b, &previous)
        pw_unpin(b)
        if wrong != PW_OK:
            self.fail(wrong, None, "resetting")

    def pulse(self):
        cdef pw_body *b = self.live()
        b.pins += 1
        cdef int wrong = pw_event_pulse(b)
        pw_unpin(b)
        if wrong != PW_OK:
            self.fail(wrong, None, "pulsing")

    def is_set(self):
        """As it was a moment ago."""
        return bool(self.look().page.value & 1)

    @property
    def manual_reset(self):
        return bool(self.live().manual)


cdef class Timer(Waitable):
    def _set(self, int64_t due, int64_t period, bint realtime, bint cancel):
        cdef int was_set = 0
        cdef pw_body *b = self.live()
        b.pins += 1
        cdef int wrong = pw_timer_set(b, due, period, realtime, cancel, &was_set)
        pw_unpin(b)
        if wrong != PW_OK:
            self.fail(wrong, None, "setting")

    def is_set(self):
        """Signalled, as it was a moment ago."""
        cdef pw_cfg *cfg = pw_timer(self.look())
        return cfg.due <= pw_timer_clock(cfg)

    @property
    def manual_reset(self):
        return bool(self.live().manual)

    @property
    def due(self):
        """Seconds until it is signalled next; 0 when it is, None when it is not set."""
        cdef pw_cfg *cfg = pw_timer(self.look())
        cdef int64_t due = cfg.due
        if due == PW_NEVER:
            return None
        return max(0, due - pw_timer_clock(cfg)) / 1e9

    @property
    def period(self):
        return pw_timer(self.look()).period / 1e9


cdef class Many:
    """One wait for several objects, to be tried again and again: what `wait_any`, `wait_all` and asyncio share."""

    cdef pw_many many
    cdef tuple handles
    cdef bint begun, counted

    def __init__(self, handles, bint all, uint64_t owner=0):
        cdef Handle one
        self.handles = tuple(handles)
        if not 1 <= len(self.handles) <= 64:
            raise ValueError(f"{len(self.handles)} objects: a wait takes 1 to 64")
        for one in self.handles:
            one.live()
        for i, one in enumerate(self.handles):
            self.many.bodies[i] = one.b
            one.b.pins += 1
            self.many.count = i + 1
        self.many.all, self.many.owner = all, owner or pw_self().serial
        pw_many_sort(&self.many)
        if all and self.many.distinct != self.many.count:
            raise ValueError("wait_all: the same object twice could never be taken as often as it is given")

    def __dealloc__(self):
        self.leave()
        for i in range(self.many.count):
            pw_unpin(self.many.bodies[i])

    def wait(self, timeout, bint alertable):
        """(index, abandoned bits). OperationTimeout, WaitInterrupted, ObjectCorrupt."""
        cdef int64_t at = deadline(timeout)
        cdef AlertWord alert = alert_word() if alertable else None
        cdef int wrong = pw_many_wait(&self.many, at, NULL if alert is None else &alert.word)
        return self.result(wrong, timeout)

    cdef result(self, int wrong, timeout):
        cdef Handle one
        if wrong != PW_OK:
            one = self.handles[0]
            one.fail(wrong, timeout, f"waiting for {'all' if self.many.all else 'any'} of {len(self.handles)} objects,")
        for i in range(self.many.count):
            if isinstance(self.handles[i], Mutex) and (self.many.all or i == self.many.index):
                if self.many.bodies[i].count == 1:
                    (<Mutex>self.handles[i]).abandoned = (self.many.abandoned >> i) & 1
        return self.many.index, self.many.abandoned

    def attempt(self, bint listen):
        """The result, or None: not now. With `listen` the bells are read, for `sleep_on_bells`."""
        cdef int wrong = pw_many_try(&self.many, pw_self(), pw_clock(0) + 100000000, not self.begun, listen)
        self.begun = True
        return None if wrong == PW_TIMEOUT else self.result(wrong, 0)

    def worth_looking(self):
        """Whether time or a death may have signalled something: neither rings a bell."""
        cdef pw_body *b
        cdef uint32_t S
        for i in range(self.many.distinct):
            b = self.many.sorted[i]
            S = b.page.S
            if b.kind == PW_MUTEX and (not S & PW_TID or pw_slot_dead(b, S)):
                return True
            if b.kind == PW_TIMER and pw_timer(b).due <= pw_timer_clock(pw_timer(b)):
                return True
        return False

    def enter(self):
        """Counted among the waiters until `leave`; pulses from now on are seen."""
        if not self.begun:
            self.begun = True
            for i in range(self.many.distinct):
                self.many.epochs[i] = self.many.sorted[i].page.value >> 32
        if not self.counted:
            self.counted = True
            for i in range(self.many.distinct):
                pw_waiting(self.many.sorted[i], 1)

    def leave(self):
        """No longer counted among the waiters."""
        if self.counted:
            self.counted = False
            for i in range(self.many.distinct):
                if not self.many.sorted[i].closing:
                    pw_waiting(self.many.sorted[i], -1)

    def words(self):
        """What to sleep on: {address: value}."""
        return {<size_t>&self.many.sorted[i].page.bell: self.many.bells[i] for i in range(self.many.distinct)}

    def look_again(self):
        """Monotonic ns at which to try again though no bell rang."""
        return pw_many_look_at(&self.many, pw_self())


def sleep_on_bells(list words, AlertWord control, int64_t until):
    """Sleeps until one of up to 127 (address, value) pairs is not so any more, the control word is set, or the time."""
    cdef char waiters[24 * 128]
    cdef unsigned count = 1
    cdef pw_waiter *first = <pw_waiter *>waiters
    cdef int64_t soon
    cdef uint32_t *word
    cdef uint32_t value
    if pw_waitv and not pw_slices:
        pw_waiter_set(first, &control.word, 0, 1)
        for address, value in words[:127]:
            pw_waiter_set(<pw_waiter *>(waiters + 24 * count), <uint32_t *><size_t>address, value, 0)
            count += 1
        with nogil:
            pw_futex_waitv(first, count, until)
    else:
        soon = pw_clock(0) + 20000000
        with nogil:
            pw_futex_wait(&control.word, 0, soon if soon < until else until)
    control.word = 0


def changed(list words):
    """The (address, value) pairs whose word is no longer what it was."""
    cdef uint32_t value
    found = []
    for pair in words:
        value = pair[1]
        if (<uint32_t *><size_t>pair[0])[0] != value:
            found.append(pair)
    return found


def new_owner():
    """An owner's number that no thread and no task has had."""
    cdef uint64_t number
    global pw_serials
    pw_self()
    number = pw_serials
    pw_serials += 1
    return number


def monotonic_ns():
    return pw_clock(0)


def crash_at(bytes name, long skip=0):
    """For tests, in the build with crash points: SIGKILL at that point, after `skip` passes."""
    if not pw_arm(name, skip):
        raise RuntimeError("this build has no crash points")


def fallbacks():
    """What is missing here, as short words: ``slices``, ``futex_waitv``, ``robust list``, ``kernel before 6.2``."""
    found = []
    if pw_slices:
        found.append("slices")
    if not pw_waitv:
        found.append("futex_waitv")
    if not pw_robust():
        found.append("robust list")
    if pw_old_kernel:
        found.append("kernel before 6.2")
    return found


cdef AlertWord alert_word():
    from portway.kernel.alert import word_of_this_thread

    return word_of_this_thread()


def _load():
    wanted = os.environ.get("PORTWAY_SYNC", "")
    if wanted not in ("", "slices"):
        raise ImportError(f"PORTWAY_SYNC={wanted!r}: give slices, or nothing")
    release = os.uname().release.split(".")
    try:
        old = (int(release[0]), int(release[1].split("-")[0])) < (6, 2)
    except (ValueError, IndexError):
        old = False
    if pw_load(wanted == "slices", old) != 0:
        raise ImportError("no thread key or no memory left in this process")


_load()
