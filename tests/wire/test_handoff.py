"""The record: round trips, and any bytes give `SocketInformation` or `InvalidInformation`, nothing else."""

from __future__ import annotations

import math
import os
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portway import SocketInformation, _accel, _handoff_python
from portway.errors import InvalidInformation
from portway.wire import handoff as wire

FAMILIES = {
    socket.AF_INET: st.binary(min_size=6, max_size=6),
    socket.AF_INET6: st.binary(min_size=26, max_size=26),
    socket.AF_UNIX: st.binary(max_size=107),
    40: st.binary(max_size=20),
}
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@st.composite
def records(draw: Callable[..., Any]) -> bytes:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    timeout = draw(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
    head = (
        draw(st.integers(0, 63)), family, draw(st.sampled_from([1, 2, 5])), draw(st.integers(0, 300)), draw(u32),
        draw(u64), draw(u32), draw(u64), draw(u32), draw(st.integers(-1, 2**31 - 1)),
        draw(st.integers(-(2**63), 2**63 - 1)), timeout, draw(st.binary(min_size=16, max_size=16)),
        draw(st.integers(0, 252)),
    )  # fmt: skip
    provider = draw(st.sampled_from([b"kernel", b"framing", b"\xff", b""]))
    parts = [draw(FAMILIES[family]), draw(FAMILIES[family]), provider]
    return wire.encode_record(head, *parts, *(draw(st.binary(max_size=40)) for _ in range(3)))


def plain(flags: int = 2, **other: Any) -> bytes:
    """A TCP record of the kernel's provider."""
    head: dict[str, Any] = {
        "flags": flags, "family": 2, "kind": 1, "protocol": 6, "target": 7, "start": 8, "source": 9, "source_start": 10,
        "uid": 0, "fd": -1, "expires": 2**40, "timeout": 0.0, "nonce": bytes(range(16)), "descriptors": 0,
    }  # fmt: skip
    parts = {"local": bytes([127, 0, 0, 1, 0, 80]), "peer": bytes([127, 0, 0, 2, 0, 81]), "provider": b"kernel",
             "reserved": b"", "unread": b"", "state": b""}  # fmt: skip
    for name, value in other.items():
        (head if name in head else parts)[name] = value
    return wire.encode_record(tuple(head.values()), *parts.values())


def everything(info: SocketInformation) -> tuple[Any, ...]:
    """All that can be asked of a record; none of it may raise."""
    return (
        info.family, info.type, info.protocol, info.listening, info.connected, info.local_address, info.peer_address,
        info.timeout, info.blocking, info.target_pid, info.source_pid, info.expires_at, info.way, info.provider,
        info.provider_reserved, info.unread, info.state, info.nonce, info.protocol_information, info.options,
        info.version, repr(info), hash(info), bytes(info), info.to_text(),
    )  # fmt: skip


@given(records())
def test_round_trips(record: bytes) -> None:
    info = SocketInformation(record)
    assert bytes(info) == record == info.protocol_information
    for again in (SocketInformation.from_bytes(record), SocketInformation.from_text(f" {info.to_text()}\n"),
                  pickle.loads(pickle.dumps(info)), SocketInformation(bytearray(record))):  # fmt: skip
        assert again == info and hash(again) == hash(info) and everything(again) == everything(info)
    parts = [info._part(at) for at in range(6)]
    assert wire.encode_record(info.head[1:15], *parts) == record


@given(st.binary(max_size=300))
@example(b"")
@example(b"PWS\x01" + bytes(92))
@example(b"PWS\x02" + bytes(92))
def test_any_bytes(data: bytes) -> None:
    try:
        info = SocketInformation(data)
    except InvalidInformation:
        return
    everything(info)
    assert bytes(info) == data


@given(records(), st.data())
def test_any_mutation_is_refused_or_leaves_all_lengths(record: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(record) - 1))
    other = bytearray(record)
    other[at] ^= data.draw(st.integers(1, 255))
    try:
        info = SocketInformation(bytes(other))
    except InvalidInformation:
        return
    everything(info)
    before = SocketInformation(record)
    assert sum(info.head[-6:]) == sum(before.head[-6:])
    assert info != before


def test_every_mutation_of_one_byte_and_every_truncation_of_one_record() -> None:
    record = plain(unread=b"un", state=b"sta", reserved=b"r", provider=b"framing", descriptors=3)
    sizes = SocketInformation(record).head[-6:]
    for at in range(len(record)):
        for bit in range(8):
            other = bytearray(record)
            other[at] ^= 1 << bit
            try:
                info = SocketInformation(bytes(other))
            except InvalidInformation:
                assert at < 96
                continue
            assert info.head[-6:] == sizes  # a length of its own cannot change alone
            everything(info)
    for size in range(len(record)):
        with pytest.raises(InvalidInformation):
            SocketInformation(record[:size])
    with pytest.raises(InvalidInformation, match="tampered"):
        SocketInformation(record + b"x")


