"""What `portway map`, `sync` and `pipe` share: listing, grants, and holding an object open while something runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import CommandNotFound, PortwayError

if TYPE_CHECKING:
    from ..kernel.namespace import Entry
    from ..kernel.security import Security

__all__ = ["Holding", "LINES", "Size", "entries", "facts", "grants", "hold", "is_terminal", "say", "security", "show"]

F = TypeVar("F", bound=Callable[..., Any])
LINES = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Holding(click.Command):
    """A command that may end in ``-- CMD ...``, which it gets as `cmd`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:at])
        ctx.params["cmd"] = tuple(args[at + 1 :])
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- CMD ...]"]


class Size(click.ParamType[int]):
    """Bytes: 4096, 64K, 1M, 2G, 0x1000."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() and value[:2] != "0x" else (value, "")
        try:
            return int(number, 0) * _UNITS[unit]
        except (ValueError, KeyError):
            self.fail(f"{value!r}: give bytes, as 4096, 64K, 1M, 2G or 0x1000", param, ctx)


def grants(command: F) -> F:
    """--everyone, --uid, --group; read them with `security`."""
    for option in (
        click.option("--group", "groups", multiple=True, help="Members of this group may use it; again for more."),
        click.option("--uid", "uids", multiple=True, help="This user may use it, by name or number; again for more."),
        click.option("--everyone", is_flag=True, help="Every user may use it (an object: under a Global\\ name)."),
    ):
        command = option(command)
    return command


def security(everyone: bool, uids: Iterable[str], groups: Iterable[str]) -> Security:
    from ..kernel.security import Security

    try:
        found = Security.everyone() if everyone else Security.owner()
        for uid in uids:
            found = found | Security.uids(uid)
        for group in groups:
            found = found | Security.group(group)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return found


def entries(mappings: bool) -> list[Entry]:
    """The live objects, mappings or the others, by name."""
    from ..kernel.namespace import Kind, Namespace

    found = [one for one in Namespace().list() if (one.kind is Kind.MAPPING) is mappings]
    return sorted(found, key=lambda one: (one.kind, one.name or ""))


def facts(entry: Entry) -> dict[str, Any]:
    from ..kernel.process import user_name

    return {
        "kind": str(entry.kind),
        "name": entry.name,
        "owner": user_name(entry.owner),
        "holders": [holder.pid for holder in entry.holders],
    }


def show(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool, what: str) -> None:
    """A line an object; with `as_json` all that is known of it."""
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    Console(soft_wrap=True).print(table)
    if not rows:
        click.echo(f"no {what}", err=True)


def _cell(value: Any) -> str:
    """What others wrote goes to the terminal without control characters."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))


def say(about: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(about) if as_json else "  ".join(f"{key} {_cell(value)}" for key, value in about.items()))
    sys.stdout.flush()


def hold(cmd: tuple[str, ...], seconds: float | None) -> int:
    """Runs `cmd` and gives its exit code; without one, returns after `seconds` or on Ctrl-C, SIGTERM or SIGHUP."""
    if cmd:
        return _run(cmd)
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        if seconds is None:
            click.echo("held until Ctrl-C", err=True)
            signal.sigwait(ends)
        else:
            signal.sigtimedwait(ends, seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    return 0


def _run(cmd: tuple[str, ...]) -> int:
    try:
        process = subprocess.Popen(cmd)
    except OSError as error:
        raise _not_run(cmd[0], error) from None
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue  # it got the Ctrl-C too, and decides
    finally:
        signal.signal(signal.SIGTERM, before)


def _not_run(word: str, error: OSError) -> PortwayError:
    found = CommandNotFound(f"{word!r}: {error.strerror}")
    found.errno = error.errno
    return found


def is_terminal() -> bool:
    return os.isatty(sys.stdout.fileno())
