"""Channels of named pipes: Windows' rules against a plain model, and every way an operation can end early."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from handoff_peers import patiently
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("portway._native.pipe")
from portway import _accel, errors

FULL = 65536
Pair = tuple[Any, Any]


class Channel(_accel.pipe.Channel):  # type: ignore[name-defined,misc]
    """As the public classes: a subclass in Python."""


def sockets(message: bool = True) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if message else socket.SOCK_STREAM)


def channel(sock: socket.socket, message: bool = True, **more: Any) -> Any:
    return Channel(sock.detach(), message=message, **{"access": 3, "timeout": 20.0, "name": "test", **more})


def make(message: bool = True, **more: Any) -> Pair:
    a, b = sockets(message)
    return channel(a, message, **more), channel(b, message, **more)


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = make()
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def stream() -> Iterator[Pair]:
    a, b = make(False)
    yield a, b
    a.close()
    b.close()


def packet(left: int, payload: bytes = b"", kind: int = 0) -> bytes:
    return struct.pack("<Q", left | kind << 56) + payload


class Doing(threading.Thread):
    """A call in a thread: its result or its error."""

    def __init__(self, call: Callable[..., Any], *args: Any, **more: Any) -> None:
        super().__init__(daemon=True)
        self.call, self.result, self.error = lambda: call(*args, **more), None, None  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error

    def get(self) -> Any:
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


# -- messages --------------------------------------------------------------------------------------------------------


SEEN = [0, 1, 31, 255, 256, 257, 1024, 1025, 4096, FULL - 1, FULL, FULL + 1, 2 * FULL, 150_000]


@pytest.mark.parametrize("size", SEEN)
def test_message_goes_through_whole(pair: Pair, size: int) -> None:
    a, b = pair
    data = random.Random(size).randbytes(size)
    for form in (bytes, bytearray, memoryview):
        assert a.send(form(data)) == size
        assert b.receive() == data
    a.send(data)
    buffer = bytearray(size + 9)
    assert b.receive_into(buffer) == size
    assert buffer[:size] == data
    assert (a.sent_messages, a.sent_bytes) == (4, 4 * size) == (b.received_messages, b.received_bytes)


def test_large_messages(pair: Pair) -> None:
    a, b = pair
    data = os.urandom(16 << 20)
    for take in (b.receive, lambda: b.receive(17 << 20)):
        sending = Doing(a.send, data)
        assert take() == data
        assert sending.get() == len(data)
    sending = Doing(a.send, data)
    buffer = bytearray(len(data))
    assert b.receive_into(buffer) == len(data)
    assert buffer == data
    sending.get()


def test_parts(pair: Pair) -> None:
    a, b = pair
    a.send(b"0123456789")
    a.send(b"abc")
    with pytest.raises(errors.MoreData) as more:
        b.receive(4)
    assert (more.value.data, more.value.left, more.value.count) == (b"0123", 6, 4)
    buffer = bytearray(5)
    with pytest.raises(errors.MoreData) as more:
        b.receive_into(buffer)
    assert (more.value.data, more.value.count, more.value.left, buffer) == (b"", 5, 1, b"45678")
    assert b.receive(1) == b"9"
    with pytest.raises(errors.MoreData):
        b.receive(0)
    assert b.receive(3) == b"abc"
    a.send(b"")
    assert b.receive(0) == b""


def test_parts_of_many_packets(pair: Pair) -> None:
    a, b = pair
    data = os.urandom(1_000_000)
    sending = Doing(a.send, data)
    got, sizes = b"", random.Random(3)
    while True:
        try:
            got += b.receive(sizes.choice([1, 1000, FULL - 1, FULL, FULL + 1, 200_000]))
            break
        except errors.MoreData as more:
            got += more.data
            assert more.left == len(data) - len(got)
    assert got == data
    sending.get()


def test_peek_table(pair: Pair, stream: Pair) -> None:
    a, b = pair
    a.send(b"0123456789")
    a.send(b"abc")
    for mode in (True, False):
        b.read_message = mode
        assert b.peek() == (b"", 13, 10)
        assert b.peek(4) == (b"0123", 13, 6)
        assert b.peek(100) == (b"0123456789", 13, 0)
    a, b = stream
    assert b.peek() == (b"", 0, 0)
    a.send(b"0123456789abc")
    assert b.peek() == (b"", 13, 0)
    assert b.peek(4) == (b"0123", 13, -4)


def test_peek_over_packets(pair: Pair) -> None:
    a, b = pair
    data = os.urandom(140_000)
    a.send(data)
    a.send(b"")
    assert b.peek(200_000) == (data, len(data), 0)
    with pytest.raises(errors.MoreData):
        b.receive(70_000)
    assert b.peek(200_000) == (data[70_000:], 70_000, 0)
    assert b.peek(69_999) == (data[70_000:-1], 70_000, 1)
    assert b.receive() == data[70_000:]
    assert b.peek(5) == (b"", 0, 0)


def test_too_large_can_be_read_in_parts() -> None:
    a, b = make(max_message=100_000)
    a.send(bytes(100_000))
    assert len(b.receive()) == 100_000
    data = os.urandom(100_001)
    a.send(data)
    for _ in range(2):
        with pytest.raises(errors.MessageTooLarge):
            b.receive()
    with pytest.raises(errors.MoreData) as more:
        b.receive(10)
    assert more.value.data + b.receive() == data
    a.close()
    b.close()


def test_directions_modes_and_values(pair: Pair, stream: Pair) -> None:
    a, b = sockets()
    reads, writes = channel(a, access=1), channel(b, access=2)
    wrong = (lambda: reads.send(b"x"), reads.flush, writes.receive, writes.peek, lambda: into(writes, 1))
    for call in wrong:
        with pytest.raises(errors.AccessDenied):
            call()
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            reads.receive(timeout=timeout)
        with pytest.raises(ValueError, match="timeout"):
            reads.timeout = timeout
    with pytest.raises(errors.InvalidParameter):
        reads.receive(-1)
    with pytest.raises(errors.InvalidParameter):
        stream[0].read_message = True
    with pytest.raises(errors.BadPipe):
        stream[0].transact(b"x")
    pair[0].read_message = False
    with pytest.raises(errors.BadPipe):
        pair[0].transact(b"x")
    reads.close()
    writes.close()


def test_bytes(stream: Pair) -> None:
    a, b = stream
    assert a.send(b"") == 0
    with pytest.raises(errors.OperationTimeout):
        b.receive(timeout=0)
    a.send(b"0123456789")
    assert b.receive(4) == b"0123"
    buffer = bytearray(3)
    assert b.receive_into(buffer) == 3
    assert buffer == b"456"
    assert b.receive() == b"789"
    data = os.urandom(3_000_000)
    sending, got = Doing(a.send, data), b""
    while len(got) < len(data):
        got += b.receive()
    assert got == data
    sending.get()
    a.send(b"rest")
    b.send(b"never read")
    a.close()
    assert b.receive() == b"rest"
    with pytest.raises(errors.BrokenPipe):
        b.receive()


def test_transactions(pair: Pair) -> None:
    a, b = pair
    answering = Doing(lambda: [b.send(b.receive() * 2) for _ in range(2)])
    assert a.transact(b"ab") == b"abab"
    with pytest.raises(errors.MoreData) as more:
        a.transact(b"abc", 4)
    answering.get()
    assert more.value.data == b"abca"
    with pytest.raises(errors.PipeBusy):
        a.transact(b"x")
    assert a.receive() == b"bc"
    b.send(b"early")
    with pytest.raises(errors.PipeBusy):
        a.transact(b"x")
    assert b.peek() == (b"", 0, 0)


# -- the model -------------------------------------------------------------------------------------------------------


class Model:
    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.by_message, self.ended = True, False

    def receive(self, size: int | None) -> Any:
        if not self.by_message:
            size, got = 65536 if size is None else size, b""
            while self.messages and len(got) < size:
                part = self.messages.popleft()
                if len(part) > size - len(got):
                    self.messages.appendleft(part[size - len(got) :])
                    part = part[: size - len(got)]
                got += part
            return got if got or not size else self.nothing()
        if not self.messages:
            return self.nothing()
        message = self.messages.popleft()
        if size is not None and len(message) > size:
            self.messages.appendleft(message[size:])
            return errors.MoreData, message[:size], len(message) - size
        return message

    def nothing(self) -> Any:
        return errors.BrokenPipe if self.ended else errors.OperationTimeout

    def peek(self, size: int) -> Any:
        if not self.messages:
            return errors.BrokenPipe if self.ended else (b"", 0, 0)
        head = self.messages[0]
        return head[:size], sum(map(len, self.messages)), max(0, len(head) - size)


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except errors.MoreData as more:
        return errors.MoreData, more.data, more.left
    except errors.PipeError as error:
        return type(error)
    except errors.OperationTimeout:
        return errors.OperationTimeout


def into(one: Any, size: int) -> Any:
    buffer = bytearray(size)
    try:
        return bytes(buffer[: one.receive_into(buffer, 0)])
    except errors.MoreData as more:
        return errors.MoreData, bytes(buffer[: more.count]), more.left


SIZES = st.one_of(st.integers(0, 12), st.sampled_from([FULL - 1, FULL, FULL + 1, 70_000]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), SIZES),
        st.tuples(st.sampled_from(["receive", "into", "peek"]), SIZES),
        st.tuples(st.sampled_from(["all", "nowait", "switch", "move", "reset"]), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_windows_rules(steps: list[tuple[str, int]]) -> None:
    sock, other = sockets()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212992)  # whatever is sent below finds room
    a, b = channel(sock), channel(other)
    model, number = Model(), 0
    for what, size in steps:
        if what == "send" and not model.ended and sum(map(len, model.messages)) + size < 140_000:
            number += 1
            data = (number.to_bytes(2, "big") * (size // 2 + 1))[:size]
            a.send(data, 0)
            model.messages.append(data)
        elif what == "receive":
            assert outcome(b.receive, size, 0) == model.receive(size)
        elif what == "into":
            assert outcome(into, b, size) == model.receive(size)
        elif what == "all":
            assert outcome(b.receive, None, 0) == model.receive(None)
        elif what == "nowait":
            expected = model.receive(None)
            assert outcome(b.receive_nowait) == (None if expected is errors.OperationTimeout else expected)
        elif what == "peek":
            assert outcome(b.peek, size) == model.peek(size)
        elif what == "switch":
            b.read_message = model.by_message = not model.by_message
        elif what == "move":  # to another channel, as a hand-over does
            state = b.travel_state()
            b = Channel(b.detach(), message=True, access=3, timeout=20.0, read_message=model.by_message)
            b.restore_travel(*state)
        elif what == "reset" and number % 3 == 1 and not model.ended:
            b.send(b"unread")  # the kernel then says ECONNRESET before what is left
            a.close()
            model.ended = True
    a.close()
    b.close()


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unread", [False, True])
def test_leftover_then_end(pair: Pair, unread: bool) -> None:
    a, b = pair
    if unread:
        b.send(b"never read")
    for one in (b"one", b"", b"three"):
        a.send(one)
    a.close()
    with pytest.raises(errors.NoData):
        b.send(b"x")
    assert b.peek(3) == (b"one", 8, 0)
    with pytest.raises(errors.MoreData):
        b.receive(1)
    assert [b.receive() for _ in range(3)] == [b"ne", b"", b"three"]
    for call in (b.receive, b.peek, lambda: b.receive(5)):
        with pytest.raises(errors.BrokenPipe) as error:
            call()
        assert error.value.code == 109


def test_flush(pair: Pair, stream: Pair) -> None:
    for a, b in (pair, stream):
        a.flush(0)
        a.send(b"data")
        with pytest.raises(errors.OperationTimeout):
            a.flush(0.01)
        flushing = Doing(a.flush)
        with contextlib.suppress(errors.MoreData):
            b.receive(2)
        assert b.receive() == b"ta"
        flushing.get()
        a.send(b"unread")
        flushing = Doing(a.flush)
        b.close()
        with pytest.raises(errors.BrokenPipe):
            flushing.get()


@pytest.mark.parametrize("end, error", [("close", errors.ObjectClosed), ("disconnect_here", errors.PipeNotConnected)])
@pytest.mark.parametrize("message", [True, False])
def test_end_of_pending_operations(end: str, error: type[Exception], message: bool) -> None:
    a, b = make(message)
    b.send(bytes(10))
    pending = [Doing(a.receive, 5)]  # this one finds data
    pending[0].join()
    pending = [Doing(lambda: [a.receive(3) for _ in iter(int, 1)]) for _ in range(3)]
    pending += [Doing(a.send, bytes(4 << 20)) for _ in range(2)]
    patiently(lambda: b.peek()[1])
    pending += [Doing(a.flush)]
    getattr(a, end)()
    for one in pending:
        with pytest.raises((error, errors.MoreData)):
            one.get()
    for call in (a.receive, a.peek, lambda: a.send(b"x"), a.flush, a.fileno, a.cancel):
        with pytest.raises(error):
            call()
    a.close()
    a.close()
    assert a.closed
    with contextlib.suppress(errors.BrokenPipe, errors.MessageAbandoned):
        while True:
            b.receive()
    b.close()


def test_detach(pair: Pair) -> None:
    a, b = pair
    sock = socket.socket(fileno=a.detach())
    assert a.closed
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
    sock.send(packet(2, b"ok"))
    assert b.receive() == b"ok"
    sock.close()


# -- timeouts and cancelling -----------------------------------------------------------------------------------------


def test_timeout_loses_nothing() -> None:
    sock, other = sockets()
    b = channel(other)
    sock.send(packet(2 * FULL + 3, b"a" * FULL))
    for timeout in (0, 0.001, 0.08):
        with pytest.raises(errors.OperationTimeout):
            b.receive(timeout=timeout)
    assert b.buffered
    assert b.receive_nowait() is None
    assert b.peek(3) == (b"aaa", FULL, 2 * FULL)
    buffer = bytearray(3 * FULL)
    with pytest.raises(errors.OperationTimeout):
        b.receive_into(buffer, 0)
    with pytest.raises(errors.MoreData) as more:
        b.receive(FULL - 1)
    assert more.value.left == FULL + 4
    sock.send(packet(FULL + 3, b"b" * FULL))
    with pytest.raises(errors.OperationTimeout):
        b.receive(2 * FULL, timeout=0)
    sock.send(packet(3, b"end"))
    assert b.receive() == b"a" + b"b" * FULL + b"end"
    sock.close()
    b.close()


@pytest.mark.parametrize("message", [True, False])
def test_send_that_times_out(message: bool) -> None:
    a, b = make(message)
    buffer = socket.socket(fileno=os.dup(a.fileno()))
    room = buffer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    for timeout in (0, 0.01):
        with pytest.raises(errors.OperationTimeout) as error:
            a.send(os.urandom(16 << 20), timeout)
        assert 0 <= error.value.sent < 16 << 20  # type: ignore[attr-defined]
    assert buffer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == room
    if message:
        with pytest.raises(errors.OperationTimeout) as error:
            a.send(b"no room", 0)
        assert error.value.sent == 0  # type: ignore[attr-defined]
        with pytest.raises(errors.MessageAbandoned):
            b.receive()
        a.send(b"next")
        assert b.receive() == b"next"
    buffer.close()
    a.close()
    b.close()


def test_owed_abandon(pair: Pair) -> None:
    """With no room for the packet that gives a message up, it goes out before the next message."""
    a, b = pair
    raw = socket.socket(fileno=os.dup(a.fileno()))
    with open("/proc/sys/net/core/wmem_max") as file:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(file.read()))
    with pytest.raises(errors.OperationTimeout):
        a.send(bytes(16 << 20), 0)
    assert a.travel_state()[1][12] & 2
    assert a.send_nowait(b"x") == -1
    sending = Doing(a.send, b"next")
    with pytest.raises(errors.MessageAbandoned):
        b.receive()
    assert b.receive() == b"next"
    sending.get()
    raw.close()


def test_abandoned_after_parts(pair: Pair) -> None:
    a, b = pair
    for read in (lambda: b.receive(10), lambda: b.receive(FULL + 5), lambda: b.receive_into(bytearray(7))):
        with pytest.raises(errors.OperationTimeout):
            a.send(bytes(4 << 20), 0)
        with pytest.raises(errors.MoreData):
            read()
        with pytest.raises(errors.MessageAbandoned):
            b.receive()
        a.send(b"clean")
        assert b.receive() == b"clean"
    with pytest.raises(errors.OperationTimeout):
        a.send(bytes(4 << 20), 0)
    b.read_message = False
    with pytest.raises(errors.MessageAbandoned):
        while set(b.receive()) == {0}:
            pass
    a.send(b"clean")
    assert b.receive() == b"clean"


def test_end_in_the_middle_of_a_message() -> None:
    sock, other = sockets()
    b = channel(other)
    sock.send(packet(FULL + 1, bytes(FULL)))
    sock.close()
    with pytest.raises(errors.BrokenPipe, match="middle of a message"):  # the part is no message
        b.receive()
    with pytest.raises(errors.BrokenPipe):
        b.receive()
    b.close()


@pytest.mark.parametrize("pending", ["receive", "send", "flush", "receive_into"])
def test_cancel(pair: Pair, pending: str) -> None:
    a, b = pair
    if pending != "receive":
        b.send(b"x")
        assert a.receive() == b"x"
    if pending == "flush":
        a.send(b"unread")
    arguments = {"send": (bytes(8 << 20),), "receive_into": (bytearray(9),)}.get(pending, ())
    doing = Doing(getattr(a, pending), *arguments, timeout=None)
    while doing.is_alive():
        a.cancel()
        doing.join(0.01)
    with pytest.raises(errors.OperationAborted):
        doing.get()
    b.send(b"later")
    assert a.receive() == b"later"


def test_cancel_storm(pair: Pair) -> None:
    """Nothing is lost or comes twice, however often receives and sends are cancelled."""
    a, b = pair
    count, over = 300, threading.Event()
    sizes = [0, 5, 70_000, 300_000]

    def send() -> None:
        for number in range(count):
            data = number.to_bytes(4, "big") + bytes(sizes[number % 4])
            while True:
                try:
                    a.send(data)
                    break
                except errors.OperationAborted:
                    pass

    def receive() -> list[int]:
        got = []
        while len(got) < count:
            try:
                data = b.receive()
                assert len(data) == 4 + sizes[int.from_bytes(data[:4], "big") % 4]
                got.append(int.from_bytes(data[:4], "big"))
            except (errors.OperationAborted, errors.MessageAbandoned):
                pass
        return got

    def storm() -> None:
        while not over.wait(0.0005):
            a.cancel()
            b.cancel()

    sending, receiving, storming = Doing(send), Doing(receive), Doing(storm)
    try:
        assert receiving.get() == list(range(count))
        sending.get()
    finally:
        over.set()
        storming.get()


def test_many_threads_share_an_end(pair: Pair) -> None:
    a, b = pair

    def send(start: int) -> None:
        for number in range(start, start + 50):
            a.send(b"%d" % number)

    senders = [Doing(send, start) for start in (0, 50, 100)]
    readers = [Doing(lambda: [int(b.receive()) for _ in range(50)]) for _ in range(3)]
    assert sorted(number for one in readers for number in one.get()) == list(range(150))
    for one in senders:
        one.get()


def test_peek_while_another_thread_receives(pair: Pair) -> None:
    a, b = pair
    receiving = Doing(b.receive)
    while receiving.is_alive():
        assert b.peek(5) == (b"", 0, 0)
        if b.peek() == (b"", 0, 0):
            a.send(b"x")
            break
    assert receiving.get() == b"x"


def run(code: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, socket, threading\nfrom portway import _accel, errors\n"
    head += "def channel(s): return _accel.pipe.Channel(s.detach(), message=True, access=3)\n"
    head += "x, y = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\na, b = channel(x), channel(y)\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("call", ["a.receive()", "a.send(bytes(8 << 20))", "a.flush()", "a.receive(10)"])
def test_ctrl_c(call: str) -> None:
    done = run(
        "b.send(b'')\na.receive()\nif 'flush' in CALL: a.send(b'x')\n"
        "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: eval(CALL)\nexcept KeyboardInterrupt: print('interrupted')\n".replace("CALL", repr(call))
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_fork_child(pair: Pair) -> None:
    """A child's close disturbs nobody, though the parent's threads were inside."""
    done = run(
        "t = threading.Thread(target=lambda: print(a.receive(), flush=True)); t.start()\n"
        "while a.peek() and not threading.active_count() > 1: pass\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    a.cancel(); a.close(); b.close(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "b.send(b'still'); t.join()\n"
    )
    assert done.stdout == "b'still'\n", done.stderr


# -- the server's record ---------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> Iterator[Any]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(8192))
        file.flush()
        yield file


def test_watch(pair: Pair, record: Any) -> None:
    a, b = pair
    b.watch(record.fileno(), 4092, 7)
    a.send(b"x" * 9)
    assert b.receive() == b"x" * 9
    a.send(b"leftover")
    os.pwrite(record.fileno(), struct.pack("<I", 7), 4092 + 28)
    for call in (b.receive, b.peek, lambda: b.send(b""), b.flush):
        with pytest.raises(errors.PipeNotConnected):
            call()
    b.close()
    with pytest.raises(errors.ObjectClosed):
        b.receive()


def test_watch_wakes_with_the_servers_close(pair: Pair, record: Any) -> None:
    a, b = pair
    b.watch(record.fileno(), 0, 3)
    receiving = Doing(b.receive)
    os.pwrite(record.fileno(), struct.pack("<I", 3), 4)
    a.close()
    with pytest.raises(errors.PipeNotConnected):
        receiving.get()


def test_watched_file_is_cut(pair: Pair, record: Any) -> None:
    a, b = pair
    b.watch(record.fileno(), 4096, 7)
    record.truncate(0)
    a.send(b"fine")
    assert b.receive() == b"fine"
    with pytest.raises(errors.InvalidParameter):
        b.watch(record.fileno(), 3, 7)


# -- hostile peers ---------------------------------------------------------------------------------------------------

BAD = [
    [b"1234567"],
    [b""],
    [packet(FULL + 5, bytes(FULL)), b""],
    [packet(1)],
    [packet(5, b"123")],
    [packet(2, b"123")],
    [packet(FULL + 1, bytes(FULL + 1))],
    [packet(0, kind=1)],
    [packet(0, kind=2)],
    [packet(FULL + 5, bytes(FULL)), packet(4, b"1234")],
    [packet(FULL + 5, bytes(FULL)), packet(0)],
    [packet(FULL + 5, bytes(FULL)), packet(5, b"12345", kind=1)],
]


@pytest.mark.parametrize("packets", BAD)
@pytest.mark.parametrize("size", [None, 10, 100_000])
def test_protocol_errors(packets: list[bytes], size: int | None) -> None:
    sock, other = sockets()
    b = channel(other)
    for one in packets:
        sock.send(one)
    sock.send(packet(4, b"fine"))
    with pytest.raises(errors.BrokenPipe, match="protocol"):
        while True:
            with contextlib.suppress(errors.MoreData):
                b.receive(size)
    with pytest.raises(errors.BrokenPipe, match="protocol"):
        b.peek()
    with pytest.raises(errors.NoData):
        b.send(b"x")
    sock.close()
    b.close()


def test_declared_size_costs_nothing() -> None:
    sock, other = sockets()
    b = channel(other, max_message=1 << 60)
    sock.send(packet((1 << 56) - 1, bytes(FULL)))
    with pytest.raises(errors.OperationTimeout):
        b.receive(timeout=0)
    with pytest.raises(errors.OperationTimeout):
        b.receive(1 << 50, timeout=0)
    assert b.peek(1 << 20) == (bytes(FULL), FULL, (1 << 56) - 1 - FULL)
    sock.close()
    b.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.builds(packet, st.integers(0, 40), st.binary(max_size=20), st.sampled_from([0, 0, 0, 1, 255])),
            st.just(packet(FULL + 4, bytes(FULL))), st.just(packet(4, b"last")), st.just(packet(0, kind=1)),
        ),
        max_size=6,
    ),
    st.lists(st.sampled_from(["all", "3", "0", "big", "peek", "switch", "into", "nowait"]), max_size=15),
)  # fmt: skip
def test_random_packets(packets: list[bytes], steps: list[str]) -> None:
    sock, other = sockets()
    b = channel(other)
    for one in packets:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(one)
    sock.close()
    calls: dict[str, Callable[[], Any]] = {
        "all": lambda: b.receive(timeout=0), "3": lambda: b.receive(3, 0), "0": lambda: b.receive(0, 0),
        "big": lambda: b.receive(1 << 40, 0), "peek": lambda: b.peek(100), "into": lambda: into(b, 5),
        "nowait": b.receive_nowait, "switch": lambda: setattr(b, "read_message", not b.read_message),
    }  # fmt: skip
    for step in steps:
        with contextlib.suppress(errors.PipeError, errors.OperationTimeout):
            calls[step]()
    b.close()


# -- hand-over and event loops ---------------------------------------------------------------------------------------

def state(expect: int = 0, offset: int = 0, flags: int = 0) -> bytes:
    return struct.pack("<QIBQ", expect, offset, flags, 0)


@pytest.mark.parametrize(
    "gathered, told",
    [
        (b"", b""), (b"", state()[:20]), (b"", state() + b"x"), (b"", state(10, 5)), (b"", state(1 << 56)),
        (b"", state(10, 11)), (b"", state(1 << 20, FULL)), (b"", state(0, 1)), (b"", state(0, 0, 4)),
    ],
)  # fmt: skip
def test_states_that_cannot_be(pair: Pair, gathered: bytes, told: bytes) -> None:
    with pytest.raises(errors.InvalidInformation):
        pair[0].restore_travel(gathered, told)
    pair[0].restore_travel(b"", state())
    for with_message in ((b"x", state()), (b"", state(5))):
        a, b = make(False)
        with pytest.raises(errors.InvalidInformation):
            a.restore_travel(*with_message)
        a.close()
        b.close()


def test_nowait(pair: Pair, stream: Pair) -> None:
    a, b = pair
    data = os.urandom(1_000_000)
    at = max(a.send_nowait(data), 0)
    assert 0 < at < len(data)
    with pytest.raises(errors.PipeBusy):
        a.send(b"between", 0)
    got = None
    while got is None:
        at = max(a.send_nowait(data, at), at) if at < len(data) else at
        got = b.receive_nowait()
    assert got == data
    assert b.receive_nowait() is None
    assert a.send_nowait(b"") == 0
    assert b.receive_nowait() == b""
    assert a.send_nowait(data) > 0
    a.abandon()
    with pytest.raises(errors.MessageAbandoned):
        b.receive()
    assert a.send_nowait(b"next") == 4
    assert b.receive() == b"next"
    a, b = stream
    assert b.receive_nowait() is None
    at, got = 0, b""
    while len(got) < len(data):
        at = max(a.send_nowait(data, at), at)
        got += b.receive_nowait() or b""
    assert got == data
