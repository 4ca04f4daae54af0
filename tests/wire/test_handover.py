"""wire/handover: what is encoded decodes to the same; anything else is InvalidInformation and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portway.errors import InvalidInformation
from portway.wire import handover as wire

kinds = st.text(st.characters(codec="utf-8"), min_size=1, max_size=16)
movings = st.builds(wire.Moving, kinds, st.binary(max_size=200), st.binary(max_size=200))


@given(st.lists(movings, min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_round_trip(moving: list[wire.Moving], generation: int) -> None:
    data, more = wire.encode(moving, generation)
    assert more == []
    header = wire.decode_header(data)
    assert (header.generation, header.moving) == (generation, tuple(moving))


@given(kinds, st.integers(wire.MAX_INLINE, wire.MAX_INLINE * 4), st.integers(0, 1000))
def test_a_large_payload_follows(kind: str, unread: int, state: int) -> None:
    moving = wire.Moving(kind, b"u" * unread, b"s" * state)
    data, more = wire.encode([moving], 7)
    header = wire.decode_header(data)
    assert header.moving is None and header.size == len(b"".join(more))
    assert max(map(len, more)) <= wire.MAX_INLINE
    assert wire.decode_payload(header.entries, b"".join(more)) == (moving,)


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    for decode in (wire.decode_header, lambda d: wire.decode_answer(d, 5)):
        try:
            decode(data)
        except InvalidInformation:
            pass


@given(st.lists(movings, min_size=1, max_size=5), st.data())
def test_mutated_messages(moving: list[wire.Moving], data: st.DataObject) -> None:
    message = bytearray(wire.encode(moving, 1)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] = data.draw(st.integers(0, 255))
    try:
        header = wire.decode_header(bytes(message))
    except InvalidInformation:
        return
    assert header.moving is None or sum(map(wire.payload_size, header.moving)) == header.size


@given(st.lists(movings, min_size=1, max_size=3), st.data())
def test_every_cut_is_refused(moving: list[wire.Moving], data: st.DataObject) -> None:
    message = wire.encode(moving, 1)[0]
    cut = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(InvalidInformation):
        wire.decode_header(message[:cut])
    with pytest.raises(InvalidInformation):
        wire.decode_header(message + b"x")


def test_a_declared_size_allocates_nothing() -> None:
    head = struct.pack("<4sHHII", b"PWM\x01", 1, 1, 2**32 - 1, 0) + struct.pack("<BBHII", 1, 1, 0, 2**32 - 2, 0)
    with pytest.raises(InvalidInformation):
        wire.decode_header(head)


@given(st.booleans(), st.integers(0, 251), st.text(max_size=600))
def test_answers(accepted: bool, first: int, reason: str) -> None:
    data = wire.encode_answer(accepted, first, 252 - first, reason)
    answer = wire.decode_answer(data, 252)
    assert (answer.accepted, answer.first, answer.entries) == (accepted, first, 252 - first)
    assert reason.startswith(answer.reason)
    with pytest.raises(InvalidInformation):
        wire.decode_answer(data, 251)


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=300), st.integers(1, 400))
def test_a_batch_fits(sizes: list[int], limit: int) -> None:
    queue = [wire.Moving("k", b"u" * size, b"") for size in sizes]
    count = wire.batch_size(queue, limit)
    assert 1 <= count <= min(limit, wire.MAX_CONNECTIONS)
    message, _ = wire.encode(queue[:count], 1)
    assert len(message) <= wire.MAX_MESSAGE


@pytest.mark.parametrize(
    ("kind", "unread", "state", "names"),
    [("", b"", b"", "kind"), ("k" * 65, b"", b"", "kind"), ("k", b"u" * 2**20, b"s", "1048577 bytes")],
)
def test_limits_are_named(kind: str, unread: bytes, state: bytes, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        wire.check_moving(kind, unread, state)
