# Part of `sync.pyx`: semaphores, events and timers.

cdef class Waitable(Handle):
    """Semaphores, events and timers."""

    def wait(self, timeout=None, *, bint alertable=False):
        """Waits until it is signalled, and takes what a wait takes. `OperationTimeout`, `WaitInterrupted`."""
        cdef pw_body *b = self.live()
        cdef int64_t at = deadline(timeout)
        cdef AlertWord alert = alert_word() if alertable else None
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_wait(b, at, NULL if alert is None else &alert.word)
        end_use(&use)
        if wrong != PW_OK:
            self.fail(wrong, timeout, "waiting for")
        return True


cdef class Semaphore(Waitable):
    def release(self, count=1):
        cdef uint64_t previous = 0
        cdef uint64_t n
        cdef pw_body *b = self.live()
        if count != int(count) or count <= 0:
            raise ValueError(f"count={count!r}: give a number above 0")
        n = min(count, 2**63 - 1)
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_semaphore_release(b, n, &previous)
        end_use(&use)
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
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_event_set(b, &previous)
        end_use(&use)
        if wrong != PW_OK:
            self.fail(wrong, None, "setting")

    def reset(self):
        cdef int previous = 0
        cdef pw_body *b = self.live()
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_event_reset(b, &previous)
        end_use(&use)
        if wrong != PW_OK:
            self.fail(wrong, None, "resetting")

    def pulse(self):
        cdef pw_body *b = self.live()
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_event_pulse(b)
        end_use(&use)
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
        cdef pw_use use
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_timer_set(b, due, period, realtime, cancel, &was_set)
        end_use(&use)
        if wrong != PW_OK:
            self.fail(wrong, None, "setting")

    def is_set(self):
        """Signalled, as it was a moment ago."""
        cdef pw_cfg cfg = pw_timer_read(self.look())
        return cfg.due <= pw_timer_clock(&cfg)

    @property
    def manual_reset(self):
        return bool(self.live().manual)

    @property
    def due(self):
        """Seconds until it is signalled next; 0 when it is, None when it is not set."""
        cdef pw_cfg cfg = pw_timer_read(self.look())
        if cfg.due == PW_NEVER:
            return None
        return max(0, cfg.due - pw_timer_clock(&cfg)) / 1e9

    @property
    def period(self):
        return pw_timer_read(self.look()).period / 1e9
