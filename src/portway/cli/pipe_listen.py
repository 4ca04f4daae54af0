"""What `portway pipe listen` does with its clients: a thread each, one writer of stdout, ended by a signal."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..deadline import Deadline
from ..errors import BrokenPipe, CommandNotFound, NoData, OperationAborted, OperationTimeout, PortwayError
from .common import remark
from .pipe import contents, put

if TYPE_CHECKING:
    from ..kernel.pipe_server import NamedPipeConnection, NamedPipeServer

__all__ = ["Listener"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Listener:
    """`run` returns after a signal or the last of `count`, with every conversation ended."""

    def __init__(
        self, server: NamedPipeServer, *, echo: bool, reply: bytes | None, cmd: tuple[str, ...], count: int | None,
        as_hex: bool, as_json: bool,
    ) -> None:  # fmt: skip
        self.server, self.echo, self.reply, self.cmd = server, echo, reply, cmd
        self.count, self.as_hex, self.as_json = count, as_hex, as_json
        self._lock = threading.Lock()
        self._seen = 0
        self._error: Exception | None = None
        self._open: dict[threading.Thread, NamedPipeConnection] = {}
        self._children: set[subprocess.Popen[bytes]] = set()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        try:
            with warnings.catch_warnings(), _signals() as signalled, selectors.DefaultSelector() as selector:
                warnings.showwarning = lambda message, *_, **__: remark(str(message))
                for source in (signalled, self._bell, self.server.fileno()):
                    selector.register(source, selectors.EVENT_READ)
                while True:
                    rung = {key.fd for key, _ in selector.select(deadline.remaining())}
                    if rung & {signalled, self._bell}:
                        break
                    deadline.check(f"serving the pipe {self.server.name}")
                    with suppress(OperationTimeout):
                        self._begin(self.server.accept(0))
        finally:
            self._end()
        if self._error is not None:
            raise self._error

    def _begin(self, pipe: NamedPipeConnection) -> None:
        thread = threading.Thread(target=self._converse, args=(pipe,), daemon=True)
        with self._lock:
            self._open[thread] = pipe
        thread.start()

    def _end(self) -> None:
        self.server.close()
        with self._lock:
            left = dict(self._open)
            for child in self._children:
                child.terminate()
        patience = Deadline(5)
        while any(thread.is_alive() for thread in left) and not patience.expired:
            for thread, pipe in left.items():
                with suppress(PortwayError):
                    pipe.cancel()  # of what waits now; who is between two calls is met the next time
                thread.join(0.02)
        os.close(self._bell)

    # -- one conversation, in a thread ---------------------------------------------------------------------------------

    def _converse(self, pipe: NamedPipeConnection) -> None:
        try:
            with pipe:
                if self.server.mode == "byte":
                    self._stream(pipe)
                elif not pipe.access & 1:
                    if self._claim():
                        self._give(pipe, b"")
                else:
                    self._messages(pipe)
        except (BrokenPipe, OperationAborted):
            pass
        except (CommandNotFound, BrokenPipeError) as error:  # no message will go better than this one
            self._error = error
            self._ring()
        except PortwayError as error:
            remark(str(error))
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)
                last = self.count is not None and self._seen >= self.count
            if last:
                self._ring()

    def _messages(self, pipe: NamedPipeConnection) -> None:
        while True:
            data = pipe.receive()
            if not self._claim():
                return
            self._print(pipe, data)
            self._give(pipe, data)
            if self._seen == self.count:
                return

    def _stream(self, pipe: NamedPipeConnection) -> None:
        if not self._claim():
            return
        if self.cmd:
            ends = {"stdin" if pipe.access & 1 else "", "stdout" if pipe.access & 2 else ""} - {""}
            self._child({end: pipe.fileno() for end in ends}, None)
        elif not pipe.access & 1:
            self._give(pipe, b"")
        else:
            for data in pipe:
                self._print(pipe, data)
                self._give(pipe, data)

    def _claim(self) -> bool:
        """Whether this message, or client, is one of the `count`."""
        with self._lock:
            if self.count is not None and self._seen >= self.count:
                return False
            self._seen += 1
            return True

    def _print(self, pipe: NamedPipeConnection, data: bytes) -> None:
        peer = pipe.peer if self.as_json else None
        with self._lock:
            if peer is not None:
                client = {"pid": peer.pid, "uid": peer.uid}
                print(json.dumps({"name": self.server.name, "client": client, **contents(data)}), flush=True)
            else:
                put(data, self.as_hex, b"\n" if self.server.mode == "message" else b"")

    def _give(self, pipe: NamedPipeConnection, data: bytes) -> None:
        if self.cmd:
            answer = self._child({}, data)
        elif self.echo or self.reply is not None:
            answer = data if self.reply is None else self.reply
        else:
            return
        if pipe.access & 2:
            with suppress(NoData):  # the client has left; what else it wrote is still to be read
                pipe.send(answer)

    def _child(self, ends: dict[str, int], data: bytes | None) -> bytes:
        """Runs CMD; what it printed, if that does not go into the pipe already."""
        streams = {"stdin": subprocess.PIPE if data is not None else subprocess.DEVNULL} | ends
        if "stdout" not in ends:
            streams["stdout"] = subprocess.PIPE if data is not None else sys.stderr.fileno()
        try:
            child = subprocess.Popen(self.cmd, **streams)  # type: ignore[call-overload]
        except OSError as error:
            found = CommandNotFound(f"{self.cmd[0]!r}: {error.strerror}")
            found.errno = error.errno
            raise found from None
        with self._lock:
            self._children.add(child)
        try:
            output, _ = child.communicate(data)
        finally:
            with self._lock:
                self._children.discard(child)
        if child.returncode:
            remark(f"{self.cmd[0]} ended with {child.returncode}")
        return output or b""

    def _ring(self) -> None:
        with suppress(OSError):  # `run` has ended
            os.eventfd_write(self._bell, 1)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that is readable once a signal has come; children get the signals as ever. What was ignored when we
    were started (nohup, a shell's ``&``) stays ignored."""
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    wakeup = signal.set_wakeup_fd(writes)
    try:
        yield reads
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reads)
        os.close(writes)
