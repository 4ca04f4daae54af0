r"""Where the names of a device live: pipes, and mailslots. One folder for each user, which only that user may change.

``ROOT/portway-pipe-UID``, mode 0711. ROOT is ``/run/portway`` if an administrator made it, else ``/tmp`` (not
``XDG_RUNTIME_DIR``, which others cannot enter, nor ``/dev/shm``, which logging out may empty); ``root=`` and
``PORTWAY_ROOT`` name a world of one's own. In it one folder for each name, called by a hash of the folded name: 0700 if
only the owner may connect, else 0711. Names are machine-wide: one's own come first, then root's, then others'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..errors import AccessDenied, NameTooLong
from .folders import check_folder, default_root, make_folder
from .objectfile import full

__all__ = ["Device", "Place"]

MODE = 0o711


class Place(NamedTuple):
    """A user's folder of a device; what lies in it is that user's word."""

    uid: int
    path: str


class Device:
    """The names of one kind under one root; cheap to make."""

    def __init__(self, kind: str, root: str | os.PathLike[str] | None = None) -> None:
        self.kind = kind
        self.root = os.path.abspath(os.fspath(root) if root is not None else default_root("/tmp"))
        if len(self.root.encode()) > 3000:
            raise NameTooLong(f"the root {self.root[:40]!r}... has more than 3,000 bytes")

    def _path(self, uid: int) -> str:
        return os.path.join(self.root, f"portway-{self.kind}-{uid}")

    def own(self) -> Place:
        """This user's folder, checked, made when it is missing."""
        uid = os.geteuid()
        path = self._path(uid)
        for _ in range(3):
            try:
                check_folder(path, (uid,), MODE, f"remove it, or as root: rm -r {path}")
                return Place(uid, path)
            except FileNotFoundError:
                try:
                    make_folder(path, MODE)
                except FileNotFoundError:  # `tidy` took its maker for dead: a process of another pid namespace
                    continue
                except OSError as error:
                    raise full(error, path) from error
        raise AccessDenied(f"{path} comes and goes", hint="end what removes it")

    def places(self, uid: int | None = None) -> Iterator[Place]:
        """The folders that exist and can be trusted to be their user's: one's own, root's, the others' in order; or
        only that of `uid`. `AccessDenied` when one's own or the one asked for is somebody else's doing."""
        me = os.geteuid()
        first = dict.fromkeys((me, 0)) if uid is None else {uid: None}
        for one in first:
            path = self._path(one)
            try:
                check_folder(path, (one,), MODE, f"as root: rm -r {path}")
            except FileNotFoundError:
                continue
            except AccessDenied:
                if one in (me, uid):
                    raise
                continue
            yield Place(one, path)
        if uid is None:
            yield from self._others(first)

    def _others(self, known: dict[int, None]) -> Iterator[Place]:
        pattern = re.compile(rf"portway-{self.kind}-(0|[1-9][0-9]{{0,9}})")
        try:
            names = os.listdir(self.root)
        except OSError:
            return
        for uid in sorted({int(found[1]) for one in names if (found := pattern.fullmatch(one))} - set(known)):
            try:
                check_folder(self._path(uid), (uid,), MODE, "")
            except (AccessDenied, FileNotFoundError):
                continue
            yield Place(uid, self._path(uid))

    def tidy(self) -> None:
        """Removes what a process that was killed while it made this user's folder has left."""
        pattern = re.compile(rf"portway-{self.kind}-{os.geteuid()}\.([0-9]+)\.[0-9a-f]+")
        with suppress(OSError):
            for name in os.listdir(self.root):
                if (found := pattern.fullmatch(name)) and not os.path.exists(f"/proc/{found[1]}"):
                    with suppress(OSError):
                        os.rmdir(os.path.join(self.root, name))

    def places_looked_at(self) -> str:
        """For messages."""
        first = dict.fromkeys(map(self._path, (os.geteuid(), 0)))
        return f"{', '.join(first)} and other users'"
