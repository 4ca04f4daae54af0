"""What this process got from its supervisor: numbers, sockets, the control line. One `Core` for each process.

The contract is docs/explanation/worker-contract.md. Both fronts (`hook`, `hook_aio`) stand on the same core, so that an
application may ask for its generation's number inside a server that drains through asyncio.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..deadline import Deadline
from ..errors import ConfigurationError, OperationTimeout, TooManyDescriptors
from ..kernel.fdpass import close_all, poll_for, receive_descriptors
from .hook_reactor import Reactor

__all__ = ["Core", "core"]

FIRST_FD = 3  # SD_LISTEN_FDS_START
_MAX_PACKET = 65_536
_RULE = "is set by `portway run`; unset it to run without"


class Core:
    """The state that the fronts share. ``target`` is the write end of the newest generation's inbox, or None."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        self.pid = pid
        self.number, self.name, self.worker = 0, "", 0
        self.sockets: dict[str, socket.socket] = {}
        self.control: socket.socket | None = None
        self.peer: socket.socket | None = None
        """Only held: with it a later supervisor takes over the line, and until then the line does not end."""
        self.inbox: socket.socket | None = None
        self.notify_socket = environ.get("NOTIFY_SOCKET", "")
        self.draining = threading.Event()
        self.stopping = False
        self.successor: int | None = None
        self.limit: float | None = None
        self.drain_until: float | None = None
        self.target: socket.socket | None = None
        self._listeners: list[Callable[[], object]] = []
        self._reader: Reactor | None = None
        self._lock = threading.Lock()
        self._said: dict[str, object] = {}
        # As systemd has it: what is meant for another pid, such as our parent, is not ours.
        if environ.get("LISTEN_PID") == str(pid):
            self.sockets = _listening(environ)
            self._join(environ)

    def _join(self, environ: Mapping[str, str]) -> None:
        if "PORTWAY_GENERATION" not in environ:
            return
        self.number = _number(environ, "PORTWAY_GENERATION")
        self.worker = _number(environ, "PORTWAY_WORKER")
        self.name = environ.get("PORTWAY_NAME", "")
        self.control = _line(environ, "PORTWAY_CONTROL")
        self.peer = _line(environ, "PORTWAY_CONTROL_PEER")
        self.inbox = _line(environ, "PORTWAY_INBOX")

    @property
    def leaving(self) -> bool:
        return self.successor is not None or self.target is not None or self.stopping

    def listen(self, call: Callable[[], object]) -> None:
        """`call` is called, in any thread, after each change of draining, target or limit."""
        with self._lock:
            self._listeners.append(call)

    def unlisten(self, call: Callable[[], object]) -> None:
        with self._lock:
            if call in self._listeners:
                self._listeners.remove(call)

    def read_control(self, make: Callable[[], Reactor]) -> None:
        """Lets a reactor read the control line, unless a living one does."""
        with self._lock:
            if self.control is None or (self._reader is not None and not self._reader.closed):
                return
            reactor, control = make(), self.control
            self._reader = reactor
        reactor.call_soon(lambda: reactor.watch(control.fileno(), self._on_control))

    def hello(self, **more: object) -> None:
        """Tells the supervisor that this worker drains by itself, and with ``adopts=True`` that it reads its inbox."""
        with self._lock:
            said = {"pid": self.pid, "hook": 1, "adopts": False, **self._said, **more}
            if said == self._said:
                return
            self._said = said
        self.say("hello", said)

    def say(self, verb: str, keys: Mapping[str, object] | None = None, *, wait: bool = True) -> None:
        """One packet to the supervisor; nobody there is fine. Without `wait` it is dropped when the line is full."""
        import json

        if self.control is None:
            return
        data = json.dumps({"verb": verb, **(keys or {})}).encode()
        try:
            self.control.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            if wait:
                self._say_later(data)
        except OSError:
            pass

    def _say_later(self, data: bytes) -> None:
        if self.control is not None:
            try:
                poll_for(self.control.fileno(), select.POLLOUT, Deadline(5), "telling the supervisor")
                self.control.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except (OSError, OperationTimeout):
                pass  # a supervisor that reads nothing for seconds is as good as none

    def notify(self, text: str) -> None:
        """systemd's notify protocol, for a worker that systemd itself started; see sd_notify(3)."""
        if not self.notify_socket:
            return
        address = self.notify_socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
            except OSError:
                pass  # nobody there to tell, and no reason to stop serving

    def _on_control(self) -> None:
        while self.control is not None:
            try:
                data, fds = receive_descriptors(self.control, _MAX_PACKET, timeout=0)
            except OperationTimeout:
                return
            except TooManyDescriptors:
                data, fds = b"{}", []
            except OSError:
                data, fds = b"", []
            if not data:
                self._supervisor_gone()
                return
            self._packet(data, fds)

    def _supervisor_gone(self) -> None:
        """It was killed: go on serving. A drain that has begun goes on too, it needs no supervisor."""
        if self._reader is not None and self.control is not None:
            self._reader.watch(self.control.fileno(), None)
            self.control.close()
            self.control = None
        self._tell()

    def _packet(self, data: bytes, fds: list[int]) -> None:
        import json

        try:
            packet: Any = json.loads(data)
            verb = packet.get("verb") if isinstance(packet, dict) else None
        except (ValueError, RecursionError):
            verb = None
        if verb == "drain":
            self._drain(packet, fds)
        else:
            close_all(fds)
            if verb == "stop":
                self.stopping = True
                self._set_limit(packet.get("limit"))
                self._tell()

    def _drain(self, packet: dict[str, Any], fds: list[int]) -> None:
        close_all(fds[1:])
        old, self.target = self.target, socket.socket(fileno=fds[0]) if fds else None
        number = packet.get("generation")
        self.successor = number if isinstance(number, int) else None
        self._set_limit(packet.get("limit"))
        self._tell()
        if old is not None and self._reader is not None:
            # Fronts in other threads still have it in hand; they were told, and are done with it a turn later.
            self._reader.call_later(5.0, old.close)

    def _set_limit(self, limit: object) -> None:
        ok = isinstance(limit, (int, float)) and limit >= 0
        self.limit = float(limit) if ok else None  # type: ignore[arg-type]
        self.drain_until = None if self.limit is None else time.monotonic() + self.limit

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for call in listeners:
            call()
        if self.leaving:
            self.draining.set()  # last: who wakes up on it finds the way to the successor open


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ConfigurationError(f"{name}={text!r}: not a number; it {_RULE}")
    return int(text)


