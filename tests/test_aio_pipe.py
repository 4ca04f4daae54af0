"""Named pipes in asyncio: the twins do what the originals do, and cancelling loses nothing. On asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import portway
from portway import aio, errors

sys.path.insert(0, str(Path(__file__).parent / "kernel"))
from pipe_world import pipe_root, remains
from sync_world import in_thread

__all__ = ["pipe_root"]
pytestmark = pytest.mark.usefixtures("pipe_root", "no_leaks")


@pytest.fixture(scope="module", autouse=True)
def _uvloop_has_its_own() -> None:
    """The first loop of libuv opens a pipe for signals that stays for good."""
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``run(coroutine)``: in a loop of its own, at most 60 seconds."""
    factory = pytest.importorskip("uvloop").new_event_loop if request.param == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:

        def go(work: Coroutine[Any, Any, Any]) -> Any:
            async def limited() -> Any:
                return await asyncio.wait_for(work, 60)

            return runner.run(limited())

        yield go


async def pair(name: str = "p", **options: Any) -> tuple[Any, Any, Any]:
    options.setdefault("mode", "message")
    server = aio.NamedPipeServer(name, **options)
    client = await aio.NamedPipeClient.open(name)
    return server, await server.accept(5), client


@contextlib.asynccontextmanager
async def paired(**options: Any) -> Any:
    server, pipe, client = await pair(**options)
    async with server, pipe, client:
        yield server, pipe, client


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def echo(pipe: Any) -> None:
    async for one in pipe:
        await pipe.send(one)


# -- as the originals --------------------------------------------------------------------------------------------------


def test_a_conversation(run: Any, pipe_root: str) -> None:
    async def main() -> None:
        async with paired(max_instances=1) as (server, pipe, client):
            for data in (b"", b"a", b"x" * 65536, b"y" * 1_000_000):
                sending = asyncio.ensure_future(client.send(data))
                assert await pipe.receive(timeout=10) == data
                assert await sending == len(data)
            await client.send(b"0123456789")
            with pytest.raises(errors.MoreData) as more:
                await pipe.receive(4)
            assert (more.value.data, more.value.left) == (b"0123", 6)
            assert pipe.peek(2) == (b"45", 6, 4)
            assert await pipe.receive() == b"456789"
            assert (pipe.peer.pid, client.mode, pipe.name, pipe.fileno() > 0) == (os.getpid(), "message", "p", True)
            with pytest.raises(errors.PipeBusy):
                await aio.NamedPipeClient.open("p")
            with pytest.raises(errors.OperationTimeout):
                await aio.NamedPipeClient.open("p", timeout=0.05)
            with pytest.raises(errors.OperationTimeout):
                await aio.wait_pipe("p", 0.05)
            waiting = asyncio.ensure_future(aio.wait_pipe("p", 20))
            opening = asyncio.ensure_future(aio.NamedPipeClient.open("p", timeout=20))
            await turns()
            await pipe.aclose()
            await asyncio.wait_for(asyncio.gather(opening), 10)
            (await opening).sync.close()
            (await server.accept(5)).sync.close()
            await waiting
            with pytest.raises(errors.BrokenPipe):
                await client.receive(timeout=5)
            with pytest.raises(errors.NoData):
                await client.send(b"x")
        for call in (aio.NamedPipeClient.open("p"), aio.wait_pipe("p", 5), aio.call_pipe("p", b"")):
            with pytest.raises(errors.PipeNotFound):
                await call

    run(main())
    assert remains(pipe_root) == []


def test_byte_pipes_and_directions(run: Any) -> None:
    async def main() -> None:
        async with paired(mode="byte") as (_, pipe, client):
            await client.send(b"abc")
            assert await pipe.receive(2) == b"ab"
            assert await pipe.receive() == b"c"
            with pytest.raises(errors.BadPipe):
                await client.transact(b"x")
        async with paired(name="i", direction="inbound") as (_, pipe, client):
            for call in (pipe.send(b"x"), client.receive(timeout=0), pipe.flush()):
                with pytest.raises(errors.AccessDenied):
                    await call

    run(main())


def test_appear_and_timeouts(run: Any) -> None:
    async def main() -> None:
        with pytest.raises(errors.OperationTimeout):
            await aio.NamedPipeClient.open("p", appear=True, timeout=0.03)
        opening = asyncio.ensure_future(aio.NamedPipeClient.open("p", appear=True, timeout=20))
        await turns()
        async with aio.NamedPipeServer("p") as server:
            for timeout in (0, 0.02):
                with contextlib.suppress(errors.OperationTimeout):
                    (await server.accept(timeout)).sync.close()
                    break
            async with await opening:
                pass
            while True:
                try:
                    (await server.accept(0)).sync.close()
                except errors.OperationTimeout:
                    break
            client = await aio.NamedPipeClient.open("p", call_timeout=0.02)
            async with client:
                for call in (client.receive(), client.receive(timeout=0), client.receive(timeout=0.01)):
                    with pytest.raises(errors.OperationTimeout):
                        await call

    run(main())


