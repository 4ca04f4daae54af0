"""The door of a pipe for those who know only .NET's path: ``$TMPDIR/CoreFxPipe_NAME``, or a rooted name itself.

Each server object has a front of its own, a socket bound to a file beside .NET's path; the path is a hard link to the
front of a server whose instances listen. When none listens the path is a socket's file that nobody has: .NET's Connect
then waits until its timeout, as on Windows. The front of a message pipe is a seqpacket socket that is bound and never
listens: .NET says "Protocol wrong type for socket" at once.

What is not ours is never removed: a file is exchanged for ours in one step, looked at, and put back when it is not the
one that was meant. A descriptor (O_PATH) keeps every file that is compared, since file systems give the number of a
removed file to the next one. All changes are made under the record's gate.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import time
from contextlib import suppress
from typing import Self

from ..errors import AccessDenied
from .netinfo import unix_queue
from .objectfile import full
from .pipe_record import Record
from .pipe_socket import bind_socket
from .security import Security

__all__ = ["Front", "Seen", "front_file", "remove_stale", "whose_front"]

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
_BINDING = 0.05  # seconds after which a new file that no socket has is left over, and not just being bound


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


class Seen:
    """What lies at a path, kept from being replaced by another of the same number. ``with``, or ``close()``."""

    def __init__(self, path: str, ask: bool = True, new: bool = True) -> None:
        self.state, self.uid, self.fd = "absent", -1, -1
        """``absent``, ``live`` (somebody has the socket bound), ``dead`` (nobody has it), ``denied`` (somebody else's:
        we may not ask), ``other`` (no socket), ``link`` (a symlink, whatever it leads to)."""
        self.identity: tuple[int, int] | None = None
        try:
            self.fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise full(error, path) from error
            self.state = "absent" if error.errno == errno.ENOTDIR else "denied"
            return
        info = os.fstat(self.fd)
        self.identity, self.uid, kind = (info.st_dev, info.st_ino), info.st_uid, stat.S_IFMT(info.st_mode)
        if kind != stat.S_IFSOCK:
            self.state = "link" if kind == stat.S_IFLNK else "other"
            return
        if not ask:
            return
        self.state = self._ask()
        ours = info.st_nlink > 1 or info.st_mode & stat.S_ISVTX or not new
        if self.state == "dead" and not ours and time.time() - info.st_ctime < _BINDING:
            time.sleep(_BINDING)  # somebody may just bind it: the file is there before its socket has it
            self.state = self._ask()

    def _ask(self) -> str:
        """A datagram socket's connect() is refused by every other kind, and whoever has it notices nothing."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
                wrong = probe.connect_ex(f"/proc/self/fd/{self.fd}")
        except OSError as error:
            raise full(error, "a socket") from error
        return {errno.ECONNREFUSED: "dead", errno.EACCES: "denied", errno.EPERM: "denied"}.get(wrong, "live")

    @property
    def left_over(self) -> bool:
        """A socket's file of ours that nobody has."""
        return self.state == "dead" and self.uid == os.geteuid()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Front:
    """One server object's. `settle` whenever it may matter; `withdraw`, or `forget`, at the end."""

    def __init__(self, record: Record, number: int, security: Security) -> None:
        self.record, self.path, self.security = record, record.header.front, security
        self.file = front_file(record, number)
        self.socket: socket.socket | None = None
        self.identity: tuple[int, int] | None = None
        self.state = "none"
        """``ours``, ``another`` (another server of this pipe has the path), ``closed`` (no instance is free),
        ``taken`` (a socket that is not this pipe's has it), ``blocked`` (a file of somebody else, or no socket, is in
        the way, or nothing can be made there)."""
        self.why = ""
        """What is wrong, when it is ``blocked``."""
        if self.path:
            self._make()

    def _make(self) -> None:
        message = self.record.header.message
        try:
            made = bind_socket(socket.SOCK_SEQPACKET if message else socket.SOCK_STREAM, self.file, self.security)
            info = os.lstat(self.file)
        except OSError as error:
            folder = os.path.dirname(self.path)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise full(error, self.path) from error
            if self.record.header.name == self.path and self.identity is None:  # a rooted name is nowhere else
                raise AccessDenied(f"{folder}: {os.strerror(error.errno or 0)}") from error
            self.state, self.why = "blocked", f"{folder}: {os.strerror(error.errno or 0)}"
            return
        if not message:
            made.listen(4096)
        self.stop()
        self.socket, self.identity, self.why = made, (info.st_dev, info.st_ino), ""

    def settle(self, free: bool) -> None:
        """Under the gate: makes the path what it should be; notes in `state` what it is. free: whether an instance of
        this server's can take a client."""
        if self.path and self.identity is None:
            self._make()  # perhaps the folder is there now
        if self.identity is None:
            return
        free = free or self.record.header.message
        self.why = ""
        for _ in range(20):
            with Seen(self.path) as seen:
                wanted = self._wanted(seen, free)
                if wanted is None:
                    return
                if wanted == self.file and not os.path.lexists(wanted):  # somebody has emptied the folder
                    self._make()
                    if self.why:
                        return
                try:
                    done = self._put(wanted, seen.identity)
                except OSError as error:
                    self.state, self.why = "blocked", f"{self.path}: {os.strerror(error.errno or 0)}"
                    return
            if done:
                self.state = "closed" if not wanted else "ours" if wanted == self.file else "another"
                return
        self.state = "taken"  # for now: somebody replaces it all the time

    def _wanted(self, seen: Seen, free: bool) -> str | None:
        """The file whose link the path should become, "" for one that nobody has; None: it stays, and `state` says
        what it is."""
        if seen.state in ("other", "link") or (seen.state == "dead" and not seen.left_over):
            self.state, self.why = "blocked", f"{self.path} is {_WHAT[seen.state]}"
        elif seen.state == "denied":
            self.state = "taken"
        elif seen.state == "live" and seen.identity == self.identity:
            if not free:
                return self._another()
            self.state = "ours"
        elif seen.state == "live":
            number = whose_front(self.record, seen.identity)
            if number is None:
                self.state = "taken"
            elif free and number not in self._free():
                return self.file
            else:
                self.state = "another"
        elif free:
            return self.file
        elif (another := self._another()) or seen.state == "absent":
            return another
        else:
            self.state = "closed"
        return None

    def lost(self) -> bool:
        """A quick look at each client: the path was ours and is not any more."""
        if self.state != "ours" or self.identity is None:
            return False
        try:
            return os.lstat(self.path).st_ino != self.identity[1]
        except OSError:
            return True

    def stop(self) -> None:
        """After a `settle` without a free instance: takes nobody any more, who waits in it is told."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def withdraw(self) -> None:
        """Under the gate, when this server leaves: its file goes, and the path with it unless another server has it."""
        if self.identity is not None:
            with suppress(OSError), Seen(self.path) as seen:
                if seen.identity == self.identity:
                    self._put(self._another(), self.identity)
        self.close()

    def forget(self) -> None:
        """In a fork child: nothing on disk changes."""
        self.stop()
        self.identity = None

    def close(self) -> None:
        """The file of its own goes; the path is somebody else's to mend."""
        if self.identity is not None:
            with suppress(OSError):
                if os.lstat(self.file).st_ino == self.identity[1]:
                    os.unlink(self.file)
        self.forget()

    # -- whose front is it -----------------------------------------------------------------------------------------

    def _free(self) -> list[int]:
        """Numbers of living servers with an instance that can take a client (or that have any, of a message pipe);
        the one that listens longest is first."""
        held, message = self.record.held(), self.record.header.message
        lines = [line for slot, line in self.record.lines() if slot in held and (message or line.state == 1)]
        lines.sort(key=lambda line: line.ticket)
        return list(dict.fromkeys(line.server for line in lines if message or not unix_queue(line.inode)))

    def _another(self) -> str:
        """The front file of another living server that can take a client; "" when there is none."""
        for number in self._free():
            file = front_file(self.record, number)
            if file != self.file:
                with suppress(OSError), Seen(file) as seen:
                    if seen.state == "live":
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
                bind_socket(socket.SOCK_STREAM, temporary, self.security).close()
                os.chmod(temporary, os.lstat(temporary).st_mode & 0o777 | stat.S_ISVTX)  # for `Seen`: never bound again
            if expected is None:
                os.link(temporary, self.path)
                return True
            return _replace(temporary, self.path, expected)
        except (FileExistsError, FileNotFoundError):
            return False
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


