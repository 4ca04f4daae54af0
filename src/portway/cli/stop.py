"""``portway stop``."""

from __future__ import annotations

import click

from .common import JSON, NAME, print_json, remark, timeout

__all__ = ["command"]


@click.command()
@NAME
@click.option("--now", is_flag=True, help="Kill the workers instead of letting them finish.")
@timeout()
@JSON
def command(name: str, now: bool, timeout: float | None, as_json: bool) -> int:
    """Drain a service and end it. Returns once it has ended."""
    from ..supervise.client import Control

    result = Control(name).stop(now=now, timeout=timeout, on_event=remark)
    if as_json:
        print_json(result)
    return 0
