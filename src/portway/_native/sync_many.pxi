# Part of `sync.pyx`: one wait for several objects, and what asyncio's helpers sleep on.

cdef class Many:
    """One wait for several objects, to be tried again and again: what `wait_any`, `wait_all` and asyncio share."""

    cdef pw_many many
    cdef pw_use use
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
        self.many.count = len(self.handles)
        pw_use_begin(&self.use, self.many.bodies, self.many.count)
        self.many.all, self.many.owner = all, owner or pw_self().serial
        pw_many_sort(&self.many)
        if all and self.many.distinct != self.many.count:
            raise ValueError("wait_all: the same object twice could never be taken as often as it is given")

    def __dealloc__(self):
        self.leave()
        end_use(&self.use)

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
        cdef pw_cfg cfg
        cdef uint32_t S
        for i in range(self.many.distinct):
            b = self.many.sorted[i]
            S = b.page.S
            if b.kind == PW_MUTEX and (not S & PW_TID or pw_slot_dead(b, S) or pw_owner_gone(b, S)):
                b.ask = 0  # who takes it asks again
                return True
            if b.kind == PW_TIMER:
                cfg = pw_timer_read(b)
                if cfg.due <= pw_timer_clock(&cfg):
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
            for i in range(self.many.distinct if self.use.at != NULL else 0):
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