_WHAT = {"other": "no socket", "link": "a symbolic link", "dead": "somebody else's"}


def remove_stale(record: Record) -> None:
    """Under the gate, by one who found that no server is left, or who sweeps: fronts of the dead go, and the path when
    `record` has no living server and nobody has it."""
    if not record.header.front:
        return
    folder = os.path.dirname(record.header.front)
    prefix = f".portway-{os.path.basename(record.folder)}-"
    if not record.alive():
        with suppress(OSError):
            remove_path(record.header.front, _aside(record))
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix):
                path = f"{folder}/{name}"
                with suppress(OSError), Seen(path, new=False) as seen:
                    if seen.left_over:
                        os.unlink(path)


def _aside(record: Record) -> str:
    """A name that `remove_stale` knows, should its maker be killed; shorter than a front's."""
    return f"{os.path.dirname(record.header.front)}/.portway-{os.path.basename(record.folder)}-t{os.urandom(4).hex()}"


def remove_path(path: str, aside: str) -> None:
    """Removes a socket's file of ours that nobody has; whatever else it turns out to be stays."""
    with Seen(path) as seen:
        if not seen.left_over:
            return
        os.rename(path, aside)
        with Seen(aside, ask=False) as moved:
            if moved.identity == seen.identity:
                os.unlink(aside)
                return
        try:
            _rename(aside, path, _RENAME_NOREPLACE)  # somebody else's, put there this moment
            return
        except FileExistsError:  # and replaced by yet another
            pass
        except NotImplementedError:
            with suppress(FileExistsError):
                os.link(aside, path)
        os.unlink(aside)


