"""What a server of a pipe does: joins the name, keeps instances listening, takes clients by every door.

`Serving` is the engine under `NamedPipeServer`, its asyncio twin and the native-style calls. It never waits:
``fileno()`` (an epoll set) is readable when `accept` has something to give.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import threading
import warnings
import weakref
from collections import deque
from contextlib import suppress

from ..errors import ObjectClosed, OperationTimeout, PortwayError
from ..wire.pipe import Direction
from . import reaper
from .pipe_front import Front, remove_stale
from .pipe_instance import Instance
from .pipe_joining import Options, join, server_of
from .pipe_name import parse_pipe_name
from .pipe_record import who
from .process import peer_of, within_limits

__all__ = ["Options", "PipeNameTaken", "Serving"]

_LOOK = 0.5  # seconds between looks at .NET's path
_ALWAYS = 3600.0
_live: weakref.WeakSet[Serving] = weakref.WeakSet()


class PipeNameTaken(RuntimeWarning):
    """Another program's server has taken .NET's path of a pipe; portway's own clients are served on."""


class Serving:
    """One server object's part of a pipe. Errors of opening: `AccessDenied` (another direction, ``first`` although the
    name exists, another user's name, another program's), `PipeBusy` (all instances taken), those of names."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options, self.who = parse_pipe_name(name), options, who()
        self.lock = threading.RLock()
        self.closed = self.taken = self._warned = self._news = False
        self.listening: list[Instance] = []
        self.used: set[Instance] = set()
        self._ready: deque[tuple[Instance, socket.socket]] = deque()
        self._by_fd: dict[int, Instance] = {}
        self._bell, self._waiters, self._woken = -1, 0, False
        self._door = object()  # the reaper's key for the front
        self._door_open = False
        self._claims: select.epoll | None = None  # tells once of each listener that it has its client
        self._claims_watched = self._no_slot = False
        self._shown: bool | None = None  # what the front was last told: whether an instance is free
        self.front: Front | None = None
        with within_limits("a pipe's server"):
            self.record, slot = join(self.name, options)
            try:
                self._epoll = select.epoll()
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._epoll.register(self._bell, select.EPOLLIN)
                with self.record.gate():
                    self.front = Front(self.record, self.who.number, options.security)
                if self.front.path and not self.record.header.message:
                    self._claims = select.epoll()
                self._listen(Instance(self.record, slot, self.who, options.security))
                self.top_up()
                self._settle()
                self._show()
                reaper.watch(self, None, _LOOK, self._look)
            except BaseException:
                self.close()
                raise
        _live.add(self)

    # -- joining and leaving -------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """The last of this object's handles is gone."""
        record = self.record
        if record.closed:
            return
        try:
            with record.gate():
                if self.front is not None:
                    self.front.withdraw()
                for slot in list(record.slots):
                    record.give_slot(slot)
                if not record.alive():
                    remove_stale(record)
                    record.remove()
        except OperationTimeout:  # the next one who meets it cleans up
            if self.front is not None:
                self.front.close()
        record.close()

    # -- instances -----------------------------------------------------------------------------------------------------

    def _limit(self) -> int:
        most = self.record.header.max_instances
        return min(most, self.options.instances or most)

    def _wanted(self) -> int:
        """How many instances should listen; one while another server of the name looks for an instance."""
        if self.record.asked():
            return 1
        return max(1, min(self.options.backlog, self._limit()))

    def top_up(self) -> None:
        """Takes free slots until enough instances listen. Under the lock, or before anybody knows this object."""
        with self.lock:
            while not self.closed and len(self.listening) < self._wanted():
                if len(self.listening) + len(self.used) >= self._limit():
                    return
                slot = self.record.take_slot()
                self._no_slot = slot is None
                if slot is None:
                    return
                self._listen(Instance(self.record, slot, self.who, self.options.security))

    def _spare(self) -> None:
        """Gives up instances that only wait for clients, when another server asks."""
        while len(self.listening) > self._wanted() and self.record.asked():
            instance = self.listening[-1]
            sock = self._take(instance)
            if sock is None:
                instance.release()
            else:
                self._connected(instance, sock)
                self._ring()

    def _listen(self, instance: Instance) -> None:
        try:
            instance.listen()
            assert instance.listener is not None
            fd = instance.listener.fileno()
            self._epoll.register(fd, select.EPOLLIN)
        except BaseException:
            instance.release()
            raise
        self._by_fd[fd] = instance
        self.listening.append(instance)
        self._watch_door()

    def _take(self, instance: Instance) -> socket.socket | None:
        """Stops it listening; its client, if one was faster. OSError: as it was, no descriptor for the client."""
        assert instance.listener is not None
        fd = instance.listener.fileno()
        self._epoll.unregister(fd)  # before it is closed, or a fork child's copy would still report it
        try:
            sock = instance.take()
        except OSError:
            self._epoll.register(fd, select.EPOLLIN)
            raise
        self._unlist(instance, fd)
        return sock

    def _refuse(self, instance: Instance) -> None:
        """Stops it listening; who is in it sees the end."""
        assert instance.listener is not None
        fd = instance.listener.fileno()
        self._epoll.unregister(fd)
        self._unlist(instance, fd)
        instance.refuse()

    def _unlist(self, instance: Instance, fd: int) -> None:
        del self._by_fd[fd]
        self.listening.remove(instance)

    def release(self, instance: Instance) -> None:
        """Its conversation is over: the slot is free, and perhaps listens again at once."""
        with self.lock:
            if self.record.closed or instance not in self.used:
                return
            self.used.discard(instance)
            if not self.closed and len(self.listening) < self._wanted():
                self._listen(instance)
                if not self._shown:  # who waits at the door comes before who sees it open
                    self._knock()
                self._show()
            else:
                instance.release()
            if self.closed and not self.used:
                self._leave()

    def moved_away(self, instance: Instance) -> None:
        """Its conversation goes on in another process, which holds the slot."""
        with self.lock:
            self.used.discard(instance)
            self.record.give_slot(instance.slot)
            if self.closed and not self.used:
                self._leave()

    def stop_listening(self) -> Instance:
        """DisconnectNamedPipe on an instance that nobody has opened: of a server object with one."""
        with self.lock:
            self._require()
            instance = self.listening[0]
            self._refuse(instance)
            instance.connected_none()
            self.used.add(instance)
            self._show()
            return instance

    def listen_again(self, instance: Instance) -> None:
        """ConnectNamedPipe on a disconnected instance."""
        with self.lock:
            self._require()
            self.used.discard(instance)
            self._listen(instance)
            self._knock()
            self._show()

    # -- clients -------------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        self._require()
        return self._epoll.fileno()

    def _require(self) -> None:
        if self.closed:
            raise ObjectClosed(f"the server of the pipe {self.name} is closed")

    def wait(self, seconds: float | None) -> None:
        """Until `accept` may have something; the loop around it looks at its own deadline."""
        with self.lock:
            self._require()
            self._waiters += 1
        try:
            self._epoll.poll(-1 if seconds is None else seconds)
        finally:
            with self.lock:
                self._waiters -= 1
                if self.closed:
                    self._close_bell()

    def accept(self) -> tuple[Instance, socket.socket] | None:
        """The next client, or None. Never waits."""
        with self.lock:
            self._require()
            self._warn()
            with within_limits(f"a client of the pipe {self.name}"):
                while not self._ready and (ready := self._clients()):
                    self._take_client(ready[0])
            if not self._ready:
                return None
            if self.front is not None and self.front.lost():
                self._settle()
                self._warn()
            found = self._ready.popleft()
            self._set_bell()
            return found

    def _clients(self) -> list[Instance]:
        fds = {fd for fd, _ in self._epoll.poll(0)}
        return [one for one in self.listening if one.listener is not None and one.listener.fileno() in fds]

    def _take_client(self, instance: Instance) -> None:
        sock = self._take(instance)
        if sock is None or self._stranger(sock):
            if sock is not None:
                sock.close()
            self._listen(instance)
            return
        self._connected(instance, sock)

    def _stranger(self, sock: socket.socket) -> bool:
        return self.options.security.is_owner_only and peer_of(sock).uid not in (os.geteuid(), 0)

    def _connected(self, instance: Instance, sock: socket.socket) -> None:
        instance.connect(sock)
        self.used.add(instance)
        with suppress(OSError):  # the client has gone already
            if self.record.header.direction is Direction.INBOUND:
                sock.shutdown(socket.SHUT_WR)
            elif self.record.header.direction is Direction.OUTBOUND:
                sock.shutdown(socket.SHUT_RD)
        self._ready.append((instance, sock))
        with suppress(OSError, PortwayError):  # no descriptor, no room: at the next look
            self.top_up()
        self._show()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _set_bell(self) -> None:
        """Rings as long as a client is ready, or somebody who waits shall look up."""
        if self._ready or self._woken:
            self._ring()
        else:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)

    def wake(self) -> None:
        """Makes `wait` return, in every thread; `unwake` ends that."""
        self._wake(True)

    def unwake(self) -> None:
        self._wake(False)

    def _wake(self, woken: bool) -> None:
        with self.lock:
            self._woken = woken
            if not self.closed:
                self._set_bell()

    # -- .NET's door ---------------------------------------------------------------------------------------------------

    def _watch_door(self) -> None:
        front = self.front
        if self._claims is None or front is None or front.socket is None:
            return
        listener = self.listening[-1].listener
        if listener is not None:
            with suppress(FileExistsError):  # goes from the set when it is closed
                self._claims.register(listener.fileno(), select.EPOLLIN | select.EPOLLET)
        if not self._door_open:
            self._door_open = True
            reaper.watch(self._door, front.socket.fileno(), _ALWAYS, self._knock)

    def _knock(self) -> float | None:
        """In the reaper's thread: somebody who knows only .NET's path. One instance is taken from the others' door."""
        with self.lock:
            try:
                while not self.closed and self.listening and self.front is not None and self.front.socket is not None:
                    if not self._let_in(self.front.socket):
                        return _ALWAYS
            except (OSError, PortwayError):  # no descriptor, no room: at the next look
                pass
            self._door_open = False
            return None

    def _let_in(self, door: socket.socket) -> bool:
        """Serves whoever is first: a client in the newest instance, else one at the door. False: nobody is there."""
        knocks = select.poll()
        knocks.register(door, select.POLLIN)
        if not knocks.poll(0):
            return False
        instance = self.listening[-1]
        faster = self._take(instance)
        if faster is None:
            try:
                fd, _ = door._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                self._listen(instance)
                return False
            except OSError:
                self._listen(instance)
                raise
            faster = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        if self._stranger(faster):
            faster.close()
            self._listen(instance)
        else:
            self._connected(instance, faster)
            self._ring()
        return True

    def _free(self) -> bool:
        """Whether a client could be served: an instance listens that nobody has claimed, or may at once."""
        if not self.listening:
            return False
        return not self._all_exist() or len(self._clients()) < len(self.listening)

    def _all_exist(self) -> bool:
        return self._no_slot or len(self.listening) + len(self.used) >= self._limit()

    def _show(self) -> None:
        """After a change: .NET's path tells it."""
        if self._claims is None:
            return
        if not self._claims_watched and self.listening and self._all_exist():
            self._claims_watched = True
            reaper.watch(self._claims, self._claims.fileno(), _ALWAYS, self._claimed)
        if self._free() is not self._shown:
            self._settle()

    def _claimed(self) -> float | None:
        """In the reaper's thread: a client has claimed an instance. The last free one may be gone, accepted or not."""
        with self.lock:
            if self._claims is None or self.closed or not self._all_exist():
                self._claims_watched = False
                return None
            self._claims.poll(0)
            self._show()
            return _ALWAYS

    def _settle(self) -> None:
        """.NET's path shows whether an instance is free. What cannot be done now is done at the next look."""
        front = self.front
        if front is None or self.record.closed:
            return
        free, door = self._free(), front.socket
        try:
            with self.record.gate(patience=0.2):
                front.settle(free)
            self._shown = free
            if front.socket is not door:
                reaper.forget(self._door)
                self._door_open = False
                if self.listening:
                    self._watch_door()
        except (PortwayError, OSError):
            self._shown = None
        self.taken = front.state in ("taken", "blocked")

    def _look(self) -> float | None:
        with self.lock:
            if self.closed:
                return None
            with suppress(OSError, PortwayError):  # for want of a descriptor or room: at the next look
                self._spare()
                self.top_up()  # another server may have given a slot back
                if self.listening and not self._door_open:
                    self._watch_door()
                self._settle()
                self._show()
            if self.taken and not self._warned and not self._news:
                self._news = True
                self._ring()  # for accept() to warn
            return _LOOK

    def _warn(self) -> None:
        if self._news:
            self._news = False
            self._set_bell()
        if self.taken and not self._warned and self.front is not None:
            self._warned = True
            path = self.front.path
            warnings.warn(
                f"{self.front.why or f'{path} is another server now{server_of(path)}'}: .NET's clients do not reach "
                f"the pipe {self.name}, portway's do",
                PipeNameTaken, stacklevel=4,
            )  # fmt: skip

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Listens no longer. Conversations go on; with the last of them the name goes."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            reaper.forget(self)
            reaper.forget(self._door)
            if self._claims is not None:
                reaper.forget(self._claims)
                self._claims.close()
                self._claims = None
            for instance in list(self.listening):
                self._refuse(instance)
                instance.release()
            for instance, sock in self._ready:
                sock.close()
                self.used.discard(instance)
                instance.release()
            self._ready.clear()
            if self._bell >= 0:
                self._ring()  # who waits looks up
                self._close_bell()
            if not self.used:
                self._leave()
            else:
                self._settle()
                if self.front is not None and not self.record.header.message:
                    self.front.stop()
        _live.discard(self)

    def _close_bell(self) -> None:
        """The last thread that waits does it: a set that loses its bell meanwhile would never wake."""
        if not self._waiters and self._bell >= 0:
            self._epoll.close()
            os.close(self._bell)
            self._bell = -1

    def forget(self) -> None:
        """In a fork child: the record has closed itself; the sockets go, nothing on disk changes."""
        self.lock = threading.RLock()
        if self.closed:
            return
        self.closed = True
        for instance in self.listening:
            if instance.listener is not None:
                instance.listener.close()
        for _, sock in self._ready:
            sock.close()
        self._waiters = 0
        self._close_bell()
        if self._claims is not None:
            self._claims.close()
        if self.front is not None:
            self.front.forget()


def _after_fork() -> None:
    for serving in list(_live):
        serving.forget()


def _at_exit() -> None:
    for serving in list(_live):
        with suppress(Exception):
            for instance in list(serving.used):
                serving.used.discard(instance)
                instance.release()
            serving.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
