"""Those who wait for a free instance: in line, with two descriptors between them, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest
from handoff_peers import descriptors, patiently
from sync_world import in_thread

import portway
from portway import NamedPipeClient, NamedPipeServer, aio, errors
from portway.kernel import pipe_waiting

pytestmark = pytest.mark.usefixtures("pipe_root", "no_leaks")
MANY = 40


def busy(**options: Any) -> tuple[NamedPipeServer, Any, NamedPipeClient]:
    """A pipe whose only instance is taken."""
    server = NamedPipeServer("p", mode="message", max_instances=1, **options)
    client = NamedPipeClient("p")
    return server, server.accept(5), client


def in_line() -> int:
    return sum(crowd._users for crowd in pipe_waiting._crowds.values())


def echo(server: NamedPipeServer, times: int) -> None:
    for _ in range(times):
        with server.accept(20) as pipe:
            pipe.send(pipe.receive(timeout=20))


def ask(number: int) -> bytes:
    with NamedPipeClient("p", timeout=20, call_timeout=20) as pipe:
        pipe.send(b"%d" % number)
        return pipe.receive()


def test_many_threads_wait_with_two_descriptors_and_all_come_in() -> None:
    server, pipe, client = busy()
    before = len(descriptors())
    waiting = [in_thread(lambda number=number: ask(number)) for number in range(MANY)]
    patiently(lambda: in_line() == MANY)
    assert len(descriptors()) - before <= 4  # the line's record, and what one who is looking opens for a moment
    client.close()
    pipe.close()
    serve = in_thread(lambda: echo(server, MANY))
    assert [join() for join in waiting] == [b"%d" % number for number in range(MANY)]
    serve()
    server.close()
    assert not pipe_waiting._crowds


def test_many_tasks_wait_with_two_descriptors_and_come_in_in_their_order() -> None:
    async def main() -> None:
        server, pipe, client = busy()
        before = len(descriptors())
        came: list[int] = []

        async def one(number: int) -> None:
            async with aio.NamedPipeClient("p", timeout=20, call_timeout=20) as end:
                came.append(number)
                await end.send(b"x")
                await end.receive()

        tasks = [asyncio.create_task(one(number)) for number in range(MANY)]
        while in_line() < MANY:
            await asyncio.sleep(0)
        assert len(descriptors()) - before <= 4
        client.close()
        pipe.close()
        serve = in_thread(lambda: echo(server, MANY))
        await asyncio.gather(*tasks)
        await asyncio.to_thread(serve)
        server.close()
        assert came == list(range(MANY))

    asyncio.run(main())


def test_whoever_gives_up_lets_the_next_one_look() -> None:
    server, pipe, client = busy()
    first = in_thread(lambda: NamedPipeClient("p", timeout=0.3))
    patiently(lambda: in_line() == 1)
    second = in_thread(lambda: NamedPipeClient("p", timeout=0.1))  # its time is over before its turn comes
    third = in_thread(lambda: ask(3))
    for join in (first, second):
        with pytest.raises(errors.OperationTimeout, match="no instance of the pipe p listens: 1 of 1 exist"):
            join()
    assert in_line() == 1
    client.close()
    pipe.close()
    echo(server, 1)
    assert third() == b"3"
    server.close()


def test_a_cancelled_task_leaves_the_line() -> None:
    async def main() -> None:
        server, pipe, client = busy()
        tasks = [asyncio.create_task(aio.NamedPipeClient.open("p", timeout=20)) for _ in range(3)]
        while in_line() < 3:
            await asyncio.sleep(0)
        for task in tasks[:2]:  # the one whose turn it is, and one who waits for it
            task.cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert in_line() == 1
        client.close()
        pipe.close()
        end, other = await tasks[2], server.accept(5)
        await end.send(b"x")
        assert other.receive(timeout=5) == b"x"
        await end.aclose()
        other.close()
        server.close()

    asyncio.run(main())


def test_the_line_ends_with_its_server() -> None:
    server, pipe, client = busy()
    waiting = [in_thread(lambda: NamedPipeClient("p", timeout=20)) for _ in range(3)]
    patiently(lambda: in_line() == 3)
    server.close()
    client.close()
    pipe.close()
    for join in waiting:
        with pytest.raises(errors.PipeNotFound):
            join()


def test_the_line_goes_on_at_a_server_that_comes_after_the_last_one() -> None:
    server, pipe, client = busy()
    waiting = [in_thread(lambda: NamedPipeClient("p", timeout=20, appear=True)) for _ in range(3)]
    patiently(lambda: in_line() == 3)
    for one in (client, pipe, server):
        one.close()
    with NamedPipeServer("p", mode="message", max_instances=3) as other:
        assert other.serving.record.header.max_instances == 3
        for join in waiting:
            join().close()


def test_a_fork_child_waits_in_a_line_of_its_own() -> None:
    server, pipe, client = busy()
    waiting = in_thread(lambda: ask(1))
    patiently(lambda: in_line() == 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if in_line() == 0 and ask(2) == b"2" else 2
        finally:
            os._exit(code)
    client.close()
    pipe.close()
    echo(server, 2)
    assert waiting() == b"1"
    assert os.waitpid(child, 0)[1] == 0
    server.close()


def test_wait_pipe_in_line_takes_nothing_from_those_behind_it() -> None:
    server, pipe, client = busy()
    first = in_thread(lambda: portway.wait_pipe("p", 20))
    patiently(lambda: in_line() == 1)
    second = in_thread(lambda: ask(2))
    patiently(lambda: in_line() == 2 and threading.active_count() > 2)
    client.close()
    pipe.close()
    echo(server, 1)
    first()
    assert second() == b"2"
    server.close()


def test_threads_come_in_in_their_order() -> None:
    server, pipe, client = busy()
    came: list[int] = []

    def one(number: int) -> None:
        with NamedPipeClient("p", timeout=20) as end:
            came.append(number)
            end.send(b"x")
            end.receive(timeout=20)

    waiting = []
    for number in range(MANY):
        waiting.append(in_thread(lambda number=number: one(number)))
        patiently(lambda number=number: in_line() == number + 1)
        crowd = next(iter(pipe_waiting._crowds.values()))
        patiently(lambda number=number, crowd=crowd: len(crowd.line.behind) == number)
    client.close()
    pipe.close()
    echo(server, MANY)
    for join in waiting:
        join()
    assert came == list(range(MANY))
    server.close()
