"""Sockets with a path: bound with exactly the rights that are meant, whatever the umask."""

from __future__ import annotations

import os
import socket

from .security import Security

__all__ = ["bind_socket"]


def bind_socket(kind: int, path: str, security: Security) -> socket.socket:
    """A non-blocking Unix socket bound at `path`, not listening. The file is never wider than `security` says.

    Whoever is granted anything may connect.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file is made with this mode, less the umask
        sock.bind(path)
        security.apply_path(path)
    except BaseException:
        sock.close()
        raise
    return sock
