"""One instance of a pipe: a listening Unix socket that takes exactly one client.

``listen(0)`` lets one connection wait; the kernel refuses the next at once. So a client's connect() is the claim of the
instance: no handshake, and an instance of a dead process refuses by itself. A client can open, write and leave before
the server looks.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress

from ..wire.pipe import FREE, LineState
from .objectfile import full
from .pipe_record import Record, Who
from .pipe_socket import bind_socket
from .process import peer_of
from .security import Security

__all__ = ["Instance"]


class Instance:
    """A slot that this server object holds. Not safe for threads by itself: `Serving` has the lock."""

    __slots__ = ("generation", "listener", "record", "security", "since", "slot", "state", "who")

    def __init__(self, record: Record, slot: int, who: Who, security: Security) -> None:
        self.record, self.slot, self.who, self.security = record, slot, who, security
        last = record.line(slot).generation
        self.generation = last or int.from_bytes(os.urandom(3), "little")
        self.listener: socket.socket | None = None
        self.state = LineState.FREE

    @property
    def _file(self) -> str:
        return self.record.reach(f"{self.slot}.{self.generation}")

    def listen(self) -> None:
        """Makes it reachable; the oldest listening instance is served first."""
        self.generation = self.generation % 0xFFFFFFFF + 1
        kind = socket.SOCK_SEQPACKET if self.record.header.message else socket.SOCK_STREAM
        with suppress(FileNotFoundError):
            os.unlink(self._file)
        try:
            self.listener = bind_socket(kind, self._file, self.security)
        except OSError as error:
            raise full(error, self._file) from error
        self.listener.listen(0)
        self._note(LineState.LISTENING, inode=os.fstat(self.listener.fileno()).st_ino)
        self.record.wake()

    def take(self) -> socket.socket | None:
        """Listens no longer; gives the client that had claimed it, if there was one. OSError when this process has no
        descriptor for it: the client stays where it is."""
        listener = self.listener
        if listener is None:
            return None
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RD)  # from now on nobody else gets in
        sock = None
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
            sock = socket.socket(socket.AF_UNIX, listener.type, 0, fd)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
        self.refuse()
        return sock

    def refuse(self) -> None:
        """Listens no longer; a client that had claimed it sees the end."""
        listener, self.listener = self.listener, None
        if listener is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._file)
            listener.close()

    def connect(self, sock: socket.socket) -> None:
        """`sock` is the client of this instance from now on."""
        peer = peer_of(sock)
        self._note(LineState.CONNECTED, client_pid=peer.pid, client_uid=peer.uid)

    def moved(self) -> None:
        """Its conversation came to this process from another one."""
        line = self.record.line(self.slot)
        pid, start, number = self.who
        self.state = LineState.CONNECTED
        self.record.write(self.slot, line._replace(server_pid=pid, server_start=start, server=number))

    def connected_none(self) -> None:
        """It neither listens nor has a client."""
        self._note(LineState.DISCONNECTED)

    def disconnect(self) -> None:
        """Tells the client that what it has not read is lost."""
        self.record.note_disconnected(self.slot, self.generation)
        self._note(LineState.DISCONNECTED)

    def release(self) -> None:
        """Gives the slot back."""
        self.refuse()
        self._note(LineState.FREE)
        self.record.give_slot(self.slot)

    def _note(self, state: LineState, inode: int = 0, client_pid: int = 0, client_uid: int = 0) -> None:
        self.state = state
        pid, start, number = self.who
        if state is LineState.FREE:
            line = FREE._replace(generation=self.generation)
        else:
            line = FREE._replace(
                generation=self.generation, state=state, ticket=time.monotonic_ns(), server_pid=pid, server_start=start,
                server=number, since_ns=time.time_ns(), inode=inode, client_pid=client_pid, client_uid=client_uid,
            )  # fmt: skip
        self.record.write(self.slot, line)
