"""Names of kernel objects, as Win32 has them: see `kernel.namespace`."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ..errors import BadPathName, InvalidAddress, NameTooLong, PathNotFound

__all__ = ["MAX_NAME", "Name", "parse_name"]

MAX_NAME = 259


class Name(NamedTuple):
    """A checked name. ``str()`` gives the shortest form that means the same."""

    scope: str
    """``Local`` or ``Global``."""
    text: str
    """Without prefix; "" for an unnamed object."""

    def __str__(self) -> str:
        return self.text if self.scope == "Local" else f"{self.scope}\\{self.text}"

    @property
    def file(self) -> str:
        """The file's name: a hash, so that any character and length will do."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()


def parse_name(name: str) -> Name:
    r"""`NameTooLong`, `PathNotFound`, `BadPathName` or `InvalidAddress`, as Windows tells them apart."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: give a string, or None for an unnamed object")
    if len(name) > MAX_NAME:
        raise NameTooLong(f"a name of {len(name)} characters ({name[:20]!r}...): at most {MAX_NAME} are possible")
    scope, text = "Local", name
    for prefix in ("Local", "Global"):
        if name.startswith(prefix + "\\"):
            scope, text = prefix, name[len(prefix) + 1 :]
            if not text:
                raise InvalidAddress(f"name {name!r}: nothing follows the prefix")
    if name == "\\":
        raise BadPathName(f"name {name!r}: a backslash alone is no name")
    if "\\" in text:
        raise PathNotFound(
            f"name {name!r}: a backslash may only follow Local or Global, written so",
            hint="'/' is an ordinary character",
        )
    if not text:
        raise InvalidAddress("an empty name cannot be opened", hint="create(None) makes an unnamed object")
    if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
        raise InvalidAddress(f"name {name!r}: NUL and lone surrogates cannot be part of a name")
    return Name(scope, text)
