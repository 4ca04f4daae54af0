"""What `portway pipe bench` measures: round trips with another process, which answers with what came."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import PipeError

if TYPE_CHECKING:
    from ..kernel.pipe_client import NamedPipeClient

__all__ = ["figures", "main"]

SIZES = (32, 4096, 65536)
ROUND = 0.02  # seconds
WAIT = 20.0
TIMEOUT = 10.0


def main(name: str) -> None:
    """The other process: echoes for one client."""
    import portway

    with portway.NamedPipeServer(name, mode="message", max_instances=1) as server, server.accept(WAIT) as pipe:
        for data in pipe:
            pipe.send(data)


@contextmanager
def _own() -> Iterator[str]:
    name = f"portway-bench-{os.getpid()}"
    run = f"from portway.cli.pipe_bench import main; main({name!r})"
    server = subprocess.Popen([sys.executable, "-c", run], stdin=subprocess.DEVNULL)
    try:
        yield name
    finally:
        server.kill()
        server.wait()


def figures(name: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a size. `PipeError` when the server does not answer with what it got."""
    if name is None:
        with _own() as own:
            yield from figures(own, rounds)
        return
    import portway

    with portway.NamedPipeClient(name, direction="duplex", timeout=WAIT, appear=True, call_timeout=TIMEOUT) as pipe:
        for size in SIZES:
            yield {"name": name, "mode": pipe.mode, "size": size, "rounds": rounds, **_measure(pipe, size, rounds)}


def _measure(pipe: NamedPipeClient, size: int, rounds: int) -> dict[str, float]:
    data = os.urandom(size)
    times = max(1, int(ROUND / _trip(pipe, data, 3)))
    taken = [_trip(pipe, data, times) for _ in range(rounds)]
    return {"median_us": round(statistics.median(taken) * 1e6, 1), "best_us": round(min(taken) * 1e6, 1)}


def _trip(pipe: NamedPipeClient, data: bytes, times: int) -> float:
    """Seconds for one round trip."""
    begun = time.perf_counter()
    for _ in range(times):
        pipe.send(data)
        answer = pipe.receive()
        while pipe.mode == "byte" and len(answer) < len(data):
            answer += pipe.receive(len(data) - len(answer))
        if answer != data:
            raise PipeError(f"{pipe.name} answers with something else than it got", hint="it must echo")
    return (time.perf_counter() - begun) / times
