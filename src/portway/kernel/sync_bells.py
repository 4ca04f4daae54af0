"""Threads that sleep for asyncio: one for up to 127 objects that tasks of any loops wait for, ended when idle.

A helper never takes anything. It sleeps on the bells of the objects, tells the loop, and the loop's thread tries; so a
cancelled wait has consumed nothing, and what a task acquires belongs to its loop's thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from .._accel import sync as _native

__all__ = ["Listener", "WORDS", "listen"]

WORDS = 127


class Listener:
    """One wait's interest: told once, by ``future``, that trying again may be worth it."""

    def __init__(self, many: Any, future: asyncio.Future[None]) -> None:
        self.many, self.future = many, future
        self.loop = future.get_loop()
        self.words: dict[int, int] = many.words()
        self.again: int = many.look_again()
        self.helper: _Helper | None = None

    def tell(self) -> None:
        try:
            self.loop.call_soon_threadsafe(_done, self.future)
        except RuntimeError:  # the loop was closed with the wait in it
            pass

    def close(self) -> None:
        with _lock:
            if self.helper is not None:
                self.helper.drop(self)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Helper:
    def __init__(self) -> None:
        self.listeners: set[Listener] = set()
        self.words: dict[int, int] = {}  # address: listeners on it
        self.control = _native.AlertWord()
        self.sleeps_until = 0
        self.thread = threading.Thread(target=self.run, name="portway-bells", daemon=True)

    def room_for(self, one: Listener) -> bool:
        return len(self.words.keys() | one.words.keys()) <= WORDS

    def add(self, one: Listener) -> None:
        self.listeners.add(one)
        one.helper = self
        for address in one.words:
            self.words[address] = self.words.get(address, 0) + 1
        self.control.set()

    def drop(self, one: Listener) -> None:
        if one in self.listeners:
            self.listeners.discard(one)
            for address in one.words:
                self.words[address] -= 1
                if not self.words[address]:
                    del self.words[address]
        one.helper = None

    def run(self) -> None:
        while True:
            with _lock:
                if not self.listeners:
                    _helpers.remove(self)
                    return
                now, kept = _native.monotonic_ns(), list(self.listeners)  # keeps their pages mapped
                words = list({pair: None for one in kept for pair in one.words.items()})
                until = min(one.again for one in kept)
            # two listeners may have read one bell at different times: then one of them has rung already
            if len(words) <= WORDS and until > now:
                _native.sleep_on_bells(words, self.control, until)
            self.tell(kept, set(_native.changed(words)))

    def tell(self, kept: list[Listener], rung: set[tuple[int, int]]) -> None:
        now = _native.monotonic_ns()
        for one in kept:
            if rung and not rung.isdisjoint(one.words.items()):
                worth = True
            elif one.again <= now:
                worth, one.again = one.many.worth_looking(), one.many.look_again()
            else:
                continue
            if worth:
                one.close()
                one.tell()


_lock = threading.Lock()
_helpers: list[_Helper] = []


def listen(one: Listener) -> None:
    """Until it is told or closed."""
    with _lock:
        for helper in _helpers:
            if helper.room_for(one):
                helper.add(one)
                return
        helper = _Helper()
        _helpers.append(helper)
        helper.add(one)
        helper.thread.start()


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _helpers.clear()


os.register_at_fork(after_in_child=_in_child)
