"""``reload``: what clients lose while the code behind the socket is replaced, several times, under load.

reload.new   half of 2,000 requests/s, each on a new connection    failed, p99_ms, worst_ms, requests
reload.kept  the other half, on 64 kept connections                the same
reload.slow  100 requests/s, half and half, to a handler of 0.5 s  the same
reload.tcp   lines on kept TCP connections, with state             failed, bytes_lost, ...

load/http.c and load/lines.c say what counts as failed; docs/performance.md repeats it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from .harness import Failed, Figures, Options, remark, rounds_of
from .load import Load, build
from .servers import SERVERS, LineServer, Server

__all__ = ["CONTENDERS", "PINNABLE", "WORKS", "run"]

CONTENDERS = (*SERVERS, LineServer.name)
WORKS = ("reload.new", "reload.kept", "reload.slow", "reload.tcp")
PINNABLE = False
TAIL_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """One run: requests (tcp: writes) a second, for at least so many seconds, with so many reloads spread over them."""

    rate: float
    seconds: float
    reloads: int
    timeout: float
    generator: dict[str, object]


def _plan(kind: str, options: Options) -> Plan:
    rates, times = {"fast": 2000.0, "slow": 100.0, "tcp": 2000.0}, {"fast": 27.0, "slow": 22.0, "tcp": 22.0}
    generator: dict[str, dict[str, object]] = {
        "fast": {"mode": "http", "path": "/fast", "split": options.split},
        "slow": {"mode": "http", "path": "/slow", "split": options.split},
        "tcp": {"mode": "lines"},
    }
    rate, seconds, reloads = options.rate or rates[kind], options.seconds or times[kind], options.reloads or 12
    if options.quick:
        rate, seconds, reloads = options.rate or rates[kind] / 10, options.seconds or 1.0, options.reloads or 1
    return Plan(rate, seconds, reloads, 30.0 if kind == "slow" else 10.0, generator[kind])


def _reload_under_load(server: Server, plan: Plan, seed: int) -> dict[str, Any]:
    """The generator's report, with ``reloads`` (done) and ``reload_s`` (median) added."""
    took: list[float] = []
    options = dict(plan.generator, rate=plan.rate, seconds=plan.seconds, timeout=plan.timeout, seed=seed)
    with Load(server.port, **options) as load:
        began = time.monotonic()
        for number in range(1, plan.reloads + 1):
            due = began + plan.seconds * number / (plan.reloads + 1)
            time.sleep(max(0.1, due - time.monotonic()))
            start = time.monotonic()
            try:
                server.reload()
            except Failed as error:
                remark(f"{server.name}: reload {number} failed: {error}")
                continue
            took.append(time.monotonic() - start)
        time.sleep(TAIL_SECONDS)
        report = load.end(plan.seconds + plan.timeout + 30)
    return report | {"reloads": len(took), "reload_s": statistics.median(took) if took else 0.0}


def _note(figures: Figures, work: str, contender: str, report: dict[str, Any], part: str, *more: str) -> None:
    """Adds one class of a report. The metrics that were promised come first."""
    stats = report[part]
    figures.add(work, contender, "failed", stats["failed"], causes=stats["causes"])
    for metric in (*more, "p99_ms", "worst_ms", "requests", "p50_ms"):
        figures.add(work, contender, metric, stats[metric])
    for metric in ("late_ms", "reloads", "reload_s"):
        figures.add(work, contender, metric, report[metric])


def _note_connections(figures: Figures, work: str, contender: str, stats: dict[str, Any]) -> None:
    for metric in ("opened", "reopened", "polite", "queued_ms"):
        figures.add(work, contender, metric, stats[metric])


def _fast(figures: Figures, options: Options, contender: str, report: dict[str, Any]) -> None:
    if options.wants_work("reload.new"):
        _note(figures, "reload.new", contender, report, "new")
    if options.wants_work("reload.kept"):
        _note(figures, "reload.kept", contender, report, "kept")
        _note_connections(figures, "reload.kept", contender, report["kept"])


def _slow(figures: Figures, options: Options, contender: str, report: dict[str, Any]) -> None:
    _note(figures, "reload.slow", contender, report, "all")
    for part in ("new", "kept"):
        figures.add("reload.slow", contender, f"failed_{part}", report[part]["failed"])
    _note_connections(figures, "reload.slow", contender, report["kept"])


def _tcp(figures: Figures, options: Options, contender: str, report: dict[str, Any]) -> None:
    _note(figures, "reload.tcp", contender, report, "lines", "bytes_lost", "bytes")


def _runs(options: Options) -> list[tuple[str, type[Server]]]:
    """(kind, server) of one round, in the order of the works."""
    runs: list[tuple[str, type[Server]]] = []
    if options.wants_work("reload.new") or options.wants_work("reload.kept"):
        runs += [("fast", server) for name, server in SERVERS.items() if options.wants(name)]
    if options.wants_work("reload.slow"):
        runs += [("slow", server) for name, server in SERVERS.items() if options.wants(name)]
    if options.wants_work("reload.tcp") and options.wants(LineServer.name):
        runs.append(("tcp", LineServer))
    return runs


def run(options: Options, figures: Figures) -> None:
    build()
    rounds, runs = rounds_of(options, 3), _runs(options)
    for number in range(rounds):
        for kind, server in list(runs):
            remark(f"reload: round {number + 1} of {rounds}, {kind}, {server.name}")
            try:
                report = _one(server, options, _plan(kind, options), number + 1)
            except Failed as error:
                remark(f"{server.name} is left out of {kind}: {error}")
                runs.remove((kind, server))
                continue
            {"fast": _fast, "slow": _slow, "tcp": _tcp}[kind](figures, options, server.name, report)


def _one(kind: type[Server], options: Options, plan: Plan, seed: int) -> dict[str, Any]:
    with kind(options) as server:
        report = _reload_under_load(server, plan, seed)
        for failure in report["failures"][:5]:
            remark(f"{server.name}: at {failure['at_s']:.2f} s: {failure['class']}, {failure['cause']}, "
                   f"connection {failure['age_s']:.2f} s old")  # fmt: skip
        return report
