"""The control socket: JSON lines between `portway reload|status|stop|upgrade` and the supervisor.

Only the supervisor's own uid is heard (SO_PEERCRED); root is refused too unless it is that uid. A request is one object
``{"verb": ..., ...}``; answers are ``{"event": text}`` any number of times, then ``{"result": {...}}`` or
``{"error": {"kind", "message", "hint", "lines"}}``, after which the supervisor closes.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from ..errors import PortwayError
from ..kernel.process import peer_of, user_name
from .loop import Loop

__all__ = ["Control", "Request", "error_record"]

_MAX_REQUEST = 1 << 20  # bytes; a command line at most
_MAX_CLIENTS = 64
_MAX_UNREAD = 4 << 20  # bytes of answers a client may leave unread before it is dropped


def error_record(error: BaseException) -> dict[str, Any]:
    lines = [line for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
    return {
        "kind": type(error).__name__, "message": getattr(error, "message", str(error)),
        "hint": getattr(error, "hint", None), "errno": getattr(error, "errno", None), "lines": lines,
    }  # fmt: skip


class Request:
    """One client and what it asked. Answering after it went away is harmless."""

    def __init__(self, control: Control, sock: socket.socket) -> None:
        self._control = control
        self.sock = sock
        self.verb = ""
        self.message: dict[str, Any] = {}
        self._in = b""
        self._out = b""
        self._last = False

    def read(self) -> None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._in += data
        line, end, _ = self._in.partition(b"\n")
        if end and not self.verb:
            self._parse(line)
        elif len(self._in) > _MAX_REQUEST:
            self.fail(PortwayError(f"a request has at most {_MAX_REQUEST} bytes"))

    def _parse(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            self.verb = str(message["verb"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.fail(PortwayError("a request is one JSON object with a verb"))
            return
        self.message = message
        self._control.serve(self)

    def event(self, text: str) -> None:
        self._send({"event": text})

    def done(self, **result: Any) -> None:
        self._last = True
        self._send({"result": result})

    def fail(self, error: BaseException) -> None:
        self._last = True
        self._send({"error": error_record(error)})

    def _send(self, record: dict[str, Any]) -> None:
        if self.sock.fileno() < 0:
            return
        waiting = bool(self._out)
        self._out += json.dumps(record).encode() + b"\n"
        if not waiting:
            self._flush()

    def _flush(self) -> None:
        try:
            self._out = self._out[self.sock.send(self._out, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if (self._last and not self._out) or len(self._out) > _MAX_UNREAD:
            self.close()
            return
        self._control.loop.forget(self.sock)
        self._control.loop.watch(self.sock, self._flush if self._out else self.read, write=bool(self._out))

    def close(self) -> None:
        self._control.forget(self)
        self.sock.close()


class Control:
    """Owns the listening socket and the clients. `serve` is called once a request is whole."""

    def __init__(self, loop: Loop, sock: socket.socket, serve: Callable[[Request], None]) -> None:
        self.loop = loop
        self.sock = sock
        self.serve = serve
        self._clients: set[Request] = set()
        sock.setblocking(False)
        loop.watch(sock, self._on_accept)

    def _on_accept(self) -> None:
        try:
            sock, _ = self.sock.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor left, say: look again when there may be one
            self.loop.forget(self.sock)
            self.loop.after(0.5, self._listen_again)
            return
        sock.setblocking(False)
        self.adopt(sock)

    def _listen_again(self) -> None:
        if self.sock.fileno() >= 0:
            self.loop.watch(self.sock, self._on_accept)

    def adopt(self, sock: socket.socket) -> Request:
        request = Request(self, sock)
        self._clients.add(request)
        self.loop.watch(sock, request.read)
        peer = peer_of(sock)
        if peer.uid != os.geteuid():
            request.fail(PortwayError(
                f"this service belongs to uid {user_name(os.geteuid())}: uid {user_name(peer.uid)} is refused",
                hint="run the command as that user",
            ))  # fmt: skip
        elif len(self._clients) > _MAX_CLIENTS:
            request.fail(PortwayError(f"more than {_MAX_CLIENTS} commands at once"))
        return request

    def forget(self, request: Request) -> None:
        self._clients.discard(request)
        self.loop.forget(request.sock)

    def close(self) -> None:
        for request in list(self._clients):
            request.close()
        self.loop.forget(self.sock)
        self.sock.close()
