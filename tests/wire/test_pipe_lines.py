"""The quick look at a record's lines sees what the thorough one does."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from portway.wire.pipe import LINE_SIZE, LineState, unpack_lines, unpack_listening

states = st.one_of(st.integers(0, 3), st.sampled_from([257, 1 << 24, 0x01010101]))
lines = st.builds(
    lambda generation, state, ticket, rest: struct.pack("<IIQ", generation, state, ticket) + rest,
    st.integers(0, 0xFFFFFFFF), states, st.integers(0, (1 << 64) - 1), st.binary(min_size=112, max_size=112),
)  # fmt: skip


@given(st.lists(lines, max_size=300), st.binary(max_size=LINE_SIZE - 1))
def test_those_that_listen_the_oldest_first(all_lines: list[bytes], cut: bytes) -> None:
    data = b"".join(all_lines) + cut
    thorough = [one for one in unpack_lines(data) if one[1].state is LineState.LISTENING]
    assert unpack_listening(data) == sorted(thorough, key=lambda one: one[1].ticket)
