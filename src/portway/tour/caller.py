"""One of the two clients of the tour's pipe: ``python -m portway.tour.caller``.

Orders on standard input: ``open NAME``, ``call COUNT``; what happens is said on standard output, JSON lines.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

import portway

__all__ = ["main"]


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, "pid": os.getpid(), **facts}), flush=True)


def call(pipe: portway.NamedPipeClient, count: int) -> None:
    micros, right = [], True
    for number in range(count):
        begun = time.perf_counter()
        answer = pipe.transact(f"question {number} of {os.getpid()}".encode())
        micros.append((time.perf_counter() - begun) * 1e6)
        right = right and answer == f"QUESTION {number} OF {os.getpid()}".encode()
    say("called", median_us=round(statistics.median(micros), 1), right=right)


def main() -> None:
    say("ready")
    pipe: portway.NamedPipeClient | None = None
    for line in sys.stdin:
        order, word = line.split()
        if order == "open":
            pipe = portway.NamedPipeClient(word, appear=True, timeout=20, call_timeout=20)
            say("opened")
        elif pipe is not None:
            call(pipe, int(word))


if __name__ == "__main__":
    main()
