"""`Security`: who besides its owner may open a named object, as file mode and POSIX ACL, which the kernel enforces.

The rights are the file's, so there are two: read, and write (which includes read). On a mapping both are real. On
synchronisation objects (mutex, semaphore, event, timer) every waiter must write into the object, so any grant there
means read and write; finer rights (may wait, but not set) are only the library's word. Whoever may write a mapping may
also cut its file.

A ``Local\\`` name lies in a folder that only its user may enter: grants matter for ``Global\\`` names. root may always.
Source: acl(5); the extended attribute ``system.posix_acl_access`` (linux/posix_acl_xattr.h).
"""

from __future__ import annotations

import errno
import grp
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from ..errors import NotSupported
from . import process

__all__ = ["Security"]

READ, WRITE = 4, 6
_ACL = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
MAX_GRANTS = 256
_NOBODY: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Security:
    """Grants beside the owner's own; join them with ``|``: ``Security.group("staff") | Security.uids(1000, 1001)``."""

    others: int = 0
    """0, `READ` (4) or `WRITE` (6), for everybody; what users and groups are granted counts before it."""
    users: Mapping[int, int] = field(default_factory=lambda: _NOBODY)
    groups: Mapping[int, int] = field(default_factory=lambda: _NOBODY)

    def __post_init__(self) -> None:
        for right in (self.others, *self.users.values(), *self.groups.values()):
            if right not in (0, READ, WRITE):
                raise ValueError(f"Security: {right!r} is no right; use owner(), everyone(), group() and uids()")

    @classmethod
    def owner(cls) -> Self:
        """Only the creator's user: the default everywhere."""
        return cls()

    @classmethod
    def everyone(cls, *, write: bool = True) -> Self:
        return cls(others=_right(write))

    @classmethod
    def group(cls, group: int | str, *, write: bool = True) -> Self:
        """Members of one group, by number or name; the creator need not be one. ValueError for an unknown name."""
        if isinstance(group, str) and not group.isdigit():
            try:
                group = grp.getgrnam(group).gr_gid
            except KeyError:
                raise ValueError(f"Security.group: no group named {group!r} on this machine") from None
        return cls(groups=MappingProxyType({_number(int(group), "group"): _right(write)}))

    @classmethod
    def uids(cls, *uids: int | str, write: bool = True) -> Self:
        """These users, by number or name. ValueError for an unknown name."""
        if not uids:
            raise ValueError("Security.uids: give at least one uid or user name")
        numbers = [_number(one, "uid") for one in sorted(process.uids(uids))]
        return cls(users=MappingProxyType({one: _right(write) for one in numbers}))

    def __or__(self, other: Security) -> Security:
        """Both grants; the larger right where they meet."""
        return Security(
            self.others | other.others, _joined(self.users, other.users), _joined(self.groups, other.groups)
        )

    @property
    def is_owner_only(self) -> bool:
        return not (self.others or self.users or self.groups)

    @property
    def mode(self) -> int:
        """The file mode; with an ACL its middle digit is the ACL's mask."""
        return 0o600 | self._mask() << 3 | self.others

    def _mask(self) -> int:
        mask = self.others  # the file's own group is part of everybody
        for right in (*self.users.values(), *self.groups.values()):
            mask |= right
        return mask

    def acl(self) -> bytes | None:
        """The value of ``system.posix_acl_access``; None when the mode says it all."""
        if not self.users and not self.groups:
            return None
        entries = [(_USER_OBJ, 6, _NO_ID)]
        entries += [(_USER, right, uid) for uid, right in sorted(self.users.items())]
        entries += [(_GROUP_OBJ, self.others, _NO_ID)]
        entries += [(_GROUP, right, gid) for gid, right in sorted(self.groups.items())]
        entries += [(_MASK, self._mask(), _NO_ID), (_OTHER, self.others, _NO_ID)]
        return _VERSION + b"".join(_ENTRY.pack(*one) for one in entries)

    def apply(self, fd: int) -> None:
        """Sets mode and ACL of a file that nobody else can have open yet. `NotSupported` without ACLs there."""
        self._set(fd)

    def apply_path(self, path: str) -> None:
        """The same for a socket's file, where any grant is the right to connect, which the kernel calls writing."""
        Security(
            WRITE if self.others else 0, dict.fromkeys(self.users, WRITE), dict.fromkeys(self.groups, WRITE)
        )._set(path)

    def _set(self, file: int | str) -> None:
        value = self.acl()
        os.chmod(file, self.mode if value is None else 0o600)
        if value is None:
            return
        try:
            os.setxattr(file, _ACL, value)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise NotSupported(
                "this file system has no POSIX ACLs, so single users and groups cannot be granted anything",
                hint="use Security.everyone(), or a root on tmpfs or ext4",
            ) from error


def _right(write: bool) -> int:
    return WRITE if write else READ


def _number(one: int, what: str) -> int:
    if isinstance(one, bool) or not 0 <= one < _NO_ID:
        raise ValueError(f"Security: {what} {one!r} is not between 0 and {_NO_ID - 1}")
    return one


def _joined(one: Mapping[int, int], other: Mapping[int, int]) -> Mapping[int, int]:
    found = MappingProxyType({key: one.get(key, 0) | other.get(key, 0) for key in {*one, *other}})
    if len(found) > MAX_GRANTS:
        raise ValueError(f"Security: {len(found)} grants; at most {MAX_GRANTS} are possible, use a group")
    return found
