"""Where a service of this uid keeps its lock, state, control socket and output; nobody else may look in.

``PORTWAY_RUNTIME_DIR`` (tests, and who wants it elsewhere), else ``/run/portway/UID`` for root or where an
administrator made it, else ``/run/user/UID/portway``, else ``/tmp/portway-UID``. Each service has a folder NAME in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

from ..errors import AccessDenied, ConfigurationError, NameInUse

__all__ = ["Lock", "existing_services", "listen_at", "near", "runtime_dir", "service_dir"]


def runtime_dir(create: bool = True) -> str:
    """The checked root folder. `AccessDenied` when it is a symlink, another's, or open to others."""
    uid = os.geteuid()
    chosen = os.environ.get("PORTWAY_RUNTIME_DIR")
    if chosen:
        return _checked(os.path.abspath(chosen), uid, create)
    shared = f"/run/portway/{uid}"
    if os.path.isdir(shared) and os.access(shared, os.W_OK):
        return _checked(shared, uid, create)
    if uid == 0 and os.access("/run", os.W_OK):
        if create:
            os.makedirs("/run/portway", 0o755, exist_ok=True)
        return _checked(shared, uid, create)
    if os.path.isdir(f"/run/user/{uid}") and os.access(f"/run/user/{uid}", os.W_OK):
        return _checked(f"/run/user/{uid}/portway", uid, create)
    return _checked(f"/tmp/portway-{uid}", uid, create)


def _checked(path: str, uid: int, create: bool) -> str:
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            why = f"runtime folder {path}: {error.strerror}"
            raise ConfigurationError(why, hint="set PORTWAY_RUNTIME_DIR") from error
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return path
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != uid or facts.st_mode & 0o077:
        raise AccessDenied(
            f"runtime folder {path}: must be a folder of uid {uid} with mode 0700, and no symlink",
            hint="remove it if it is not yours to trust, or set PORTWAY_RUNTIME_DIR",
        )
    return path


def service_dir(name: str, create: bool = True) -> str:
    return _checked(os.path.join(runtime_dir(create), name), os.geteuid(), create)


def existing_services() -> list[str]:
    """Names with a folder here, running or not."""
    root = runtime_dir(create=False)
    try:
        return sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)))
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def near(path: str) -> Iterator[str]:
    """`path`, or a short name for it while the folder is open: Unix socket names end at 107 bytes."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


class Lock:
    """One supervisor a name: flock(2) on a file that stays. Held until close() or the process ends."""

    def __init__(self, folder: str, name: str, fd: int | None = None) -> None:
        self.path = os.path.join(folder, "lock")
        self.fd = fd if fd is not None else self._take(name)

    def _take(self, name: str) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                raise NameInUse(
                    f"{name} runs already (pid {pid})",
                    hint=f"`portway reload {name}` for new code, `portway stop {name}` to end it, or take another name",
                ) from None
            raise
        return fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def listen_at(path: str) -> socket.socket:
    """A listening stream socket, 0600, that replaces whatever stale one stood there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with near(path) as name:
            sock.bind(name)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(old)
    return sock
