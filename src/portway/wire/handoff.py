"""The record that names a duplicated socket, and the messages that carry it beside its descriptors.

A record, version 1, little-endian::

    0    4   magic "PWS", version 0x01
    4    2   flags, see `Flag`
    6    2   address family        8   2   socket type       10  2  protocol
    12   4   target pid            16  8   target start time (clock ticks since boot)
    24   4   source pid            28  8   source start time
    36   4   source uid            40  4   source descriptor, -1 when pushed as a message
    44   8   expiry, nanoseconds on the machine's monotonic clock
    52   8   timeout the target should set, seconds (double); counts when the flags say TIMEOUT
    60   16  nonce
    76   2   descriptors besides the socket
    78   2   length of the local address
    80   2   length of the peer address
    82   2   length of the provider's name
    84   4   length of the provider's reserved bytes
    88   4   length of the unread bytes
    92   4   length of the state
    96   ... local, peer, provider (UTF-8), reserved, unread, state, and nothing after them

An address: IPv4 is 4 + 2 bytes (address, port), IPv6 16 + 2 + 4 + 4 (address, port, flow, scope), Unix the path or,
after a zero byte, the abstract name; ports and flow in network order.

A message on a session (Unix seqpacket, source to target) starts with one byte:

    1  records    count (2), then for each its length (4) and the record; the descriptors of all in order
    2  head       total length (4), then the first bytes of one record, with its descriptors
    3  rest       the next bytes of that record
    4  ack        target to source: how many sockets were received so far (8)
    5  refused    target to source: why (UTF-8)
    6  claims     count (2), then for each nonce (16), expiry (8), number of descriptors (2), length (2) and bytes of
                  the proof: the record itself up to 512 bytes, else its BLAKE2b-256; the descriptors of all in order.
                  The records themselves travel some other way, too
"""

from __future__ import annotations

import base64
import binascii
import math
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

from ..errors import InvalidInformation
from .cursor import Cursor, Truncated

__all__ = [
    "MAX_PAYLOAD", "MAX_RECORD", "MAX_RESERVED", "Claim", "Flag", "Head", "Kind", "SocketInformation",
    "SocketInformationOptions", "digest", "encode_record", "nonce_of", "pack_ack", "pack_claims", "pack_head",
    "pack_records", "pack_refused", "pack_rest", "proof", "unpack_claims", "unpack_count", "unpack_records",
]  # fmt: skip

MAX_PAYLOAD = 1 << 20
"""Unread bytes plus state of one record."""
MAX_RESERVED = 1 << 16
"""A provider's reserved bytes, all layers together."""
MAX_RECORD = 96 + 3 * 0xFFFF + MAX_RESERVED + MAX_PAYLOAD
MAGIC = b"PWS\x01"


class Flag(IntFlag):
    LISTENING = 1
    CONNECTED = 2
    NONBLOCKING = 4
    TIMEOUT = 8
    BY_PID = 16
    """The target fetches it from the source by process id; otherwise it was pushed as a message."""
    QUEUED = 32
    """Sent for the target's HandoffInbox.receive(), not for socket_from()."""


class SocketInformationOptions(IntFlag):
    """System.Net.Sockets.SocketInformationOptions."""

    NonBlocking = 1
    Connected = 2
    Listening = 4
    UseOnlyOverlappedIO = 8


class Kind(IntEnum):
    RECORDS = 1
    HEAD = 2
    REST = 3
    ACK = 4
    REFUSED = 5
    CLAIMS = 6


class Head(NamedTuple):
    """The fixed part of a record, in the order of the bytes."""

    magic: bytes
    flags: int
    family: int
    type: int
    protocol: int
    target_pid: int
    target_start: int
    source_pid: int
    source_start: int
    source_uid: int
    source_fd: int
    expires_ns: int
    timeout: float
    nonce: bytes
    descriptors: int
    local_size: int
    peer_size: int
    provider_size: int
    reserved_size: int
    unread_size: int
    state_size: int


class Claim(NamedTuple):
    """What the target must know of a record before the record itself comes."""

    nonce: bytes
    expires_ns: int
    descriptors: int
    proof: bytes
    """See `proof`."""


