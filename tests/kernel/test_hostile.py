"""An inbox is open to every process of its user: whatever comes down a line, only the line ends."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from handoff_peers import descriptors, patiently
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portway
from portway.errors import InformationUsed, InvalidInformation, OperationTimeout, PortwayError
from portway.kernel.process import start_time
from portway.kernel.record import myself
from portway.kernel.session import inbox_name
from portway.wire import handoff as wire


def line() -> socket.socket:
    """A line to the inbox of this process, as anybody of this user can open one."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.connect(inbox_name(*myself()))
    raw.setblocking(False)
    return raw


def record(unread: bytes = b"", **other: Any) -> bytes:
    """A good record from this process to this process, but for `other`."""
    pid, started = myself()
    head: dict[str, Any] = {
        "flags": 32, "family": 1, "kind": 1, "protocol": 0, "target": pid, "start": started, "source": pid,
        "source_start": started, "uid": os.geteuid(), "fd": -1, "expires": time.monotonic_ns() + 10**10,
        "timeout": 0.0, "nonce": os.urandom(16), "descriptors": 0,
    } | other  # fmt: skip
    provider = head.pop("provider", b"kernel")
    return wire.encode_record(tuple(head.values()), b"", b"", provider, b"", unread, b"")


def claim(count: int = 1, **other: Any) -> wire.Claim:
    fields = {"nonce": os.urandom(16), "expires_ns": time.monotonic_ns() + 10**10, "descriptors": count,
              "proof": b"p" * 40} | other  # fmt: skip
    return wire.Claim(**fields)


@pytest.fixture
def box() -> Iterator[portway.HandoffInbox]:
    with portway.HandoffInbox() as made:
        yield made


def drain(box: portway.HandoffInbox) -> list[bytes | None]:
    """All that `receive` gives; its errors, which must be ours, are None."""
    got: list[bytes | None] = []
    while True:
        try:
            with box.receive(0) as sock:
                got.append(sock.information.nonce)
        except OperationTimeout:
            return got
        except PortwayError:
            got.append(None)


def answer(raw: socket.socket) -> str:
    """Why the inbox ended the line."""
    try:
        data = raw.recv(4096)
    except ConnectionResetError:
        data = raw.recv(4096)
    assert data[:1] == b"\x05", data
    return data[1:].decode()


def forget_claims(box: portway.HandoffInbox) -> None:
    for _, fds in box._addressed.values():
        for fd in fds:
            os.close(fd)
    box._addressed.clear()


