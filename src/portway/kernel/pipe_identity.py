"""Who is at the other end of a pipe, as the kernel vouches, and acting as that user for a while.

ImpersonateNamedPipeClient and RevertToSelf. Sources: unix(7) SO_PEERCRED; SO_PEERGROUPS, SO_PEERPIDFD; setresuid(2).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from .._accel import identity as _native
from ..errors import AccessDenied, InvalidParameter, PortwayError
from .process import start_time, user_name

__all__ = ["Identity", "identity_of", "impersonate", "run_as"]

_T = TypeVar("_T")
_SO_PEERGROUPS, _SO_PEERPIDFD = 59, 77
_acting = threading.local()


class Identity(NamedTuple):
    """The process that connected, or that called listen(), as it was then."""

    pid: int
    """0: not in our pid namespace."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups."""
    start_time: int | None
    """Clock ticks since boot; with `pid` it names the process for good. None: it has ended, or cannot be seen."""

    @property
    def user(self) -> str:
        """``1000 (alice)``, or the number alone."""
        return user_name(self.uid)

    @property
    def is_nobody(self) -> bool:
        """A user of another user namespace that ours has no number for."""
        return self.uid == _overflow("uid") or self.gid == _overflow("gid")


def _overflow(what: str) -> int:
    try:
        with open(f"/proc/sys/kernel/overflow{what}") as file:
            return int(file.read())
    except OSError:
        return 65534


def identity_of(fd: int) -> Identity:
    """Of the peer of a connected Unix socket."""
    with _Borrowed(fd) as sock:
        pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return Identity(pid, uid, gid, _groups(sock), _start(sock, pid))


class _Borrowed:
    """A socket object over somebody else's descriptor."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)

    def __enter__(self) -> socket.socket:
        return self._sock

    def __exit__(self, *exc: object) -> None:
        self._sock.detach()


def _groups(sock: socket.socket) -> tuple[int, ...]:
    for room in (256, 4 * 65536):  # NGROUPS_MAX
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room)
        except OSError as error:
            if error.errno == errno.ERANGE:
                continue
            return ()
        return struct.unpack(f"{len(raw) // 4}I", raw[: len(raw) // 4 * 4])
    return ()


def _start(sock: socket.socket, pid: int) -> int | None:
    """A pid that was used again in the meantime is not the peer's: its pidfd must still be alive after the look."""
    if pid <= 0:
        return None
    try:
        fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return _start_by_pid(pid)
    try:
        with suppress(PortwayError, OSError):
            started = start_time(pid)
            _signal_nothing(fd)
            return started
        return None
    finally:
        os.close(fd)


def _signal_nothing(pidfd: int) -> None:
    """ProcessLookupError when its process has ended."""
    import signal

    with suppress(PermissionError):
        signal.pidfd_send_signal(pidfd, 0)


def _start_by_pid(pid: int) -> int | None:
    """Before Linux 6.5: read twice, around a pidfd. The peer may have ended before we came; then it is another's."""
    with suppress(PortwayError, OSError):
        first = start_time(pid)
        fd = os.pidfd_open(pid)
        try:
            _signal_nothing(fd)
            return first if start_time(pid) == first else None
        finally:
            os.close(fd)
    return None


@contextmanager
def impersonate(identity: Identity) -> Iterator[Identity]:
    """This thread acts as the client's user, with its group and groups (the *effective* ids), until the block is left.

    Needs root (CAP_SETUID and CAP_SETGID); without, it is allowed only when the client is the user we are already, and
    changes nothing. Refused: nobody (`Identity.is_nobody`), a thread that impersonates already, a thread that runs an
    event loop (there `run_as` takes a thread of its own).

    What it is not. It is no sandbox: the thread may go back at any time, descriptors that are open stay open, memory,
    umask and current folder are the process's, and os.access() asks for the real uid, which stays ours. Other threads
    keep their identity, but a thread or process started inside keeps the client's for ever. Security labels, keyrings
    and name spaces do not change. Inside, the process is not dumpable (no core, no ptrace by the user); that is put
    back. If going back fails the process is aborted.
    """
    if asyncio._get_running_loop() is not None:
        raise AccessDenied(
            "the thread of an event loop serves other tasks and cannot become the client",
            hint="await run_as_client(function) of portway.aio's pipe",
        )
    if getattr(_acting, "now", None) is not None:
        raise InvalidParameter(f"this thread acts as uid {_acting.now.uid} already", hint="leave that block first")
    if identity.is_nobody:
        raise AccessDenied(f"the client is uid {identity.user}: a user that this namespace has no number for")
    uids, gids, groups = _native.get()
    mine = uids[1] == identity.uid and gids[1] == identity.gid and set(identity.groups) <= {*groups, gids[1]}
    if mine and uids[1] != 0:
        yield identity
        return
    dumpable = _native.dumpable()
    try:
        _native.set_groups(identity.groups)
    except OSError as error:
        raise AccessDenied(
            f"uid {user_name(uids[1])} cannot act as uid {identity.user}: it needs CAP_SETUID and CAP_SETGID",
            hint="pipe.peer tells who the client is without becoming it",
        ) from error
    _acting.now = identity
    try:
        _become(identity)
        yield identity
    finally:
        _go_back(uids, gids, groups, dumpable)
        _acting.now = None


def _become(identity: Identity) -> None:
    try:
        # Only the effective ids: the saved are the way back, and with the client's real uid its user could kill us.
        _native.set_gids(_KEEP, identity.gid, _KEEP)
        _native.set_uids(_KEEP, identity.uid, _KEEP)
    except OSError as error:
        raise AccessDenied(f"cannot act as uid {identity.user}: {error.strerror}") from error


_KEEP = 0xFFFFFFFF


def _go_back(uids: tuple[int, int, int], gids: tuple[int, int, int], groups: tuple[int, ...], dumpable: int) -> None:
    try:
        _native.set_uids(*uids)
        _native.set_gids(*gids)
        _native.set_groups(groups)
        if _native.get() != (uids, gids, groups):
            raise OSError(errno.EPERM, "the identity is not what it was")
        if dumpable == 1:
            _native.dumpable(1)
    except BaseException as error:
        print(f"portway: this thread cannot go back to uid {uids[1]}: {error}; aborting", file=sys.stderr, flush=True)
        os.abort()


async def run_as(identity: Identity, function: Callable[..., _T], *args: Any) -> _T:
    """``function(*args)`` as that user, in a thread of its own that ends with it. See `impersonate`."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

    def work() -> None:
        result: Any = None
        wrong: BaseException | None = None
        try:
            with impersonate(identity):
                result = function(*args)
        except BaseException as error:
            wrong = RuntimeError(f"{error!r} in a thread") if isinstance(error, StopIteration) else error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, wrong)

    threading.Thread(target=work, name=f"portway-as-{identity.uid}", daemon=True).start()
    return await done
