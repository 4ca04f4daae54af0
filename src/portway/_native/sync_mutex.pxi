# Part of `sync.pyx`: the mutex.

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
        cdef pw_use use
        cdef bint first
        pw_use_begin(&use, &b, 1)
        cdef int wrong = pw_mutex_acquire(b, 0, at, NULL if alert is None else &alert.word)
        if b.closing and (wrong == PW_OK or wrong == PW_ABANDONED):
            pw_mutex_give_back(b, wrong)
            wrong = PW_CLOSED
        first = b.count == 1
        end_use(&use)
        if wrong > PW_ABANDONED or wrong < 0:
            self.fail(wrong, timeout, "acquiring")
        if first:
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
