"""``portway reload``."""

from __future__ import annotations

import click

from .common import JSON, print_json, remark, timeout

__all__ = ["command"]


@click.command()
@click.argument("name")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@timeout()
@JSON
def command(name: str, words: tuple[str, ...], timeout: float | None, as_json: bool) -> int:
    """Start the next generation of a service and wait until it serves.

    The options are read again from portway.toml, if they came from there. With a command after -- that is the service
    from now on. When the new generation does not become ready, the old one goes on serving: exit code 4, with the
    failed generation's last lines.
    """
    from ..supervise.client import Control

    result = Control(name).reload(list(words) or None, timeout=timeout, on_event=remark)
    if as_json:
        print_json(result)
    return 0
