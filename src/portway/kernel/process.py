"""Who a process is: pid *and* start time, its uid, a pidfd that stays right when the pid is used again.

Sources: proc(5), pidfd_open(2), pidfd_getfd(2), unix(7) SO_PEERCRED.
"""

from __future__ import annotations

import errno
import os
import pwd
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .._accel import handoff as _native
from ..errors import AccessDenied, NotSupported, ProcessNotFound, TooManyDescriptors
from ..lifecycle import Handle

__all__ = ["Peer", "Pidfd", "overflow_uid", "peer_of", "start_time", "take_descriptor", "uid_of", "uids", "user_name",
           "within_limits"]  # fmt: skip


@contextmanager
def within_limits(doing: str) -> Iterator[None]:
    """Turns EMFILE and ENFILE into `TooManyDescriptors`; ``doing`` completes "no descriptor left for ..."."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        hint = "close some, or raise RLIMIT_NOFILE"
        raise TooManyDescriptors(f"no descriptor left for {doing}", hint=hint) from error


class Peer(NamedTuple):
    """The process at the other end of a Unix socket, as the kernel vouches for it (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Who connected, or called listen() or socketpair(); pid 0 when that process is not in our pid namespace."""
    return Peer(*struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def overflow_uid() -> int:
    """The number of users of other user namespaces that ours has none for: nobody, who is never who is meant."""
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except OSError:
        return 65534


def start_time(pid: int) -> int:
    """When `pid` started, in clock ticks since boot (field 22 of /proc/PID/stat). `ProcessNotFound` if there is none.

    pid and start time together name a process for good; a pid alone is used again.
    """
    try:
        with within_limits("reading /proc"), open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessNotFound(f"pid {pid}: no such process") from None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        raise ProcessNotFound(f"pid {pid}: has ended (not yet waited for by its parent)")
    return int(fields[19])


def uid_of(pid: int) -> int:
    """The effective uid of `pid`; `ProcessNotFound` if there is none, or if that is the number of a thread."""
    try:
        with within_limits("reading /proc"), open(f"/proc/{pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessNotFound(f"pid {pid}: no such process") from None
    process = int(fields[b"Tgid"])
    if process != pid:
        raise ProcessNotFound(f"pid {pid} is a thread of process {process}", hint=f"give {process}")
    return int(fields[b"Uid"].split()[1])


def uids(allowed: Iterable[int | str]) -> frozenset[int]:
    """Uids from numbers and user names; `ValueError` names the one that does not exist."""
    if isinstance(allowed, str):
        raise ValueError(f"allow_uids={allowed!r}: give several, as ({allowed!r},)")
    found = set()
    for one in allowed:
        if isinstance(one, int):
            found.add(one)
        elif one.isdigit():
            found.add(int(one))
        else:
            try:
                found.add(pwd.getpwnam(one).pw_uid)
            except KeyError:
                raise ValueError(f"allow_uids: no user named {one!r} on this machine") from None
    return frozenset(found)


def user_name(uid: int) -> str:
    """For messages: ``1000 (alice)``, or the number alone."""
    try:
        return f"{uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return str(uid)


class Pidfd(Handle):
    """A reference to one process that never comes to mean another. Readable (poll) once the process has ended."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        super().__init__(-1)
        self.pid = pid
        if not 0 < pid < 1 << 31:
            raise ProcessNotFound(f"pid {pid}: not a process id", hint="give a number above 0")
        try:
            with within_limits("a pidfd"):
                self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ProcessNotFound(f"pid {pid}: no such process") from None
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise NotSupported("pidfd_open: this kernel lacks it", hint="use Linux 5.3 or later") from error
            if error.errno == errno.EPERM:
                raise NotSupported(
                    "pidfd_open is forbidden here", hint="a seccomp filter of the container refuses it; allow it there"
                ) from error
            if error.errno in (errno.EINVAL, errno.ENOENT):
                raise ProcessNotFound(f"pid {pid} is a thread, not a process") from None
            raise

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return not poll.poll(0)


def take_descriptor(process: Pidfd, fd: int) -> int:
    """A close-on-exec duplicate, in this process, of descriptor `fd` of `process` (pidfd_getfd). The caller closes it.

    `AccessDenied` without the right to inspect the process, `NotSupported` where the call is missing or filtered away,
    `ProcessNotFound` when the process has ended, ``OSError(EBADF)`` when it has no such descriptor.
    """
    try:
        return int(_native.pidfd_getfd(process.fileno(), fd))
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise ProcessNotFound(f"pid {process.pid}: has ended") from None
        if error.errno == errno.ENOSYS:
            raise NotSupported(
                "pidfd_getfd: this kernel lacks it",
                hint="use Linux 5.6 or later, or let the target open a portway.HandoffInbox",
            ) from error
        if error.errno == errno.EPERM:
            raise AccessDenied(
                f"pidfd_getfd on pid {process.pid} is forbidden: another uid, a process that dropped privileges or is "
                "not dumpable, Yama's ptrace_scope, or a container's seccomp filter",
                hint="let the target open a portway.HandoffInbox, or see `portway doctor`",
            ) from error
        with within_limits("a duplicate in this process"):
            raise
