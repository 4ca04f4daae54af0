"""Part four of the tour: a pipe of messages with two clients, one of them killed; .NET at the other end, by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import portway

from .moving import TourProcess

__all__ = ["CALLS", "netpeer", "talk"]

CALLS = 2000
TIMEOUT = 20.0
Say = Callable[[str, dict[str, Any]], None]


def talk(say: Say) -> dict[str, Any]:
    """The figures of this chapter; ``dotnet`` is None where there is no .NET program."""
    two = _two_clients(say)
    program = netpeer()
    dotnet = None if program is None else _dotnet(say, program)
    left = sum(one.name.startswith(f"portway-tour-{os.getpid()}") for one in portway.list_pipes())
    ok = two.pop("ok") and (dotnet is None or dotnet["ok"]) and not left
    return {**two, "dotnet": dotnet, "left_over": left, "ok": ok}


def _two_clients(say: Say) -> dict[str, Any]:
    name = f"portway-tour-{os.getpid()}"
    with portway.NamedPipeServer(name, mode="message", max_instances=2) as server:
        thread = threading.Thread(target=server.serve, args=(_answer,), daemon=True)
        thread.start()
        clients = [TourProcess("portway.tour.caller"), TourProcess("portway.tour.caller")]
        one, two = clients
        try:
            for client in clients:
                client.order(f"open {name}")
                client.expect("opened")
            say("serves", {"pipe": name, "type": "message", "instances": "2 of 2, both in use"})
            busy = _is_busy(name)
            for client in clients:
                client.order(f"call {CALLS}")
            done = [client.expect("called") for client in clients]
            micros = max(part["median_us"] for part in done)
            third = "PipeBusy" if busy else "got in"
            say("called", {"clients": [one.pid, two.pid], "times": 2 * CALLS, "median_us": micros, "a third": third})
            one.popen.send_signal(signal.SIGKILL)
            portway.wait_pipe(name, TIMEOUT)  # the killed one's instance is free again
            whole = portway.call_pipe(name, b"x" * 300_000, timeout=TIMEOUT) == b"X" * 300_000
            two.order("call 1")
            two.expect("called")
            say("killed", {"with -9": one.pid, "its instance": "free, and used again", "served on": two.pid})
        finally:
            for client in clients:
                client.end()
    thread.join(TIMEOUT)
    right = all(part["right"] for part in done)
    return {"calls": 2 * CALLS, "median_us": micros, "third_was_busy": busy, "ok": busy and right and whole}


def _answer(pipe: portway.NamedPipeConnection) -> None:
    for message in pipe:
        pipe.send(message.upper())


def _is_busy(name: str) -> bool:
    try:
        portway.NamedPipeClient(name).close()
    except portway.errors.PipeBusy:
        return True
    return False


# -- .NET -------------------------------------------------------------------------------------------------------------


def netpeer() -> Path | None:
    """The .NET program of the interop tests: ``PORTWAY_NETPEER``, or beside a checkout."""
    named = os.environ.get("PORTWAY_NETPEER")
    found = Path(named) if named else Path(__file__).resolve().parents[4] / "shared/peers/netpeer"
    return found if found.is_file() and os.access(found, os.X_OK) else None


def _dotnet(say: Say, program: Path) -> dict[str, Any]:
    """A NamedPipeClientStream with our server, then our client with a NamedPipeServerStream."""
    name = f"portway-tour-{os.getpid()}-net"
    with portway.NamedPipeServer(name, mode="byte") as server:
        thread = threading.Thread(target=server.serve, args=(_echo,), daemon=True)
        thread.start()
        words = ["--name", name, "--mode", "echo", "--size", "1000", "--reps", "200", "--timeout", "10000"]
        client = _Dotnet(program, "client", *words)
        output, _ = client.popen.communicate(timeout=TIMEOUT)
        to_us = client.popen.returncode == 0 and '"error"' not in output
    thread.join(TIMEOUT)
    say("answers", {"server": "portway", "client": ".NET's NamedPipeClientStream", "name": name, "right": to_us})
    with closing(_Dotnet(program, "server", "--name", name, "--mode", "echo", "--quiet")) as theirs:
        theirs.ready()
        with portway.NamedPipeClient(name, appear=True, timeout=TIMEOUT, call_timeout=TIMEOUT) as pipe:
            data, came = os.urandom(1000), b""
            pipe.send(data)
            while len(came) < len(data):
                came += pipe.receive(len(data) - len(came))
    to_them = came == data
    say("asks", {"server": ".NET's NamedPipeServerStream", "client": "portway", "name": name, "right": to_them})
    return {"client_of_ours": to_us, "server_for_us": to_them, "ok": to_us and to_them}


def _echo(pipe: portway.NamedPipeConnection) -> None:
    for data in pipe:
        pipe.send(data)


class _Dotnet:
    def __init__(self, program: Path, *words: str) -> None:
        self.popen = subprocess.Popen(
            [program, "pipe", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "DOTNET_EnableDiagnostics": "0"},  # so that it leaves nothing
        )  # fmt: skip

    def ready(self) -> None:
        assert self.popen.stdout is not None
        said = json.loads(self.popen.stdout.readline() or "{}")
        if said.get("event") != "listening":
            raise RuntimeError(f"the .NET program did not listen: {said}")

    def close(self) -> None:
        try:
            self.popen.communicate("quit\n", timeout=TIMEOUT)
        finally:
            self.popen.kill()
            self.popen.wait()