@pytest.mark.parametrize(("data", "says"), [
    (b"", "truncated"),
    (b"PWS", "truncated"),
    (b"hello", "does not start with 'PWS'"),
    (b"x" * 200, "does not start with 'PWS'"),
    (b"PWS\x07" + bytes(100), "version 7"),
    (plain()[:-1], "truncated"),
    (plain() + b"?", "tampered"),
    (plain(unread=bytes(1 << 20), state=b"1"), "1048576"),
    (plain(reserved=bytes(65537)), "65537 reserved"),
    (plain(flags=8, timeout=math.nan), "timeout of nan"),
    (plain(flags=8, timeout=-1.0), "timeout of -1.0"),
    (plain(flags=8, timeout=math.inf), "timeout of inf"),
])  # fmt: skip
def test_refusals_say_why(data: bytes, says: str) -> None:
    with pytest.raises(InvalidInformation, match=says):
        SocketInformation(data)


@pytest.mark.parametrize("bad", ["", "not base64!", "é", "UFdT", "====", "A" * 200])
def test_text_that_is_no_record(bad: str) -> None:
    with pytest.raises(InvalidInformation):
        SocketInformation.from_text(bad)


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    try:
        SocketInformation.from_text(text)
    except InvalidInformation:
        pass


@pytest.mark.parametrize("bad", [5, None, 10**12, "text", [1, 2]])
def test_what_is_no_bytes_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError):
        SocketInformation(bad)


def test_the_largest_record() -> None:
    info = SocketInformation(plain(unread=bytes(1 << 19), state=bytes(1 << 19), reserved=bytes(1 << 16)))
    assert len(bytes(info)) <= wire.MAX_RECORD
    assert len(info.unread) + len(info.state) == wire.MAX_PAYLOAD


def test_repr_shows_no_secret() -> None:
    nonce, unread, state, reserved = b"N" * 16, b"password", b"session-key", b"reserved-bytes"
    info = SocketInformation(plain(nonce=nonce, unread=unread, state=state, reserved=reserved))
    text = repr(info) + str(info) + f"{info}"
    for secret in (nonce, unread, state, reserved):
        for form in (secret.decode(), secret.hex(), repr(secret), info.to_text()):
            assert form not in text
    assert "unread: 8 bytes" in text and "127.0.0.2" in text


