"""What ``--bind`` may say: text -> `Bind`. Pure; the sockets are made in `sockets`.

::

    HOST:PORT   [V6]:PORT   :PORT      TCP; ``:PORT`` is one dual-stack socket; port 0 is chosen once and then kept
    udp:HOST:PORT                      one UDP socket that all generations share
    unix:PATH                          a Unix stream socket; PATH is absolute or relative to the supervisor's directory
    fd:NAME                            a socket inherited by socket activation (LISTEN_FDNAMES), or fd:0 by its place

Each takes ``,name=NAME`` (what LISTEN_FDNAMES and ``{fdNAME}`` call it); ``unix:`` also ``,mode=0660`` (octal) and
``,owner=USER[:GROUP]``.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from ..errors import InvalidAddress

__all__ = ["Bind", "parse_bind", "parse_binds"]

_NAME = re.compile(r"[A-Za-z0-9._\[\]/%-]{1,64}\Z")
_FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH, udp:HOST:PORT or fd:NAME"
SUN_PATH = 107  # bytes; struct sockaddr_un less its closing NUL, unix(7)


@dataclass(frozen=True, slots=True)
class Bind:
    """One ``--bind``. ``kind`` is tcp, udp, unix or fd; ``host`` is "" for every address of both families."""

    text: str
    kind: str
    name: str
    host: str = ""
    port: int = 0
    path: str = ""
    mode: int | None = None
    owner: str | None = None

    @property
    def address(self) -> str:
        """What people write for it, without the options."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'udp:' if self.kind == 'udp' else ''}{host}:{self.port}"


def parse_bind(text: str) -> Bind:
    """`InvalidAddress` names the text, the rule it breaks and the forms there are."""
    address, *rest = text.strip().split(",")
    options = _options(text, rest)
    kind, _, tail = address.partition(":")
    if kind == "unix":
        bind = _unix(text, tail, options)
    elif kind == "fd":
        bind = _inherited(text, tail, options)
    else:
        udp = kind == "udp"
        bind = _internet(text, "udp" if udp else "tcp", tail if udp else address, options)
    unknown = sorted(set(options) - {"name"} - ({"mode", "owner"} if bind.kind == "unix" else set()))
    if unknown:
        raise _wrong(text, f"{unknown[0]!r} is no option of a {bind.kind} bind")
    if not _NAME.match(bind.name):
        raise _wrong(text, f"the name {bind.name!r} must be 1-64 of letters, digits and . _ - [ ] / %")
    return bind


def parse_binds(texts: list[str] | tuple[str, ...]) -> tuple[Bind, ...]:
    """All binds of a service; `InvalidAddress` when two have one name or one address."""
    binds = tuple(parse_bind(text) for text in texts)
    names: set[str] = set()
    for bind in binds:
        if bind.name in names:
            raise _wrong(bind.text, f"another bind is called {bind.name!r} too; give it a ,name= of its own")
        names.add(bind.name)
    return binds


def _wrong(text: str, why: str) -> InvalidAddress:
    return InvalidAddress(f"--bind {text!r}: {why}", hint=f"write {_FORMS}")


def _options(text: str, parts: list[str]) -> dict[str, str]:
    options = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or not value:
            raise _wrong(text, f"{part!r} is not KEY=VALUE")
        if key in options:
            raise _wrong(text, f"{key!r} is given twice")
        options[key] = value
    return options


def _default_name(address: str) -> str:
    return re.sub(r"[^A-Za-z0-9._\[\]/%-]", "-", address)[-64:]


def _unix(text: str, path: str, options: dict[str, str]) -> Bind:
    if not path or "\0" in path or path.endswith("/"):
        raise _wrong(text, "unix: wants the path of a socket")
    if path.startswith("@"):
        raise _wrong(text, "abstract Unix names cannot be replaced by rename, so a reload would share them")
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > SUN_PATH:
        raise _wrong(text, f"a Unix socket's path has at most {SUN_PATH} bytes, this one {len(os.fsencode(path))}")
    mode = options.get("mode")
    if mode is not None and not re.fullmatch(r"0?[0-7]{3}", mode):
        raise _wrong(text, f"mode={mode} is not an octal mode like 0660")
    name = options.get("name", _default_name(os.path.basename(path)))
    return Bind(text, "unix", name, "", 0, path, None if mode is None else int(mode, 8), options.get("owner"))


def _inherited(text: str, name: str, options: dict[str, str]) -> Bind:
    if not name:
        raise _wrong(text, "fd: wants a name of LISTEN_FDNAMES, or a place counted from 0")
    return Bind(text, "fd", options.get("name", _default_name(name)), path=name)


def _internet(text: str, kind: str, address: str, options: dict[str, str]) -> Bind:
    host, sign, digits = address.rpartition(":")
    if not sign or not re.fullmatch(r"[0-9]{1,5}", digits) or int(digits) > 65535:
        raise _wrong(text, "the port must be a number from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        _check_v6(text, host)
    elif ":" in host:
        raise _wrong(text, "an IPv6 address stands in brackets")
    elif host and not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
        raise _wrong(text, f"{host!r} is no host name or address")
    name = options.get("name", _default_name(f"udp:{address}" if kind == "udp" else address))
    return Bind(text, kind, name, host, int(digits))


def _check_v6(text: str, host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise _wrong(text, f"{host!r} is no IPv6 address") from None