same = claim()
HOSTILE: dict[str, tuple[list[tuple[bytes, int]], str]] = {
    "unknown kind": ([(b"\xff", 1)], "kind 255 out of place"),
    "rest without head": ([(b"\x03abc", 1)], "kind 3 out of place"),
    "empty records": ([(b"\x01", 1)], "truncated"),
    "records without descriptors": ([(wire.pack_records([record()]), 0)], "0 descriptors came"),
    "records with too many": ([(wire.pack_records([record()]), 3)], "3 descriptors came"),
    "no record at all": ([(wire.pack_records([b"x" * 200]), 1)], "not a socket information record"),
    "strange timeout": ([(wire.pack_records([record(flags=40, timeout=float("nan"))]), 1)], "timeout of nan"),
    "head of nothing": ([(b"\x02" + bytes(4), 2)], "a record of 0 bytes"),
    "head too large": ([(b"\x02" + struct.pack("<I", wire.MAX_RECORD + 1), 2)], f"at most {wire.MAX_RECORD}"),
    "head cut": ([(b"\x02\x01", 2)], "truncated"),
    "head twice": ([(wire.pack_head(record(b"x" * 500), 100), 1)] * 2, "kind 2 out of place"),
    "head and garbage": ([(b"\x02" + struct.pack("<I", 100) + b"g" * 100, 1)], "not a socket information record"),
    "head longer than it says": ([(b"\x02" + struct.pack("<I", 10) + b"g" * 20, 1)], "parts of 20 bytes"),
    "rest longer": ([(wire.pack_head(record(b"x" * 500), 100), 1), (b"\x03" + b"x" * 5000, 0)], "parts of 5100"),
    "rest of nothing": ([(wire.pack_head(record(b"x" * 500), 100), 1), (b"\x03", 0)], "kind 3 out of place"),
    "rest with descriptors": ([(wire.pack_head(record(b"x" * 500), 100), 1), (b"\x03ab", 2)], "kind 3 out of place"),
    "split record of too many": ([(wire.pack_head(record(descriptors=4), 5000), 2)], "2 descriptors came"),
    "claims cut": ([(b"\x06\x01\x00abc", 1)], "truncated"),
    "claims without descriptors": ([(wire.pack_claims([claim(0)] * 3), 0)], "without a descriptor"),
    "a claim twice in one": ([(wire.pack_claims([same, same]), 2)], "made before"),
    "a claim twice": ([(wire.pack_claims([same]), 1)] * 2, "made before"),
    "claims of too many": ([(wire.pack_claims([claim(9)]), 2)], "2 descriptors came"),
    "too long a message": ([(b"\x01" + bytes(100_000), 1)], "more than 65,536 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_rule_ends_the_line_and_leaves_nothing(name: str, box: portway.HandoffInbox, tcp: Any) -> None:
    messages, says = HOSTILE[name]
    _, server = tcp()
    drain(box)
    before = set(descriptors().items())
    with line() as raw, portway.HandoffSession(os.getpid()) as honest:
        for data, count in messages:
            socket.send_fds(raw, [data], [server.fileno()] * count)
        assert drain(box) == []
        assert says in answer(raw)
        honest.send(server)
        assert len(drain(box)) == 1
    drain(box)
    forget_claims(box)
    assert set(descriptors().items()) == before


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_message_without_a_byte_can_bring_descriptors(count: int, box: portway.HandoffInbox, tcp: Any) -> None:
    _, server = tcp()
    drain(box)
    before = set(descriptors().items())
    with line() as raw:
        socket.send_fds(raw, [b""], [server.fileno()] * count)
        assert drain(box) == []
    assert drain(box) == [] and set(descriptors().items()) == before


@pytest.mark.parametrize("other", [{"target": 1}, {"start": 1}, {"source": 1}])
def test_records_for_or_from_somebody_else_are_dropped(other: Any, box: portway.HandoffInbox, tcp: Any) -> None:
    _, server = tcp()
    with line() as raw:
        for data in (wire.pack_records([record(**other)]), wire.pack_head(record(**other), 5000)):
            socket.send_fds(raw, [data], [server.fileno()])
        socket.send_fds(raw, [wire.pack_records([record(**other), record(nonce=b"n" * 16)])], [server.fileno()] * 2)
        assert drain(box) == [b"n" * 16]


@pytest.mark.parametrize("what", ["pipe", "file", "epoll"])
@pytest.mark.parametrize("long", [False, True])
def test_what_comes_as_a_socket_and_is_none(what: str, long: bool, box: portway.HandoffInbox, tmp_path: Any) -> None:
    import select

    reader, writer = os.pipe()
    (tmp_path / "x").touch()
    with line() as raw, (tmp_path / "x").open() as file, select.epoll() as epoll:
        fd = {"pipe": reader, "file": file.fileno(), "epoll": epoll.fileno()}[what]
        socket.send_fds(raw, [wire.pack_records([record(b"u" if long else b"")])], [fd])
        with pytest.raises(InvalidInformation, match="with a descriptor that is none"):
            box.receive(5)
    os.close(reader)
    os.close(writer)


def test_lies_about_the_socket_do_not_hurt(box: portway.HandoffInbox, tcp: Any) -> None:
    """The kernel's descriptor is what it is; an honest sender is not protected from itself."""
    _, server = tcp()
    with line() as raw:
        for other in ({"family": 999}, {"kind": 999}, {"protocol": 65535}, {"family": 10}, {"provider": b"\xff\xfe"}):
            socket.send_fds(raw, [wire.pack_records([record(**other)])], [server.fileno()])
            assert len(drain(box)) == 1


def test_a_forged_claim_does_not_take_anothers_place(box: portway.HandoffInbox, tcp: Any) -> None:
    far, server = tcp()
    info = portway.duplicate_socket(server, os.getpid(), way="message")
    with line() as raw:
        socket.send_fds(raw, [wire.pack_claims([claim(nonce=info.nonce)])], [server.fileno()])
        with portway.socket_from(info) as sock:
            sock.sendall(b"mine")
        assert far.recv(9) == b"mine"
        with pytest.raises((InformationUsed, InvalidInformation)):
            portway.socket_from(info)
    forget_claims(box)


messages = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda kind, rest: bytes([kind]) + rest, st.integers(0, 7), st.binary(max_size=200)),
    st.builds(lambda size, rest: struct.pack("<BI", 2, size) + rest, st.integers(0, 300), st.binary(max_size=300)),
    st.builds(lambda n, parts: struct.pack("<BH", 1, n) + b"".join(struct.pack("<I", len(p)) + p for p in parts),
              st.integers(0, 3), st.lists(st.binary(max_size=120), max_size=3)),
    st.builds(lambda n, d: struct.pack("<BH", 6, n) + d, st.integers(0, 3), st.binary(min_size=26, max_size=120)),
)  # fmt: skip


