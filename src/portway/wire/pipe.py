r"""What a named pipe leaves in its record, and how a message travels in packets. Little-endian, version 1.

A record is one header page and 255 lines of 128 bytes, one for each instance. Header::

    0x000   8  magic "PWPIPE"
    0x008   4  layout version
    0x00c   4  type: 0 byte, 1 message
    0x010   4  direction: 1 inbound (client to server), 2 outbound, 3 duplex
    0x014   4  most instances, 1 to 255
    0x018   4  size of the out buffer    0x01c  4  of the in buffer: as the first server gave them
    0x020   4  default wait, milliseconds
    0x024   4  flags: 1 others than the owner may connect, 2 remote clients are accepted
    0x028   8  random number of the record
    0x030   4  length of the name        0x034  4  length of the front's path (.NET's name for the pipe), 0: none
    0x038   4  wake word: changes whenever an instance begins to listen
    0x03c   4  when a server last asked the others for an instance, milliseconds on the monotonic clock, 0: never
    0x100      the name as given, UTF-8, at most 1,024 bytes
    0x500      the front's path, UTF-8, at most 107 bytes

A line::

    0   4  generation: the instance's socket is the file ``<slot>.<generation>``
    4   4  state: 0 free, 1 listening, 2 connected, 3 disconnected
    8   8  when it began to listen, nanoseconds on the machine's monotonic clock: who comes first is served first
    16  4  server's pid    20  4  client's pid, 0: unknown    24  8  server's start time, clock ticks since boot
    32  4  client's uid    36  4  reserved                    40  8  since when in this state, Unix nanoseconds
    48  8  number of the server object that has the instance (its front file is named by it)
    56  8  inode of the listening socket, by which the kernel tells whether a client waits in it
    64 32  reserved
    96 32  the last eight generations that the server disconnected (DisconnectNamedPipe): their clients throw away what
           they have not read

Every byte was written by somebody else: a reader takes nothing for granted.

A packet of a message pipe (Unix seqpacket) is 8 bytes and up to 65,536 of the message: the low 56 bits count the bytes
of the message from here on, the high 8 are the kind, 0 data or 1 "its writer gave this message up". The last packet of
a message is the one whose count equals its payload; an empty message is 8 bytes, never mistaken for the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..errors import ObjectCorrupt

__all__ = [
    "ASKED_AT", "DISCONNECTED_AT", "HEADER_SIZE", "LINE_SIZE", "MAX_INSTANCES", "MAX_PACKET", "RECORD_SIZE", "WAKE_AT",
    "Direction", "Flag", "Header", "Line", "LineState", "PacketKind", "line_at", "line_slot", "pack_header",
    "pack_line", "pack_packet_head", "packets", "unpack_header", "unpack_lines", "unpack_listening",
    "unpack_packet_head",
]  # fmt: skip

MAGIC = b"PWPIPE\0\0"
VERSION = 1
HEADER_SIZE = 4096
LINE_SIZE = 128
MAX_INSTANCES = 255
RECORD_SIZE = HEADER_SIZE + MAX_INSTANCES * LINE_SIZE
WAKE_AT = 0x38
ASKED_AT = 0x3C
DISCONNECTED_AT = 96
"""Within a line."""
NAME_AT, MAX_NAME = 0x100, 1024
FRONT_AT, MAX_FRONT = 0x500, 107
MAX_PACKET = 65536
_HEADER = struct.Struct("<8sIIIIIIIIQIIII")
_LINE = struct.Struct("<IIQIIQI4xQQQ32x32x")
_PACKET = struct.Struct("<Q")
_LENGTH = (1 << 56) - 1
assert _LINE.size == LINE_SIZE


class Direction(IntEnum):
    """From whom to whom, as the server says it: PIPE_ACCESS_INBOUND and so on."""

    INBOUND = 1
    OUTBOUND = 2
    DUPLEX = 3


class Flag(IntFlag):
    SHARED = 1
    REMOTE = 2


class LineState(IntEnum):
    FREE = 0
    LISTENING = 1
    CONNECTED = 2
    DISCONNECTED = 3


class PacketKind(IntEnum):
    DATA = 0
    ABANDONED = 1


class Header(NamedTuple):
    """What the first server of a pipe decided."""

    name: str
    """As given; names compare without case."""
    message: bool
    direction: Direction
    max_instances: int
    out_size: int
    in_size: int
    default_wait_ms: int
    flags: Flag
    number: int
    front: str
    """.NET's path for the pipe, "" when it has none."""


class Line(NamedTuple):
    """One instance, as its server wrote it; that the server lives, only the kernel says."""

    generation: int
    state: LineState
    ticket: int
    server_pid: int
    client_pid: int
    server_start: int
    client_uid: int
    since_ns: int
    server: int
    inode: int


FREE = Line(0, LineState.FREE, 0, 0, 0, 0, 0, 0, 0, 0)


