"""The contenders of ``reload``: how each server is started, reloaded and stopped, in the way its manual names.

All run benchmarks/app.py on 127.0.0.1, keep idle connections 5 s and log no accesses.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from .harness import Failed, Options, remark

__all__ = ["SERVERS", "LineServer", "Server"]

ROOT = Path(__file__).parent.parent
MARK = "PORTWAY_BENCHMARK"
"""Set to this run's own folder in the environment of every process of a server: what is left of it can be found."""
READY_SECONDS = 30.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, condition: Callable[[], bool], timeout: float = READY_SECONDS) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {timeout:g} s")
        time.sleep(0.02)


class Server:
    """One server on a port of its own. Enter starts it and waits for its first answer; exit ends all its processes."""

    name = ""
    app = "benchmarks.app:app"
    reload_limit = 60.0

    def __init__(self, options: Options) -> None:
        self.options, self.port = options, _free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="portway-bench-"))
        self.log = self.folder / "log"
        (self.folder / "run").mkdir(mode=0o700)
        self.environment = {
            **os.environ, MARK: str(self.folder), "PORTWAY_RUNTIME_DIR": str(self.folder / "run"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def reload(self) -> None:
        """Replaces the code, or raises `Failed`. Returns when the server's own way says so: see each contender."""
        raise NotImplementedError

    def uvicorn(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "uvicorn", self.app, "--http", self.options.http, "--no-access-log",
                "--log-level", "warning", *more]  # fmt: skip

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.wait_answer()

    def wait_answer(self) -> None:
        wait_for(f"{self.name} answers", self._answers_or_ended)

    def _answers_or_ended(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise Failed(f"{self.name} ended with {self.process.returncode}: {self.last_words()}")
        return self.answers()

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as sock:
                sock.sendall(b"GET /fast?id=x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return sock.recv(12) == b"HTTP/1.1 200"
        except OSError:
            return False

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "it printed nothing"

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def children(self) -> set[int]:
        """The worker processes of a master."""
        assert self.process is not None
        found = set()
        for child in psutil.Process(self.process.pid).children():
            try:
                if not any("resource_tracker" in word for word in child.cmdline()):
                    found.add(child.pid)
            except psutil.Error:
                continue  # it has just ended
        return found

    def hang_up(self) -> None:
        """SIGHUP to the master; waits until the old workers are gone and as many others exist, ready or not."""
        old = self.children()
        self.signal(signal.SIGHUP)
        wait_for(f"{self.name} has new workers", lambda: self._replaced(old), self.reload_limit)

    def _replaced(self, old: set[int]) -> bool:
        now = self.children()
        return len(now) >= len(old) and not now & old

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                remark(f"{self.name}: still there 15 s after SIGTERM, killed")
        self._kill_the_rest()
        self.process.wait()

    def _kill_the_rest(self) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder):
                    process.kill()
            except psutil.Error:
                continue

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Uvicorn(Server):
    """Its own reload: SIGHUP to the master of at least two workers, which are replaced one after the other."""

    name = "uvicorn"

    def command(self) -> list[str]:
        return self.uvicorn("--port", str(self.port), "--workers", str(max(2, self.options.workers)))

    def reload(self) -> None:
        self.hang_up()


class UvicornRestart(Server):
    """Stop and start, as a plain service manager does."""

    name = "uvicorn-restart"

    def command(self) -> list[str]:
        return self.uvicorn("--port", str(self.port), "--workers", str(self.options.workers))

    def reload(self) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(self.reload_limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name}: still there {self.reload_limit:g} s after SIGTERM") from None
        self.start()


class Gunicorn(Server):
    """SIGHUP to the master. uvicorn's worker class, the usual way to run ASGI under gunicorn."""

    name = "gunicorn"
    worker = "uvicorn.workers.UvicornWorker"

    def command(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "gunicorn", "-k", self.worker, "-b", f"127.0.0.1:{self.port}",
                "-w", str(self.options.workers), "--keep-alive", "5", "--log-level", "warning", self.app]  # fmt: skip

    def reload(self) -> None:
        self.hang_up()


class GunicornAsgi(Gunicorn):
    """The same with gunicorn's own ASGI worker."""

    name = "gunicorn-asgi"
    worker = "asgi"


class _Portway(Server):
    """What the two ways of portway share: `portway reload`, and saying why the command is not there."""

    service = "bench"

    def portway(self, *arguments: str, timeout: float = READY_SECONDS) -> None:
        command = [sys.executable, "-m", "portway", *arguments]
        try:
            done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True,
                                  timeout=timeout)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"portway {' '.join(arguments)}: not within {timeout:g} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-8:]
            raise Failed(f"portway {' '.join(arguments)} ended with {done.returncode}: {' | '.join(said)}")

    def run(self, *command: str) -> list[str]:
        return [sys.executable, "-m", "portway", "run", "--name", self.service, "--bind", f"127.0.0.1:{self.port}",
                "--workers", str(self.options.workers), "--", *command]  # fmt: skip

    def start(self) -> None:
        self.portway(self.command()[3], "--help")
        super().start()

    def reload(self) -> None:
        self.portway("reload", self.service, timeout=self.reload_limit)


class PortwayRun(_Portway):
    """An unchanged uvicorn under `portway run`."""

    name = "portway-run"

    def command(self) -> list[str]:
        return self.run(*self.uvicorn("--fd", "{fd}"))


class PortwayAsgi(_Portway):
    """`portway asgi`: kept connections move to the successor."""

    name = "portway-asgi"

    def command(self) -> list[str]:
        http = [] if self.options.http == "auto" else ["--http", self.options.http]
        return [sys.executable, "-m", "portway", "asgi", self.app, "--name", self.service,
                "--bind", f"127.0.0.1:{self.port}", "--workers", str(self.options.workers), *http]  # fmt: skip


class LineServer(_Portway):
    """examples/line_server.py under `portway run`; a connection's half-read line and its count move with it."""

    name = "portway"

    def command(self) -> list[str]:
        return self.run(sys.executable, str(ROOT / "examples" / "line_server.py"))

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as sock:
                sock.sendall(b"hello\n")
                return sock.recv(7) == b"1 hello"
        except OSError:
            return False


SERVERS: dict[str, type[Server]] = {
    server.name: server for server in (Uvicorn, UvicornRestart, Gunicorn, GunicornAsgi, PortwayRun, PortwayAsgi)
}