def _line(environ: Mapping[str, str], name: str) -> socket.socket | None:
    """The seqpacket socket whose descriptor number the variable holds, close-on-exec from here on."""
    if name not in environ:
        return None
    fd = _number(environ, name)
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigurationError(f"{name}={fd}: not an open socket ({error.strerror}); it {_RULE}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.detach()
        raise ConfigurationError(f"{name}={fd}: not a Unix seqpacket socket; it {_RULE}")
    sock.set_inheritable(False)
    return sock


def _listening(environ: Mapping[str, str]) -> dict[str, socket.socket]:
    count = _number(environ, "LISTEN_FDS")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, socket.socket] = {}
    for index in range(count):
        base = names[index] if index < len(names) and names[index] else "unknown"
        name, again = base, 2
        while name in found:
            name, again = f"{base}#{again}", again + 1
        try:
            sock = socket.socket(fileno=FIRST_FD + index)
        except OSError as error:
            raise ConfigurationError(
                f"LISTEN_FDS={count}: descriptor {FIRST_FD + index} is not a socket ({error.strerror})",
                hint="unset LISTEN_FDS and LISTEN_PID when starting this program by hand",
            ) from None
        sock.set_inheritable(False)
        found[name] = sock
    return found


_core: Core | None = None
_parents: list[Core] = []  # kept, so that a forked child does not close sockets which its server may still use
_core_lock = threading.Lock()


def core() -> Core:
    """This process's core; a forked child starts over, outside of any generation."""
    global _core
    with _core_lock:
        if _core is not None and _core.pid != os.getpid():
            _parents.append(_core)
            _core = None
        if _core is None:
            _core = Core(os.environ, os.getpid())
        return _core
