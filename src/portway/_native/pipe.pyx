# cython: boundscheck=False, wraparound=False
"""The channel of a named pipe: messages or bytes over a connected Unix socket. The hot path of `kernel.pipe_end`.

Packets are those of `portway.wire.pipe`. One receive is one system call as a rule: the socket has a short SO_RCVTIMEO, and
only a call that finds nothing for so long goes on with poll(), where cancel(), close() and the deadline reach it. The
socket is never O_NONBLOCK, which its duplicates would share. What the kernel has is read when it is asked for, so that
flush() at the other end, peek() and a hand-over tell the truth; only a message of several packets is gathered here.

One thread receives and one sends at a time; the others wait in turn. Source: win32-semantics, section 1; unix(7).
"""

import os

from portway import errors

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE, _PyBytes_Resize
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EPIPE, errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from portway._native.guard cimport guarded, install

include "pipe_c.pxi"

DEF PACKET = 65536
DEF NO_LIMIT = -1.0
_UNSET = object()

include "pipe_connection.pxi"
include "pipe_receive.pxi"
include "pipe_send.pxi"


cdef class Channel(Sender):
    """See the module and `kernel.pipe_end.PipeEnd`, which says what the calls do."""

    # -- control -------------------------------------------------------------------------------------------------------

    def cancel(self):
        """Ends every call that waits now, in any thread, with `OperationAborted`; later calls are not affected."""
        if self._closed:
            self.refuse()
        self.cancels += 1
        self.ring()

    def close(self):
        """Calls of other threads end with `ObjectClosed`. Closing twice is fine."""
        self.end_here()
        self.gone = 0  # it is closed that counts now

    cdef int end_here(self) except -1:
        if self._closed:
            return 0
        if self.owes_abandoned and self.pid == getpid():
            pw_send_abandoned(self._fd)
        self._closed = 1
        self.ring()
        if not self.pins:
            self.release_fd()
        return 0

    def detach(self):
        """The descriptor, which is the caller's now; this end is closed, the connection is not."""
        cdef int fd
        if self._closed or self.pins:
            raise errors.ObjectClosed(f"this end of the pipe {self.name} is closed, or in use by another thread")
        fd = self._fd
        pw_pipe_plain(fd)
        self._fd, self._closed = -1, 1
        self.ring()
        self.release_fd()
        return fd

    def disconnect_here(self):
        """The server disconnects: what was not read is lost, and every call gives `PipeNotConnected`."""
        if self._closed:
            self.refuse()
        self.gone = 1
        self.drop_gathered()
        shutdown(self._fd, SHUT_RDWR)  # whoever has a duplicate
        self.end_here()

    def watch(self, int record_fd, long at, uint32_t generation):
        """Eight words at offset `at` of a pipe's record: if one is `generation`, the server has disconnected us."""
        cdef long page = at & ~4095L
        cdef void *got
        if at < 0 or at & 3 or self.map != NULL:
            raise errors.InvalidParameter(f"at={at}: give a multiple of 4, once")
        if install() != 0:
            raise OSError(errno, os.strerror(errno))
        got = mmap(NULL, 8192, PROT_READ, MAP_SHARED, record_fd, page)
        if got == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.watching.at = <uint32_t *>(<char *>got + (at - page))
        self.watching.generation = generation
        self.map = <char *>got

    # -- moving --------------------------------------------------------------------------------------------------------

    def travel_state(self):
        """(what was received of a message and not handed out, 21 bytes of state) for `restore_travel` elsewhere."""
        if self._closed:
            self.refuse()
        if self.pins:
            raise errors.HandoffError(f"the pipe {self.name} is in use by another thread")
        gathered = PyBytes_AS_STRING(<object>self.g)[self.g_at:self.g_size] if self.g_size > self.g_at else b""
        flags = self.owes_notice | self.owes_abandoned << 1
        return gathered, (int(self.expect).to_bytes(8, "little") + int(self.offset).to_bytes(4, "little")
                          + bytes([flags]) + int(self.received_messages).to_bytes(8, "little"))

    def restore_travel(self, bytes gathered, bytes state):
        """`InvalidInformation` when it does not fit what waits in the socket."""
        cdef uint64_t head = 0
        cdef size_t length = 0
        cdef int end = 0
        cdef ssize_t got
        if len(state) != 21 or state[12] > 3:
            raise errors.InvalidInformation(f"{len(state)} bytes of state of a pipe: 21 are written")
        expect, offset = int.from_bytes(state[:8], "little"), int.from_bytes(state[8:12], "little")
        if offset >= PACKET or expect >> 56 or (offset and offset > expect) or (not self.message and (expect or gathered)):
            raise errors.InvalidInformation(f"a pipe's state with offset {offset} of {expect} bytes cannot be")
        if offset:
            got = pw_peek_packet(self._fd, &head, NULL, 0, 0, &length, MSG_DONTWAIT, &end)
            if got < 0 or end or head != expect or length <= offset:
                raise errors.InvalidInformation("the half-read message that was to come with a pipe is not there")
        if gathered:
            Py_INCREF(gathered)
            self.g, self.g_size, self.g_at = <PyObject *>gathered, len(gathered), 0
            self.own_gathered()
        self.expect, self.offset = expect, offset
        self.owes_notice, self.owes_abandoned = state[12] & 1, state[12] >> 1 & 1
