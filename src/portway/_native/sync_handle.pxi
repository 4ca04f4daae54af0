# Part of `sync.pyx`: what handles of every kind share.

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
        cdef pw_use use
        cdef int wrong
        if b.page.L:
            pw_use_begin(&use, &b, 1)
            wrong = pw_L_lock(b, pw_self(), pw_clock(0) + 100000000)
            if wrong == PW_OK:
                pw_L_unlock(b)
            end_use(&use)
            if wrong == -1:
                pw_failed()
            if wrong == PW_DENIED:
                self.fail(wrong, 0, "looking at")
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
        if wrong == PW_CLOSED:
            raise errors.ObjectClosed(f"this {type(self).__name__} was closed while this thread was {doing} it")
        if wrong == PW_DENIED:
            raise errors.AccessDenied(
                f"{doing} {what}: a process was killed in the middle of a wait_all, and the object that says whether it "
                "had taken them may not be opened by this user",
                hint="any use by a user who may open both finishes it, as does root's: portway sync ls",
            )
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
