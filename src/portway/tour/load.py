"""The tour's clients: ``python -m portway.tour.load PORT``, until its standard input ends.

Half of the requests each open a connection, half use kept ones; at a fixed pace, whether or not answers come (open
loop). Nobody retries. A line of JSON every 0.2 s, and a last one at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

__all__ = ["main"]

NEW_PER_SECOND = 200
KEPT = 20
KEPT_PER_SECOND = 10  # each
LIMIT = 5.0  # seconds until a request without an answer has failed


class Tally:
    """Counts of one kind of client; latencies in ms, from the moment the request was due."""

    def __init__(self) -> None:
        self.asked = self.answered = self.failed = self.reopened = 0
        self.latencies: list[float] = []
        self.versions: Counter[str] = Counter()
        self.first_error = ""

    def record(self) -> dict[str, Any]:
        ranked = sorted(self.latencies)
        return {
            "asked": self.asked, "answered": self.answered, "failed": self.failed, "reopened": self.reopened,
            "p99_ms": round(ranked[len(ranked) * 99 // 100], 1) if ranked else 0.0,
            "worst_ms": round(ranked[-1], 1) if ranked else 0.0,
            "versions": dict(self.versions), "first_error": self.first_error,
        }  # fmt: skip


class Connection:
    """HTTP/1.1 by hand, so that nothing between us and the socket retries."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.last = reader, writer, False

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, close: bool) -> str:
        """The body of the answer; ``last`` says whether the server announced that it closes."""
        end = "close" if close else "keep-alive"
        self.writer.write(f"GET / HTTP/1.1\r\nHost: tour\r\nConnection: {end}\r\n\r\n".encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if not head.startswith("http/1.1 200"):
            raise ValueError(head.splitlines()[0])
        self.last = "connection: close" in head
        size = int(head.partition("content-length:")[2].split("\r")[0])
        return (await self.reader.readexactly(size)).decode()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


async def request(tally: Tally, port: int, due: float, kept: Connection | None) -> Connection | None:
    """One request; the connection if it can be used again."""
    tally.asked += 1
    connection = kept
    try:
        async with asyncio.timeout(LIMIT):
            connection = kept or await Connection.open(port)
            body = await connection.ask(close=kept is None)
    except (OSError, EOFError, ValueError, TimeoutError) as error:
        tally.failed += 1
        tally.first_error = tally.first_error or f"{type(error).__name__}: {error}"
        if connection is not None:
            await connection.close()
        return None
    tally.answered += 1
    tally.latencies.append((time.monotonic() - due) * 1000)
    tally.versions[body.split(" pid ")[0]] += 1
    if kept is None or connection.last:
        await connection.close()
        return None
    return connection


async def new_clients(tally: Tally, port: int, stop: asyncio.Event) -> None:
    running: set[asyncio.Task[Any]] = set()
    due = time.monotonic()
    while not stop.is_set():
        task = asyncio.create_task(request(tally, port, due, None))
        running.add(task)
        task.add_done_callback(running.discard)
        due += 1 / NEW_PER_SECOND
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*running)


async def kept_client(tally: Tally, port: int, stop: asyncio.Event) -> None:
    connection: Connection | None = None
    due = time.monotonic()
    while not stop.is_set():
        if connection is not None and connection.reader.at_eof():
            tally.reopened += 1  # closed while idle, and we saw it: no request was lost
            await connection.close()
            connection = None
        with suppress(OSError):
            connection = connection or await Connection.open(port)
        if connection is None:
            tally.asked, tally.failed = tally.asked + 1, tally.failed + 1
        else:
            connection = await request(tally, port, max(due, time.monotonic() - 0.001), connection)
        due += 1 / KEPT_PER_SECOND
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    if connection is not None:
        await connection.close()


async def report(tallies: dict[str, Tally], stop: asyncio.Event) -> None:
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.2)
        print(json.dumps({name: tally.record() for name, tally in tallies.items()}), flush=True)


async def run(port: int) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def watch() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
    new, kept = Tally(), Tally()
    clients = [kept_client(kept, port, stop) for _ in range(KEPT)]
    await asyncio.gather(new_clients(new, port, stop), *clients, report({"new": new, "kept": kept}, stop))
    print(json.dumps({"new": new.record(), "kept": kept.record(), "last": True}), flush=True)


def main() -> None:
    asyncio.run(run(int(sys.argv[1])))


if __name__ == "__main__":
    main()
