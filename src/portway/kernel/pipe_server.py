r"""`NamedPipeServer`: a pipe's name, and its clients one after the other. CreateNamedPipeW and its companions."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ..deadline import Deadline
from ..errors import InvalidParameter, ObjectClosed, OperationAborted, PortwayError, TooManyDescriptors
from ..wire.pipe import MAX_INSTANCES, Direction
from .pipe_end import DEFAULT_MAX_MESSAGE, PipeEnd, access_of, mode_is_message
from .pipe_serving import Options, Serving
from .security import Security

if TYPE_CHECKING:
    import socket

    from .pipe_instance import Instance

__all__ = ["NamedPipeConnection", "NamedPipeServer", "server_options"]

_NO_DESCRIPTOR = 0.1  # seconds `serve` waits for one


class NamedPipeConnection(PipeEnd):
    """The server's end of one conversation, from `NamedPipeServer.accept`. ``close()`` gives its instance back."""

    is_server = True
    _shared = -1

    def __init__(
        self, server: Serving, instance: Instance, sock: socket.socket, max_message: int, timeout: float | None
    ) -> None:
        header = server.record.header
        self._server, self._instance = server, instance
        self.place = instance.slot, instance.generation, server.record.folder
        super().__init__(
            sock.detach(), message=header.message, access=int(header.direction), read_message=header.message,
            max_message=max_message, timeout=timeout, name=header.name,
        )  # fmt: skip

    @property
    def instance(self) -> Instance:
        """The slot this conversation has."""
        return self._instance

    def disconnect(self) -> None:
        """DisconnectNamedPipe: ends the conversation at once. What either side has not read is lost; the client's
        calls give `PipeNotConnected`. `flush` first to be sure that it has read all. Closes this end, too."""
        with self._server.lock:
            if self.closed or self._server.record.closed:
                raise ObjectClosed(f"{self!r} is closed, or the parent of this process has it")
            self._close_shared()
            self._instance.disconnect()
            self.disconnect_here()
            self._server.release(self._instance)

    def close(self) -> None:
        """Ends the conversation; the client can still read what was sent. Closing twice is fine."""
        with self._server.lock:
            if not self.closed:
                self._close_shared()
                super().close()
                self._server.release(self._instance)

    def share_slot(self) -> int:
        """For the hand-off provider: a descriptor that holds the instance by itself; this end's to close."""
        if self._shared < 0:
            self._shared = self._server.record.share_slot(self._instance.slot)
        return self._shared

    def leave(self) -> None:
        """The conversation goes on in another process."""
        self._close_shared()
        super().leave()
        self._server.moved_away(self._instance)

    def _close_shared(self) -> None:
        fd, self._shared = self._shared, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_instance", None) is not None and not self.closed:
            self.close()


def server_options(
    *, mode: str, direction: str | Direction, max_instances: int, instances: int | None, backlog: int,
    security: Security | None, first_instance: bool, remote_clients: Literal["reject", "accept"], out_buffer: int,
    in_buffer: int, default_wait: float, root: str | os.PathLike[str] | None,
) -> Options:  # fmt: skip
    """The checked options of a server. `InvalidParameter` names the one that cannot be."""
    if not 1 <= max_instances <= MAX_INSTANCES:
        raise InvalidParameter(f"max_instances={max_instances}: 1 to {MAX_INSTANCES}, the latter is the most there are")
    for what, value, least in (("instances", instances, 1), ("backlog", backlog, 1), ("out_buffer", out_buffer, 0),
                               ("in_buffer", in_buffer, 0)):  # fmt: skip
        if value is not None and not least <= value < 1 << 32:
            raise InvalidParameter(f"{what}={value}: give a number from {least} on")
    if remote_clients not in ("reject", "accept"):
        raise InvalidParameter(f"remote_clients={remote_clients!r}: give 'reject' or 'accept'")
    if not 0 <= default_wait < 4_000_000:
        raise InvalidParameter(f"default_wait={default_wait}: give seconds")
    return Options(
        mode_is_message(mode), Direction(access_of(direction)), max_instances, instances, backlog, first_instance,
        security or Security.owner(), remote_clients == "accept", out_buffer, in_buffer,
        int(default_wait * 1000) or 50, None if root is None else os.fspath(root),
    )  # fmt: skip


