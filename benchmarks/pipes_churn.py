"""``pipe.churn``: one name, served by processes that are killed all the time, and opened by clients that are, too.

Four processes serve 16 instances each. A thousand clients in 20 processes, half of these with threads and half with
tasks, open the pipe, send what nobody else sends, want their own answer, close, and come again within a second; one in
a hundred conversations is left before the answer and not counted. Every 100 ms a server is killed with -9 and another
one started, every 500 ms a process of 50 clients.

connections       answered conversations
wedged            conversations without their own answer for 10 s. Tried again only after `PipeBusy`, `PipeNotFound` or
                  a break before the answer; every other error, and every client that does not end, counts here
leaked            when all clients have gone and the pipes were listed once: instances, descriptors and files beyond
                  those of idle servers, descriptors of clients, and, when all servers were killed and the pipes listed
                  once more, files
worst_ms          the longest conversation, waiting for an instance included; worst_threads_ms, worst_tasks_ms apart
killed, killed_clients   servers, and processes of clients
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from .harness import Figures, Options, remark

__all__ = ["run"]

NAME = "churn"
SERVERS, INSTANCES, BACKLOG, PROCESSES, CLIENTS = 4, 16, 4, 20, 50
LIMIT, LIMIT_NS = 10.0, 10_000_000_000
TICK, PAUSE = 0.1, 1.0
SERVED, WEDGED, WORST, BEGAN, ASKED = range(5)  # a client's cells; BEGAN: 0 between two conversations
CELLS = 5


class Board:
    """Numbers that all processes share: five of each client, two of each process of clients, and whether to stop."""

    def __init__(self, processes: int, clients: int) -> None:
        self.processes, self.clients = processes, clients
        self._map = mmap.mmap(-1, 8 * (1 + 2 * processes + CELLS * processes * clients))
        self.cells = memoryview(self._map).cast("Q")

    @property
    def stopping(self) -> bool:
        return bool(self.cells[0])

    def stop(self) -> None:
        self.cells[0] = 1

    def process(self, number: int) -> int:
        """Where the cells of a process are: 1 + its descriptors before, and after."""
        return 1 + 2 * number

    def client(self, process: int, number: int) -> int:
        return 1 + 2 * self.processes + CELLS * (process * self.clients + number)

    def worst(self, kind: int) -> list[int]:
        """Nanoseconds of each client in processes with threads (0) or tasks (1)."""
        mine = range(kind, self.processes, 2)
        return [self.cells[self.client(process, number) + WORST] for process in mine for number in range(self.clients)]

    def all(self, cell: int) -> Iterator[int]:
        for at in range(1 + 2 * self.processes, len(self.cells), CELLS):
            yield self.cells[at + cell]


# -- clients -----------------------------------------------------------------------------------------------------------


class Client:
    """What one client remembers of its conversations."""

    def __init__(self, board: Board, process: int, number: int) -> None:
        self.cells, self.at, self.random = board.cells, board.client(process, number), random.Random()
        self.longest = PAUSE * board.clients / CLIENTS
        self.name = f"{process}.{number}"

    def begin(self) -> bytes:
        self.began = self.cells[self.at + BEGAN] = time.monotonic_ns()
        self.cells[self.at + ASKED] += 1
        return f"{self.name}.{self.random.getrandbits(64)}".encode()

    def left(self) -> float:
        return max(LIMIT - (time.monotonic_ns() - self.began) / 1e9, 0.0)

    def pause(self) -> float:
        """Seconds between two conversations."""
        return self.random.random() * self.longest

    def leaves(self) -> bool:
        return self.random.random() < 0.01

    def answered(self, right: bool) -> None:
        self.end(SERVED if right else WEDGED, "" if right else "somebody else's answer")

    def end(self, what: int, why: str = "") -> None:
        """`what`: SERVED, WEDGED, or -1 for a conversation that the client left."""
        took = time.monotonic_ns() - self.began
        self.cells[self.at + WORST] = max(self.cells[self.at + WORST], took)
        if what >= 0:
            self.cells[self.at + what] += 1
        self.cells[self.at + BEGAN] = 0
        if why:
            remark(f"pipe.churn: client {self.name}, after {took / 1e9:.2f} s: {why}")


def _answer(question: bytes) -> bytes:
    return b"answer to " + question


def _converse(client: Client, errors: Any, open_pipe: Callable[..., Any]) -> None:
    question = client.begin()
    while True:
        try:
            left = client.left()
            if not left:
                return client.end(WEDGED, "not served")
            with open_pipe(NAME, timeout=left, call_timeout=left) as pipe:
                pipe.send(question)
                if client.leaves():
                    return client.end(-1)
                answer = pipe.receive()
        except errors.PipeNotFound:
            time.sleep(0.002)
        except (errors.PipeBusy, errors.BrokenPipe, errors.NoData):
            continue
        except Exception as error:
            return client.end(WEDGED, f"{type(error).__name__}: {error}")
        else:
            return client.answered(answer == _answer(question))


async def _converse_aio(client: Client, errors: Any, aio: Any) -> None:
    question = client.begin()
    while True:
        try:
            left = client.left()
            if not left:
                return client.end(WEDGED, "not served")
            async with aio.NamedPipeClient(NAME, timeout=left, call_timeout=left) as pipe:
                await pipe.send(question)
                if client.leaves():
                    return client.end(-1)
                answer = await pipe.receive()
        except errors.PipeNotFound:
            await asyncio.sleep(0.002)
        except (errors.PipeBusy, errors.BrokenPipe, errors.NoData):
            continue
        except Exception as error:
            return client.end(WEDGED, f"{type(error).__name__}: {error}")
        else:
            return client.answered(answer == _answer(question))


def _clients(board: Board, process: int) -> None:
    import portway
    from portway import aio, errors

    mine = [Client(board, process, number) for number in range(board.clients)]
    at = board.process(process)

    def until_stop(client: Client) -> None:
        while not board.stopping:
            time.sleep(client.pause())
            _converse(client, errors, portway.NamedPipeClient)

    async def until_stop_aio(client: Client) -> None:
        while not board.stopping:
            await asyncio.sleep(client.pause())
            await _converse_aio(client, errors, aio)

    async def tasks() -> None:
        await asyncio.gather(*(until_stop_aio(client) for client in mine))

    board.cells[at] = 1 + _descriptors(os.getpid())
    if process % 2:
        asyncio.run(tasks())
    else:
        threads = [threading.Thread(target=until_stop, args=(client,)) for client in mine]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    board.cells[at + 1] = 1 + _descriptors(os.getpid())


# -- servers -----------------------------------------------------------------------------------------------------------


def _server(number: int, ready: int) -> None:
    import portway

    most = SERVERS * INSTANCES
    with portway.NamedPipeServer(NAME, mode="message", max_instances=most, instances=INSTANCES) as server:
        if ready >= 0:
            os.write(ready, b"1")
            os.close(ready)
        server.serve(_serve)


def _serve(pipe: Any) -> None:
    for question in pipe:
        pipe.send(_answer(question))


# -- the run -----------------------------------------------------------------------------------------------------------


def _fork(work: Callable[..., None], *args: Any) -> int:
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # an exception in the hooks of fork() would be lost
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    else:
        code = 1
        try:
            for one in ends:
                signal.signal(one, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
            work(*args)
            code = 0
        except BaseException as error:
            remark(f"pipe.churn: {work.__name__}{args[1:]}: {type(error).__name__}: {error}")
        finally:
            os._exit(code)
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _files() -> list[str]:
    return [f"{folder}/{name}" for folder, _, names in os.walk(os.environ["PORTWAY_ROOT"]) for name in names]


def run(options: Options, figures: Figures) -> None:
    from portway import NamedPipeClient, NamedPipeServer, aio

    _ = NamedPipeClient, NamedPipeServer, aio.NamedPipeClient  # imported before the first fork
    processes, clients, wanted = (2, 5, 200) if options.quick else (PROCESSES, CLIENTS, 100_000)
    board = Board(processes, clients)
    servers: list[int] = []
    crowd: list[int] = []
    counts: Counter[str] = Counter()
    try:
        idle = [_idle(servers, number) for number in range(SERVERS)]
        files = len(_files())
        crowd += [_fork(_clients, board, number) for number in range(processes)]
        _kill_around(board, servers, crowd, counts, wanted)
        board.stop()
        wedged = sum(board.all(WEDGED)) + _stragglers(board, crowd)
        leaked = _leaked(board, servers, idle[-1], files)
    finally:
        for pid in [*crowd, *servers]:
            with suppress(OSError):
                _kill(pid)
    leaked += _left_behind()
    threads, tasks = (max(board.worst(kind)) / 1e6 for kind in (0, 1))
    for metric, value in (
        ("connections", sum(board.all(SERVED))), ("wedged", wedged), ("leaked", leaked),
        ("worst_ms", max(threads, tasks)), ("worst_threads_ms", threads), ("worst_tasks_ms", tasks), *counts.items(),
    ):  # fmt: skip
        figures.add("pipe.churn", "portway", metric, value)


def _idle(servers: list[int], number: int) -> int:
    """Starts a server and waits until it listens; its descriptors."""
    reads, writes = os.pipe()
    servers.append(_fork(_server, number, writes))
    os.close(writes)
    os.read(reads, 1)
    os.close(reads)
    return _descriptors(servers[-1])


def _kill_around(board: Board, servers: list[int], crowd: list[int], counts: Counter[str], wanted: int) -> None:
    began = due = time.monotonic()
    counts.update(killed=0, killed_clients=0)
    told = 0
    while (served := sum(board.all(SERVED))) < wanted:
        due = max(due + TICK, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))
        number = random.randrange(len(servers))
        _kill(servers[number])
        servers[number] = _fork(_server, number, -1)
        counts["killed"] += 1
        if counts["killed"] % 5 == 0:
            number = random.randrange(len(crowd))
            _kill(crowd[number])
            for client in range(board.clients):
                board.cells[board.client(number, client) + BEGAN] = 0
            crowd[number] = _fork(_clients, board, number)
            counts["killed_clients"] += 1
        if time.monotonic() - began > told + 5:
            told += 5
            remark(f"pipes: churn, {served:,} of {wanted:,} after {told} s, {counts['killed']} servers killed")
    counts["seconds"] = int(time.monotonic() - began)


def _stragglers(board: Board, crowd: list[int]) -> int:
    """Clients that do not end although their time is over."""
    limit = time.monotonic() + LIMIT + 5
    while crowd and time.monotonic() < limit:
        for pid in list(crowd):
            if os.waitpid(pid, os.WNOHANG)[0]:
                crowd.remove(pid)
        time.sleep(0.01)
    return sum(began != 0 for began in board.all(BEGAN))


def _leaked(board: Board, servers: list[int], idle: int, files: int) -> int:
    import portway

    leaked, limit = 0, time.monotonic() + 5
    for number in range(board.processes):
        before, after = board.cells[board.process(number)], board.cells[board.process(number) + 1]
        leaked += max(after - before, 0) if after else 0
    while any(_descriptors(pid) > idle for pid in servers) and time.monotonic() < limit:
        time.sleep(0.05)  # the last clients have gone this moment, their servers are looking
    each = [_descriptors(pid) for pid in servers]
    listed = portway.list_pipes()
    here, slots, in_use = len(_files()), sum(one.instances for one in listed), sum(one.in_use for one in listed)
    extra = max(slots - SERVERS * BACKLOG, 0) + in_use + sum(max(one - idle, 0) for one in each) + max(here - files, 0)
    if leaked or extra:
        remark(
            f"pipe.churn: leaked: {slots} instances, {in_use} in use, {each} descriptors (idle: {idle}), {here} files "
            f"(idle: {files}), {leaked} descriptors of clients"
        )
    return leaked + extra


def _left_behind() -> int:
    """All are dead, one looks."""
    import portway

    portway.list_pipes()
    left = _files()
    if left:
        remark(f"pipe.churn: left behind: {left}")
    return len(left)
