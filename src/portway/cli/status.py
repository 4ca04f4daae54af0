"""``portway status``."""

from __future__ import annotations

from typing import Any

import click

from .common import JSON, age, print_json, timeout

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
@timeout(10.0)
@JSON
def command(name: str | None, timeout: float | None, as_json: bool) -> int:
    """What runs: of one service everything, without NAME one line for each service of this user."""
    from ..supervise.client import Control, services

    if name is None:
        found = services(timeout=timeout)
        if as_json:
            print_json(found)
        else:
            _table(found)
        return 0
    report = Control(name).status(timeout=timeout, connections=True)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 0


def _table(found: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "PID", "GENERATION", "WORKERS", "CONNECTIONS", "SOCKETS")]
    for one in found:
        if one["state"] != "running":
            rows.append((one["name"], one["state"], "-", "-", str(len(one.get("pids", ()))), "-", "-"))
            continue
        serving = [g for g in one["generations"] if g["number"] == one["serving"]]
        workers = sum(1 for g in one["generations"] for w in g["workers"] if w["pid"])
        rows.append((
            one["name"], "stopping" if one["stopping"] else "running", str(one["pid"]),
            str(serving[0]["number"]) if serving else "-", str(workers),
            str(sum(g["connections"] for g in one["generations"])),
            " ".join(s["address"] for s in one["sockets"]) or "-",
        ))  # fmt: skip
    _columns(rows)


def _columns(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(report: dict[str, Any]) -> None:
    state = "stopping" if report["stopping"] else "running"
    who = f"supervisor pid {report['pid']}, portway {report['version']}"
    print(f"{report['name']}: {state}, {who}, {report['reloads']} reloads")
    if report["obstacle"]:
        print(f"  if the supervisor is killed, its sockets cannot be taken over: {report['obstacle']}")
    for one in report["sockets"]:
        shared = "" if one["kind"] in ("tcp", "unix") else "  shared by all generations"
        print(f"  socket {one['name']}: {one['address']}{shared}")
    for one in report["generations"]:
        print(f"  generation {one['number']}: {one['phase']}, {age(report['clock'] - one['began'])} old, "
              f"{one['connections']} connections, {' '.join(one['options']['command'])}")  # fmt: skip
        for worker in one["workers"]:
            _show_worker(worker, report["clock"])


def _show_worker(worker: dict[str, Any], clock: float) -> None:
    marks = [mark for mark in ("hook", "orphan", "drained") if worker[mark]]
    text = f"  {worker['text']}" if worker["text"] else ""
    alive = f"pid {worker['pid']}, {age(clock - worker['since'])} old" if worker["pid"] else "not running"
    extra = f" ({', '.join(marks)})" if marks else ""
    print(f"    worker {worker['index']}: {alive}, {worker['restarts']} restarts{extra}{text}")
