"""What every benchmark shares: options, the figures and how they are printed, pinning, a process for each end.

A figure is (work, contender, metric); each round adds one value to it. A printed line is its median, min, max and n.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["Failed", "Figures", "Options", "Worker", "pin_to_one_core", "remark", "rounds_of", "workers"]

FORK = multiprocessing.get_context("fork")


class Failed(Exception):
    """A contender cannot run here, or did not do what it should. It is left out, and the remark says why."""


@dataclass
class Options:
    """The command line, as every benchmark sees it. None: the benchmark's own choice."""

    rounds: int | None = None
    only: frozenset[str] = frozenset()
    works: frozenset[str] = frozenset()
    quick: bool = False
    rate: float | None = None
    seconds: float | None = None
    reloads: int | None = None
    split: int = 0
    http: str = "auto"
    workers: int = 1

    def wants(self, contender: str) -> bool:
        return not self.only or contender in self.only

    def wants_work(self, work: str) -> bool:
        return not self.works or work in self.works


@dataclass
class Figures:
    """Values by (work, contender, metric), in the order in which they first came."""

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    notes: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, work: str, contender: str, metric: str, value: float, **notes: Any) -> None:
        """One round's value. Notes become further keys of the line; counts in a dict add up over the rounds."""
        key = (work, contender, metric)
        self.values.setdefault(key, []).append(value)
        kept = self.notes.setdefault(key, {})
        for name, note in notes.items():
            if isinstance(note, dict):
                note = dict(Counter(kept.get(name, {})) + Counter(note))
            kept[name] = note

    def lines(self) -> Iterator[dict[str, Any]]:
        for key, values in self.values.items():
            work, contender, metric = key
            yield {
                "work": work, "contender": contender, "metric": metric, "median": _short(statistics.median(values)),
                "min": _short(min(values)), "max": _short(max(values)), "n": len(values), **self.notes.get(key, {}),
            }  # fmt: skip

    def print(self, as_json: bool) -> None:
        if as_json:
            for line in self.lines():
                print(json.dumps(line))
            return
        if not self.values:
            return
        head = ("work", "contender", "metric", "median", "min", "max", "n")
        rows = [[f"{line[key]:,}" if key in head[3:] else line[key] for key in head] for line in self.lines()]
        widths = [max(len(row[at]) for row in [list(head), *rows]) for at in range(len(head))]
        for row in [list(head), *rows]:
            cells = [cell.rjust(width) if at > 2 else cell.ljust(width) for at, (cell, width) in
                     enumerate(zip(row, widths, strict=True))]  # fmt: skip
            print("  ".join(cells).rstrip())


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 3)


def remark(text: str) -> None:
    """Progress and whatever else is not a figure: standard error."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


def pin_to_one_core() -> int:
    """Binds this process and all it starts to the last core it may use; that core's number."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def rounds_of(options: Options, usual: int) -> int:
    return options.rounds or (1 if options.quick else usual)


class Worker:
    """A process that runs ``serve(commands, *args)``: each command it is given is answered with one value.

    ``serve(*args)`` is called in the process, at the first command, and returns the function that answers commands.
    An exception there comes back as `Failed`. Close the last one started first: later ones have inherited its line.
    """

    def __init__(self, name: str, serve: Callable[..., Callable[..., Any]], *args: Any) -> None:
        self.name = name
        self._line, theirs = FORK.Pipe()
        self._process: BaseProcess = FORK.Process(
            target=_serve, args=(theirs, self._line, serve, args), name=name, daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def order(self, *command: Any) -> None:
        try:
            self._line.send(command)
        except OSError as error:
            raise Failed(f"{self.name}: {error}") from None

    def answer(self, timeout: float = 60) -> Any:
        try:
            if not self._line.poll(timeout):
                raise Failed(f"{self.name}: no answer in {timeout:g} s")
            good, value = self._line.recv()
        except (EOFError, OSError):
            raise Failed(f"{self.name}: its process ended") from None
        if not good:
            raise Failed(f"{self.name}: {value}")
        return value

    def ask(self, *command: Any, timeout: float = 60) -> Any:
        self.order(*command)
        return self.answer(timeout)

    def close(self) -> None:
        """Ends the process; killed when it does not end by itself."""
        self._line.close()
        self._process.join(3)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(
    line: Connection, other_end: Connection, serve: Callable[..., Callable[..., Any]], args: tuple[Any, ...]
) -> None:
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    do: Callable[..., Any] | None = None
    while True:
        try:
            command = line.recv()
        except (EOFError, OSError):
            return
        try:
            do = do or serve(*args)
            line.send((True, do(*command)))
        except Exception as error:
            line.send((False, f"{type(error).__name__}: {error}"))


@contextmanager
def workers(made: Iterable[Callable[[], Worker]]) -> Iterator[list[Worker]]:
    """Starts them all and closes them all, whatever happens."""
    running: list[Worker] = []
    try:
        for make in made:
            running.append(make())  # noqa: PERF401  # those started so far are closed when one fails
        yield running
    finally:
        for worker in reversed(running):
            worker.close()
