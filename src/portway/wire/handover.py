"""The messages by which connections move from one generation of a service to the next.

An inbox message (Unix seqpacket), version 1, little-endian. Its descriptors are one end of a reply socketpair
(seqpacket) and then one connection for each entry, in order::

    0    4   magic "PWM", version 0x01
    4    2   flags: 1, the payload follows on the reply socket, in packets of at most 60,000 bytes
    6    2   entries, 1 to 252; 1 when the payload follows
    8    4   length of the payload
    12   4   number of the source's generation
    16   ... for each entry 12 bytes:
             0  1  length of the kind, 1 to 64      1  1  descriptors, 1       2  2  zero
             4  4  length of the unread bytes       8  4  length of the state
    ...      the payload, unless it follows: for each entry kind (UTF-8), unread, state; and nothing after it

Each message is complete in itself (a large payload comes on the message's own reply socket), so any number of sources
and receivers can share one inbox. The receiver answers on the reply socket, in any order, each entry once::

    0    1   "A" accepted: the connection is the receiver's now; "R" refused: it stays with the source
    1    2   first entry, from 0      3  2  how many entries
    5    ... why, when refused (UTF-8, at most 500 bytes)

The end of the reply socket refuses every entry not answered so far.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import InvalidInformation
from .cursor import Cursor, Truncated

__all__ = [
    "MAX_CONNECTIONS", "MAX_INLINE", "MAX_MESSAGE", "MAX_PAYLOAD", "Answer", "Header", "Moving", "batch_size",
    "check_moving", "decode_answer", "decode_header", "decode_payload", "encode", "encode_answer",
]  # fmt: skip

MAX_CONNECTIONS = 252
"""Connections in one message: the kernel takes 253 descriptors, one is the reply socket."""
MAX_INLINE = 60_000
"""Payload bytes that travel in the message itself, or in one packet on the reply socket."""
MAX_PAYLOAD = 1 << 20
"""Unread bytes plus state of one connection."""
MAX_KIND = 64
MAX_REASON = 500
MAX_MESSAGE = 65_536
FOLLOWS = 1
_HEAD = struct.Struct("<4sHHII")
_ENTRY = struct.Struct("<BBHII")
_ANSWER = struct.Struct("<cHH")
_MAGIC = b"PWM\x01"


class Moving(NamedTuple):
    """What travels beside a connection's descriptor."""

    kind: str
    """Which code can take it over, such as ``"http/1.1"``; 1 to 64 bytes of UTF-8. A version belongs into it."""
    unread: bytes
    """Bytes read from the socket and not consumed; the receiver sees them before what it reads itself."""
    state: bytes
    """Whatever the layers above need; only the two ends know its form."""


class Header(NamedTuple):
    """A decoded inbox message. ``moving`` is None while the payload, ``size`` bytes, follows on the reply socket."""

    generation: int
    entries: tuple[tuple[int, int, int], ...]
    size: int
    moving: tuple[Moving, ...] | None


class Answer(NamedTuple):
    accepted: bool
    first: int
    entries: int
    reason: str


def check_moving(kind: str, unread: bytes, state: bytes) -> Moving:
    """The three as one record; `ValueError` naming what is over a limit."""
    if not 1 <= len(kind.encode()) <= MAX_KIND:
        raise ValueError(f"kind={kind!r}: give 1 to {MAX_KIND} bytes of UTF-8")
    if len(unread) + len(state) > MAX_PAYLOAD:
        raise ValueError(
            f"unread and state are {len(unread) + len(state)} bytes: a connection moves with at most {MAX_PAYLOAD}"
        )
    return Moving(kind, bytes(unread), bytes(state))


def payload_size(moving: Moving) -> int:
    return len(moving.kind.encode()) + len(moving.unread) + len(moving.state)


def batch_size(queue: Iterable[Moving], limit: int) -> int:
    """How many of the queue's first connections, at most `limit`, go into one message; at least 1."""
    count = total = 0
    for moving in queue:
        total += payload_size(moving)
        if count and (count >= min(limit, MAX_CONNECTIONS) or total > MAX_INLINE):
            break
        count += 1
    return max(count, 1)


