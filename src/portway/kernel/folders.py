"""Folders under a shared place: which root, made without a moment of wrong rights, trusted only after a look.

Nothing that another user could have put there in advance is trusted.
"""

from __future__ import annotations

import errno
import os
import stat

from .._accel import sync as _native
from ..errors import AccessDenied
from .process import user_name

__all__ = ["check_folder", "default_root", "given_root", "make_folder"]


def given_root() -> str | None:
    """``PORTWAY_ROOT``, a world of one's own; not for a set-uid program, even after it has changed its uid."""
    given = os.environ.get("PORTWAY_ROOT")
    if given and not _native.runs_for_another():
        return given
    return None


def default_root(fallback: str) -> str:
    """`given_root`, else ``/run/portway`` if an administrator made it (root's, 1777), else `fallback`."""
    given = given_root()
    if given:
        return given
    try:
        info = os.lstat("/run/portway")
        if stat.S_ISDIR(info.st_mode) and info.st_uid == 0 and stat.S_IMODE(info.st_mode) == 0o1777:
            return "/run/portway"
    except OSError:
        pass
    return fallback


def check_folder(path: str, uids: tuple[int, ...], mode: int, fix: str) -> None:
    """`AccessDenied` unless `path` is a folder, no symlink, of one of `uids` and with exactly `mode`.

    For every folder where names of ours live, of pipes and mailslots too.
    """
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise AccessDenied(f"{path} is not a folder but something put there before us", hint=fix)
    if info.st_uid not in uids:
        raise AccessDenied(f"{path} belongs to uid {user_name(info.st_uid)}, who could exchange objects", hint=fix)
    if stat.S_IMODE(info.st_mode) != mode:
        raise AccessDenied(f"{path} has mode {stat.S_IMODE(info.st_mode):o}, must have {mode:o}", hint=fix)


def make_folder(path: str, mode: int) -> None:
    """Under a name of its own first, so that no other process meets a folder with the wrong mode. OSError as it comes;
    nothing happens when somebody else was first."""
    fresh = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.mkdir(fresh, 0o700)
    os.chmod(fresh, mode)
    try:
        os.rename(fresh, path)  # replaces an empty folder only
    except OSError as error:
        os.rmdir(fresh)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES):
            raise
