"""The asyncio twins: the same nouns, awaited; cancelling loses nothing, waiting blocks no loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

import portway
from portway import aio
from portway.errors import (
    HandoffRefused,
    InformationExpired,
    InformationUsed,
    ObjectClosed,
    OperationTimeout,
    ProcessNotFound,
)
from portway.kernel import inbox as inbox_module
from portway.kernel.session import WINDOW

pytestmark = pytest.mark.usefixtures("no_leaks")
ME = os.getpid()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def turns(count: int = 5) -> None:
    """Lets what is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("way", ["pid", "message"])
def test_duplicate_and_claim(way: Any, tcp: Any) -> None:
    far, near = tcp()

    async def main() -> None:
        async with aio.HandoffInbox():
            info = await aio.duplicate_socket(near, ME, way=way, unread=b"u", target_timeout=None)
            sock = await aio.socket_from(info)
            with sock:
                assert isinstance(sock, portway.SharedSocket) and sock.gettimeout() == 0.0 and sock.unread == b"u"
                await asyncio.get_running_loop().sock_sendall(sock, b"hello")
            with pytest.raises(InformationUsed):
                await aio.socket_from(info)
            closed = await aio.duplicate_and_close(near, ME, way=way)
            assert near.fileno() == -1
            (await aio.socket_from(closed)).close()
            await aio.wait_claimed(closed, 10)
            await aio.wait_claimed(info, 10)

    run(main())
    assert far.recv(9) == b"hello" and far.recv(9) == b""


def test_waiting_for_the_claim(tcp: Any, peer: Any) -> None:
    _, near = tcp()
    target = peer()

    async def main() -> None:
        info = await aio.duplicate_socket(near, target.pid)
        with pytest.raises(OperationTimeout, match=f"pid {target.pid} to claim"):
            await aio.wait_claimed(info, 0.01)
        waiting = asyncio.create_task(aio.wait_claimed(info))
        cancelled = asyncio.create_task(aio.wait_claimed(info))
        await turns()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert not waiting.done()
        target.start("s = portway.socket_from(info)", info=info)
        await asyncio.wait_for(waiting, 20)
        await asyncio.to_thread(target.result)
        soon = await aio.duplicate_socket(near, target.pid, expires=0.1)
        with pytest.raises(InformationExpired):
            await aio.wait_claimed(soon, 20)
        with pytest.raises(InformationExpired):
            await aio.wait_claimed(soon, 20)
        with pytest.raises(ValueError, match="made by pid"):
            await aio.wait_claimed(target.run("portway.duplicate_socket(s, pid)", pid=ME))

    run(main())


def test_an_offer_outlives_the_loop_that_waited_for_it(tcp: Any, peer: Any) -> None:
    """Its end must not fail in the reaper, where nobody would see the others expire any more."""
    _, near = tcp()
    target = peer()
    info = portway.duplicate_socket(near, target.pid, expires=0.3)

    async def main() -> None:
        task = asyncio.create_task(aio.wait_claimed(info))
        await turns()
        del task

    run(main())
    with pytest.raises(InformationExpired):
        portway.wait_claimed(info, 20)


def test_receive_waits_and_is_non_blocking(tcp: Any) -> None:
    _, near = tcp()

    async def main() -> None:
        async with aio.HandoffInbox() as box:
            for call in (box.receive, box.receive_many):
                for limit in (0, 0.01):
                    with pytest.raises(OperationTimeout, match="to be handed over"):
                        await call(limit)
            waiting = asyncio.create_task(box.receive())
            await turns()
            async with aio.HandoffSession(ME) as session:
                await session.send(near, state=b"s")
                with await waiting as sock:
                    assert sock.gettimeout() == 0.0 and sock.state == b"s"
                await session.send_many([near] * 300)
                got = []
                while len(got) < 300:
                    got += await box.receive_many(10)
                for one in got:
                    assert one.gettimeout() == 0.0
                    one.close()

    run(main())


def test_cancelled_receives_lose_nothing(tcp: Any) -> None:
    """Receivers are cancelled around the moment in which sockets arrive; each arrives at one of them."""
    _, near = tcp()
    count = 300

    async def main() -> list[bytes]:
        got: list[bytes] = []

        async def take(box: aio.HandoffInbox) -> None:
            with await box.receive() as sock:
                got.append(sock.state)

        async with aio.HandoffInbox() as box, aio.HandoffSession(ME) as session:
            sender = asyncio.create_task(send_all(session))
            for attempt in itertools.count():
                if len(got) == count:
                    break
                task = asyncio.create_task(take(box))
                await turns(attempt % 7)
                task.cancel()
                await asyncio.wait([task])
            await sender
        return got

    async def send_all(session: aio.HandoffSession) -> None:
        for n in range(count):
            await session.send(near, state=b"%d" % n)

    assert run(main()) == [b"%d" % n for n in range(count)]


def test_several_receivers_keep_their_own_time(tcp: Any) -> None:
    _, near = tcp()

    async def main() -> None:
        async with aio.HandoffInbox() as box, aio.HandoffSession(ME) as session:
            patient = asyncio.create_task(box.receive())
            await turns()
            with pytest.raises(OperationTimeout):  # though another waits before it
                await box.receive(0.01)
            await session.send(near)
            (await patient).close()

    run(main())


