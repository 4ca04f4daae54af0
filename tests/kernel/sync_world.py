"""A root of its own for each test, and real processes that are killed and reaped whatever happens."""

from __future__ import annotations

import os
import pickle
import select
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Process:
    """A fork child that runs ``work(tell)``: ``tell(value)`` sends a value to the test, `hear` receives one."""

    def __init__(self, work: Callable[..., Any], *args: Any) -> None:
        self.reads, writes = os.pipe()
        self.ended: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(writes)
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(self.reads)

            def tell(value: Any) -> None:
                data = pickle.dumps(value)
                os.write(writes, len(data).to_bytes(4, "little") + data)

            work(tell, *args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def hear(self, timeout: float = 10) -> Any:
        if not select.select([self.reads], [], [], timeout)[0]:
            raise AssertionError(f"pid {self.pid} said nothing in {timeout} s")
        size = os.read(self.reads, 4)
        assert len(size) == 4, f"pid {self.pid} ended: {self.wait()}"
        return pickle.loads(os.read(self.reads, int.from_bytes(size, "little")))

    def wait(self, timeout: float = 20) -> int:
        """The exit code, negative for a signal."""
        until = time.monotonic() + timeout
        while self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise AssertionError(f"pid {self.pid} did not end in {timeout} s")
            else:
                time.sleep(0.001)
        return self.ended

    def kill(self) -> None:
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def close(self) -> None:
        self.kill()
        if self.reads >= 0:
            os.close(self.reads)
            self.reads = -1


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = f"/dev/shm/pwtest-{os.getpid()}-{os.urandom(4).hex()}"
    monkeypatch.setenv("PORTWAY_ROOT", path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def begin(work: Callable[..., Any], *args: Any) -> Process:
        running.append(Process(work, *args))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def until(condition: Callable[[], Any], what: str, timeout: float = 10) -> Any:
    limit = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < limit, f"not in {timeout} s: {what}"
        time.sleep(0.001)
    return value


def files(root: str) -> list[str]:
    """Objects that lie under the root, looked at without touching them."""
    return [str(one) for one in Path(root).glob("portway-*/*")]


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `work`; the function returned waits for its result or raises its exception."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((True, work()))
        except BaseException as error:
            result.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(10)
        assert result, "the thread did not end in 10 s"
        good, value = result[0]
        if not good:
            raise value
        return value

    join.thread = thread  # type: ignore[attr-defined]
    return join
