"""An end of a pipe moves to another process like a socket, with the half-read message and its place in the pipe.

The hand-off provider ``pipe``: ``portway.duplicate_and_close(pipe, pid, provider="pipe")`` there,
``portway.socket_from(record)`` here gives the end. A server's end takes the lock of its instance along, so the limit of
instances and the name hold on while it lives, whatever becomes of the server it came from. Nobody may be in a call of
the end meanwhile.

Reserved bytes, little-endian: version (1), flags (1: message pipe, 2: reads messages, 4: server's end), access (1),
slot (2), generation (4), max_message (8), timeout in seconds (8, double; negative: none), length of the channel's state
(2), of the name (2), of the folder (2); then those three. Unread bytes are those of a message that was received in
part. A server's end has one more descriptor: the record, with the lock of the slot.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from contextlib import suppress
from typing import Any, Literal

from ..errors import InvalidInformation, OperationTimeout, PortwayError, UnsupportedSocket
from ..provider import Parcel
from ..wire import pipe as wire
from .device import Place
from .pipe_client import NamedPipeClient
from .pipe_end import PipeEnd
from .pipe_front import remove_stale
from .pipe_instance import Instance
from .pipe_record import Record, Who, who
from .pipe_server import NamedPipeConnection
from .security import Security

__all__ = ["PipeHandoff"]

_HEAD = struct.Struct("<BBBHIQdHHH")
_MESSAGE, _READS, _SERVER = 1, 2, 4


class _Borrowed(socket.socket):
    """A socket object over a descriptor that stays its end's."""

    def __del__(self) -> None:
        self.detach()


class PipeHandoff:
    """See the module. Restores a `NamedPipeConnection` or a `NamedPipeClient`."""

    name = "pipe"
    restores: Literal["descriptor", "object"] = "object"

    def missing(self) -> str | None:
        return None

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        if not isinstance(obj, PipeEnd):
            raise UnsupportedSocket(f"{obj!r} is no end of a pipe", hint="leave provider= out for a plain socket")
        gathered, state = obj.travel_state()
        flags = _MESSAGE * obj.message | _READS * obj.read_message | _SERVER * obj.is_server
        slot, generation, folder = obj.place
        name, path = obj.name.encode(), os.fsencode(folder)
        timeout = -1.0 if obj.timeout is None else obj.timeout
        head = _HEAD.pack(
            1, flags, obj.access, slot, generation, obj.max_message, timeout, len(state), len(name), len(path)
        )
        kind = socket.SOCK_SEQPACKET if obj.message else socket.SOCK_STREAM
        borrowed = _Borrowed(socket.AF_UNIX, kind, 0, obj.fileno())
        obj.borrowed = borrowed  # as long as the end: only its number travels
        descriptors = [obj.share_slot()] if isinstance(obj, NamedPipeConnection) else []
        return Parcel(borrowed, head + state + name + path, descriptors, gathered)

    def restore(self, parcel: Parcel) -> PipeEnd:
        flags, access, slot, generation, most, timeout, state, name, folder = _unpack(parcel.reserved)
        options: dict[str, Any] = {
            "message": bool(flags & _MESSAGE), "access": access, "read_message": bool(flags & _READS),
            "max_message": most, "timeout": None if timeout < 0 else timeout, "name": name,
        }  # fmt: skip
        gathered, parcel.unread = parcel.unread, b""
        end: PipeEnd
        if flags & _SERVER:
            if len(parcel.descriptors) != 1:
                raise InvalidInformation(f"{len(parcel.descriptors)} descriptors came with a server's end of a pipe: 1")
            moved = _Moved(parcel.descriptors[0], folder, slot)
            parcel.descriptors.clear()
            end = NamedPipeConnection.__new__(NamedPipeConnection)
            end._server, end._instance = moved, moved.instance(slot, generation)  # type: ignore[assignment]
        else:
            end = NamedPipeClient.__new__(NamedPipeClient)
        end.place = slot, generation, folder
        PipeEnd.__init__(end, parcel.socket.detach(), **options)
        try:
            end.restore_travel(gathered, state)
            if not flags & _SERVER and folder:
                _watch(end, folder, slot, generation)
        except BaseException:
            end.close()
            raise
        return end

    def close(self, obj: Any) -> None:
        """The end here; the conversation goes on there, and keeps its instance."""
        obj.leave()


def _unpack(reserved: bytes) -> tuple[int, int, int, int, int, float, bytes, str, str]:
    if len(reserved) < _HEAD.size:
        raise InvalidInformation(f"{len(reserved)} reserved bytes: the pipe provider wrote more")
    version, flags, access, slot, generation, most, timeout, *sizes = _HEAD.unpack_from(reserved)
    if version != 1 or len(reserved) != _HEAD.size + sum(sizes) or not 1 <= access <= 3 or flags > 7:
        raise InvalidInformation(f"reserved bytes of pipe version {version}, {len(reserved)} in all, cannot be")
    if slot >= wire.MAX_INSTANCES or timeout != timeout:
        raise InvalidInformation(f"instance {slot}, timeout {timeout} of a pipe cannot be")
    parts, at = [], _HEAD.size
    for size in sizes:
        parts.append(reserved[at : at + size])
        at += size
    try:
        return flags, access, slot, generation, most, timeout, parts[0], parts[1].decode(), os.fsdecode(parts[2])
    except UnicodeDecodeError:
        raise InvalidInformation("the name of a pipe that came is not UTF-8") from None


def _watch(end: PipeEnd, folder: str, slot: int, generation: int) -> None:
    """The record may have gone meanwhile; then nobody can disconnect this end any more."""
    with suppress(OSError, PortwayError):
        fd = os.open(f"{folder}/record", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            end.watch(fd, wire.line_at(slot) + wire.DISCONNECTED_AT, generation)
        finally:
            os.close(fd)


class _Moved:
    """What stands in for the server object of a server's end that came from elsewhere: the record, for one slot."""

    def __init__(self, fd: int, folder: str, slot: int) -> None:
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InvalidInformation("the descriptor that came with a server's end is no record of a pipe")
            header = wire.unpack_header(os.pread(fd, wire.HEADER_SIZE, 0), folder)
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except BaseException:
            os.close(fd)
            raise
        self.record = Record(fd, folder_fd, Place(info.st_uid, os.path.dirname(folder)), folder, header)
        self.record.adopt(slot)
        self.who: Who = who()

    @property
    def lock(self) -> threading.RLock:
        return self.record.lock

    def instance(self, slot: int, generation: int) -> Instance:
        made = Instance(self.record, slot, self.who, Security.owner())
        made.generation = generation
        made.moved()
        return made

    def release(self, instance: Instance) -> None:
        """The conversation is over: the slot is free; the last one who has the pipe removes the name."""
        record = self.record
        if record.closed:
            return
        instance.release()
        try:
            with record.gate(patience=1):
                if not record.alive():
                    remove_stale(record)
                    record.remove()
        except OperationTimeout:
            pass
        record.close()
