"""`portway._native.handoff` in Python: the specification, and what runs where nothing could be compiled."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import struct

__all__ = [
    "MAX_DESCRIPTORS", "facts", "pidfd_getfd", "readable", "receive_message", "records", "send_message", "send_plain",
    "set_ptracer", "shared", "shared_many", "split", "take_message",
]  # fmt: skip

MAX_DESCRIPTORS = 253  # SCM_MAX_FD, kernel include/net/scm.h
_SYS_PIDFD_GETFD = 438  # the same on every architecture but alpha
_PR_SET_PTRACER = 0x59616D61
_INT = struct.calcsize("i")


def _call(name: str, *arguments: int) -> int:
    import ctypes  # not in every subinterpreter, and those need none of this

    libc = ctypes.CDLL(None, use_errno=True)
    got = int(getattr(libc, name)(*(ctypes.c_long(one) for one in arguments)))
    if got < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return got


def pidfd_getfd(pidfd: int, fd: int) -> int:
    return _call("syscall", _SYS_PIDFD_GETFD, pidfd, fd, 0)


def set_ptracer(pid: int) -> None:
    _call("prctl", _PR_SET_PTRACER, pid, 0, 0, 0)


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _address(family: int, address: object) -> bytes:
    if family == socket.AF_INET and isinstance(address, tuple):
        return socket.inet_aton(address[0]) + struct.pack(">H", address[1])
    if family == socket.AF_INET6 and isinstance(address, tuple):
        host = socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
        return host + struct.pack(">HI", address[1], address[2]) + struct.pack("<I", address[3])
    if family == socket.AF_UNIX and isinstance(address, str | bytes):
        return os.fsencode(address)
    return b""


def facts(fd: int) -> tuple[int, int, int, bool, bool, bytes, bytes]:
    with _borrowed(fd) as sock:
        family, local, peer, connected = int(sock.family), b"", b"", False
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        local = _address(family, sock.getsockname())
        if not listening:
            try:
                peer, connected = _address(family, sock.getpeername()), True
            except OSError:
                pass
        return family, int(sock.type), sock.proto, listening, connected, local, peer


def send_message(sock: int, data: bytes, fds: list[int]) -> int:
    if len(fds) > MAX_DESCRIPTORS:
        raise ValueError(f"{len(fds)} descriptors in one message: the kernel takes {MAX_DESCRIPTORS}")
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with _borrowed(sock) as line:
        return line.sendmsg([data], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive_message(sock: int, max_bytes: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    fds: list[int] = []
    with _borrowed(sock) as line:
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)
        data, control, seen, _ = line.recvmsg(max_bytes, space, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += memoryview(payload[: len(payload) - len(payload) % _INT]).cast("i")
    return data, fds, seen


def take_message(sock: int) -> tuple[bytes, list[int], int] | None:
    try:
        data, fds, seen = receive_message(sock, 65536, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return None
    if seen & socket.MSG_CTRUNC:
        return data, fds, seen
    ours = False
    try:
        ours = bool(_drop(sock)) or not data
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
    finally:
        if not ours:
            for fd in fds:
                os.close(fd)
    return (data, fds, seen) if ours else None  # else somebody has taken it between our two looks


def _drop(sock: int) -> int:
    with _borrowed(sock) as line:
        try:
            return len(line.recv(1, socket.MSG_DONTWAIT))
        except ConnectionResetError:  # the sender ended between our two looks; that is said once
            return len(line.recv(1, socket.MSG_DONTWAIT))


records = send_plain = split = shared = shared_many = None
"""Shortcuts of the native module for plain sockets; the long way, which is the specification, serves without them."""


class _borrowed:
    """A socket object over somebody else's descriptor number, for a few calls."""

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if socket.getdefaulttimeout() is None:
            self._socket = socket.socket(fileno=fd)
            return
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)  # the object would set O_NONBLOCK and wait on its own
        self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(None)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *exc: object) -> None:
        self._socket.detach()