def test_serve_and_call(run: Any) -> None:
    async def main() -> None:
        async with aio.NamedPipeServer("p", mode="message") as server:
            serving = asyncio.ensure_future(server.serve(echo))
            assert await asyncio.gather(*(aio.call_pipe("p", b"%d" % n, timeout=20) for n in range(30))) == [
                b"%d" % n for n in range(30)
            ]
            assert await asyncio.to_thread(portway.call_pipe, "p", b"from a thread", timeout=20) == b"from a thread"
            with pytest.raises(errors.MoreData):
                await aio.call_pipe("p", b"long", size=2, timeout=20)
            client = await aio.NamedPipeClient.open("p", timeout=20)
            assert await client.transact(b"x", timeout=20) == b"x"
            serving.cancel()  # its conversations end with it
            with pytest.raises(asyncio.CancelledError):
                await serving
            with pytest.raises(errors.BrokenPipe):
                await client.receive(timeout=5)
            await client.aclose()

    run(main())


def test_what_a_handler_raises_is_reported(run: Any) -> None:
    async def main() -> None:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

        async def handler(pipe: Any) -> None:
            raise KeyError(await pipe.receive())

        async with aio.NamedPipeServer("p", mode="message") as server:
            serving = asyncio.ensure_future(server.serve(handler))
            with pytest.raises(errors.BrokenPipe):
                await aio.call_pipe("p", b"x", timeout=20)
            await server.aclose()
            await serving
        assert [type(one) for one in reported] == [KeyError]

    run(main())


def test_flush_disconnect_and_transact(run: Any) -> None:
    async def main() -> None:
        async with paired(max_instances=1) as (server, pipe, client):
            await client.flush()
            await client.send(b"x")
            with pytest.raises(errors.OperationTimeout):
                await client.flush(timeout=0.02)
            with pytest.raises(errors.PipeBusy):
                await pipe.transact(b"unread data is in the way")
            flushing = asyncio.ensure_future(client.flush())
            await turns()
            assert await pipe.receive() == b"x"
            await flushing
            talking = asyncio.ensure_future(echo(pipe))
            assert await client.transact(b"question", timeout=5) == b"question"
            talking.cancel()
            await turns()
            await pipe.send(b"lost")
            await pipe.disconnect()
            for call in (client.receive(timeout=5), client.send(b"x")):
                with pytest.raises(errors.PipeNotConnected):
                    await call
            async with aio.NamedPipeClient("p", timeout=5) as other, await server.accept(5) as again:
                waiting = asyncio.ensure_future(other.receive())
                await turns()
                await again.disconnect()
                with pytest.raises(errors.PipeNotConnected):
                    await waiting

    run(main())


def test_run_as_client(run: Any) -> None:
    async def main() -> None:
        async with paired() as (_, pipe, _):
            with pytest.raises(errors.AccessDenied, match="run_as_client"):
                pipe.impersonate()
            if os.geteuid() == 0:
                assert await pipe.run_as_client(os.geteuid) == 0

    run(main())


# -- ending what waits -------------------------------------------------------------------------------------------------


def test_aclose_and_cancel_end_what_waits(run: Any) -> None:
    async def main() -> None:
        async with paired() as (server, pipe, client):
            for end, kind in (("cancel", errors.OperationAborted), ("aclose", errors.ObjectClosed)):
                waiting = [asyncio.ensure_future(one) for one in (
                    pipe.receive(), pipe.receive(), pipe.send(b"x" * (8 << 20)), pipe.send(b"queued"), server.accept(),
                    server.accept(),
                )]  # fmt: skip
                await turns()
                for one in (pipe, server):
                    result = getattr(one, end)()
                    if result is not None:
                        await result
                results = await asyncio.gather(*waiting, return_exceptions=True)
                assert [type(one) for one in results] == [kind] * 6
            for call in (pipe.receive(), pipe.send(b""), server.accept()):
                with pytest.raises(errors.ObjectClosed):
                    await call
            with pytest.raises((errors.MessageAbandoned, errors.BrokenPipe)):
                await client.receive(timeout=5)

    run(main())


def test_two_tasks_receive_in_turn(run: Any) -> None:
    async def main() -> None:
        async with paired() as (_, pipe, client):
            receiving = [asyncio.ensure_future(pipe.receive(timeout=20)) for _ in range(10)]
            await turns()
            for number in range(10):
                await client.send(b"%d" % number)
            assert await asyncio.gather(*receiving) == [b"%d" % number for number in range(10)]

    run(main())