_TIMEOUT = int(Flag.TIMEOUT)
_CLAIM = struct.Struct("<16sqHH")
_HEAD = struct.Struct("<4sHHHHIQIQIiqd16sHHHHIII")
HEAD_SIZE = _HEAD.size
assert HEAD_SIZE == 96
_unpack_head = _HEAD.unpack_from
_make_head = Head._make


def encode_record(
    head: Sequence[Any], local: bytes, peer: bytes, provider: bytes, reserved: bytes, unread: bytes, state: bytes
) -> bytes:
    """`head` is everything of `Head` between the magic and the lengths."""
    return b"".join((
        _HEAD.pack(MAGIC, *head, len(local), len(peer), len(provider), len(reserved), len(unread), len(state)),
        local, peer, provider, reserved, unread, state,
    ))  # fmt: skip


def decode_head(record: bytes) -> Head:
    """`InvalidInformation` unless these are exactly the bytes of one record of this version within the quotas."""
    size = len(record)
    if size < HEAD_SIZE:
        if not MAGIC.startswith(record[:4]):
            raise InvalidInformation("not a socket information record: it does not start with 'PWS'")
        raise InvalidInformation(f"a truncated record: {size} bytes, its head alone has {HEAD_SIZE}")
    head = _make_head(_unpack_head(record))
    if head.magic != MAGIC:
        if head.magic[:3] == MAGIC[:3]:
            raise InvalidInformation(
                f"a record of version {head.magic[3]}, this portway reads version 1",
                hint="update portway on this side",
            )
        raise InvalidInformation("not a socket information record: it does not start with 'PWS'")
    announced = HEAD_SIZE + head.local_size + head.peer_size + head.provider_size + head.reserved_size
    announced += head.unread_size + head.state_size
    if size != announced:
        what = "truncated" if size < announced else "tampered"
        raise InvalidInformation(f"a {what} record: {size} bytes, its lengths add up to {announced}")
    if head.flags & _TIMEOUT and not 0 < head.timeout < math.inf:
        raise InvalidInformation(f"a record with a timeout of {head.timeout} s")
    if head.unread_size + head.state_size > MAX_PAYLOAD or head.reserved_size > MAX_RESERVED:
        raise InvalidInformation(
            f"a record with {head.unread_size} unread, {head.state_size} state, {head.reserved_size} reserved bytes: "
            f"at most {MAX_PAYLOAD} for the first two and {MAX_RESERVED} for the third"
        )
    return head


