"""Length-prefixed messages: whole, byte by byte, and hostile prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portway.wire.framing import FrameReader, FrameTooLarge, pack_frame

messages = st.lists(st.binary(max_size=100), max_size=10)


@given(messages, st.data())
def test_however_the_bytes_are_cut(many: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(pack_frame, many))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, got = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += reader.receive(stream[start:end])
    assert got == many and reader.pending == b""


@given(messages, st.binary(max_size=30))
def test_a_half_read_frame_travels(many: list[bytes], more: bytes) -> None:
    stream = b"".join(map(pack_frame, [*many, more]))
    for cut in range(len(stream)):
        first = FrameReader()
        got = first.receive(stream[:cut])
        second = FrameReader(pending=first.pending)
        assert got + second.receive(stream[cut:]) == [*many, more]


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes(data: bytes, limit: int) -> None:
    reader = FrameReader(limit)
    try:
        got = reader.receive(data)
    except FrameTooLarge:
        return
    assert all(len(one) <= limit for one in got)
    assert b"".join(map(pack_frame, got)) + reader.pending == data


def test_too_large_is_refused_by_its_prefix_alone() -> None:
    with pytest.raises(FrameTooLarge, match="a frame of 11 bytes: at most 10"):
        FrameReader(10).receive((11).to_bytes(4, "big"))
    assert FrameReader(10).receive(pack_frame(b"x" * 10)) == [b"x" * 10]