def test_many_senders_never_mix_their_messages(run: Any) -> None:
    """Large ones that wait for room, small ones that need none: whole, each sender's in order."""

    async def main() -> None:
        async with paired() as (_, pipe, client):

            async def sender(who: int) -> None:
                for number in range(12):
                    size = (400_000, 5, 70_000)[(who + number) % 3]
                    await client.send(b"%d %d " % (who, number) + bytes([who]) * size)
                    if number % 4 == who % 4:
                        await asyncio.sleep(0)

            sending = [asyncio.ensure_future(sender(who)) for who in range(6)]
            seen: dict[int, int] = {}
            for _ in range(72):
                data = await pipe.receive(timeout=20)
                who, number = map(int, data.split(b" ", 2)[:2])
                rest = data.split(b" ", 2)[2]
                assert number == seen.get(who, 0) and rest == bytes([who]) * (400_000, 5, 70_000)[(who + number) % 3]
                seen[who] = number + 1
            await asyncio.gather(*sending)

    run(main())


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_at_random_loses_and_doubles_nothing(seed: int, run: Any) -> None:
    """Receives are cancelled and time out all the time, sends too: each message that was sent whole comes once."""
    noise = random.Random(seed)

    async def main() -> None:
        async with paired() as (_, pipe, client):
            sent: list[int] = []
            got: list[int] = []
            abandoned = 0

            async def send() -> None:
                for number in range(250):
                    size = noise.choice([0, 10, 70_000, 300_000])
                    task = asyncio.ensure_future(client.send(number.to_bytes(4, "little") + b"x" * size))
                    if noise.random() < 0.3:
                        await turns(noise.randrange(3))
                        task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                        sent.append(number)
                while True:
                    try:
                        await client.send(b"last")
                        return
                    except errors.OperationTimeout:
                        pass

            async def receive() -> None:
                nonlocal abandoned
                while True:
                    task = asyncio.ensure_future(pipe.receive(timeout=noise.choice([None, None, 0.001, 0])))
                    if noise.random() < 0.4:
                        await turns(noise.randrange(4))
                        task.cancel()
                    try:
                        data = await task
                    except (asyncio.CancelledError, errors.OperationTimeout):
                        await asyncio.sleep(0)
                        continue
                    except errors.MessageAbandoned:
                        abandoned += 1
                        continue
                    if data == b"last":
                        return
                    got.append(int.from_bytes(data[:4], "little"))

            await asyncio.gather(send(), receive())
            assert got == sorted(set(got)), "doubled, or out of order"
            assert set(sent) <= set(got), "lost"
            assert len(got) + abandoned <= 250

    run(main())


def test_cancelled_accepts_lose_no_client(run: Any) -> None:
    noise = random.Random(7)

    async def main() -> None:
        async with aio.NamedPipeServer("p", mode="message", backlog=4) as server:
            served: list[bytes] = []

            async def serve() -> None:
                while len(served) < 60:
                    tasks = [asyncio.ensure_future(server.accept(noise.choice([None, 0.001]))) for _ in range(3)]
                    await turns(noise.randrange(5))
                    tasks[noise.randrange(3)].cancel()
                    if noise.random() < 0.5:
                        server.cancel()
                    done = await asyncio.wait(tasks, timeout=0.01)
                    for one in done[1]:
                        one.cancel()
                    for one in tasks:
                        with contextlib.suppress(
                            asyncio.CancelledError, errors.OperationTimeout, errors.OperationAborted
                        ):
                            async with await one as pipe:
                                served.append(await pipe.receive(timeout=5))

            async def ask(number: int) -> None:
                async with aio.NamedPipeClient("p", timeout=30) as client:
                    await client.send(b"%d" % number)
                    with contextlib.suppress(errors.BrokenPipe):
                        await client.receive()

            await asyncio.gather(serve(), *(ask(number) for number in range(60)))
            assert sorted(map(int, served)) == list(range(60))

    run(main())


def test_a_cancel_inside_a_large_send_is_told_to_the_reader(run: Any) -> None:
    async def main() -> None:
        async with paired() as (_, pipe, client):
            sending = asyncio.ensure_future(client.send(b"x" * (32 << 20)))
            await turns(20)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            following = asyncio.ensure_future(client.send(b"next"))
            with pytest.raises(errors.MessageAbandoned):
                await pipe.receive(timeout=10)
            assert await pipe.receive(timeout=10) == b"next"
            await following
            with pytest.raises(errors.OperationTimeout):
                await client.send(b"x" * (32 << 20), timeout=0.05)
            with pytest.raises(errors.MessageAbandoned):
                await pipe.receive(timeout=10)

    run(main())


# -- many --------------------------------------------------------------------------------------------------------------


def test_a_thousand_clients(run: Any) -> None:
    """In one loop, over at most 255 instances: each gets its own answer."""

    async def main() -> None:
        async with aio.NamedPipeServer("p", mode="message", backlog=100) as server:
            serving = asyncio.ensure_future(server.serve(echo))

            async def ask(number: int) -> bytes:
                return await aio.call_pipe("p", b"%d" % number, timeout=50)

            answers = await asyncio.gather(*(ask(number) for number in range(1000)))
            assert answers == [b"%d" % number for number in range(1000)]
            await server.aclose()
            await serving

    run(main())


def test_a_loop_and_threads_share_a_pipe(run: Any) -> None:
    async def main() -> None:
        with portway.NamedPipeServer("p", mode="message") as server:
            serve = in_thread(lambda: server.serve(lambda pipe: [pipe.send(one.upper()) for one in pipe]))
            async with aio.NamedPipeClient("p", timeout=20) as client:
                for number in range(50):
                    assert await client.transact(b"a%d" % number, timeout=10) == b"A%d" % number
        serve()

    run(main())
