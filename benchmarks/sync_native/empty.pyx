# cython: language_level=3, binding=False
cdef class Empty:
    """A pair of calls that do nothing: what Python itself costs."""

    def acquire(self, timeout=None, *, bint alertable=False):
        return True

    def release(self):
        pass
