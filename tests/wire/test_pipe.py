"""wire/pipe: what is packed unpacks to the same; anything else is ObjectCorrupt or ValueError and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portway.errors import ObjectCorrupt
from portway.wire import pipe as wire

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)
headers = st.builds(
    wire.Header, texts, st.booleans(), st.sampled_from(wire.Direction), st.integers(1, 255), u32, u32, u32,
    st.builds(wire.Flag, st.integers(0, 3)), u64, st.text(st.characters(codec="utf-8"), max_size=26),
)  # fmt: skip
used_lines = st.builds(
    wire.Line, u32, st.sampled_from(list(wire.LineState)[1:]), u64, u32, u32, u64, u32, u64, u64, u64
)  # fmt: skip


@given(headers)
def test_headers_round_trip(header: wire.Header) -> None:
    page = wire.pack_header(header)
    assert len(page) == wire.HEADER_SIZE
    assert wire.unpack_header(page, "here") == header


@given(headers)
def test_a_header_as_the_table_says(header: wire.Header) -> None:
    """Against struct and the table of the module, field by field."""
    page = wire.pack_header(header)
    name = header.name.encode()
    assert page[:8] == b"PWPIPE\0\0" and struct.unpack_from("<I", page, 8) == (1,)
    assert struct.unpack_from("<IIIIIII", page, 12) == (
        header.message, header.direction, header.max_instances, header.out_size, header.in_size,
        header.default_wait_ms, header.flags,
    )  # fmt: skip
    assert struct.unpack_from("<QII", page, 0x28) == (header.number, len(name), len(header.front.encode()))
    assert page[0x100 : 0x100 + len(name)] == name
    assert page[0x500 : 0x500 + len(header.front.encode())] == header.front.encode()


@pytest.mark.parametrize("changed", [{"name": ""}, {"name": "n" * 1025}, {"front": "f" * 108}])
def test_headers_that_cannot_be_packed(changed: dict[str, str]) -> None:
    header = wire.Header("p", True, wire.Direction.DUPLEX, 1, 0, 0, 50, wire.Flag(0), 1, "/tmp/f")
    with pytest.raises(ValueError):
        wire.pack_header(header._replace(**changed))  # type: ignore[arg-type]


@given(st.binary(max_size=5000))
def test_any_bytes_as_a_header(data: bytes) -> None:
    with pytest.raises(ObjectCorrupt, match="the file"):
        wire.unpack_header(data, "the file")


@given(headers, st.lists(st.tuples(st.integers(0, wire.HEADER_SIZE - 1), st.integers(0, 255)), max_size=6))
def test_mutated_headers(header: wire.Header, changes: list[tuple[int, int]]) -> None:
    page = bytearray(wire.pack_header(header))
    for at, value in changes:
        page[at] = value
    try:
        found = wire.unpack_header(bytes(page), "there")
    except ObjectCorrupt as error:
        assert "there" in str(error)
        return
    assert 1 <= found.max_instances <= 255 and found.direction in wire.Direction and 0 < len(found.name) <= 1024
    assert len(found.front.encode()) <= 107


@given(headers, st.integers(0, wire.HEADER_SIZE - 1))
def test_a_header_that_is_cut(header: wire.Header, size: int) -> None:
    with pytest.raises(ObjectCorrupt):
        wire.unpack_header(wire.pack_header(header)[:size], "x")


@given(st.lists(st.one_of(st.none(), used_lines), max_size=255))
def test_lines_round_trip(lines: list[wire.Line | None]) -> None:
    data = b"".join(wire.pack_line(one or wire.FREE) for one in lines)
    assert list(wire.unpack_lines(data)) == [(slot, one) for slot, one in enumerate(lines) if one is not None]
    assert [wire.line_slot(wire.line_at(slot)) for slot in range(len(lines))] == list(range(len(lines)))


@given(used_lines, st.binary(max_size=40))
def test_the_disconnected_generations_are_the_last_field(line: wire.Line, disconnected: bytes) -> None:
    data = wire.pack_line(line, disconnected)
    assert len(data) == wire.LINE_SIZE
    assert data[wire.DISCONNECTED_AT :] == disconnected[:32].ljust(32, b"\0")
    assert next(wire.unpack_lines(data)) == (0, line)


@given(st.binary(max_size=wire.LINE_SIZE * 4))
def test_any_bytes_as_lines(data: bytes) -> None:
    for slot, line in wire.unpack_lines(data):
        assert 0 <= slot < len(data) // wire.LINE_SIZE and line.state in (1, 2, 3)


def test_no_more_than_255_lines() -> None:
    one = wire.pack_line(wire.FREE._replace(state=wire.LineState.LISTENING))
    assert len(list(wire.unpack_lines(one * 300 + b"x"))) == 255


@given(st.one_of(st.binary(max_size=100), st.integers(0, 300_000).map(bytes)))
def test_a_message_is_its_packets(message: bytes) -> None:
    found, left = b"", None
    sent = list(wire.packets(message))
    for packet in sent:
        kind, here = wire.unpack_packet_head(packet)
        assert kind is wire.PacketKind.DATA and left in (None, here)
        found += packet[8:]
        left = here - (len(packet) - 8)
        assert len(packet) <= 8 + wire.MAX_PACKET
    assert found == message and left == 0
    assert len(sent) == max(1, -(-len(message) // 65536))


@given(st.integers(0, 2**56 - 1), st.sampled_from(wire.PacketKind))
def test_packet_heads(left: int, kind: wire.PacketKind) -> None:
    assert struct.unpack("<Q", wire.pack_packet_head(left, kind)) == (int(kind) << 56 | left,)


@given(
    st.one_of(
        st.binary(max_size=100),
        st.tuples(u64, st.binary(max_size=20)).map(lambda one: struct.pack("<Q", one[0]) + one[1]),
    )
)
def test_any_bytes_as_a_packet(packet: bytes) -> None:
    try:
        kind, left = wire.unpack_packet_head(packet)
    except ValueError:
        return
    size = len(packet) - 8
    assert (kind is wire.PacketKind.ABANDONED and size == 0) or (size == left or (size < left and size == 65536))


@pytest.mark.parametrize("packet", [b"", b"1234567", bytes(8 + 65537), b"\0" * 7 + b"\2", b"\0" * 7 + b"\1" + b"x"])
def test_packets_that_cannot_be(packet: bytes) -> None:
    with pytest.raises(ValueError):
        wire.unpack_packet_head(packet)
