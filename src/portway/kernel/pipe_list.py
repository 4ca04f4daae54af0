"""Which pipes there are: portway's of this user (all users', for root; else those with a .NET path), and .NET's.

Nobody is connected to. What dead servers left behind is removed on the way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..errors import AccessDenied, PortwayError
from ..wire.pipe import Direction, Line, LineState
from .device import Device, Place
from .netinfo import look_at, unix_queue
from .pipe_front import Seen, remove_stale, whose_front
from .pipe_name import DOTNET_PREFIX, dotnet_folder, parse_pipe_name
from .pipe_record import Record, open_record

__all__ = ["InstanceInfo", "PipeInfo", "list_pipes"]

_KEY = re.compile(r"[0-9a-f]{20}")


class InstanceInfo(NamedTuple):
    """One instance, as its server says; that the server lives, the kernel says."""

    slot: int
    state: str
    """``listening``, ``connected`` (or claimed by a client that the server has not looked at), ``disconnected``."""
    server_pid: int
    client_pid: int
    """0: not known (yet)."""
    client_uid: int
    since: float
    """Unix time of the state."""


class PipeInfo(NamedTuple):
    """One pipe that lives."""

    name: str
    kind: str
    """``portway``, or ``dotnet``: somebody else's socket at .NET's path."""
    mode: str
    """``byte``, ``message``; ``unknown``, as the direction, of a pipe that is closed to us."""
    direction: str
    owner: int
    """uid; of a .NET pipe the file's owner."""
    instances: int
    """How many exist, listening or in use; 0: not known."""
    in_use: int
    max_instances: int
    shared: bool
    """Whether others than the owner may connect."""
    dotnet_path: str
    """Where .NET finds it; "" for none."""
    dotnet_state: str
    """``ours``: .NET's path leads to this pipe; ``closed``: no instance is free; ``taken``: another program's server
    has the path; ``blocked``: a file is in the way; ``absent``; ``none``."""
    detail: tuple[InstanceInfo, ...]


def list_pipes(*, root: str | os.PathLike[str] | None = None) -> list[PipeInfo]:
    """All that live, portway's first, by name. Errors: none; what cannot be read is left out."""
    found, device = [], Device("pipe", root)
    device.tidy()
    places = list(device.places())
    for place in places:
        found += list(_of(place))
    known = {one.dotnet_path for one in found if one.dotnet_state in ("ours", "closed")}
    fronts = list(_at_dotnets_paths(known, places))
    found += [one for one in fronts if one.kind == "portway"]
    return sorted(found, key=lambda one: one.name.lower()) + [one for one in fronts if one.kind != "portway"]


def _of(place: Place) -> Iterator[PipeInfo]:
    try:
        keys = sorted(one for one in os.listdir(place.path) if _KEY.fullmatch(one))
    except OSError:
        return
    own = place.uid == os.geteuid()
    for key in keys:
        try:
            record = open_record(place, key, write=own)
        except (PortwayError, OSError):
            continue
        if record is None:
            if own:
                with suppress(OSError):
                    os.rmdir(f"{place.path}/{key}")  # its maker was killed in the middle
            continue
        with record:
            if own:
                with suppress(PortwayError):
                    _sweep(record)
            if record.alive():
                yield _describe(record)


def _sweep(record: Record) -> None:
    with record.gate(patience=0.5):
        if record.alive():
            record.sweep()
            remove_stale(record)
        elif os.fstat(record.fd).st_nlink:
            remove_stale(record)
            record.remove()


def _describe(record: Record) -> PipeInfo:
    header, held = record.header, record.held()
    detail = tuple(_instance(slot, line) for slot, line in record.lines() if slot in held)
    used = sum(one.state != "listening" for one in detail)
    return PipeInfo(
        header.name, "portway", "message" if header.message else "byte", header.direction.name.lower(),
        record.place.uid, len(held), used, header.max_instances, bool(header.flags & 1), header.front,
        _front_state(record), detail,
    )  # fmt: skip


def _instance(slot: int, line: Line) -> InstanceInfo:
    state = line.state.name.lower()
    if line.state is LineState.LISTENING and unix_queue(line.inode):
        state = "connected"
    return InstanceInfo(slot, state, line.server_pid, line.client_pid, line.client_uid, line.since_ns / 1e9)


def _front_state(record: Record) -> str:
    path = record.header.front
    if not path:
        return "none"
    try:
        with Seen(path) as seen:
            if seen.state == "live":
                return "ours" if whose_front(record, seen.identity) is not None else "taken"
            if seen.state == "dead":
                return "closed" if seen.uid == record.place.uid else "blocked"
            return {"absent": "absent", "denied": "taken"}.get(seen.state, "blocked")
    except (PortwayError, OSError):
        return "none"


def _at_dotnets_paths(known: set[str], places: list[Place]) -> Iterator[PipeInfo]:
    folder = dotnet_folder()
    try:
        names = sorted(one for one in os.listdir(folder) if one.startswith(DOTNET_PREFIX))
    except OSError:
        return
    for one in names:
        path = os.path.join(folder, one)
        if path not in known and (seen := look_at(path)).state in ("live", "denied"):
            name = one.removeprefix(DOTNET_PREFIX)
            theirs = [place for place in places if place.uid == seen.uid != os.geteuid()]
            yield _of_another_user(theirs, name, path) or PipeInfo(
                name, "dotnet", "byte", Direction.DUPLEX.name.lower(), seen.uid, 0, 0, 0, False, path, "ours", ()
            )


def _of_another_user(places: list[Place], name: str, path: str) -> PipeInfo | None:
    """A pipe of portway's in a folder that only its user may list; its record is found by the name."""
    for place in places:
        try:
            key = parse_pipe_name(name).key
            if os.stat(path).st_nlink < 2 or not os.path.isdir(f"{place.path}/{key}"):
                continue  # a front has a name of its own besides
            record = open_record(place, key)
        except AccessDenied:
            return PipeInfo(name, "portway", "unknown", "unknown", place.uid, 0, 0, 0, False, path, "ours", ())
        except (PortwayError, OSError):
            continue
        if record is not None:
            with record:
                if record.header.front == path and record.alive():
                    return _describe(record)
    return None
