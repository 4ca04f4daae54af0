"""Contracts that third parties implement, and the registry that finds them by name or entry point.

`Handoff` is the service-provider interface of socket duplication (Winsock: WSPDuplicateSocket, where a layered
provider calls the one below and adds its own state to dwProviderReserved). The other contracts of the design
(Transport, Upgrade, Encoder, Formatter) come with the features that need them.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from .errors import ProviderNotFound

__all__ = ["Handoff", "Parcel", "handoff_provider", "handoff_providers", "register_handoff"]


@dataclass(slots=True)
class Parcel:
    """What travels when one object is duplicated: filled from the bottom layer up, emptied from the top down."""

    socket: socket.socket
    """The kernel socket. In the target it is a `SharedSocket` of the target's own."""
    reserved: bytes = b""
    """The providers' own bytes, at most 64 KiB. A layered provider wraps what the one below put here."""
    descriptors: list[int] = field(default_factory=list)
    """Further descriptors, of any kind. In the source they stay the provider's; in the target they are the restoring
    provider's to close, and `restore` removes those it takes from the list: what is left in it is closed."""
    unread: bytes = b""
    """Bytes read from the socket and not consumed."""
    state: bytes = b""
    """State of the layers above."""


@runtime_checkable
class Handoff(Protocol):
    """Duplicates one kind of object into another process. Passes `portway.testing.check_handoff`.

    A *layered* provider holds another (`below`), calls its `duplicate` and `restore`, and adds state and descriptors
    of its own. Providers are found by name in the target, so the name and the format of the reserved bytes are a
    promise between versions.
    """

    name: str
    restores: Literal["descriptor", "object"]
    """``"descriptor"``: `restore` gives a `SharedSocket`, a kernel descriptor that everything can use (Winsock's IFS
    provider). ``"object"``: it gives an object of its own, whose ``fileno()`` can be waited on (non-IFS)."""

    def missing(self) -> str | None:
        """Why it cannot work on this machine, or None."""

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        """What must travel so that process `pid` can have `obj` too. Changes nothing: `obj` stays usable, and is
        still the caller's if the hand-over fails. `UnsupportedSocket` for an object it does not know."""

    def restore(self, parcel: Parcel) -> Any:
        """The object in the target. Owns ``parcel.socket`` from now on; raises only errors of portway."""

    def close(self, obj: Any) -> None:
        """Closes the source's copy after a `duplicate_and_close`; the connection lives on in the target."""


_providers: dict[str, Handoff] = {}
_lock = threading.Lock()


def register_handoff(provider: Handoff) -> None:
    """Makes `provider` known under its name in this process; `ValueError` if the name is taken by another class."""
    with _lock:
        there = _providers.setdefault(provider.name, provider)
    if type(there) is not type(provider):
        raise ValueError(f"a hand-off provider named {provider.name!r} is registered already: {there!r}")


def handoff_provider(name: str) -> Handoff:
    """The provider registered under `name`, here or by an installed package (entry point group ``portway.handoff``).

    `ProviderNotFound` lists the known names. Only names that this process's own packages installed are ever loaded.
    """
    found = _providers.get(name)
    if found is None:
        known = _load(name)
        found = _providers.get(name)
        if found is None:
            raise ProviderNotFound(
                f"no hand-off provider named {name!r}; known here: {', '.join(sorted(known))}",
                hint="install or register it in the target process, too",
            )
    why = found.missing()
    if why:
        raise ProviderNotFound(f"the hand-off provider {name!r} cannot work here: {why}")
    return found


def handoff_providers() -> list[str]:
    """The names that `handoff_provider` knows, sorted."""
    return sorted(_load(None))


def _load(wanted: str | None) -> set[str]:
    from importlib.metadata import entry_points

    known = set(_providers)
    for point in entry_points(group="portway.handoff"):
        known.add(point.name)
        if point.name == wanted:
            register_handoff(point.load()())
    return known
