"""One of the processes that share the tour's ledger: ``python -m portway.tour.ledger``.

Orders on standard input: ``open NAME``, ``work COUNT``, ``stop`` (in the middle of a move, holding the mutex).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from .sharing import Ledger

__all__ = ["main"]


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> None:
    ledger: Ledger | None = None
    say("ready")
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "open":
            ledger = Ledger(rest[0])
            say("opened")
        elif ledger is not None and order == "work":
            told = sum(ledger.move(1 if count % 2 else -2) for count in range(int(rest[0])))
            say("worked", rounds=int(rest[0]), told=told, at=time.monotonic_ns())
        elif ledger is not None and order == "stop":
            threading.Thread(target=ledger.move, args=(5,), kwargs={"stop_between": True}, daemon=True).start()
            while not ledger.torn():
                time.sleep(0.001)
            say("holds")


if __name__ == "__main__":
    main()
