"""`portway.generation()`: what a server needs to hand its live connections to its successor.

    generation = portway.generation()
    for listener in generation.sockets.values(): ...      # accept as usual
    generation.ready()
    generation.draining.wait()                            # `portway reload` has started a newer generation
    generation.hand_over(sock, "line/1", unread, state)   # returns once the successor has it
    generation.drained()

and in the successor ``for adopted in generation: ...``. Outside of `portway run` the number is 0, draining is never
set and nothing is adopted, so a program needs no second way to start. How it works:
docs/explanation/worker-contract.md.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator

from ..deadline import Deadline
from ..errors import HandoffRefused, UnsupportedSocket
from ..wire.handover import Moving, check_moving
from .hook_core import Core, core
from .hook_reactor import ThreadReactor
from .hook_source import Mover, Offer
from .hook_target import Adopted, Batch, Check, Receiver

__all__ = ["Adopted", "BaseGeneration", "Generation", "generation"]


class BaseGeneration:
    """What the blocking and the asyncio generation share."""

    _core: Core
    _status_at = 0.0

    @property
    def number(self) -> int:
        """Of this generation, from 1; 0 outside of `portway run`."""
        return self._core.number

    @property
    def name(self) -> str:
        """The service's name; empty outside of `portway run`."""
        return self._core.name

    @property
    def worker(self) -> int:
        """Number of this process in its generation, from 0."""
        return self._core.worker

    @property
    def sockets(self) -> dict[str, socket.socket]:
        """The listening (and UDP) sockets by name, from LISTEN_FDS; the dictionary and the sockets are the caller's."""
        return self._core.sockets

    @property
    def successor(self) -> int | None:
        """The generation to drain towards; None before `draining`, and when the service is being stopped."""
        return self._core.successor

    @property
    def drain_limit(self) -> float | None:
        """Seconds, from the moment draining was set, after which this worker is ended by force; None: no limit."""
        return self._core.limit

    @property
    def drain_remaining(self) -> float | None:
        """Seconds left of `drain_limit`, never negative; None without a limit."""
        until = self._core.drain_until
        return None if until is None else max(0.0, until - time.monotonic())

    def ready(self) -> None:
        """Tells the supervisor, or systemd, that this worker serves (``--ready notify`` waits for it)."""
        if self._core.control is not None:
            self._core.say("ready")
        else:
            self._core.notify("READY=1")

    def status(self, connections: int, text: str = "") -> None:
        """For `portway status`; sent at most once a second, so call it as often as convenient."""
        now = time.monotonic()
        if now - self._status_at >= 1.0:
            self._status_at = now
            self._core.say("status", {"connections": connections, "text": text[:200]}, wait=False)

    def watchdog(self) -> None:
        """This worker is alive: systemd's ``WATCHDOG=1``, to whoever set NOTIFY_SOCKET."""
        self._core.notify("WATCHDOG=1")

    @property
    def supervised(self) -> bool:
        """Whether there is a line to a supervisor; what is said while none lives, the next one hears."""
        return self._core.control is not None

    def drained(self) -> None:
        """Everything was handed over or has finished: the supervisor may end this worker."""
        self._core.say("drained")

    def _movable(self, sock: socket.socket, kind: str, unread: bytes, state: bytes) -> Moving:
        if isinstance(sock, ssl.SSLSocket):
            raise UnsupportedSocket(
                "a TLS connection does not move: its keys are in this process", hint="finish it here and close it"
            )
        if sock.fileno() < 0:
            raise ValueError("hand_over: this socket is closed")
        return check_moving(kind, unread, state)

    def __repr__(self) -> str:
        state = "draining" if self._core.draining.is_set() else "serving"
        return f"<{type(self).__name__} {self.number} of {self.name!r}, worker {self.worker}, {state}>"


