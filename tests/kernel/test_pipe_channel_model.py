"""The native channel against a plain model of Windows' rules for messages, parts and peeks."""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portway import errors
from portway._native.pipe import Channel

PACKET = 65536
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([PACKET - 1, PACKET, PACKET + 1, 100_000]))


class Model:
    """What waits in one direction: messages, the first perhaps in part."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.closed = False

    @property
    def waiting(self) -> int:
        return sum(map(len, self.messages))

    def whole(self) -> bytes:
        return self.messages.popleft()

    def part(self, size: int) -> tuple[bytes, int]:
        """(data, left)."""
        first = self.messages[0]
        data, rest = first[:size], first[size:]
        if rest:
            self.messages[0] = rest
        else:
            self.messages.popleft()
        return data, len(rest)

    def bytes_mode(self, size: int) -> bytes:
        out = b""
        while self.messages and len(out) < size:
            out += self.part(size - len(out))[0]
        return out


class Messages(RuleBasedStateMachine):
    """One end sends, the other reads in any way; both live in this process."""

    def __init__(self) -> None:
        super().__init__()
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sender = Channel(one.detach(), message=True, access=3, timeout=5)
        self.reader = Channel(other.detach(), message=True, access=3, timeout=5)
        self.model = Model()
        self.serial = 0

    def teardown(self) -> None:
        self.sender.close()
        self.reader.close()

    @precondition(lambda self: not self.model.closed and self.model.waiting < 90_000)
    @rule(size=SIZES)
    def send(self, size: int) -> None:
        self.serial += 1
        data = bytes((self.serial + at) & 0xFF for at in range(min(size, 256))).ljust(size, b"\x55")
        try:
            assert self.sender.send(data, timeout=0) == size
        except errors.OperationTimeout as error:
            assert error.sent == 0 or size > PACKET  # type: ignore[attr-defined]
            if error.sent:  # type: ignore[attr-defined]
                self.drain_abandoned()
            return
        self.model.messages.append(data)

    def drain_abandoned(self) -> None:
        while self.model.messages:
            assert self.reader.receive() == self.model.whole()
        try:
            self.reader.receive()
            raise AssertionError("a message that was given up arrived")
        except errors.MessageAbandoned:
            pass

    @precondition(lambda self: self.reader.read_message)
    @rule()
    def receive(self) -> None:
        self._compare(lambda: self.reader.receive(timeout=0), lambda: self.model.whole())

    @precondition(lambda self: self.reader.read_message)
    @rule(size=SIZES, into=st.booleans())
    def receive_part(self, size: int, into: bool) -> None:
        def real() -> Any:
            buffer = bytearray(size)
            try:
                if into:
                    return bytes(buffer[: self.reader.receive_into(buffer, timeout=0)]), 0
                return self.reader.receive(size, timeout=0), 0
            except errors.MoreData as more:
                return (bytes(buffer[: more.count]) if into else more.data), more.left

        self._compare(real, lambda: self.model.part(size))

    @precondition(lambda self: not self.reader.read_message)
    @rule(size=SIZES.filter(bool))
    def receive_bytes(self, size: int) -> None:
        while self.model.messages and not self.model.messages[0]:
            if len(self.model.messages) == 1:
                break
            self.model.messages.popleft()
        if self.model.waiting:
            self._compare(lambda: self.reader.receive(size, timeout=0), lambda: self.model.bytes_mode(size))

    @rule(message=st.booleans())
    def read_mode(self, message: bool) -> None:
        self.reader.read_message = message

    @rule(size=SIZES)
    def peek(self, size: int) -> None:
        if not self.model.messages:
            if self.model.closed:
                try:
                    self.reader.peek(size)
                    raise AssertionError("peek of an ended pipe")
                except errors.BrokenPipe:
                    return
            assert self.reader.peek(size) == (b"", 0, 0)
            return
        first = self.model.messages[0]
        data = first[:size]
        assert self.reader.peek(size) == (data, self.model.waiting, len(first) - len(data))

    @precondition(lambda self: not self.model.closed)
    @rule()
    def flush(self) -> None:
        try:
            self.sender.flush(timeout=0)
            assert self.model.waiting == 0 or self.reader.buffered
        except errors.OperationTimeout:
            assert self.model.messages

    @precondition(lambda self: not self.model.closed)
    @rule()
    def transact_is_refused_with_unread_data(self) -> None:
        if self.model.messages and self.reader.read_message:
            try:
                self.reader.transact(b"x", timeout=0)
                raise AssertionError("transact wrote although unread data waits")
            except errors.PipeBusy:
                pass

    @precondition(lambda self: not self.model.closed)
    @rule()
    def close(self) -> None:
        self.sender.close()
        self.model.closed = True

    def _compare(self, real: Any, model: Any) -> None:
        if self.model.messages:
            assert real() == model()
            return
        try:
            real()
            raise AssertionError("data out of nothing")
        except errors.BrokenPipe:
            assert self.model.closed
        except errors.OperationTimeout:
            assert not self.model.closed

    @invariant()
    def open(self) -> None:
        assert not self.reader.closed


TestMessages = Messages.TestCase
TestMessages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
