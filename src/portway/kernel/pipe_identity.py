"""Who is at the other end of a pipe, and being that user on one thread: ImpersonateNamedPipeClient, RevertToSelf.

Sources: unix(7), setresuid(2) "C library/kernel differences", capabilities(7).
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import pwd
import select
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from typing import NamedTuple, TypeVar, TypeVarTuple, cast

from .. import _accel
from ..errors import AccessDenied, BadPipe, NotSupported, PipeNotConnected, ProcessNotFound
from .process import Pidfd, start_time, uid_of, user_name, within_limits

__all__ = ["Identity", "identity_of", "impersonate", "run_as"]

_SO_PEERCRED, _SO_PEERGROUPS, _SO_PEERPIDFD = 17, 59, 77
_NO_ID = 0xFFFFFFFF

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@cache
def _overflow_uid() -> int:
    try:
        with within_limits("reading /proc"), open("/proc/sys/kernel/overflowuid", "rb") as file:
            return int(file.read())
    except FileNotFoundError:
        return 65534


class Identity(NamedTuple):
    """Who called connect() (or listen(), seen from the client), as the kernel noted it at that moment.

    `start_time` is in clock ticks since boot; None when the process has ended or is outside of our pid namespace: then
    `pid` names nobody any more.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    """The supplementary ones."""
    start_time: int | None

    @property
    def user(self) -> str:
        """The name; the number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def is_nobody(self) -> bool:
        """The overflow uid stands for every user whom our user namespace cannot name: grant it nothing."""
        return self.uid in (_overflow_uid(), _NO_ID)


def identity_of(fd: int) -> Identity:
    """Of the peer of a connected AF_UNIX socket; `PipeNotConnected` where the socket has none.

    A pid that was used again is not taken for the peer: its `start_time` is None. Before Linux 6.5 the kernel gives a
    mere number, and another process *of the same uid* that got it before this call cannot be told from the peer.
    """
    native = _accel.identity
    try:
        pid, uid, gid = struct.unpack("iII", native.peer_option(fd, _SO_PEERCRED, 12))
        if uid == _NO_ID:
            raise PipeNotConnected(f"descriptor {fd} has no peer", hint="give a connected Unix socket")
        groups = native.peer_option(fd, _SO_PEERGROUPS)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            raise BadPipe(f"descriptor {fd} is no socket") from None
        raise
    return Identity(pid, uid, gid, struct.unpack(f"{len(groups) // 4}I", groups), _started(fd, pid, uid))


def _started(fd: int, pid: int, uid: int) -> int | None:
    """The start time of the peer, read while a pidfd shows that `pid` is not another process."""
    if pid <= 0:
        return None
    try:
        with within_limits("a pidfd"):
            (pidfd,) = struct.unpack("i", _accel.identity.peer_option(fd, _SO_PEERPIDFD, 4))
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return _started_by_pid(pid, uid)
        if error.errno in (errno.ESRCH, errno.ENODATA, errno.EINVAL):  # ended; which of them depends on the kernel
            return None
        raise
    try:
        started = start_time(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return None if poll.poll(0) else started
    except ProcessNotFound:
        return None
    finally:
        os.close(pidfd)


def _started_by_pid(pid: int, uid: int) -> int | None:
    """Before Linux 6.5, from the number alone."""
    try:
        before = start_time(pid)
        with Pidfd(pid) as process:
            owner, after = uid_of(pid), start_time(pid)
            return after if process.alive and before == after and owner == uid else None
    except ProcessNotFound:
        return None


def impersonate(identity: Identity) -> AbstractContextManager[Identity]:
    """``with impersonate(server.identity) as client:`` this thread, and no other, acts as the client.

    With CAP_SETUID and CAP_SETGID (root) the thread's effective uid and gid and its groups are the client's, and it has
    no capabilities; at the end all is as before. Without, it works only for a client that is who we are, and changes
    nothing. If the way back fails the process aborts. `AccessDenied` for a user who has no name here (`is_nobody`);
    `NotSupported` inside another impersonation and on the thread of an event loop, where other tasks would act as the
    client too: there use `run_as`.

    What it is not:

    * A sandbox: code in the block can go back to what we are.
    * A change of the real and saved uid: they stay ours, or the client could kill this process. So `os.access` needs
      ``effective_ids=True``, signals may be sent to whom *we* may send them, and a program started inside has our real
      uid and can be us again, as on Windows; to start one as the client give ``subprocess`` ``user``, ``group`` and
      ``extra_groups``, outside of the block.
    * A change of other threads: they stay as they were. But a thread *started* inside has the client's identity for
      ever, and finalizers and callbacks that happen to run on this thread have it too. A generator must not yield
      inside.
    * A change of umask, working directory, open descriptors, keyrings, or labels of a security module. Of a client that
      is root only the ids are taken, not the lack of capabilities it may have.

    While any thread is inside, the process is not dumpable (no core file, no debugger of the same user); when the last
    one leaves it is again if it was.
    """
    return cast(
        "AbstractContextManager[Identity]",
        _accel.identity.Impersonation(
            identity.uid, identity.gid, tuple(identity.groups), identity, partial(_may_become, identity)
        ),
    )


def _may_become(identity: Identity) -> bool:
    """On the thread that enters. False: it is that user already, and has not the right to change."""
    if identity.is_nobody:
        raise AccessDenied(
            f"uid {identity.uid} stands for users unknown in this user namespace", hint="nobody can be impersonated"
        )
    if asyncio._get_running_loop() is not None:
        raise NotSupported(
            "impersonate() on the thread of an event loop: its other tasks would act as the client too",
            hint="await run_as(identity, function)",
        )
    missing = _accel.identity.missing_capabilities()
    if not missing:
        return True
    (_, uid, _), (_, gid, _), groups = _accel.identity.thread_identity()
    ours, theirs = {gid, *groups}, {identity.gid, *identity.groups}
    if uid == identity.uid and gid == identity.gid and ours == theirs:
        return False
    what = f"with groups {sorted(theirs)} instead of {sorted(ours)}" if uid == identity.uid else f"from uid {uid}"
    raise AccessDenied(
        f"to become uid {user_name(identity.uid)} {what} this process needs {' and '.join(missing)}",
        hint="the identity tells who the client is without becoming it; decide by its uid",
    )


async def run_as(identity: Identity, function: Callable[[*Ts], R], *args: *Ts) -> R:
    """Calls ``function(*args)`` as the client, in a thread of its own, and gives back what it returns or raises.

    When the caller is cancelled the function runs to its end all the same, unheard.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[R | None, BaseException | None]] = loop.create_future()
    call = partial(contextvars.copy_context().run, function, *args)
    name = f"portway run_as uid {identity.uid}"
    threading.Thread(target=_work, args=(loop, done, identity, call), name=name).start()
    value, error = await done
    try:
        if error is not None:
            raise error
        return cast(R, value)
    finally:
        del done, error  # the traceback of `error` refers to this frame


def _work(
    loop: asyncio.AbstractEventLoop,
    done: asyncio.Future[tuple[R | None, BaseException | None]],
    identity: Identity,
    call: Callable[[], R],
) -> None:
    result, failed = None, None
    try:
        with impersonate(identity):
            result = call()
    except BaseException as error:
        failed = error
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(_tell, done, result, failed)
    result = failed = None  # the traceback of `failed` refers to this frame


def _tell(
    done: asyncio.Future[tuple[R | None, BaseException | None]], result: R | None, failed: BaseException | None
) -> None:
    if not done.done():
        done.set_result((result, failed))
