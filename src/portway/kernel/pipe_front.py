"""The door of a pipe for those who know only .NET's path: ``$TMPDIR/CoreFxPipe_NAME``, or a rooted name itself.

Each server object has a front of its own, a socket bound to a file beside .NET's path; the path is a hard link to the
front of a server whose instances listen. When none listens the path is a socket's file that nobody has: .NET's Connect
then waits until its timeout, as on Windows. The front of a message pipe is a seqpacket socket that is bound and never
listens: .NET says "Protocol wrong type for socket" at once.

What is not ours is never removed: a file is exchanged for ours in one step, looked at, and put back when it is not the
one that was meant. All changes are made under the record's gate.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import suppress

from ..errors import AccessDenied
from .netinfo import look_at
from .objectfile import full
from .pipe_name import MAX_SOCKET_PATH
from .pipe_record import Record
from .pipe_socket import bind_socket
from .security import Security

__all__ = ["Front", "front_file", "remove_stale", "whose_front"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def front_file(record: Record, number: int) -> str:
    """The file of one server's front."""
    return f"{os.path.dirname(record.header.front)}/.portway-{os.path.basename(record.folder)}-{number:x}"


def whose_front(record: Record, identity: tuple[int, int] | None) -> int | None:
    """The number of the server of this pipe whose front the file is; None: it is no front of this pipe."""
    prefix = os.path.basename(front_file(record, 0))[:-1]
    folder = os.path.dirname(record.header.front)
    numbers = [line.server for _, line in record.lines()]
    with suppress(OSError):  # a server may have no instance at the moment
        for name in os.listdir(folder):
            with suppress(ValueError):
                numbers += [int(name.removeprefix(prefix), 16)] * name.startswith(prefix)
    for number in numbers:
        with suppress(OSError):
            info = os.lstat(front_file(record, number))
            if (info.st_dev, info.st_ino) == identity:
                return number
    return None


