# cython: binding=False
"""A wait of an asyncio task that is resumed where its event is met, not a turn of the loop later.

Setting a future's result asks the loop to go round once more, and to ask the kernel again, before the task runs. A `Wait`
is future-compatible (``_asyncio_future_blocking``, the protocol between `asyncio.Task` and futures of any kind), but
`resume` runs the task at once. That is for callbacks of the loop only; from inside another task use `resume_soon`.
"""

from asyncio import CancelledError
from collections import deque


cdef class Wait:
    """Awaited once, by one task. ``await wait`` gives ``value``, or raises ``error``. ``size``, ``until`` and ``seconds``
    are the user's."""

    cdef public bint _asyncio_future_blocking
    cdef public object error, value, size
    cdef public double until, seconds
    cdef object loop, callback, context
    cdef bint over

    def __init__(self, loop, size=None):
        self.loop, self.size = loop, size
        self.until = 1e300

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if not self.over:
            self._asyncio_future_blocking = True
            return self
        if self.error is not None:
            raise self.error
        raise StopIteration(self.value)

    def send(self, value):
        return self.__next__()

    def throw(self, kind, value=None, traceback=None):
        self.over = True
        self.callback = None
        raise kind if value is None else value

    def close(self):
        self.over = True
        self.callback = None

    cpdef resume(self):
        """The task goes on, now."""
        cdef object callback = self.callback, context = self.context
        self.over = True
        self.callback = self.context = None
        if callback is not None:
            context.run(callback, self)

    def resume_soon(self):
        callback, context = self.callback, self.context
        self.over = True
        self.callback = self.context = None
        if callback is not None:
            self.loop.call_soon(callback, self, context=context)

    # -- what asyncio.Task asks of a future

    def get_loop(self):
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        self.callback, self.context = callback, context
        if self.over:
            self.resume_soon()

    def remove_done_callback(self, callback):
        found = self.callback == callback
        if found:
            self.callback = None
        return int(found)

    def cancel(self, msg=None):
        if self.over:
            return False
        self.error = CancelledError() if msg is None else CancelledError(msg)
        self.resume_soon()
        return True

    cpdef bint done(self):
        return self.over

    def cancelled(self):
        return isinstance(self.error, CancelledError)

    def result(self):
        if self.error is not None:
            raise self.error
        return self.value

    def exception(self):
        return self.error


cdef class Pump:
    """The waits of one descriptor's readers, in order: `take(size)` is asked whenever it is readable, and gives None when
    there is nothing yet. One timer for all that wait; it outlives them, so that a call costs no timer of its own."""

    cdef object loop, take, waits, timer, late
    cdef int fd
    cdef bint reading
    cdef double timer_at

    def __init__(self, loop, int fd, take, late):
        """`late(seconds)` makes the error of a wait whose time is over."""
        self.loop, self.fd, self.take, self.late = loop, fd, take, late
        self.waits = deque()

    @property
    def waiting(self):
        return len(self.waits)

    def wait(self, size, seconds):
        """To be awaited at once. `seconds` may be None."""
        cdef Wait wait = Wait(self.loop, size)
        self.waits.append(wait)
        if not self.reading:
            self.reading = True
            self.loop.add_reader(self.fd, self.readable)
        if seconds is not None:
            wait.seconds = seconds
            wait.until = <double>self.loop.time() + wait.seconds
            if self.timer is None or self.timer_at > wait.until:
                self.set_timer(wait.until)
        return wait

    def readable(self):
        """Called by the loop: the first who waits goes on with what is there."""
        cdef Wait wait
        while self.waits:
            wait = self.waits[0]
            if not wait.over:
                try:
                    wait.value = self.take(wait.size)
                except Exception as error:
                    wait.error = error
                else:
                    if wait.value is None:
                        return
                self.waits.popleft()
                wait.resume()
                return
            self.waits.popleft()
        self.reading = False
        self.loop.remove_reader(self.fd)

    cdef int set_timer(self, double until) except -1:
        if self.timer is not None:
            self.timer.cancel()
        self.timer_at = until
        self.timer = self.loop.call_at(until, self.expire)
        return 0

    def expire(self):
        cdef Wait wait
        cdef double now = self.loop.time(), until = 1e300
        self.timer = None
        for wait in list(self.waits):
            if wait.over:
                continue
            if wait.until <= now:
                wait.error = self.late(wait.seconds)
                wait.resume_soon()
            else:
                until = min(until, wait.until)
        if until < 1e300:
            self.set_timer(until)

    def wake(self, error):
        """Ends all waits with `error`; the tasks go on with the loop's next turn."""
        cdef Wait wait
        for wait in self.waits:
            if not wait.over:
                wait.error = error
                wait.resume_soon()
        self.waits.clear()

    def stop(self):
        """Before the descriptor is closed."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.reading:
            self.reading = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self.fd)
