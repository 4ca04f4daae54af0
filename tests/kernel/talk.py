"""A Python process that does what a test says, line by line, and can be killed at any moment."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

LOOP = """
import json, os, sys, threading, time, signal
import portway
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have it ignored
space = {"portway": portway, "os": os, "sys": sys, "threading": threading, "time": time, "signal": signal}
for line in sys.stdin:
    try:
        kind, code = json.loads(line)
        answer = eval(code, space) if kind == "eval" else exec(code, space)
        said = ["ok", answer if isinstance(answer, (int, float, str, list, dict, type(None))) else repr(answer)]
    except BaseException as error:
        said = ["error", type(error).__name__, str(error)]
    print(json.dumps(said), flush=True)
"""


class Failed(Exception):
    """The line raised in the other process: its type's name and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Talker:
    def __init__(self, *, before: tuple[str, ...] = (), preexec: Any = None, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **(env or {})}, preexec_fn=preexec, bufsize=0,
        )  # fmt: skip
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, code: str, *, kind: str = "eval") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, code]).encode() + b"\n")

    def answer(self, timeout: float = 30) -> Any:
        """What the line that was started gave; `Failed` if it raised; EOFError when the process ended instead."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError("no answer")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise EOFError("the process ended")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        said = json.loads(line)
        if said[0] == "error":
            raise Failed(said[1], said[2])
        return said[1]

    def get(self, code: str, timeout: float = 30) -> Any:
        self.start(code)
        return self.answer(timeout)

    def do(self, code: str, timeout: float = 30) -> None:
        self.start(code, kind="exec")
        self.answer(timeout)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def sleeping(self) -> bool:
        """Whether its main thread sleeps in the kernel: it has really begun to wait."""
        with open(f"/proc/{self.pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] == b"S"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def until(condition: Any, timeout: float = 20) -> None:
    """Polls until `condition()` holds; AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.002)