class Front:
    """One server object's. ``close()`` after `settle` has taken the path away from it."""

    def __init__(self, record: Record, number: int, security: Security) -> None:
        self.record, self.path = record, record.header.front
        self.file = front_file(record, number)
        self.socket: socket.socket | None = None
        self.state = "none"
        """``ours``, ``another`` (another server of this pipe has the path), ``closed`` (no instance listens),
        ``taken`` (a socket that is not this pipe's has it), ``blocked`` (a file of somebody else, or no socket)."""
        if not self.path or len(os.fsencode(self.file)) > MAX_SOCKET_PATH:
            self.path = ""
            return
        kind = socket.SOCK_SEQPACKET if record.header.message else socket.SOCK_STREAM
        try:
            self.socket = bind_socket(kind, self.file, security)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise AccessDenied(f"{os.path.dirname(self.path)}: {os.strerror(error.errno or 0)}") from None
            raise full(error, self.path) from error
        if not record.header.message:
            self.socket.listen(4096)
        info = os.lstat(self.file)
        self.identity = info.st_dev, info.st_ino

    def settle(self, listening: bool) -> None:
        """Under the gate: makes the path what it should be; notes in `state` what it is."""
        if not self.path:
            return
        listening = listening or self.record.header.message
        for _ in range(20):
            seen = look_at(self.path)
            foreign = seen.state == "dead" and (seen.uid != os.geteuid() or os.path.islink(self.path))
            if foreign or seen.state in ("other", "denied"):
                self.state = "blocked" if seen.state != "denied" else "taken"
                return
            if seen.state == "live" and seen.identity == self.identity:
                if listening:
                    self.state = "ours"
                    return
                wanted = self._another()
            elif seen.state == "live":
                number = whose_front(self.record, seen.identity)
                if number is None:
                    self.state = "taken"
                    return
                if not listening or number in self._listening():
                    self.state = "another"
                    return
                wanted = self.file
            else:
                wanted = self.file if listening else self._another()
                if not wanted and seen.state == "dead":
                    self.state = "closed"
                    return
            if self._put(wanted, seen.identity):
                self.state = "closed" if not wanted else "ours" if wanted == self.file else "another"
                return

    def withdraw(self) -> None:
        """Under the gate, when this server leaves: its file goes, and the path with it unless another server has it."""
        if not self.path:
            return
        if self.state == "ours" and look_at(self.path).identity == self.identity:
            self._put(self._another(), self.identity)
        self.close()

    def forget(self) -> None:
        """In a fork child: nothing on disk changes."""
        sock, self.socket, self.path = self.socket, None, ""
        if sock is not None:
            sock.close()

    def close(self) -> None:
        with suppress(FileNotFoundError):
            if self.path and os.lstat(self.file).st_ino == self.identity[1]:
                os.unlink(self.file)
        self.forget()

    # -- whose front is it -----------------------------------------------------------------------------------------

    def _listening(self) -> list[int]:
        """Numbers of living servers whose instances listen (or that have any, of a message pipe), oldest first."""
        held, message = self.record.held(), self.record.header.message
        lines = [line for slot, line in self.record.lines() if slot in held and (message or line.state == 1)]
        return [line.server for line in sorted(lines, key=lambda line: line.ticket)]

    def _another(self) -> str:
        """The front file of another living server that can take a client; "" when there is none."""
        for number in self._listening():
            file = front_file(self.record, number)
            if file != self.file and look_at(file).state == "live":
                return file
        return ""

    # -- changing the path -----------------------------------------------------------------------------------------

    def _put(self, file: str, expected: tuple[int, int] | None) -> bool:
        """Makes the path a link to `file`, or to a socket nobody has when that is "". False: it changed meanwhile."""
        temporary = _aside(self.record)
        try:
            if file:
                os.link(file, temporary)
            else:
                bind_socket(socket.SOCK_STREAM, temporary, Security.owner()).close()
            if expected is None:
                os.link(temporary, self.path)
                return True
            return _exchange(temporary, self.path, expected)
        except (FileExistsError, FileNotFoundError):
            return False
        except OSError as error:
            raise full(error, self.path) from error
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def remove_stale(record: Record) -> None:
    """Under the gate, by one who found that no server is left, or who sweeps: fronts of the dead go, and the path when
    `record` has no living server and nobody has it."""
    if not record.header.front:
        return
    folder = os.path.dirname(record.header.front)
    prefix = f".portway-{os.path.basename(record.folder)}-"
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix):
                path = f"{folder}/{name}"
                if (seen := look_at(path)).state == "dead" and seen.uid == os.geteuid():
                    with suppress(OSError):
                        os.unlink(path)
    if not record.alive():
        remove_path(record.header.front, _aside(record))


def _aside(record: Record) -> str:
    """A name that `remove_stale` knows, should its maker be killed; shorter than a front's."""
    return f"{os.path.dirname(record.header.front)}/.portway-{os.path.basename(record.folder)}-t{os.urandom(4).hex()}"


def remove_path(path: str, aside: str) -> None:
    """Removes a socket's file of ours that nobody has; whatever else it turns out to be stays."""
    seen = look_at(path)
    if seen.state != "dead" or seen.uid != os.geteuid() or os.path.islink(path):
        return
    try:
        os.rename(path, aside)
        info = os.lstat(aside)
        if (info.st_dev, info.st_ino) == seen.identity:
            os.unlink(aside)
            return
        os.link(aside, path)  # somebody else's, put there this moment
        os.unlink(aside)
    except FileNotFoundError:
        pass
    except OSError:
        with suppress(OSError):
            os.rename(aside, path)


def _exchange(temporary: str, path: str, expected: tuple[int, int]) -> bool:
    """Swaps the two names if `path` is still the file expected; the old one is at `temporary` then, to be removed."""
    try:
        if not _swap(temporary, path):
            return False
    except NotImplementedError:  # this file system cannot; there is a moment in which a stranger's file would be lost
        info = os.lstat(path)
        if (info.st_dev, info.st_ino) != expected:
            return False
        os.rename(temporary, path)
        return True
    info = os.lstat(temporary)
    if (info.st_dev, info.st_ino) == expected:
        return True
    _swap(temporary, path)
    return False


def _swap(one: str, other: str) -> bool:
    global _renameat2
    if _renameat2 is None:
        _renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.ENOENT:
        return False
    if number in (errno.EINVAL, errno.ENOSYS):
        raise NotImplementedError
    raise OSError(number, os.strerror(number), other)


_renameat2: ctypes._NamedFuncPointer | None = None