class SocketInformation:
    """One duplicated socket, as a small record that any IPC can carry: bytes, base64 text or pickle.

    What WSAPROTOCOL_INFO is to Winsock and System.Net.Sockets.SocketInformation to .NET. Made by
    `portway.duplicate_socket`; `portway.socket_from` in the target process turns it into a socket, once. It is a
    secret until then: whoever may read the target's memory is the only one who could use it, but treat it as a
    password all the same; ``repr()`` shows neither nonce nor payload. Immutable, hashable, equal by bytes.

    ``SocketInformation(data)`` and `from_text` raise `InvalidInformation` for anything but a whole record.
    """

    __slots__ = ("_raw", "head")

    head: Head
    """The fixed part, decoded."""

    def __init__(self, data: bytes) -> None:
        self._raw = data if type(data) is bytes else bytes(memoryview(data))  # bytes(5) would be five zeros
        self.head = decode_head(self._raw)

    @classmethod
    def from_bytes(cls, data: bytes) -> SocketInformation:
        return cls(data)

    @classmethod
    def from_text(cls, text: str) -> SocketInformation:
        """Reads what `to_text` wrote; white space around it is ignored."""
        try:
            return cls(base64.b64decode(text.strip().encode("ascii"), validate=True))
        except (UnicodeEncodeError, binascii.Error):
            raise InvalidInformation("not a socket information record: the text is not base64") from None

    def to_text(self) -> str:
        """Base64 on one line."""
        return base64.b64encode(self._raw).decode("ascii")

    def __bytes__(self) -> bytes:
        return self._raw

    def _part(self, index: int) -> bytes:
        sizes = self.head[-6:]
        start = HEAD_SIZE + sum(sizes[:index])
        return self._raw[start : start + sizes[index]]

    version = 1

    @property
    def family(self) -> int:
        """A `socket.AddressFamily` where Python knows it."""
        return _named(socket.AddressFamily, self.head.family)

    @property
    def type(self) -> int:
        """A `socket.SocketKind` where Python knows it."""
        return _named(socket.SocketKind, self.head.type)

    @property
    def protocol(self) -> int:
        """IPPROTO_TCP is 6, IPPROTO_UDP 17, Unix sockets have 0."""
        return self.head.protocol

    @property
    def listening(self) -> bool:
        return bool(self.head.flags & Flag.LISTENING)

    @property
    def connected(self) -> bool:
        return bool(self.head.flags & Flag.CONNECTED)

    @property
    def local_address(self) -> Any:
        """As `socket.getsockname` gives it: (host, port), (host, port, flow, scope), a path, or abstract bytes."""
        return _address(self.head.family, self._part(0))

    @property
    def peer_address(self) -> Any:
        """As `socket.getpeername` gives it; None when not connected."""
        return _address(self.head.family, self._part(1)) if self.connected else None

    @property
    def timeout(self) -> float | None:
        """What the target's `gettimeout` will say: None blocking, 0.0 non-blocking, else seconds."""
        if self.head.flags & Flag.TIMEOUT:
            return self.head.timeout
        return 0.0 if self.head.flags & Flag.NONBLOCKING else None

    @property
    def blocking(self) -> bool:
        return not self.head.flags & Flag.NONBLOCKING

    @property
    def target_pid(self) -> int:
        return self.head.target_pid

    @property
    def source_pid(self) -> int:
        return self.head.source_pid

    @property
    def expires_at(self) -> float:
        """On the clock of `time.monotonic`, which all processes of a machine share."""
        return self.head.expires_ns / 1e9

    @property
    def way(self) -> str:
        """``"pid"``: the target takes it from the source; ``"message"``: it waits in the target's inbox."""
        return "pid" if self.head.flags & Flag.BY_PID else "message"

    @property
    def provider(self) -> str:
        """The outermost hand-off provider; restoring needs one registered under the same name."""
        return self._part(2).decode("utf-8", "replace")

    @property
    def provider_reserved(self) -> bytes:
        """What the layers of the provider added for themselves (dwProviderReserved, without its limit of 4 bytes)."""
        return self._part(3)

    @property
    def unread(self) -> bytes:
        """Bytes the source had read from the socket and not consumed; they come before what the socket still has."""
        return self._part(4)

    @property
    def state(self) -> bytes:
        """State of the layers above, opaque to portway."""
        return self._part(5)

    @property
    def nonce(self) -> bytes:
        return self.head.nonce

    @property
    def protocol_information(self) -> bytes:
        """The whole record: SocketInformation.ProtocolInformation in .NET."""
        return self._raw

    @property
    def options(self) -> SocketInformationOptions:
        """SocketInformation.Options in .NET."""
        head, options = self.head, SocketInformationOptions
        return (
            options(options.NonBlocking * bool(head.flags & Flag.NONBLOCKING))
            | options.Connected * bool(head.flags & Flag.CONNECTED)
            | options.Listening * bool(head.flags & Flag.LISTENING)
        )

    def __reduce__(self) -> tuple[object, ...]:
        return SocketInformation, (self._raw,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SocketInformation) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self.head.nonce)

    def __repr__(self) -> str:
        head = self.head
        role = "listening" if self.listening else "connected" if self.connected else "unconnected"
        parts = [f"{_label(self.family)}/{_label(self.type)} {role}", f"local={self.local_address!r}"]
        if self.connected:
            parts.append(f"peer={self.peer_address!r}")
        parts += [f"by {self.way}", f"{head.source_pid} -> {head.target_pid}", f"provider={self.provider!r}"]
        parts += [f"{name}: {size} bytes" for name, size in zip(("unread", "state"), head[-2:], strict=True) if size]
        return f"<SocketInformation {', '.join(parts)}>"


def _named(kind: type[IntEnum], value: int) -> int:
    try:
        return kind(value)
    except ValueError:
        return value


