"""Real `portway run` processes for the tests: started, asked, and all gone afterwards, whatever happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLAIN = [sys.executable, str(HERE / "servers" / "plain.py")]


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Polls until `condition` is true; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def get(address: str | tuple[str, int], path: str = "/", timeout: float = 10.0) -> str:
    """One request on a new connection; the body. OSError when it gets none."""
    with connect(address, timeout) as sock:
        return ask(sock, path, close=True)


def connect(address: str | tuple[str, int], timeout: float = 10.0) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def ask(sock: socket.socket, path: str = "/", *, close: bool = False) -> str:
    """One request on an open connection; the body."""
    end = "Connection: close\r\n" if close else ""
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{end}\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"closed after {data!r}")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))[15:])
    while len(body) < length:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"closed after {body!r} of {length} bytes")
        body += piece
    return body.decode()


class World:
    """A runtime folder of its own; every process started in it carries a mark by which it is found and killed."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pw"))
        self.mark = f"PORTWAY_TEST_MARK={uuid.uuid4()}"
        key, _, value = self.mark.partition("=")
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("PORTWAY_", "LISTEN_", "NOTIFY_"))}
        self.environ |= {"PORTWAY_RUNTIME_DIR": str(self.root / "run"), key: value, "PYTHONUNBUFFERED": "1",
                         "PYTHONPATH": str(HERE / "servers")}  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, name: str = "web", prefix: tuple[str, ...] = (), **environ: str) -> Running:
        running = Running(self, name, [*prefix, sys.executable, "-m", "portway", "run", *arguments], environ)
        self.processes.append(running.process)
        return running

    def run(self, *arguments: str, timeout: float = 60.0, **environ: str) -> subprocess.CompletedProcess[str]:
        """A portway command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "portway", *arguments], env=self.environ | environ, cwd=self.root, text=True,
            capture_output=True, timeout=timeout,
        )  # fmt: skip

    def marked(self) -> list[int]:
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                        found.append(int(name))
        return found

    def close(self) -> None:
        end = time.monotonic() + 10
        while (left := [pid for pid in self.marked() if alive(pid)]) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.processes:
            process.wait(10)
        shutil.rmtree(self.root, ignore_errors=True)
        assert not left, f"still there: {left}"


class Running:
    """One supervisor. `pid` is the supervisor's own, also when a program started it."""

    def __init__(self, world: World, name: str, command: list[str], environ: dict[str, str]) -> None:
        self.world = world
        self.name = name
        self.out = world.root / f"{name}.{uuid.uuid4().hex[:6]}.out"
        self.err = self.out.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=world.environ | environ, cwd=world.root, stdout=out, stderr=err, stdin=subprocess.DEVNULL
            )

    @property
    def pid(self) -> int:
        return int(self.status()["pid"])

    def said(self) -> str:
        return self.err.read_text(errors="replace")

    def printed(self) -> str:
        return self.out.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        done = self.world.run("status", self.name, "--json")
        assert done.returncode == 0, f"{done.stderr}\n{self.said()}"
        return dict(json.loads(done.stdout))

    def serves(self, generation: int = 1, seconds: float = 30.0) -> dict[str, Any]:
        """The status once this generation serves."""
        said = f"generation {generation} serves"

        def look() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said()}"
            return said in self.said()

        until(look, f"{said}: {self.said()}", seconds)
        return self.status()

    def address(self, place: int = 0) -> tuple[str, int]:
        """Of a TCP bind with port 0."""
        host, _, port = self.status()["sockets"][place]["address"].rpartition(":")
        return host.strip("[]"), int(port)

    def workers(self, generation: int | None = None) -> list[int]:
        report = self.status()
        number = generation or report["serving"]
        return [w["pid"] for g in report["generations"] if g["number"] == number for w in g["workers"] if w["pid"]]

    def reload(self, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        words = ["--", *command] if command else []
        return self.world.run("reload", self.name, "--json", *words, timeout=timeout)

    def reloaded(self, *command: str) -> int:
        done = self.reload(*command)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["generation"])

    def stop(self) -> None:
        done = self.world.run("stop", self.name)
        assert done.returncode == 0, done.stderr
        assert self.process.wait(20) == 0, self.said()

    def ends(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def gone(self, generation: int) -> None:
        until(lambda: f"generation {generation} ended" in self.said(), f"end of generation {generation}", 40)