def encode(moving: Sequence[Moving], generation: int) -> tuple[bytes, list[bytes]]:
    """The message, and the packets that follow it on the reply socket (mostly none)."""
    table: list[bytes] = []
    parts: list[bytes] = []
    for kind, unread, state in moving:
        name = kind.encode()
        table.append(_ENTRY.pack(len(name), 1, 0, len(unread), len(state)))
        parts += (name, unread, state)
    payload = b"".join(parts)
    follows = len(payload) > MAX_INLINE
    if follows and len(moving) > 1:
        raise ValueError(f"{len(payload)} bytes of payload for {len(moving)} connections: one at a time")
    head = _HEAD.pack(_MAGIC, FOLLOWS if follows else 0, len(moving), len(payload), generation) + b"".join(table)
    if not follows:
        return head + payload, []
    return head, [payload[at : at + MAX_INLINE] for at in range(0, len(payload), MAX_INLINE)]


def decode_header(data: bytes) -> Header:
    """`InvalidInformation` for anything that is not exactly one message."""
    cursor = Cursor(data)
    try:
        magic, flags, count, size, generation = _HEAD.unpack(cursor.take(_HEAD.size))
        if magic != _MAGIC:
            raise InvalidInformation(
                f"a hand-over message starts with {bytes(magic)!r}, not {_MAGIC!r}",
                hint="both generations need versions of portway that speak the same one",
            )
        if flags & ~FOLLOWS or not 1 <= count <= MAX_CONNECTIONS:
            raise InvalidInformation(f"a hand-over message with flags {flags} and {count} connections")
        entries = tuple(_entry(cursor.take(_ENTRY.size)) for _ in range(count))
    except Truncated as error:
        raise InvalidInformation(f"a hand-over message is cut short: {error}") from None
    if size != sum(map(sum, entries)):
        raise InvalidInformation(f"a hand-over message announces {size} bytes, its entries {sum(map(sum, entries))}")
    if flags & FOLLOWS:
        if count != 1 or cursor.left:
            raise InvalidInformation("a hand-over message whose payload follows has one entry and nothing after it")
        return Header(generation, entries, size, None)
    return Header(generation, entries, size, decode_payload(entries, cursor.rest()))


def _entry(view: memoryview) -> tuple[int, int, int]:
    kind, descriptors, zero, unread, state = _ENTRY.unpack(view)
    if not 1 <= kind <= MAX_KIND or descriptors != 1 or zero or unread + state > MAX_PAYLOAD:
        raise InvalidInformation(
            f"a hand-over entry with a kind of {kind} bytes, {descriptors} descriptors, {unread} bytes unread and "
            f"{state} of state"
        )
    return kind, unread, state


def decode_payload(entries: Sequence[tuple[int, int, int]], data: bytes | bytearray | memoryview) -> tuple[Moving, ...]:
    """What the entries of a header stand for; `InvalidInformation` when the payload is not exactly that long."""
    cursor, found = Cursor(data), []
    try:
        for kind, unread, state in entries:
            name = bytes(cursor.take(kind)).decode()
            found.append(Moving(name, bytes(cursor.take(unread)), bytes(cursor.take(state))))
    except Truncated as error:
        raise InvalidInformation(f"a hand-over payload is cut short: {error}") from None
    except UnicodeDecodeError:
        raise InvalidInformation("a hand-over message's kind is not UTF-8") from None
    if cursor.left:
        raise InvalidInformation(f"a hand-over payload with {cursor.left} bytes too many")
    return tuple(found)


def encode_answer(accepted: bool, first: int, count: int = 1, reason: str = "") -> bytes:
    cut = reason.encode()[:MAX_REASON].decode(errors="ignore")
    return _ANSWER.pack(b"A" if accepted else b"R", first, count) + cut.encode()


def decode_answer(data: bytes, entries: int) -> Answer:
    """`InvalidInformation` for anything that is not an answer to a message of that many `entries`."""
    if not _ANSWER.size <= len(data) <= _ANSWER.size + MAX_REASON:
        raise InvalidInformation(f"an answer of {len(data)} bytes to a hand-over")
    verdict, first, count = _ANSWER.unpack_from(data)
    if verdict not in (b"A", b"R") or not count or first + count > entries:
        raise InvalidInformation(f"an answer {data[:5]!r} to a hand-over of {entries} connections")
    return Answer(verdict == b"A", first, count, data[_ANSWER.size :].decode(errors="replace"))
