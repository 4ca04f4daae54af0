# What other native modules use of the guard, through pointers resolved at import: there is one handler in the process.
ctypedef void (*body_t)(void *) noexcept nogil

cdef int guarded(body_t body, void *argument) noexcept nogil
cdef int install() noexcept nogil
cdef void hook(int (*)(void *) noexcept nogil) noexcept nogil