class Generation(BaseGeneration):
    """For threaded and plain blocking servers; every method may be called from any thread. See `generation`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._mover: Mover | None = None
        self._reactor: ThreadReactor | None = None
        self._receiver = Receiver(core.inbox) if core.inbox is not None else None
        self._batch: Batch | None = None

    @property
    def draining(self) -> threading.Event:
        """Set once this worker should hand over and finish. Reading it promises that this server does so by itself:
        no stop signal comes before `drained` or the end of `drain_limit`."""
        self._engine()
        self._core.hello()
        return self._core.draining

    def hand_over(self, sock: socket.socket, kind: str, unread: bytes = b"", state: bytes = b"") -> None:
        """Gives a connection to the newer generation, and returns once that has it; `sock` is closed then.

        Stop reading from `sock` before: `unread` (bytes read and not consumed) is what the successor sees first, and
        `state` is for the layers above; both together at most 1 MiB. There is no timeout: an offer that left may
        be accepted at any time, and giving up would leave two servers with one connection.

        `HandoffRefused` when the successor will not take it, has ended, or there is none: the socket is still the
        caller's, go on serving it. `UnsupportedSocket` for TLS.
        """
        moving = self._movable(sock, kind, unread, state)
        over, refusal = threading.Event(), deque[str]()

        def done(reason: str | None) -> None:
            if reason is not None:
                refusal.append(reason)
            over.set()

        mover, reactor = self._engine(), self._reactor
        if mover is None or reactor is None:
            raise HandoffRefused("no newer generation takes connections", hint="go on serving this one")
        reactor.call_soon(lambda: mover.submit(Offer(sock.fileno(), moving, done)))
        over.wait()
        if refusal:
            raise HandoffRefused(f"the connection stays here: {refusal[0]}", hint="go on serving it")
        sock.close()

    def adopted(self, timeout: float | None = None, *, check: Check | None = None) -> Adopted | None:
        """The next connection from an older generation; None when none will ever come.

        `check` may refuse one by returning a reason, after a look at its kind and state; it must not read from it. It
        stays with its source then. `OperationTimeout` after `timeout` seconds. Workers of a generation share what
        comes. Call it until None, also while draining: what comes then is handed on.
        """
        deadline = Deadline(timeout)
        receiver = self._receiver
        if receiver is None:
            return None
        self._core.hello(adopts=True)
        while True:
            with self._lock:
                found = self._next(receiver, check)
            if found is not None:
                return found
            if not receiver.descriptors():
                return None
            if not receiver.wait(deadline):
                raise deadline.error("waiting for a connection from an older generation")

    def __iter__(self) -> Iterator[Adopted]:
        while (found := self.adopted()) is not None:
            yield found

    def _next(self, receiver: Receiver, check: Check | None) -> Adopted | None:
        while True:
            while self._batch is not None and self._batch.fds:
                found = self._batch.accept(check)
                if found is not None:
                    return found
            if not receiver.ready:
                receiver.step(1)
            if not receiver.ready:
                return None
            self._batch = receiver.ready.popleft()

    def _engine(self) -> Mover | None:
        """The mover, whose thread also reads the control line; None, and no thread, outside of `portway run`."""
        with self._lock:
            if self._mover is None and self._core.control is not None:
                reactor = ThreadReactor("portway-generation")
                mover = Mover(reactor, self.number)
                self._reactor, self._mover = reactor, mover
                self._core.listen(lambda: reactor.call_soon(lambda: mover.retarget(self._core.target)))
                reactor.call_soon(lambda: mover.retarget(self._core.target))
                self._core.read_control(lambda: reactor)
            return self._mover


_generation: Generation | None = None


def generation() -> Generation:
    """This process's place among the generations of its service: its sockets, and how to take over and hand over.

    The same object each time, in each process its own (a forked child is outside of any generation). Works outside of
    `portway run` as well. `ConfigurationError` when the environment contradicts itself. For asyncio there is
    `portway.aio.generation`.
    """
    global _generation
    if _generation is None or _generation._core.pid != os.getpid():
        _generation = Generation(core())
    return _generation
