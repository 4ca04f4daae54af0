"""Part three of the tour: two processes share a mapping guarded by a mutex; one is killed while it holds it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import portway

from .moving import TourProcess

__all__ = ["ROUNDS", "Ledger", "share_memory"]

ROUNDS = 2000
Say = Callable[[str, dict[str, Any]], None]


class Ledger:
    """Two numbers that must always add up to nothing, in memory that several processes write."""

    def __init__(self, name: str) -> None:
        self.mapping = portway.FileMapping.create(name, 4096)
        self.view = self.mapping.view()
        self.mutex = portway.Mutex(name + "/lock")

    def move(self, amount: int, *, stop_between: bool = False) -> bool:
        """Takes `amount` from one to the other, repairing first what a dead owner left; whether there was one."""
        with self.mutex as owner:
            told = bool(owner.abandoned)
            if told:
                self._put(1, -self._get(0))  # the first number is always written first
            self._put(0, self._get(0) + amount)
            while stop_between:
                time.sleep(60)  # until it is killed, with the mutex
            self._put(1, self._get(1) - amount)
        return told

    def balance(self) -> tuple[int, int]:
        with self.mutex:
            return self._get(0), self._get(1)

    def torn(self) -> bool:
        """Looks without the mutex: somebody is in the middle of a move."""
        return self._get(0) + self._get(1) != 0

    def _get(self, at: int) -> int:
        return int.from_bytes(self.view.read(at * 8, 8), "little", signed=True)

    def _put(self, at: int, value: int) -> None:
        self.view.write(value.to_bytes(8, "little", signed=True), at * 8)

    def close(self) -> None:
        self.view.unmap()
        self.mapping.close()
        self.mutex.close()


def share_memory(say: Say) -> dict[str, Any]:
    """Two processes and this one write the ledger; one is killed in the middle. The figures."""
    name = f"portway-tour-{os.getpid()}"
    ledger = Ledger(name)
    one, two = TourProcess("portway.tour.ledger"), TourProcess("portway.tour.ledger")
    try:
        for process in (one, two):
            process.order(f"open {name}")
            process.expect("opened")
        for process in (one, two):
            process.order(f"work {ROUNDS}")
        done = [process.expect("worked") for process in (one, two)]
        say("shared", {"processes": 2, "writes": 2 * ROUNDS, "numbers": ledger.balance()})
        one.order("stop")
        one.expect("holds")
        two.order("work 1")  # waits for the mutex that the other will never release
        killed = time.monotonic_ns()
        one.popen.send_signal(signal.SIGKILL)
        told = two.expect("worked")
        micros = max(0, told["at"] - killed) / 1000
        balance = ledger.balance()
        say("killed", {"with -9, holding the mutex": one.pid, "told": told["told"], "after_us": round(micros)})
        whole = told["told"] == 1 and sum(balance) == 0 and not ledger.mutex.abandoned
        say("went on", {"process": two.pid, "numbers": balance})
    finally:
        one.end()
        two.end()
        ledger.close()
    left = _left(name)
    return {"writes": sum(part["rounds"] for part in done) + 1, "told": told["told"], "told_after_us": round(micros),
            "numbers": list(balance), "left_over": left, "ok": whole and not left}  # fmt: skip


def _left(name: str) -> int:
    """Objects of the tour that still have a name."""
    left = 0
    for kind, text in ((portway.FileMapping, name), (portway.Mutex, name + "/lock")):
        try:
            kind.open(text).close()
            left += 1
        except portway.PortwayError:
            continue
    return left