def test_what_a_record_says() -> None:
    info = SocketInformation(plain(flags=2 | 8, timeout=2.5))
    assert (info.family, info.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert info.local_address == ("127.0.0.1", 80) and info.peer_address == ("127.0.0.2", 81)
    assert info.timeout == 2.5 and info.blocking and info.way == "message" and info.connected and not info.listening
    assert info.options == wire.SocketInformationOptions.Connected == 2
    listening = SocketInformation(plain(flags=1 | 4 | 16))
    assert listening.timeout == 0.0 and not listening.blocking and listening.way == "pid"
    assert listening.options == 1 | 4 and listening.peer_address is None


# -- messages --------------------------------------------------------------------------------------------------------

claims = st.builds(
    wire.Claim, st.binary(min_size=16, max_size=16), st.integers(-(2**63), 2**63 - 1), st.integers(0, 65535),
    st.binary(max_size=60),
)  # fmt: skip


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_records_in_messages(many: list[bytes]) -> None:
    packed = wire.pack_records(many)
    assert wire.unpack_records(packed) == many
    for size in range(len(packed)):
        with pytest.raises(InvalidInformation):
            wire.unpack_records(packed[:size])
    with pytest.raises(InvalidInformation):
        wire.unpack_records(packed + b"x")


@given(st.lists(claims, max_size=10))
def test_claims_in_messages(many: list[wire.Claim]) -> None:
    packed = wire.pack_claims(many)
    assert wire.unpack_claims(packed) == many
    with pytest.raises(InvalidInformation):
        wire.unpack_claims(packed[:-1])
    with pytest.raises(InvalidInformation):
        wire.unpack_claims(packed + b"x")


@given(st.binary(max_size=200))
def test_any_message(data: bytes) -> None:
    for decode in (wire.unpack_records, wire.unpack_claims, lambda one: wire.unpack_count(one, 8)):
        for head in (b"", b"\x01", b"\x06"):
            try:
                decode(head + data)  # type: ignore[operator]
            except InvalidInformation:
                pass


def test_a_record_in_pieces() -> None:
    record = os.urandom(1000)
    head = wire.pack_head(record, 300)
    assert wire.unpack_count(head, 4) == 1000
    rest = [wire.pack_rest(record, at, 300)[1:] for at in range(300, 1000, 300)]
    assert head[5:] + b"".join(rest) == record
    assert wire.unpack_count(wire.pack_ack(2**40), 8) == 2**40
    assert len(wire.pack_refused("é" * 2000)) == 1001


# -- the shortcuts of the native module are the long way, faster -----------------------------------------------------

native = pytest.mark.skipif(_accel.handoff.records is None, reason="PORTWAY_IMPL=python: no native module here")


def kinds() -> list[socket.socket]:
    """Real sockets of every family and role."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0portway-test-{os.getpid()}")
    client.setblocking(False)
    server.settimeout(1.5)
    return [listener, client, server, six, udp, abstract, *socket.socketpair(), socket.socket(socket.AF_UNIX)]


@native
def test_native_and_python_see_the_same_facts() -> None:
    socks = kinds()
    for sock in socks:
        assert _accel.handoff.facts(sock.fileno()) == _handoff_python.facts(sock.fileno())
        sock.close()


@native
def test_native_records_are_byte_for_byte_those_of_python() -> None:
    socks = kinds()
    fds: list[int] = []
    nonces = os.urandom(16 * len(socks))
    fast = _accel.handoff.records(socks, (socket.socket,), fds, 11, 12, 13, 14, 15, 16, 32, nonces)
    assert fds == [one.fileno() for one in socks]
    for at, (sock, record) in enumerate(zip(socks, fast, strict=True)):
        family, kind, protocol, listening, connected, local, peer = _handoff_python.facts(sock.fileno())
        timeout = sock.gettimeout()
        flags = 32 | listening | connected * 2 | (0 if timeout is None else 8 if timeout else 4)
        nonce = nonces[16 * at : 16 * at + 16]
        head = (flags, family, kind, protocol, 11, 12, 13, 14, 15, -1, 16, timeout or 0.0, nonce, 0)
        assert record == wire.encode_record(head, local, peer, b"kernel", b"", b"", b"")
        sock.close()


def split_in_python(message: bytes, fds: list[int], pid: int, start: int, source: int) -> Any:
    """What the native split promises, by the decoder."""
    try:
        infos = [SocketInformation(one) for one in wire.unpack_records(message)]
    except InvalidInformation:
        return None
    for info in infos:
        head = info.head
        if (head.target_pid, head.target_start, head.source_pid) != (pid, start, source) or info.provider != "kernel":
            return None
        if head.descriptors or head.reserved_size or head.unread_size or head.state_size:
            return None
    if len(fds) != len(infos):
        return None
    return [(info.head.expires_ns, bytes(info), [fd]) for info, fd in zip(infos, fds, strict=True)]


@native
@given(st.lists(st.sampled_from([
    plain(), plain(flags=8, timeout=1.0), plain(flags=8, timeout=math.nan), plain(flags=4), plain(state=b"s"),
    plain(provider=b"framin"), plain(descriptors=1), plain(target=6), plain(source=6), plain(start=9),
    plain(reserved=b"r"), plain()[:-1], plain() + b"x", b"", bytes(96), plain(flags=8, timeout=-0.0),
]), max_size=4), st.integers(0, 5), st.data())  # fmt: skip
def test_native_split_is_the_decoder(many: list[bytes], count: int, data: st.DataObject) -> None:
    message = bytearray(wire.pack_records(many))
    if data.draw(st.booleans()):
        message[data.draw(st.integers(0, len(message) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del message[data.draw(st.integers(0, len(message))) :]
    fds = list(range(len(many) if data.draw(st.booleans()) else count))
    whole = bytes(message)
    assert _accel.handoff.split(whole, fds, 7, 8, 9) == split_in_python(whole, fds, 7, 8, 9)


@native
@given(st.binary(max_size=400), st.integers(0, 3))
def test_native_split_of_any_bytes(data: bytes, count: int) -> None:
    for head in (b"", struct.pack("<BH", 1, count), struct.pack("<BHI", 1, count, 102) + b"PWS\x01"):
        fds = list(range(count))
        assert _accel.handoff.split(head + data, fds, 7, 8, 9) == split_in_python(head + data, fds, 7, 8, 9)


@native
def test_native_shared_is_the_constructor() -> None:
    from portway import SharedSocket
    from portway.kernel import restore

    ours, theirs = socket.socketpair()
    with ours, theirs:
        record = plain(flags=2 | 32, family=1, kind=1, protocol=0)
        fast = restore._shortcut(SharedSocket, restore._initialise, record, os.dup(theirs.fileno()))
        slow = restore._shared(SocketInformation(record), record, [os.dup(theirs.fileno())])
        with fast, slow:
            for name in ("family", "type", "proto", "timeout", "unread", "state", "information", "_io_refs", "_closed"):
                assert getattr(fast, name) == getattr(slow, name), name
            assert fast.gettimeout() == slow.gettimeout() is None
            assert type(fast) is type(slow) and set(dir(fast)) == set(dir(slow))
            fast.sendall(b"1")
            slow.sendall(b"2")
            assert ours.recv(10) == b"12"
        assert fast.fileno() == slow.fileno() == -1
    for other in (plain(flags=4), plain(flags=8, timeout=1.0), plain(state=b"x"), b"", bytes(96), plain(provider=b"x")):
        assert restore._shortcut(SharedSocket, restore._initialise, other, 99) is None
