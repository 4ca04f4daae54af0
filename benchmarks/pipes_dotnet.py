"""``pipe.dotnet``, ``pipe.dotnet-oneway-64k``: byte pipes with a .NET program at one end, or at both.

The program is netpeer (`PORTWAY_NETPEER`, else ``../shared/peers/netpeer``), its frames a length of 4 bytes, one byte
that says what to do (0: send the payload back, 1: swallow it, 2: say how many bytes were swallowed) and the payload.
Each line of ``portway`` is the slower one of its two roles, server and client, which have notes of their own.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .harness import Failed, Figures, Options, Worker, remark, rounds_of, workers

__all__ = ["run"]

HEAD = struct.Struct("<IB")
ECHO, SWALLOW, COUNT = 0, 1, 2
SMALL, LARGE, TAKE = 32, 65536, 1 << 17
ROUND_TRIPS, ONE_WAY = "round trips 32 B", "one way 65536 B writes"


def run(options: Options, figures: Figures) -> None:
    program = _program()
    if program is None:
        remark("pipe.dotnet is left out: PORTWAY_NETPEER is not set and ../shared/peers/netpeer does not exist")
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # what is started inherits it
    try:
        _rounds(program, options, figures)
    except Failed as error:
        remark(f"pipe.dotnet is left out: {error}")
    finally:
        os.sched_setaffinity(0, before)


def _program() -> Path | None:
    named = os.environ.get("PORTWAY_NETPEER")
    found = Path(named) if named else Path(__file__).resolve().parents[2] / "shared/peers/netpeer"
    return found if found.exists() else None


def _rounds(program: Path, options: Options, figures: Figures) -> None:
    rounds, runs, ms = rounds_of(options, 5), 1 if options.quick else 5, 20 if options.quick else 150
    works = (("pipe.dotnet", ROUND_TRIPS, "per_s"), ("pipe.dotnet-oneway-64k", ONE_WAY, "mb_s"))
    ends = [lambda: Worker("server", _server), lambda: Worker("client", _client)]
    with _dotnet_server(program), workers(ends) as (server, client):
        server.ask("listen")
        client.ask("open")
        for number in range(rounds):
            remark(f"pipes: .NET, round {number + 1} of {rounds}")
            there = _bench_client(program, "dotnet", runs, ms)
            server_role = _bench_client(program, "portway", runs, ms)
            client_role = client.ask("bench", runs, ms)
            for work, what, metric in works:
                if options.wants_work(work) and options.wants("dotnet"):
                    figures.add(work, "dotnet", metric, there[what])
                if options.wants_work(work) and options.wants("portway"):
                    roles = {"as_server": server_role[what], "as_client": client_role[what]}
                    figures.add(work, "portway", metric, min(roles.values()), **roles)


def _environment() -> dict[str, str]:
    return {**os.environ, "DOTNET_EnableDiagnostics": "0"}


@contextmanager
def _dotnet_server(program: Path) -> Iterator[None]:
    command = [str(program), "pipe", "server", "--name", "dotnet", "--mode", "frame", "--quiet", "--listeners", "2"]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
    assert peer.stdin is not None and peer.stdout is not None
    try:
        if b"listening" not in peer.stdout.readline():
            raise Failed("netpeer did not begin to listen")
        yield
    finally:
        peer.kill()
        peer.wait()
        peer.stdin.close()
        peer.stdout.close()


def _bench_client(program: Path, name: str, runs: int, ms: int) -> dict[str, float]:
    command = [str(program), "pipe", "bench-client", "--name", name, "--runs", str(runs), "--ms", str(ms)]
    none = subprocess.DEVNULL
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_environment(), stdin=none)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    rates = {line["what"]: float(line.get("MBps") or line["per_s"]) for line in found if line["event"] == "bench"}
    if done.returncode or not {ROUND_TRIPS, ONE_WAY} <= set(rates):
        raise Failed(f"netpeer's client of the pipe {name}: {done.stdout[-300:]} {done.stderr[-300:]}")
    return rates


# -- portway's ends ----------------------------------------------------------------------------------------------------


def _server() -> Callable[[str], None]:
    def listen(command: str) -> None:
        import portway

        server = portway.NamedPipeServer("portway")
        threading.Thread(target=_serve, args=(server,), daemon=True).start()

    return listen


def _serve(server: Any) -> None:
    """One client after the other."""
    for pipe in server:
        with pipe, suppress(BrokenPipeError):
            _frames(pipe)


def _frames(pipe: Any) -> None:
    """Answers frames until the client has gone. What has come is taken at once: a frame, part of one, or several."""
    send, receive, unpack, whole = pipe.send, pipe.receive, HEAD.unpack_from, HEAD.size
    swallowed, rest = 0, b""
    for data in iter(lambda: receive(TAKE), None):
        at = 0
        if rest:
            data, rest = rest + data, b""
        while len(data) - at >= whole:
            size, what = unpack(data, at)
            after = at + whole + size
            if what == ECHO:
                if after > len(data):
                    break
                send(data[at + whole : after])
            elif what == SWALLOW:
                swallowed += size
                while after > len(data):  # the payload is not kept
                    after -= len(data)
                    data = receive(TAKE)
            else:
                send(swallowed.to_bytes(8, "little"))
                swallowed = 0
            at = after
        rest = data[at:]


def _client() -> Callable[..., Any]:
    pipes: list[Any] = []

    def do(command: str, *args: Any) -> Any:
        import portway

        if command == "open":
            pipes.append(portway.NamedPipeClient("dotnet", timeout=30, appear=True))
            return None
        return _bench(pipes[0], *args)

    return do


def _bench(pipe: Any, runs: int, ms: int) -> dict[str, float]:
    """As netpeer's bench-client: a run to get warm, then the median of `runs`."""
    small, large = HEAD.pack(SMALL, ECHO) + bytes(SMALL), HEAD.pack(LARGE, SWALLOW) + bytes(LARGE)
    send, receive = pipe.send, pipe.receive

    def round_trips(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            for _ in range(50):
                send(small)
                if len(receive(SMALL)) < SMALL:
                    raise Failed("half an answer")
            count += 50
        return count

    def one_way(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            send(large)
            count += 1
        send(HEAD.pack(0, COUNT))
        if int.from_bytes(receive(8), "little") != count * LARGE:
            raise Failed("netpeer counted another number of bytes")
        return count

    found = {}
    for what, work, unit in ((ROUND_TRIPS, round_trips, 1), (ONE_WAY, one_way, LARGE / 1e6)):
        rates = []
        for _ in range(runs + 1):
            began = time.perf_counter()
            count = work(began + ms / 1000)
            rates.append(count * unit / (time.perf_counter() - began))
        found[what] = statistics.median(rates[1:])
    return found
