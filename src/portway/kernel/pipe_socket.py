"""Sockets with a path: bound with exactly the rights that are meant, whatever the umask."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .pipe_name import MAX_SOCKET_PATH
from .security import Security

__all__ = ["bind_socket", "near"]


@contextmanager
def near(path: str) -> Iterator[str]:
    """A path of at most 107 bytes to the same file, while it lasts."""
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def bind_socket(kind: int, path: str, security: Security) -> socket.socket:
    """A non-blocking Unix socket bound at `path`, not listening. The file is never wider than `security` says.

    Whoever is granted anything may connect.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file is made with this mode, less the umask
        with near(path) as short:
            sock.bind(short)
        security.apply_path(path)
    except BaseException:
        sock.close()
        raise
    return sock
