r"""Names of pipes: what may be written, when two mean the same, and where .NET on Unix puts them.

``\\.\pipe\HelloWorld``, ``//./pipe/HelloWorld``, ``\\localhost\pipe\HelloWorld`` and plain ``HelloWorld`` are one name,
1 to 256 characters of any kind but NUL, compared without case. A name that begins with ``/`` is *rooted*, as in .NET:
the pipe lives at that path, case counts. Source: CreateNamedPipeW; System.IO.Pipes (PipeStream.GetPipePath).
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import NamedTuple

from ..address import MAX_DEVICE_NAME
from ..errors import InvalidAddress, NameTooLong, NotSupported, PathNotFound

__all__ = ["DOTNET_PREFIX", "MAX_SOCKET_PATH", "PipeName", "dotnet_folder", "fold", "parse_pipe_name"]

DOTNET_PREFIX = "CoreFxPipe_"
MAX_SOCKET_PATH = 107
"""Bytes of a socket's path that connect(2) takes."""
_DEVICE = re.compile(r"[\\/]{2}([^\\/]*)[\\/]([^\\/]*)(?:[\\/](.*))?\Z", re.DOTALL)
_HERE = {".", "?", "localhost", "127.0.0.1", "[::1]", "::1"}


class PipeName(NamedTuple):
    """A checked name; ``str()`` gives it without prefix."""

    text: str
    rooted: bool

    def __str__(self) -> str:
        return self.text

    @property
    def full(self) -> str:
        return self.text if self.rooted else f"\\\\.\\pipe\\{self.text}"

    @property
    def key(self) -> str:
        """What names that mean the same pipe share, as a file name: 20 hex digits."""
        folded = self.text if self.rooted else fold(self.text)
        return hashlib.sha256(folded.encode()).hexdigest()[:20]

    @property
    def dotnet_path(self) -> str | None:
        """Where .NET looks for it; None when it can have no peer there: ``/`` in the name, more than 107 bytes."""
        if self.rooted:
            path = self.text
        elif "/" in self.text or self.text.lower() == "anonymous":
            return None
        else:
            path = os.path.join(dotnet_folder(), DOTNET_PREFIX + self.text)
            if not os.path.isabs(path):
                path = os.path.abspath(path)
        try:
            return path if len(path.encode()) <= MAX_SOCKET_PATH else None
        except UnicodeEncodeError:  # a TMPDIR that is no UTF-8, which .NET cannot say either
            return None


def dotnet_folder() -> str:
    """``Path.GetTempPath()``: ``TMPDIR``, else ``/tmp``; not Python's, which looks elsewhere, too."""
    return os.environ.get("TMPDIR") or "/tmp"


def fold(text: str) -> str:
    """Each character by itself, so that ``straße`` and ``STRASSE`` stay two names, as on Windows."""
    return "".join(upper if len(upper := one.upper()) == 1 else one for one in text)


def parse_pipe_name(name: str) -> PipeName:
    """`PathNotFound` for an empty name, `NameTooLong`, `InvalidAddress`; `NotSupported` for another machine's."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: give a string")
    if not name:
        raise PathNotFound("an empty name is no pipe", hint=r"give NAME or \\.\pipe\NAME")
    if "\0" in name or any("\ud800" <= one <= "\udfff" for one in name):
        raise InvalidAddress(f"name {name!r}: NUL and lone surrogates cannot be part of a name")
    if name.startswith(("\\\\", "//")):
        return _device(name)
    if name.startswith("/"):
        if name.endswith("/"):
            raise InvalidAddress(f"name {name!r}: a folder's path is no pipe")
        return PipeName(os.path.normpath(name), True)
    return _checked(name, name)


def _device(name: str) -> PipeName:
    found = _DEVICE.match(name)
    if not found or found[2].lower() != "pipe" or not found[1]:
        raise InvalidAddress(f"{name!r} is not \\\\.\\pipe\\NAME", hint="the name alone will do")
    if found[1].lower() not in _HERE:
        raise NotSupported(f"{name!r}: pipes of other machines are not built yet", hint=r"this machine is \\.\pipe")
    return _checked(found[3] or "", name)


def _checked(text: str, name: str) -> PipeName:
    if not text:
        raise InvalidAddress(f"{name!r}: nothing follows the prefix", hint=r"give \\.\pipe\NAME")
    if len(text) > MAX_DEVICE_NAME:
        raise NameTooLong(f"a pipe name of {len(text)} characters ({text[:20]!r}...): at most {MAX_DEVICE_NAME}")
    return PipeName(text, False)
