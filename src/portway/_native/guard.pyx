# cython: freethreading_compatible=True
"""SIGBUS in a page of a mapping that somebody cut or that has no space behind it, as a return value.

A mapping's pages vanish when its file is truncated by whoever may write it, and a sparse page has nothing behind it
when the file system is full. Touching either is SIGBUS. Whatever our own native code does with such pages runs as a
body of `guarded`; faults elsewhere go to the handler that was installed before ours, faulthandler's for one.
"""

cdef extern from "guard.h" nogil:
    ctypedef void (*portway_body)(void *)
    int portway_guard_install()
    int (*portway_hook)(void *)
    int portway_guarded(portway_body, void *)


cdef int guarded(body_t body, void *argument) noexcept nogil:
    return portway_guarded(<portway_body>body, argument)


cdef int install() noexcept nogil:
    return portway_guard_install()


cdef void hook(int (*heals)(void *) noexcept nogil) noexcept nogil:
    """Asked first, with the address: 1 when it has put memory there (`sync`: the pages of its objects)."""
    global portway_hook
    portway_hook = heals