def line_at(slot: int) -> int:
    return HEADER_SIZE + slot * LINE_SIZE


def line_slot(at: int) -> int:
    """The slot of the line that offset `at` lies in."""
    return (at - HEADER_SIZE) // LINE_SIZE


def pack_header(header: Header) -> bytes:
    """The whole header page; `ValueError` for what no header may hold."""
    name, front = header.name.encode(), header.front.encode()
    if not 0 < len(name) <= MAX_NAME or len(front) > MAX_FRONT:
        raise ValueError(f"a name of {len(name)} and a front of {len(front)} bytes")
    page = bytearray(HEADER_SIZE)
    _HEADER.pack_into(
        page, 0, MAGIC, VERSION, header.message, header.direction, header.max_instances, header.out_size,
        header.in_size, header.default_wait_ms, header.flags, header.number, len(name), len(front), 0, 0,
    )  # fmt: skip
    page[NAME_AT : NAME_AT + len(name)] = name
    page[FRONT_AT : FRONT_AT + len(front)] = front
    return bytes(page)


def unpack_header(page: bytes, where: str) -> Header:
    """`ObjectCorrupt`, naming the file `where`, for anything that `pack_header` cannot have written."""
    if len(page) < HEADER_SIZE or page[:8] != MAGIC:
        raise ObjectCorrupt(f"{where} is not the record of a pipe", hint="its owner may remove the folder it lies in")
    fields = _HEADER.unpack_from(page)
    _, version, kind, direction, most, out_size, in_size, wait, flags, number, name_size, front_size, _, _ = fields
    if version != VERSION:
        raise ObjectCorrupt(
            f"{where} has layout version {version}, this portway knows {VERSION}",
            hint="end the servers of the other version first",
        )
    if kind > 1 or not 1 <= direction <= 3 or not 1 <= most <= MAX_INSTANCES or name_size > MAX_NAME or not name_size:
        raise ObjectCorrupt(f"{where}: type {kind}, direction {direction}, {most} instances cannot be")
    try:
        if front_size > MAX_FRONT:
            raise ValueError(front_size)
        name = page[NAME_AT : NAME_AT + name_size].decode()
        front = page[FRONT_AT : FRONT_AT + front_size].decode()
    except ValueError:
        raise ObjectCorrupt(f"{where}: a name or path that cannot be") from None
    return Header(name, bool(kind), Direction(direction), most, out_size, in_size, wait, Flag(flags & 3), number, front)


def pack_line(line: Line, disconnected: bytes = b"") -> bytes:
    """128 bytes; `disconnected` is the last field of the table, up to 32 bytes."""
    return _LINE.pack(*line)[:DISCONNECTED_AT] + disconnected[:32].ljust(32, b"\0")


def unpack_lines(data: bytes) -> Iterator[tuple[int, Line]]:
    """(slot, line) of every line that is not free; an unknown state counts as free, a cut line is missing."""
    whole = min(len(data) // LINE_SIZE, MAX_INSTANCES)
    for slot, fields in enumerate(_LINE.iter_unpack(data[: whole * LINE_SIZE])):
        if 1 <= fields[1] <= 3:
            yield slot, Line(fields[0], LineState(fields[1]), *fields[2:])


def unpack_listening(data: bytes) -> list[tuple[int, Line]]:
    """Of `unpack_lines`, those that listen, the oldest first; the others cost next to nothing."""
    whole, found = min(len(data) // LINE_SIZE, MAX_INSTANCES), []
    for slot, low in enumerate(data[4 : whole * LINE_SIZE : LINE_SIZE]):
        if low == 1:
            fields = _LINE.unpack_from(data, slot * LINE_SIZE)
            if fields[1] == 1:
                found.append((slot, Line(fields[0], LineState.LISTENING, *fields[2:])))
    return sorted(found, key=lambda one: one[1].ticket)


def pack_packet_head(left: int, kind: PacketKind = PacketKind.DATA) -> bytes:
    return _PACKET.pack(kind << 56 | left)


def unpack_packet_head(packet: bytes) -> tuple[PacketKind, int]:
    """(kind, bytes of the message from here on); `ValueError` for a packet that cannot be."""
    if not 8 <= len(packet) <= 8 + MAX_PACKET:
        raise ValueError(f"a packet of {len(packet)} bytes")
    (head,) = _PACKET.unpack_from(packet)
    kind, left = PacketKind(head >> 56), head & _LENGTH
    size = len(packet) - 8
    if (kind is PacketKind.DATA and (size > left or (size < left and size != MAX_PACKET))) or (kind and size):
        raise ValueError(f"a packet of {size} bytes, of a message of {left} bytes more")
    return kind, left


def packets(message: bytes) -> Iterator[bytes]:
    """The packets of one message: the specification of what the native channel sends."""
    for at in range(0, max(len(message), 1), MAX_PACKET):
        yield pack_packet_head(len(message) - at) + message[at : at + MAX_PACKET]