def _replace(temporary: str, path: str, expected: tuple[int, int]) -> bool:
    """Swaps the two names if `path` is still the file expected; what is at `temporary` then may be removed."""
    try:
        with Seen(temporary, ask=False) as ours:
            _rename(temporary, path, _RENAME_EXCHANGE)
            return _restored(temporary, path, ours, expected)
    except NotImplementedError:  # this file system cannot: the path is empty for a moment
        aside = f"{temporary}a"
        os.rename(path, aside)
        with Seen(aside, ask=False) as moved:
            wrong = moved.identity != expected
        with suppress(FileExistsError):
            os.link(aside if wrong else temporary, path)
        os.unlink(aside)
        return not wrong


def _restored(temporary: str, path: str, ours: Seen, expected: tuple[int, int]) -> bool:
    """After the swap: True when it was the right file. Else it goes back, unless it has a successor by now."""
    there = ours.identity  # what we put at the path last
    kept = [Seen(temporary, ask=False)]
    try:
        if kept[0].identity == expected:
            return True
        while True:
            try:
                _rename(temporary, path, _RENAME_EXCHANGE)
            except FileNotFoundError:  # removed by one who would have removed this one
                return False
            before, there = there, kept[-1].identity
            kept.append(Seen(temporary, ask=False))
            if kept[-1].identity == before:  # nobody came in between
                return False
    finally:
        for one in kept:
            one.close()


def _rename(old: str, new: str, how: int) -> None:
    """renameat2(2). NotImplementedError when the file system cannot."""
    global _renameat2
    if _renameat2 is None:
        _renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if _renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), how):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS):
            raise NotImplementedError
        raise OSError(number, os.strerror(number), new)


_renameat2: ctypes._NamedFuncPointer | None = None