@given(st.lists(st.tuples(messages, st.integers(0, 4)), max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_messages(many: list[tuple[bytes, int]]) -> None:
    sample = socket.socket(socket.AF_UNIX)
    before = set(descriptors().items())
    with portway.HandoffInbox() as box, line() as raw:
        for data, count in many:
            try:
                socket.send_fds(raw, [data], [sample.fileno()] * count)
            except (BrokenPipeError, BlockingIOError):
                break
            drain(box)
    patiently(lambda: {one for one in descriptors().items() if "eventfd" not in one[1]} <= before)
    sample.close()


def test_mutated_messages_leave_nothing(box: portway.HandoffInbox, tcp: Any) -> None:
    """Good messages with a few bytes changed, a few hundred of them, on lines of their own."""
    _, server = tcp()
    rng = random.Random(7)
    good = [(wire.pack_records([record(), record()]), 2), (wire.pack_records([record(b"un")]), 1),
            (wire.pack_claims([claim(2), claim()]), 3), (wire.pack_head(record(b"x" * 50), 5000), 1)]  # fmt: skip
    drain(box)
    before = set(descriptors().items())
    for _ in range(400):
        data, count = rng.choice(good)
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with line() as raw:
            socket.send_fds(raw, [bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])],
                            [server.fileno()] * rng.choice([count, count, rng.randint(0, 5)]))  # fmt: skip
            drain(box)
        drain(box)
    forget_claims(box)
    assert set(descriptors().items()) == before


def test_a_flood_of_strangers_does_not_shut_others_out(peer: Any, tcp: Any) -> None:
    """Another user fills the queue of the inbox; its reaper refuses them, and our own get through."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    target, stranger, source = peer(61234), peer(61235), peer(61234)
    target.run("box = portway.HandoffInbox()")
    stranger.run("""
lines = []
for _ in range(300):
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    try: one.connect(name)
    except BlockingIOError: pass
    lines.append(one)
""", name=inbox_name(target.pid, start_time(target.pid)))  # fmt: skip
    source.run("a, b = socket.socketpair()")
    source.run("with portway.HandoffSession(pid, timeout=20) as s: s.send(b)", pid=target.pid)
    target.run("s = box.receive(10)\ns.sendall(b'x')\nassert len(box._lines) <= 1")
    assert source.run("a.recv(5)") == b"x"
