"""What the kernel tells of Unix sockets, without touching them: how full a listener's queue is, who has a path.

Source: sock_diag(7), linux/unix_diag.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

__all__ = ["Path", "look_at", "unix_queue"]

_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR = 20, 1, 2
_UDIAG_SHOW_RQLEN, _UNIX_DIAG_RQLEN = 0x10, 4
_HEAD = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_ANSWER = struct.Struct("=BBBBIII")


def unix_queue(inode: int) -> int | None:
    """How many connections wait in the listening socket with this inode; None when the kernel does not tell (another
    network namespace, a filter, no such socket)."""
    if not 0 < inode < 1 << 32:
        return None
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _UDIAG_SHOW_RQLEN, 0xFFFFFFFF, 0xFFFFFFFF)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as sock:
            sock.send(_HEAD.pack(_HEAD.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
            return _queue(sock.recv(4096, socket.MSG_DONTWAIT))
    except OSError:
        return None


def _queue(answer: bytes) -> int | None:
    if len(answer) < _HEAD.size + _ANSWER.size or _HEAD.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    at = _HEAD.size + _ANSWER.size
    while at + 4 <= len(answer):
        size, kind = struct.unpack_from("=HH", answer, at)
        if kind == _UNIX_DIAG_RQLEN and size >= 8:
            return int(struct.unpack_from("=I", answer, at + 4)[0])
        at += max(size + 3 & ~3, 4)
    return None


class Path:
    """What lies at a socket's path, as `look_at` saw it."""

    __slots__ = ("identity", "state", "uid")

    def __init__(self, state: str, identity: tuple[int, int] | None, uid: int) -> None:
        self.state = state
        """``absent``, ``live`` (somebody has it bound), ``dead`` (a socket's file that nobody has), ``denied``
        (somebody else's: we may not ask), ``other`` (no socket)."""
        self.identity = identity
        """(device, inode) of the file."""
        self.uid = uid


def look_at(path: str) -> Path:
    """A datagram socket's connect() is refused by every other kind of socket, and whoever has it notices nothing."""
    try:
        info = os.stat(path)  # a symlink counts as what it leads to, as for .NET's connect
    except (FileNotFoundError, NotADirectoryError):
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return Path("absent", None, -1)
        return Path("other", (info.st_dev, info.st_ino), info.st_uid)
    except OSError:
        return Path("denied", None, -1)
    identity = info.st_dev, info.st_ino
    if info.st_mode & 0o170000 != 0o140000:
        return Path("other", identity, info.st_uid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        wrong = probe.connect_ex(path)
    if wrong == errno.ENOENT:
        return Path("absent", None, -1)
    state = {errno.ECONNREFUSED: "dead", errno.EACCES: "denied", errno.EPERM: "denied"}.get(wrong, "live")
    return Path(state, identity, info.st_uid)
