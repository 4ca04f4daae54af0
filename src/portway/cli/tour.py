"""`portway tour`: the main jobs, shown with real processes, a live table and a summary. Under a minute."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from ..errors import MissingExtra

if TYPE_CHECKING:
    from rich.table import Table

    from ..tour.service import Service

__all__ = ["command"]


@click.command("tour")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the summary last.")
def command(as_json: bool) -> None:
    """Shows what portway is for: reloads under load, a connection that moves, memory under a mutex, named pipes.

    Starts real processes on 127.0.0.1 in a folder of its own and ends them. Exit code 1 if anything was lost.
    """
    from importlib.util import find_spec

    if find_spec("uvicorn") is None:
        raise MissingExtra("the tour needs uvicorn", hint='pip install "portway[asgi]"')
    summary = _machine_readable() if as_json else _for_people()
    sys.exit(0 if all(part["ok"] for part in summary.values()) else 1)


def _machine_readable() -> dict[str, Any]:
    from ..tour.moving import move_connection
    from ..tour.service import show_reloads
    from ..tour.sharing import share_memory
    from ..tour.talking import talk

    def say(event: str, facts: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)

    summary = {
        "reload": show_reloads(say), "move": move_connection(say), "share": share_memory(say), "talk": talk(say)
    }  # fmt: skip
    print(json.dumps({"event": "summary", **summary}), flush=True)
    return summary


def _for_people() -> dict[str, Any]:
    from rich.console import Console
    from rich.live import Live

    from ..tour.moving import move_connection
    from ..tour.service import show_reloads
    from ..tour.sharing import share_memory
    from ..tour.talking import talk

    console = Console()

    def say(event: str, facts: dict[str, Any]) -> None:
        console.print(f"[bold]{event:10}[/] " + ", ".join(f"{key} {value}" for key, value in facts.items()))

    console.rule("1. A uvicorn app is reloaded under load")
    done = threading.Event()
    with Live(console=console, refresh_per_second=5, transient=not console.is_terminal) as live:

        def follow(service: Service) -> None:
            def repeat() -> None:
                while not done.wait(0.2):
                    live.update(_clients(service.latest))

            threading.Thread(target=repeat, daemon=True).start()

        try:
            reload = show_reloads(say, follow)
        finally:
            done.set()
    console.rule("2. A live connection moves between two unrelated processes")
    move = move_connection(say)
    console.rule("3. Two processes share memory under a mutex; one is killed while it holds it")
    share = share_memory(say)
    console.rule("4. A named pipe: two clients, and .NET by nothing but the name")
    talked = talk(say)
    if talked["dotnet"] is None:
        console.print("[dim]no .NET program here (PORTWAY_NETPEER): left out[/]")
    console.rule("Summary")
    console.print(_summary(reload, move, share, talked))
    return {"reload": reload, "move": move, "share": share, "talk": talked}


def _clients(latest: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("clients", "asked", "answered", "failed", "p99 ms", "now served by", box=None)
    for name in ("new", "kept"):
        one = latest.get(name)
        if one:
            versions = list(one["versions"])
            table.add_row(
                f"{name} connections", str(one["asked"]), str(one["answered"]), str(one["failed"]), str(one["p99_ms"]),
                versions[-1] if versions else "",
            )  # fmt: skip
    return table


def _summary(reload: dict[str, Any], move: dict[str, Any], share: dict[str, Any], talked: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("what", "figure", show_header=False, box=None)
    table.add_row("requests during the reloads", str(reload["requests"]))
    table.add_row("failed on new connections", str(reload["failed_new"]))
    table.add_row("failed on kept connections", str(reload["failed_kept"]))
    table.add_row("p99, worst", f"{reload['p99_ms']} ms, {reload['worst_ms']} ms")
    table.add_row("reloads that took over", str(reload["reloads"]))
    refused = reload["broken_version_refused"]
    table.add_row("broken version", "refused, the old one served on" if refused else "TOOK OVER")
    table.add_row("moves of one live connection", f"{move['moves']}, median {move['median_us']} us")
    table.add_row("its unread bytes and state", "kept" if move["unread_and_state_kept"] else "LOST")
    table.add_row("writes under the mutex", f"{share['writes']}, the numbers add up: {share['numbers']}")
    table.add_row("owner killed with -9", f"the next one told after {share['told_after_us']} us, and went on")
    table.add_row("calls through a named pipe", f"{talked['calls']} of two clients, median {talked['median_us']} us")
    if talked["dotnet"] is not None:
        table.add_row(".NET by the pipe's name", "as client and as server" if talked["dotnet"]["ok"] else "WRONG")
    well = reload["ok"] and move["ok"] and share["ok"] and talked["ok"]
    table.add_row("result", "[green]nothing was lost[/]" if well else "[red]something was lost[/]")
    if reload["first_error"]:
        table.add_row("first error of a client", reload["first_error"])
    return table
