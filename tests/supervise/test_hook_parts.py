"""The parts of the hook in one process: batches, back-pressure, cancelling, taking connections out of a loop."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import resource
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import portway.aio
from portway.deadline import Deadline
from portway.errors import HandoffRefused, ObjectClosed, TooManyDescriptors, UnsupportedSocket
from portway.supervise.hook import Generation
from portway.supervise.hook_aio import AsyncGeneration
from portway.supervise.hook_core import Core
from portway.supervise.hook_reactor import ThreadReactor
from portway.supervise.hook_source import Mover, Offer
from portway.supervise.hook_target import Receiver
from portway.wire.handover import Moving

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def inbox() -> Iterator[Pair]:
    read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield read, write
    read.close()
    write.close()


@pytest.fixture
def core(inbox: Pair) -> Iterator[Core]:
    """A worker that is draining towards the inbox."""
    made = Core({}, os.getpid())
    made.target, made.successor = inbox[1], 2
    made.control, made.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield made
    made.control.close()
    made.peer.close()


def accept(receiver: Receiver, count: int) -> list[socket.socket]:
    found: list[socket.socket] = []
    deadline = Deadline(20)
    while len(found) < count:
        assert receiver.wait(deadline), f"{len(found)} of {count} came"
        receiver.step()
        while receiver.ready:
            batch = receiver.ready.popleft()
            while batch.fds:
                adopted = batch.accept()
                assert adopted is not None
                found.append(adopted.sock)
    return found


def back_pressure(lower: bool, result: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
    """As an unprivileged user whose descriptors in flight are counted: ETOOMANYREFS near its limit."""
    os.setgid(65534)
    os.setuid(65534)
    read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one, _other = socket.socketpair()
    if lower:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
    mover = Mover(reactor := ThreadReactor("mover"), 1)
    done: list[str | None] = []
    reactor.call_soon(lambda: mover.retarget(write))
    for _ in range(400):
        offer = Offer(one.fileno(), Moving("k", b"", b""), done.append)
        reactor.call_soon(lambda offer=offer: mover.submit(offer))
    receiver, deadline, taken = Receiver(read), Deadline(30), 0
    while len(done) < 400:
        deadline.check("moving")
        receiver.wait(Deadline(0.05))
        receiver.step(1)
        while receiver.ready:
            batch = receiver.ready.popleft()
            while batch.fds:
                adopted = batch.accept()
                assert adopted is not None
                adopted.sock.close()
                taken += 1
    result.send((taken, done.count(None)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("lower", [False, True])
def test_too_many_in_flight_is_back_pressure(lower: bool) -> None:
    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=back_pressure, args=(lower, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.recv() == (400, 400)
    finally:
        process.join(20)
        process.kill()
        ours.close()


def test_nothing_is_left_open(inbox: Pair, core: Core) -> None:
    generation = Generation(core)
    receiver = Receiver(inbox[0])

    def round() -> None:
        pairs = [socket.socketpair() for _ in range(30)]
        threads = [threading.Thread(target=generation.hand_over, args=(one, "k", b"u", b"s")) for one, _ in pairs]
        for thread in threads:
            thread.start()
        moved = accept(receiver, 30)
        for thread in threads:
            thread.join(20)
        assert all(one.fileno() < 0 for one, _ in pairs)
        for sock in [*moved, *(other for _, other in pairs)]:
            sock.close()

    round()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        round()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_descriptor_refuses_itself_alone(inbox: Pair) -> None:
    mover = Mover(reactor := ThreadReactor("mover"), 1)
    good, other = socket.socketpair()
    done: dict[str, str | None] = {}
    over = threading.Semaphore(0)

    def note(name: str) -> object:
        def call(reason: str | None) -> None:
            done[name] = reason
            over.release()

        return call

    def submit() -> None:
        mover.retarget(inbox[1])
        for name, fd in (("first", good.fileno()), ("closed", 999_999), ("last", good.fileno())):
            mover.submit(Offer(fd, Moving("k", b"", b""), note(name)))  # type: ignore[arg-type]

    reactor.call_soon(submit)
    for sock in accept(Receiver(inbox[0]), 2):
        sock.close()
    for _ in range(3):
        assert over.acquire(timeout=20)
    assert done["first"] is done["last"] is None and "closed" in str(done["closed"])
    good.close()
    other.close()


def test_what_is_no_socket_is_refused(inbox: Pair) -> None:
    mover, over, done = Mover(reactor := ThreadReactor("mover"), 1), threading.Event(), []

    def end(reason: str | None) -> None:
        done.append(reason)
        over.set()

    with open(os.devnull, "rb") as file:
        before = len(os.listdir("/proc/self/fd"))
        reactor.call_soon(
            lambda: (mover.retarget(inbox[1]), mover.submit(Offer(file.fileno(), Moving("k", b"", b""), end)))
        )
        receiver = Receiver(inbox[0])
        assert receiver.wait(Deadline(20))
        receiver.step()
        assert receiver.ready.popleft().accept() is None
        assert over.wait(20) and done == ["not a socket"]
        assert len(os.listdir("/proc/self/fd")) == before


def test_arguments_are_checked_before_anything_moves(inbox: Pair, core: Core) -> None:
    generation = Generation(core)
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(ValueError, match="kind=''"):
            generation.hand_over(one, "")
        with pytest.raises(ValueError, match="1048577 bytes"):
            generation.hand_over(one, "k", b"u" * (2**20 + 1))
        one.close()
        with pytest.raises(ValueError, match="closed"):
            generation.hand_over(one, "k")
    tls = ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="x", do_handshake_on_connect=False)
    with tls, pytest.raises(UnsupportedSocket, match="TLS"):
        generation.hand_over(tls, "k")
    assert not Receiver(inbox[0]).wait(Deadline(0))


def test_cancelled_before_and_after_it_left(inbox: Pair, core: Core) -> None:
    async def main() -> None:
        generation = AsyncGeneration(core, asyncio.get_running_loop())
        one, other = socket.socketpair()
        early = asyncio.ensure_future(generation.hand_over(one, "k"))
        early.cancel()
        with pytest.raises(asyncio.CancelledError):
            await early
        assert one.fileno() >= 0 and not Receiver(inbox[0]).wait(Deadline(0))
        late = asyncio.ensure_future(generation.hand_over(one, "k"))
        while not Receiver(inbox[0]).wait(Deadline(0)):
            await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        (moved,) = accept(Receiver(inbox[0]), 1)
        while one.fileno() >= 0:
            await asyncio.sleep(0)  # accepted: the source's descriptor is closed for the caller who has gone
        for sock in (moved, other):
            sock.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_inbox_closes(inbox: Pair, core: Core) -> None:
    generation = Generation(core)
    inbox[0].close()
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(HandoffRefused, match="inbox is closed"):
            generation.hand_over(one, "k")
        one.send(b"mine still")
        assert other.recv(100) == b"mine still"


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_detach_and_attach_lose_nothing(data: bytes, cut: int) -> None:
    async def main() -> bytes:
        ours, theirs = socket.socketpair()
        theirs.setblocking(True)
        reader, writer = await portway.aio.attach(ours)
        theirs.sendall(data[:cut])
        got = b""
        if data[:cut]:
            got = await reader.readexactly(min(cut, len(data)) // 2)
        writer.write(b"w" * 300_000)
        drained = asyncio.create_task(asyncio.to_thread(read, theirs, 300_000))
        sock, unread = await portway.aio.detach(writer)
        assert await drained == 300_000
        theirs.sendall(data[cut:])
        theirs.close()
        reader, writer = await portway.aio.attach(sock, unread)
        got += await reader.read(-1)
        writer.close()
        return got

    assert asyncio.run(main()) == data


def read(sock: socket.socket, size: int) -> int:
    got = 0
    while got < size:
        got += len(sock.recv(size - got))
    return got


def test_detach_refuses_what_it_cannot_do() -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        _, writer = await portway.aio.attach(one)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(TooManyDescriptors):
                await portway.aio.detach(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        writer.close()
        with pytest.raises(ObjectClosed):
            await portway.aio.detach(writer)
        other.close()

    asyncio.run(main())


requests = st.builds(
    lambda path, body: b"POST /%b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body),
    st.text("abc/", max_size=5).map(str.encode),
    st.binary(max_size=30),
)


@given(st.lists(requests, min_size=1, max_size=4), requests.filter(bool), st.data())
def test_the_end_of_messages_is_found(whole: list[bytes], last: bytes, data: st.DataObject) -> None:
    pytest.importorskip("httptools")
    from portway.supervise.asgi.httptools_moving import end_of_messages

    cut = data.draw(st.integers(1, last.index(b"\r\n\r\n") + 3))
    joined = b"".join(whole)
    assert end_of_messages(joined + last[:cut], len(whole)) == len(joined)
