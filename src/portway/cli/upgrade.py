"""``portway upgrade``."""

from __future__ import annotations

import click

from .common import JSON, NAME, print_json, remark, timeout

__all__ = ["command"]


@click.command()
@NAME
@click.option("--python", metavar="PATH", help="The interpreter whose portway takes over [the one it runs on].")
@timeout(60.0)
@JSON
def command(name: str, python: str | None, timeout: float | None, as_json: bool) -> int:
    """Replace a supervisor by the portway installed now, in place: same process, same sockets, same workers.

    A trial process of the new code must be able to read the state first; if it cannot, nothing changes (exit code 1).
    New code of the service itself is `portway reload`.
    """
    from ..supervise.client import Control

    result = Control(name).upgrade(python, timeout=timeout, on_event=remark)
    if as_json:
        print_json(result)
    else:
        remark(f"{name}: portway {result['version']} on {result['python']} supervises (pid {result['pid']})")
    return 0
