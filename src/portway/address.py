r"""Every name a peer can have, parsed once at the edge; ``parse(str(a)) == a``.

::

    \\.\pipe\NAME   \\HOST\pipe\NAME                pipes; a bare NAME is a pipe of this machine (parse_pipe)
    \\.\mailslot\NAME   \\HOST\mailslot\NAME   \\*\mailslot\NAME   \\DOMAIN\mailslot\NAME
    Local\NAME   Global\NAME                        kernel objects: mutexes, events, mappings ...
    SCHEME://HOST[:PORT]/PATH                       net.tcp net.pipe http https tcp ipc soap.udp nats queue shm
    HOST:PORT   [V6]:PORT                           a TCP socket

Pipes and mailslots compare without regard to case and have at most 256 characters; kernel objects are case-sensitive
and have at most 259 (win32-semantics: CreateNamedPipeW, CreateMailslotW, CreateMutexW).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from .errors import InvalidAddress

__all__ = ["Address", "parse", "parse_pipe"]

MAX_DEVICE_NAME = 256
MAX_OBJECT_NAME = 259
_DEVICES = ("pipe", "mailslot")
_SCOPES = ("Local", "Global")
_SCHEMES = {
    "net.tcp": 808, "net.pipe": None, "http": 80, "https": 443, "tcp": None, "ipc": None, "soap.udp": 3702,
    "nats": 4222, "queue": None, "shm": None,
}  # fmt: skip
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^?#]*)?\Z")
_HOST = re.compile(r"[A-Za-z0-9._*+%-]*\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """`scheme` is one of the table above, or ``pipe``, ``mailslot``, ``Local``, ``Global``, ``socket``."""

    scheme: str
    host: str
    port: int | None
    """None: the scheme has no ports, or its default applies (`effective_port`)."""
    path: str
    """Without the leading separator; empty for a socket."""

    @property
    def effective_port(self) -> int | None:
        return self.port if self.port is not None else _SCHEMES.get(self.scheme)

    @property
    def key(self) -> str:
        """What two names share when they mean the same peer: case folded where Windows folds it."""
        text = str(self)
        return text.casefold() if self.scheme in _DEVICES else text

    def __str__(self) -> str:
        if self.scheme in _DEVICES:
            return f"\\\\{self.host}\\{self.scheme}\\{self.path}"
        if self.scheme in _SCOPES:
            return f"{self.scheme}\\{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        place = host if self.port is None else f"{host}:{self.port}"
        return place if self.scheme == "socket" else f"{self.scheme}://{place}/{self.path}"


def parse(text: str) -> Address:
    """`InvalidAddress` names the text, the rule it breaks and what would do."""
    if "\0" in text:
        raise InvalidAddress(f"{text!r}: a name has no NUL character")
    if text.startswith("\\\\"):
        return _device(text)
    scope, found, name = text.partition("\\")
    if found:
        return _object(text, scope, name)
    if "://" in text:
        return _uri(text)
    host, port = _place(text, text)
    if port is None:
        raise InvalidAddress(f"{text!r}: no port", hint="write HOST:PORT, or a whole address such as \\\\.\\pipe\\NAME")
    return Address("socket", host, port, "")


def parse_pipe(text: str) -> Address:
    r"""The same, and a name without any prefix is a pipe of this machine: ``HelloWorld`` is ``\\.\pipe\HelloWorld``."""
    return parse(text if text.startswith("\\\\") or "://" in text else f"\\\\.\\pipe\\{text}")


def _device(text: str) -> Address:
    host, _, rest = text[2:].partition("\\")
    device, _, name = rest.partition("\\")
    device = device.lower()
    if device not in _DEVICES or not host:
        raise InvalidAddress(f"{text!r}: not \\\\HOST\\pipe\\NAME or \\\\HOST\\mailslot\\NAME", hint="HOST is . here")
    if not name or len(name) > MAX_DEVICE_NAME:
        raise InvalidAddress(f"{text!r}: a {device} name has 1 to {MAX_DEVICE_NAME} characters, this has {len(name)}")
    if device == "pipe" and "\\" in name:
        raise InvalidAddress(f"{text!r}: a pipe name has no backslash")
    if not _HOST.match(host) or (host == "*" and device == "pipe"):
        raise InvalidAddress(f"{text!r}: {host!r} is no host", hint="use . for this machine")
    return Address(device, host, None, name)


def _object(text: str, scope: str, name: str) -> Address:
    if scope not in _SCOPES:
        raise InvalidAddress(f"{text!r}: the prefix {scope!r} is none of Local, Global", hint="case counts")
    if not name or "\\" in name or len(text) > MAX_OBJECT_NAME:
        raise InvalidAddress(
            f"{text!r}: an object name has 1 to {MAX_OBJECT_NAME} characters, prefix included, and no further backslash"
        )
    return Address(scope, "", None, name)


def _uri(text: str) -> Address:
    found = _URI.match(text)
    if not found:
        raise InvalidAddress(f"{text!r}: not SCHEME://HOST[:PORT]/PATH")
    scheme = found[1].lower()
    if scheme not in _SCHEMES:
        raise InvalidAddress(f"{text!r}: scheme {scheme!r} is none of {', '.join(_SCHEMES)}")
    host, port = _place(found[2], text)
    return Address(scheme, host, port, (found[3] or "/")[1:])


def _place(place: str, text: str) -> tuple[str, int | None]:
    if place.startswith("["):
        host, closed, rest = place[1:].partition("]")
        try:
            if not closed or rest[:1] not in ("", ":"):
                raise ValueError
            ipaddress.IPv6Address(host)
        except ValueError:
            raise InvalidAddress(f"{text!r}: [{host}] is no IPv6 address") from None
        colon, digits = rest[:1], rest[1:]
    else:
        host, colon, digits = place.partition(":")
        if not _HOST.match(host):
            raise InvalidAddress(f"{text!r}: {host!r} is no host", hint="an IPv6 address stands in [brackets]")
    if not colon:
        return host, None
    if not (digits.isascii() and digits.isdigit()) or int(digits) > 65535:
        raise InvalidAddress(f"{text!r}: port {digits!r}", hint="a port is 0 to 65535")
    return host, int(digits)