def test_closing_wakes_who_waits_and_ends_iteration(tcp: Any) -> None:
    _, near = tcp()

    async def main() -> None:
        async with aio.HandoffInbox() as box, aio.HandoffSession(ME) as session:
            seen = []

            async def iterate() -> None:
                async for sock in box:
                    sock.close()
                    seen.append(sock)

            task = asyncio.create_task(iterate())
            await session.send_many([near] * 3)
            await until(lambda: len(seen) == 3)
            await turns()
            await box.aclose()
            await asyncio.wait_for(task, 10)
        async with aio.HandoffInbox() as box:
            waiting = [asyncio.create_task(box.receive()) for _ in range(3)]
            await turns()
            await box.aclose()
            for one in waiting:
                with pytest.raises(ObjectClosed):
                    await asyncio.wait_for(one, 10)
            with pytest.raises(ObjectClosed):
                await box.receive()

    run(main())


def test_socket_from_finds_records_in_a_full_inbox_and_cancelling_keeps_them(
    tcp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_WAITING", 3)
    _, near = tcp()

    async def main() -> None:
        async with aio.HandoffInbox() as box, aio.HandoffSession(ME) as session:
            await session.send_many([near] * 3)
            await until(lambda: not box._inbox._pump())
            info = await session.duplicate(near)
            with pytest.raises(OperationTimeout):
                await aio.socket_from(info, timeout=0.02)
            task = asyncio.create_task(aio.socket_from(info))
            await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
            await asyncio.wait([task])
            for sock in await box.receive_many(5):
                sock.close()
            (await aio.socket_from(info)).close()

    run(main())


async def beats(work: Awaitable[Any]) -> int:
    """How often the loop came round while `work` ran."""
    count = 0

    async def beat() -> None:
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0.001)

    task = asyncio.create_task(beat())
    try:
        await work
    finally:
        task.cancel()
    return count


@pytest.mark.parametrize("large", [False, True], ids=["many", "large"])
def test_back_pressure_does_not_block_the_loop(large: bool, peer: Any) -> None:
    target = peer()
    target.run("box = portway.HandoffInbox()\nbox._lock.acquire()")
    sock = socket.socket()

    async def main() -> None:
        async with aio.HandoffSession(target.pid, timeout=0.3) as session:
            many = [sock] * (WINDOW + 200)
            work = session.send(sock, unread=bytes(1 << 20)) if large else session.send_many(many)

            async def expect() -> None:
                with pytest.raises(OperationTimeout):
                    await work

            assert await beats(expect()) > 20

    with sock:
        run(main())


def test_what_waits_goes_on_when_the_target_receives(peer: Any) -> None:
    target = peer()
    target.run("box = portway.HandoffInbox()\nbox._lock.acquire()\ngot = []")

    async def main() -> None:
        async with aio.HandoffSession(target.pid, timeout=30) as session:
            sending = asyncio.create_task(session.send_many([sock] * (WINDOW + 200)))
            await asyncio.sleep(0.02)
            assert not sending.done()
            target.start(f"""
box._lock.release()
while len(got) < {WINDOW + 200}: got += box.receive_many(20)
""")
            await sending
            await asyncio.to_thread(target.result)
            infos = await session.duplicate_many([sock] * 150)
            assert len(infos) == 150

    with socket.socket() as sock:
        run(main())


def test_errors_are_the_same(tcp: Any, peer: Any) -> None:
    _, near = tcp()
    gone = peer()
    gone.kill()

    async def main() -> None:
        with pytest.raises(ProcessNotFound):
            await aio.duplicate_socket(near, gone.pid)
        with pytest.raises(HandoffRefused):
            await aio.duplicate_socket(near, ME, way="message")
        with pytest.raises(HandoffRefused):
            await aio.HandoffSession.open(ME)
        closed = aio.HandoffSession(ME)
        with pytest.raises(ObjectClosed):
            await closed.send(near)
        await closed.aclose()
        async with aio.HandoffInbox():
            opened = await aio.HandoffSession.open(ME)
            await opened.aclose()
            with pytest.raises(ObjectClosed):
                await opened.send(near)

    run(main())


def test_a_moved_connection_goes_on_in_streams(tcp: Any, peer: Any) -> None:
    """The whole way: streams here, detach, another process, streams there."""
    far, near = tcp()
    target = peer()
    far.sendall(b"line one\nline tw")

    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(sock=near)
        first = await reader.readline()
        await until(lambda: len(reader._buffer) == 7)  # type: ignore[attr-defined]
        sock, unread = await aio.detach(writer)
        assert unread == b"line tw"
        info = await aio.duplicate_and_close(sock, target.pid, unread=unread)
        target.start("""
async def go():
    sock = await aio.socket_from(info)
    reader, writer = await aio.attach(sock, sock.unread)
    writer.write((await reader.readline()).upper())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
asyncio.run(go())
""", info=info)  # fmt: skip
        far.sendall(b"o\n")
        await asyncio.to_thread(target.result)
        return first

    assert run(main()) == b"line one\n"
    assert far.recv(100) == b"LINE TWO\n"
