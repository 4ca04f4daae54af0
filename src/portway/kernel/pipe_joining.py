"""How a server object comes to a pipe's name: joins the servers that have it, or makes it, or is refused."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field

from ..deadline import Deadline
from ..errors import AccessDenied, OperationTimeout, PipeBusy, PortwayError
from ..wire.pipe import Direction, Flag, Header
from .device import Device, Place
from .netinfo import look_at
from .pipe_front import remove_stale
from .pipe_name import PipeName
from .pipe_record import Record, find, make
from .process import user_name
from .security import Security

__all__ = ["BACKLOG", "Options", "join", "server_of"]

BACKLOG = 4
_PATIENCE = 1.5  # seconds that a new server waits for the others to spare an instance


@dataclass(frozen=True, slots=True)
class Options:
    """What the first server of a name decides for all (type, direction, maximum), and what is one server's own."""

    message: bool = False
    direction: Direction = Direction.DUPLEX
    max_instances: int = 255
    instances: int | None = None
    backlog: int = BACKLOG
    first: bool = False
    security: Security = field(default_factory=Security.owner)
    remote: bool = False
    out_size: int = 0
    in_size: int = 0
    default_wait_ms: int = 50
    root: str | None = None

    def header(self, name: PipeName) -> Header:
        flags = Flag.SHARED * (not self.security.is_owner_only) | Flag.REMOTE * self.remote
        number = int.from_bytes(os.urandom(8), "little")
        return Header(
            name.text, self.message, self.direction, self.max_instances, self.out_size, self.in_size,
            self.default_wait_ms, Flag(flags), number, name.dotnet_path or "",
        )  # fmt: skip


def join(name: PipeName, options: Options) -> tuple[Record, int]:
    """The record, joined, and the first slot of ours. Errors: see `Serving`."""
    device = Device("pipe", options.root)
    deadline = Deadline(_PATIENCE)
    for _ in range(1000):
        record = find(device.own(), name, write=True)
        if record is None:
            _refuse_others(device, name)
            made = make(device, name, options.header(name), not options.security.is_owner_only)
            if made is not None:
                return made, 0
            continue
        try:
            slot = _join_existing(record, name, options, deadline)
        except BaseException:
            record.close()
            raise
        if slot is not None:
            return record, slot
        asked = record.asked()
        record.close()
        if asked:
            time.sleep(0.005)
    raise OperationTimeout(f"the pipe {name}: others make and remove it all the time")


def _join_existing(record: Record, name: PipeName, wanted: Options, deadline: Deadline) -> int | None:
    """None: try again, since it had no server left, or has just gone, or others were asked for an instance."""
    with record.gate():
        if os.fstat(record.fd).st_nlink == 0:
            return None
        if not record.alive():
            remove_stale(record)
            record.remove()
            return None
        header = record.header
        if wanted.first:
            raise AccessDenied(f"the pipe {name} exists already", hint="leave out first_instance to join it")
        if header.direction != wanted.direction:
            theirs, ours = header.direction.name.lower(), wanted.direction.name.lower()
            raise AccessDenied(f"the pipe {name} is {theirs}, this server wants {ours}")
        record.join()
        slot = record.take_slot()
        if slot is None and not deadline.expired and record.surplus():
            record.ask()
            return None
        if slot is None:
            raise PipeBusy(
                f"all {header.max_instances} instances of the pipe {name} are in use",
                hint="the first server's max_instances holds for all",
            )
        record.sweep()
        return slot


def _refuse_others(device: Device, name: PipeName) -> None:
    """A name that another user, or another program at .NET's path, visibly serves is not ours to take."""
    me = os.geteuid()
    for place in device.places():
        if place.uid != me and _serves(place, name):
            other = user_name(place.uid)
            raise AccessDenied(f"uid {other} serves the pipe {name}", hint="take another name")
    path = name.dotnet_path
    seen = look_at(path) if path else None
    if path and seen and seen.state in ("live", "denied"):
        # whether another user's socket lives is not told to who may not connect
        may = "may be served by another program" + (f" of uid {user_name(seen.uid)}" if seen.uid >= 0 else "")
        raise AccessDenied(
            f"the pipe {name} {'is served by another program' if seen.state == 'live' else may}: "
            f"{path}{server_of(path)}",
            hint="end it, or take another name",
        )


def _serves(place: Place, name: PipeName) -> bool:
    """As far as we can see; another user's record may be closed to us, or nonsense."""
    try:
        record = find(place, name)
    except (PortwayError, OSError):
        return False
    if record is None:
        return False
    with record:
        return record.alive()


def server_of(path: str) -> str:
    """ " (pid 12, dotnet)", as far as /proc tells."""
    with suppress(Exception):
        import psutil

        for one in psutil.net_connections("unix"):
            if str(one.laddr) == path and one.pid:
                return f" (pid {one.pid}, {psutil.Process(one.pid).name()})"
    return ""