def _label(value: int) -> str:
    return getattr(value, "name", str(value))


def _address(family: int, raw: bytes) -> Any:
    if family == socket.AF_INET and len(raw) == 6:
        return socket.inet_ntoa(raw[:4]), int.from_bytes(raw[4:], "big")
    if family == socket.AF_INET6 and len(raw) == 26:
        host = socket.inet_ntop(socket.AF_INET6, raw[:16])
        return host, *struct.unpack(">HI", raw[16:22]), int.from_bytes(raw[22:], "little")
    if family == socket.AF_UNIX:
        return raw if raw[:1] == b"\0" else raw.decode("utf-8", "surrogateescape")
    return raw


def pack_records(records: Sequence[bytes]) -> bytes:
    parts = [b"\x01", len(records).to_bytes(2, "little")]
    for record in records:
        parts.append(len(record).to_bytes(4, "little"))
        parts.append(record)
    return b"".join(parts)


def unpack_records(message: bytes) -> list[bytes]:
    """The records of a message of kind RECORDS, not yet decoded; `InvalidInformation` for anything else."""
    cursor = Cursor(message)
    try:
        if cursor.uint(1) != Kind.RECORDS:
            raise InvalidInformation(f"a message of kind {message[0]}, not records")
        records = [bytes(cursor.take(cursor.uint(4))) for _ in range(cursor.uint(2))]
    except Truncated as cut:
        raise InvalidInformation(f"a truncated message: {cut}") from None
    if cursor.left:
        raise InvalidInformation(f"{cursor.left} bytes after the last record of a message")
    return records


def digest(record: bytes) -> bytes:
    """What ties a record to its descriptors: who changes a bit of it has another one."""
    from hashlib import blake2b  # 3 ms, which only those who claim by record need to pay

    return blake2b(record, digest_size=32).digest()


def nonce_of(record: bytes) -> bytes:
    return record[60:76]


def proof(record: bytes) -> bytes:
    """What ties a record to its descriptors: the record itself where that is small, a digest where it is not."""
    return record if len(record) <= 512 else digest(record)


def pack_claims(claims: Sequence[Claim]) -> bytes:
    parts = [b"\x06", len(claims).to_bytes(2, "little")]
    for nonce, expires_ns, descriptors, shown in claims:
        parts.append(_CLAIM.pack(nonce, expires_ns, descriptors, len(shown)))
        parts.append(shown)
    return b"".join(parts)


def unpack_claims(message: bytes) -> list[Claim]:
    """The claims of a message of kind CLAIMS; `InvalidInformation` for anything else."""
    cursor = Cursor(message)
    claims = []
    try:
        if cursor.uint(1) != Kind.CLAIMS:
            raise InvalidInformation(f"a message of kind {message[0]}, not claims")
        for _ in range(cursor.uint(2)):
            nonce, expires_ns, descriptors, size = _CLAIM.unpack(cursor.take(_CLAIM.size))
            claims.append(Claim(nonce, expires_ns, descriptors, bytes(cursor.take(size))))
    except Truncated as cut:
        raise InvalidInformation(f"a truncated message: {cut}") from None
    if cursor.left:
        raise InvalidInformation(f"{cursor.left} bytes after the last claim of a message")
    return claims


def pack_head(record: bytes, size: int) -> bytes:
    """The first part, `size` bytes at most, of a record that does not fit one message."""
    return b"\x02" + len(record).to_bytes(4, "little") + record[:size]


def pack_rest(record: bytes, at: int, size: int) -> bytes:
    return b"\x03" + record[at : at + size]


def pack_ack(received: int) -> bytes:
    return b"\x04" + received.to_bytes(8, "little")


def pack_refused(why: str) -> bytes:
    return b"\x05" + why.encode()[:1000]


def unpack_count(message: bytes, size: int) -> int:
    """The integer behind the kind of a HEAD (4 bytes) or ACK (8 bytes) message."""
    cursor = Cursor(message)
    try:
        cursor.take(1)
        return cursor.uint(size)
    except Truncated as cut:
        raise InvalidInformation(f"a truncated message: {cut}") from None
