"""The whole, under the real supervisor: `portway asgi` and the line servers through reloads, crashes and upgrades."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import PLAIN, Running, World, ask, connect, until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICK = ("--ready-hold", "0.1", "--settle", "0.05")


def path() -> str:
    return f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"


def asgi(world: World, *options: str, app: str = "asgi_app:app", name: str = "web") -> Running:
    words = ["--name", name, *QUICK, "--no-access-log", *options, app]
    running = Running(world, name, [sys.executable, "-m", "portway", "asgi", *words], {"PYTHONPATH": path()})
    world.processes.append(running.process)
    return running


def lines(world: World, server: str) -> Running:
    command = [sys.executable, str(EXAMPLES / server)]
    return world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *command, PYTHONPATH=path())


def about(sock: socket.socket, path: str = "/") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(sock, path))
    return found


class Crowd:
    """Threads that run `work` over and over; the first error of any ends it and is the test's."""

    def __init__(self, count: int, work: Callable[[int, threading.Event], int]) -> None:
        self.over = threading.Event()
        self.errors: list[BaseException] = []
        self.done = 0
        self.threads = [threading.Thread(target=self._run, args=(work, number)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _run(self, work: Callable[[int, threading.Event], int], number: int) -> None:
        try:
            count = work(number, self.over)
            self.done += count
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> int:
        self.over.set()
        for thread in self.threads:
            thread.join(30)
        if self.errors:
            raise self.errors[0]
        return self.done


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_no_client_sees_a_reload(world: World, http: str) -> None:
    running = asgi(world, "--bind", "127.0.0.1:0", "--workers", "2", "--http", http)
    running.serves()
    address = running.address()

    def work(number: int, over: threading.Event) -> int:
        """Half of the clients keep their connection, one in four of the requests is slow."""
        kept = connect(address) if number % 2 else None
        count = 0
        while not over.is_set():
            sock = kept or connect(address)
            found = about(sock, "/slow?0.1" if number % 4 == 0 else "/")
            assert found["client"] == list(sock.getsockname())
            if kept is None:
                sock.close()
            count += 1
            time.sleep(0.002)
        if kept is not None:
            kept.close()
        return count

    crowd = Crowd(12, work)
    try:
        for generation in range(2, 7):
            assert running.reloaded() == generation
            running.gone(generation - 1)
    finally:
        done = crowd.end()
    assert done > 200
    running.stop()


@pytest.mark.parametrize("server", ["line_server.py", "threaded_line_server.py"])
def test_a_line_server_loses_and_doubles_nothing(world: World, server: str) -> None:
    running = lines(world, server)
    running.serves()
    address = running.address()

    def work(number: int, over: threading.Event) -> int:
        """Lines in pieces that end anywhere; the answers, with their count, byte for byte."""
        count, rest = 0, b""
        with connect(address) as sock, sock.makefile("rb") as file:
            while not over.is_set():
                line = b"%d of %d " % (count, number) * (1 + count % 7)
                data = rest + line + b"\n" + (tail := b"%d of" % (count + 1))
                sock.sendall(data[: len(data) - len(tail)])
                sock.sendall(tail)
                count += 1
                assert file.readline() == b"%d %b\n" % (count, (b"" if count == 1 else b"%d of" % (count - 1)) + line)
                time.sleep(0.001)
            sock.sendall(b"\n")
            assert file.readline().startswith(b"%d " % (count + 1))
            sock.shutdown(socket.SHUT_WR)
            assert file.read() == b""
        return count

    crowd = Crowd(8, work)
    try:
        for generation in range(2, 6):
            assert running.reloaded() == generation
            running.gone(generation - 1)
    finally:
        done = crowd.end()
    assert done > 200
    running.stop()


def test_unix_sockets(world: World) -> None:
    name = str(world.root / "web.sock")
    running = asgi(world, "--bind", f"unix:{name}")
    running.serves()
    with connect(name) as kept:
        first = about(kept)
        assert running.reloaded() == 2
        running.gone(1)
        second = about(kept)
    assert (first["generation"], second["generation"]) == (1, 2)
    assert first["client"] is second["client"] is None
    running.stop()


def test_a_broken_version_takes_nothing_over(world: World) -> None:
    (world.root / "broken.py").write_text("import asgi_app\napp = asgi_app.nothing\n")
    running = asgi(world, "--bind", "127.0.0.1:0")
    running.serves()
    with connect(running.address()) as kept:
        assert about(kept)["generation"] == 1
        done = running.reload(sys.executable, "-m", "portway.supervise.asgi", "broken:app", "--app-dir", ".")
        assert done.returncode == 4, done.stderr
        assert about(kept)["generation"] == 1
        assert running.reloaded() == 3
        running.gone(1)
        assert about(kept)["generation"] == 3
    running.stop()


def test_a_long_request_reaches_the_newest_generation(world: World) -> None:
    """Two reloads while it runs: its connection then moves to the third generation, the second has gone."""
    running = asgi(world, "--bind", "127.0.0.1:0")
    running.serves()
    with connect(running.address()) as slow, connect(running.address()) as kept:
        about(kept)
        crowd = Crowd(1, lambda number, over: about(slow, "/slow?3")["generation"])
        until(lambda: running.status()["generations"][0]["workers"][0]["connections"] == 2, "both are connected")
        assert running.reloaded() == 2
        assert running.reloaded() == 3
        running.gone(2)
        assert about(kept)["generation"] == 3
        assert crowd.end() == 1  # answered by the generation that began it
        running.gone(1)
        assert about(slow)["generation"] == 3
    running.stop()


def test_a_reload_to_a_server_without_the_hook(world: World) -> None:
    running = asgi(world, "--bind", "127.0.0.1:0")
    running.serves()
    with connect(running.address()) as kept:
        assert about(kept)["generation"] == 1
        assert running.reloaded("env", "PLAIN_NOTIFY=1", *PLAIN) == 2
        until(lambda: running.status()["generations"][0]["phase"] == "draining", "generation 1 drains")
        assert about(kept)["generation"] == 1  # answered here, with Connection: close
        assert kept.recv(1) == b""
    running.gone(1)
    running.stop()


def test_connections_move_after_an_upgrade_of_the_supervisor(world: World) -> None:
    running = asgi(world, "--bind", "127.0.0.1:0")
    running.serves()
    with connect(running.address()) as kept:
        assert about(kept)["generation"] == 1
        done = world.run("upgrade", "web")
        assert done.returncode == 0, done.stderr
        assert running.reloaded() == 2
        running.gone(1)
        assert about(kept)["generation"] == 2
    running.stop()


def test_connections_move_after_kill_9_of_the_supervisor(world: World) -> None:
    running = asgi(world, "--bind", "127.0.0.1:0")
    running.serves()
    with connect(running.address()) as kept:
        assert about(kept)["generation"] == 1
        running.process.kill()
        running.process.wait(20)
        assert about(kept)["generation"] == 1
        again = asgi(world, "--bind", "127.0.0.1:0")
        until(lambda: "serves" in again.said() or again.process.poll() is not None, "it takes over")
        assert again.process.poll() is None, again.said()
        until(lambda: about(kept)["generation"] > 1, "the connection has moved")
        again.stop()


def test_a_killed_worker_takes_only_its_own(world: World) -> None:
    running = asgi(world, "--bind", "127.0.0.1:0", "--workers", "2")
    running.serves()
    kept = [connect(running.address()) for _ in range(20)]
    try:
        first = [about(one)["pid"] for one in kept]
        victim = first[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: "started again" in running.said(), "the worker's successor")
        for one, pid in zip(kept, first, strict=True):
            if pid != victim:
                assert about(one)["pid"] == pid
        assert running.reloaded() == 2
        running.gone(1)
        for one, pid in zip(kept, first, strict=True):
            if pid != victim:
                assert about(one)["generation"] == 2
    finally:
        for one in kept:
            one.close()
    running.stop()


@pytest.mark.slow
def test_ten_thousand_connections_move(world: World) -> None:
    """Clients, source and target are three processes; each connection has half a line of unread bytes."""
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 1000:
        pytest.skip(f"RLIMIT_NOFILE is at most {hard} here, {count} connections need more")
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(soft, count + 5000) if hard == resource.RLIM_INFINITY else hard, hard)
    )
    kept: list[socket.socket] = []
    try:
        running = lines(world, "line_server.py")
        running.serves()
        address = running.address()
        for _ in range(count):
            kept.append(connect(address, 60))
            kept[-1].sendall(b"one\nha")
        for one in kept:
            assert one.recv(100) == b"1 one\n"
        assert running.reloaded() == 2
        running.gone(1)
        for one in kept:
            one.sendall(b"lf\n")
        for one in kept:
            assert one.recv(100) == b"2 half\n"
        running.stop()
    finally:
        for one in kept:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
