"""Part one of the tour: a service under load is reloaded, and once with a version that must not take over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import GenerationFailed, NotRunning, SuperviseError
from ..supervise.client import Control

__all__ = ["Service", "show_reloads"]

RELOADS = 4
_APP = '''
import os

BODY = b"version {version} pid %d" % os.getpid()
HEAD = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))]

async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({{"type": "http.response.start", "status": 200, "headers": HEAD}})
        await send({{"type": "http.response.body", "body": BODY}})
'''
Say = Callable[[str, dict[str, Any]], None]


class Service:
    """A uvicorn app under portway, in a world of its own, and its clients."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.environment = {**os.environ, "PORTWAY_RUNTIME_DIR": str(self.folder / "run"), "PYTHONUNBUFFERED": "1"}
        self.version = 0
        self.latest: dict[str, Any] = {}
        self.failed_reload = ""

    def write(self, version: int, *, broken: bool = False) -> None:
        self.version = version
        text = _APP.format(version=version)
        # A new mtime within the same second and size would let Python use the old bytecode: write none of it.
        (self.folder / "tourapp.py").write_text(text + ("raise RuntimeError('a typo')\n" if broken else ""))

    @contextmanager
    def running(self) -> Iterator[Control]:
        self.write(1)
        words = [sys.executable, "-m", "portway", "asgi", "tourapp:app", "--name", "tour", "--bind", "127.0.0.1:0"]
        log = (self.folder / "supervisor.log").open("wb")
        with log, subprocess.Popen(
            [*words, "--ready-hold", "0.5", "--chdir", str(self.folder), "--env", "PYTHONDONTWRITEBYTECODE=1"],
            env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                yield self._when_up(process)
            finally:
                process.terminate()
                process.wait(20)

    def _when_up(self, process: subprocess.Popen[bytes]) -> Control:
        os.environ["PORTWAY_RUNTIME_DIR"] = self.environment["PORTWAY_RUNTIME_DIR"]
        control, limit = Control("tour"), time.monotonic() + 20
        while process.poll() is None and time.monotonic() < limit:
            try:
                report = control.status()
            except (NotRunning, SuperviseError):
                report = {"generations": []}
            if any(one["phase"] == "serving" for one in report["generations"]):
                return control
            time.sleep(0.05)
        raise SuperviseError("the tour's service did not start:\n" + (self.folder / "supervisor.log").read_text())

    @contextmanager
    def loaded(self, port: int) -> Iterator[None]:
        with subprocess.Popen(
            [sys.executable, "-m", "portway.tour.load", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            reader = threading.Thread(target=self._read, args=(process,))
            reader.start()
            try:
                yield
            finally:
                assert process.stdin is not None
                process.stdin.close()
                reader.join()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.latest = json.loads(line)

    def reload_broken(self, control: Control) -> None:
        self.write(self.version + 1, broken=True)
        try:
            control.reload(timeout=20)
        except GenerationFailed as error:
            lines = "\n".join(getattr(error, "__notes__", ())).splitlines()
            self.failed_reload = next((line for line in reversed(lines) if "typo" in line), str(error))
        self.version -= 1


def _pause(seconds: float) -> None:
    time.sleep(seconds)  # the tour's own pace: load between the reloads


def show_reloads(say: Say, watch: Callable[[Service], None] = lambda service: None) -> dict[str, Any]:
    """Runs it all; `watch` is given the service, whose `latest` has the clients' counts."""
    with ExitStack() as stack:
        service = Service(stack.enter_context(tempfile.TemporaryDirectory(prefix="portway-tour-")))
        control = stack.enter_context(service.running())
        report = control.status()
        address = report["sockets"][0]["address"]
        say("running", {"address": address, "supervisor": report["pid"]})
        with service.loaded(int(address.rpartition(":")[2])):
            watch(service)
            _pause(1.5)
            for version in range(2, 2 + RELOADS):
                service.write(version)
                started = time.monotonic()
                control.reload(timeout=30)
                say("reloaded", {"version": version, "seconds": round(time.monotonic() - started, 2)})
                _pause(0.7)
            service.reload_broken(control)
            say("broken", {"refused because": service.failed_reload or "NOT REFUSED"})
            _pause(1.0)
    return _summary(service)


def _summary(service: Service) -> dict[str, Any]:
    new, kept = service.latest["new"], service.latest["kept"]
    seen = {*new["versions"], *kept["versions"]}
    wanted = {f"version {n}" for n in range(1, 2 + RELOADS)}
    return {
        "requests": new["asked"] + kept["asked"],
        "failed_new": new["failed"], "failed_kept": kept["failed"], "kept_reopened": kept["reopened"],
        "p99_ms": max(new["p99_ms"], kept["p99_ms"]), "worst_ms": max(new["worst_ms"], kept["worst_ms"]),
        "reloads": RELOADS, "broken_version_refused": bool(service.failed_reload), "versions_served": sorted(seen),
        "first_error": new["first_error"] or kept["first_error"],
        "ok": not new["failed"] and not kept["failed"] and bool(service.failed_reload) and seen == wanted,
    }  # fmt: skip