class NamedPipeServer:
    r"""Serves the pipe of this name: ``for pipe in server: ...``, `accept`, or `serve`.

    name: ``\\.\pipe\HelloWorld``, or just ``HelloWorld``; 1 to 256 characters, compared without case. A byte pipe is
      also where .NET on Unix looks for it. A rooted name (``/run/x.pipe``) is that path, as in .NET.
    mode: ``"byte"``, a stream, or ``"message"``: what one `send` wrote, one `receive` gives.
    direction: what this end does: ``"inbound"`` reads, ``"outbound"`` writes, ``"duplex"``.
    max_instances: conversations of the name at a time, 1 to 255, in all processes that serve it; what the first server
      said holds. instances: of these, how many this object may have (default: all). backlog: how many listen at a
      time: so many clients can open, write and leave before `accept`; the next gets `PipeBusy`.
    security: who may connect, read and write besides the owner; nobody else ever controls the pipe.
    first_instance: `AccessDenied` if the name exists. remote_clients: recorded for serving other machines.
    out_buffer, in_buffer: advisory, as on Windows; default_wait: seconds `wait_pipe` waits when it says nothing.
    max_message: what ``receive()`` without a size gathers at most. timeout: the default of its connections' calls.
    root: a world of one's own, for tests.

    An instance listens from here on. Errors: those of names, `AccessDenied` (another direction; another user or
    program serves the name), `PipeBusy` (all instances taken), `InvalidParameter`. Close it, or leave ``with``: the
    connections go on, and the name goes with the last of them. In a fork child it is closed.
    """

    def __init__(
        self, name: str, *, mode: Literal["byte", "message"] = "byte", direction: str | Direction = "duplex",
        max_instances: int = MAX_INSTANCES, instances: int | None = None, backlog: int = 4,
        security: Security | None = None, first_instance: bool = False,
        remote_clients: Literal["reject", "accept"] = "reject", out_buffer: int = 0, in_buffer: int = 0,
        default_wait: float = 0.05, max_message: int = DEFAULT_MAX_MESSAGE, timeout: float | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        options = server_options(
            mode=mode, direction=direction, max_instances=max_instances, instances=instances, backlog=backlog,
            security=security, first_instance=first_instance, remote_clients=remote_clients, out_buffer=out_buffer,
            in_buffer=in_buffer, default_wait=default_wait, root=root,
        )  # fmt: skip
        self.max_message, self.timeout = max_message, timeout
        self._cancels = self._waiting = self._leaving = 0
        self.serving = Serving(name, options)

    # -- clients -------------------------------------------------------------------------------------------------------

    def accept(self, timeout: float | None = None) -> NamedPipeConnection:
        """The next client; the caller closes it. `OperationTimeout`, `OperationAborted` (`cancel`), `ObjectClosed`.

        Clients are taken in the order in which their instances began to listen. ConnectNamedPipe.
        """
        deadline, cancels = Deadline(timeout), self._cancels
        while (found := self.serving.accept()) is None:
            deadline.check(f"waiting for a client of the pipe {self.name}")
            self._wait(deadline, cancels)
        return self._connection(*found)

    def _connection(self, instance: Instance, sock: socket.socket) -> NamedPipeConnection:
        return NamedPipeConnection(self.serving, instance, sock, self.max_message, self.timeout)

    def _wait(self, deadline: Deadline, cancels: int) -> None:
        with self.serving.lock:
            if cancels == self._cancels:
                self._waiting += 1
        try:
            if cancels == self._cancels:
                self.serving.wait(deadline.remaining())
        finally:
            with self.serving.lock:
                self._waiting -= 1
                if self._leaving:
                    self._leaving -= 1
                    if not self._leaving:
                        self.serving.unwake()
        if cancels != self._cancels:
            raise OperationAborted(f"accept() of the pipe {self.name} was cancelled")

    def cancel(self) -> None:
        """Ends every accept() that is waiting now with `OperationAborted`. From any thread."""
        with self.serving.lock:
            self._cancels += 1
            self._leaving = self._waiting
            if self._waiting:
                self.serving.wake()

    def __iter__(self) -> Iterator[NamedPipeConnection]:
        """One client after the other, until the server is closed."""
        while not self.closed:
            try:
                yield self.accept()
            except ObjectClosed:
                return

    def serve(self, handler: Callable[[NamedPipeConnection], Any], *, threads: int | None = None) -> None:
        """Calls ``handler(pipe)`` for each client in a thread of its own, and closes the pipe after it, until `close`
        (from another thread, or by Ctrl-C). What a handler raises is reported and ends its conversation only.

        threads: at most so many at a time (default: as many as there are instances).
        """
        turns = threading.Semaphore(threads or MAX_INSTANCES)
        while not self.closed:
            turns.acquire()
            try:
                pipe = self.accept()
            except ObjectClosed:
                return
            except TooManyDescriptors:  # the client stays where it is until a conversation ends
                turns.release()
                time.sleep(_NO_DESCRIPTOR)
                continue
            except BaseException:
                turns.release()
                raise
            threading.Thread(
                target=_converse, args=(handler, pipe, turns), name=f"portway-pipe-{self.name}", daemon=True
            ).start()

    # -- facts and the end ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """As given, without ``\\\\.\\pipe\\``."""
        return self.serving.name.text

    @property
    def mode(self) -> Literal["byte", "message"]:
        """The type of the pipe, which its first server decided."""
        return "message" if self.serving.record.header.message else "byte"

    @property
    def direction(self) -> Direction:
        return self.serving.record.header.direction

    @property
    def max_instances(self) -> int:
        return self.serving.record.header.max_instances

    @property
    def dotnet_path(self) -> str | None:
        """Where .NET finds it; None when it has no such place."""
        return self.serving.record.header.front or None

    @property
    def dotnet_state(self) -> str:
        """``ours``, ``another`` (server of this pipe has the path), ``closed`` (no instance is free: .NET waits),
        ``taken`` (another program's server has it), ``blocked`` (a file is in the way), ``none``."""
        return self.serving.front.state if self.serving.front else "none"

    @property
    def closed(self) -> bool:
        return self.serving.closed

    def fileno(self) -> int:
        """Readable while `accept` would not wait. For selectors only."""
        return self.serving.fileno()

    def close(self) -> None:
        """Listens no longer; see the class. Closing twice is fine."""
        self.serving.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "serving") and not sys.is_finalizing():
            self.serving.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.serving.listening)} listening, {len(self.serving.used)} in use"
        return f"<NamedPipeServer {self.name!r} {state}>"


def _converse(
    handler: Callable[[NamedPipeConnection], Any], pipe: NamedPipeConnection, turns: threading.Semaphore
) -> None:
    try:
        with pipe:
            handler(pipe)
    except PortwayError as error:
        if not isinstance(error, (BrokenPipeError, ConnectionError)):
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
    except Exception:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
    finally:
        turns.release()
