"""``python -m benchmarks NAME [options]``: figures on standard output, remarks on standard error.

Exit codes: 0 figures for every contender that was asked for by name, 1 one of those could not run, 2 usage, 130
interrupted (SIGINT, SIGTERM: what was started is ended first).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from . import harness, machine

NAMES = {
    "handoff": "duplicating sockets into another process",
    "pipes": "named pipes: messages, .NET as a peer, and what kill -9 leaves",
    "reload": "requests lost while the service behind the socket is replaced",
    "startup": "import portway, portway --help",
    "sync": "named mutexes and events, and what kill -9 leaves",
}


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:10}{what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--rounds", type=_positive(int), help="rounds over all contenders (default: the benchmark's)")
    parser.add_argument("--only", action="append", default=[], metavar="CONTENDER", help="only this one; repeatable")
    parser.add_argument("--work", action="append", default=[], metavar="WORK", help="only this work; repeatable")
    parser.add_argument("--pin", action="store_true", help="handoff, startup: all processes on one core")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Not for figures")
    parser.add_argument("--versions", action="store_true", help="print the versions of all that takes part, and end")
    parser.add_argument("--machine", action="store_true", help="print a description of the machine, and end")
    group = parser.add_argument_group("reload")
    group.add_argument("--rate", type=_positive(float), help="requests a second (default 2000; slow: 100)")
    group.add_argument("--seconds", type=_positive(float), help="load for at least so long (default 27; slow: 22)")
    group.add_argument("--reloads", type=_positive(int), help="reloads in one run (default 12)")
    group.add_argument("--split", type=int, default=0, choices=range(101), metavar="PERCENT",
                       help="of the kept requests send their head in two writes, 5 ms apart (default 0)")  # fmt: skip
    group.add_argument("--http", default="auto", choices=["auto", "h11", "httptools"], help="uvicorn's HTTP parser")
    group.add_argument("--workers", type=_positive(int), default=1, help="worker processes of each server (default 1)")
    return parser


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
        return value

    number.__name__ = "number"  # argparse names it in "invalid number value"
    return number


def main() -> int:
    parser = _parser()
    asked = parser.parse_args()
    if asked.versions or asked.machine:
        print(machine.describe() if asked.machine else "\n".join(" ".join(pair) for pair in machine.versions().items()))
        return 0
    if asked.name is None:
        parser.error(f"give one of {', '.join(NAMES)}")
    benchmark = import_module(f".{asked.name}", __package__)
    for given, known, option in ((asked.only, benchmark.CONTENDERS, "--only"), (asked.work, benchmark.WORKS, "--work")):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{option} {unknown[0]}: {asked.name} has {', '.join(known)}")
    options = harness.Options(
        rounds=asked.rounds, only=frozenset(asked.only), works=frozenset(asked.work), quick=asked.quick,
        rate=asked.rate, seconds=asked.seconds, reloads=asked.reloads, split=asked.split, http=asked.http,
        workers=asked.workers,
    )  # fmt: skip
    return _run(benchmark, options, pin=asked.pin, as_json=asked.json)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # so that every server and process is ended on the way out


def _run(benchmark: ModuleType, options: harness.Options, *, pin: bool, as_json: bool) -> int:
    if pin and benchmark.PINNABLE:
        harness.remark(f"all processes on core {harness.pin_to_one_core()}")
    elif pin:
        harness.remark("--pin is ignored: servers, clients and supervisor on one core would measure the scheduler")
    figures = harness.Figures()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        benchmark.run(options, figures)
    except KeyboardInterrupt:
        harness.remark("interrupted; the figures so far:")
        figures.print(as_json)
        return 130
    figures.print(as_json)
    seen = {contender for _, contender, _ in figures.values}
    return 1 if options.only - seen or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
