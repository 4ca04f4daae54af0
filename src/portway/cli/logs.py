"""``portway logs``."""

from __future__ import annotations

import os
import sys
import time

import click

from ..errors import NotRunning
from .common import JSON, NAME, print_json, remark

__all__ = ["command"]


@click.command()
@NAME
@click.option("--lines", "-n", type=click.IntRange(0, 1_000_000), default=100, show_default=True,
              help="Of each worker.")  # fmt: skip
@click.option("--follow", "-f", is_flag=True, help="Go on as more is printed, until interrupted.")
@click.option("--generation", "-g", type=int, help="Of this generation only.")
@JSON
def command(name: str, lines: int, follow: bool, generation: int | None, as_json: bool) -> int:
    """What a service printed: the last MiB of each worker, of the generations that live and the three before.

    Works without the supervisor too, while the service's folder is there.
    """
    from ..supervise.config import check_name
    from ..supervise.output import chunks, files
    from ..supervise.paths import service_dir

    folder = service_dir(check_name(name), create=False)
    if not os.path.isdir(folder):
        raise NotRunning(f"{name} is not running", hint="see `portway status`")
    seen: dict[str, int] = {}
    pending: dict[str, bytes] = {}
    first = True
    while True:
        found = [one for one in files(folder) if generation in (None, one[0])]
        if first and not found:
            remark(f"{name}: nothing was printed, or it runs with --output inherit")
        for number, worker, path in found:
            data, seen[path] = chunks(path, seen.get(path, -1 if first else 0))
            data = pending.pop(path, b"") + data
            if follow:
                data, _, rest = data.rpartition(b"\n")
                pending[path] = rest
            shown = data.decode(errors="replace").splitlines()
            _print(number, worker, shown[-lines:] if first and lines else [] if first else shown, as_json)
        first = False
        if not follow:
            return 0
        time.sleep(0.1)


def _print(generation: int, worker: int, lines: list[str], as_json: bool) -> None:
    for line in lines:
        if as_json:
            print_json({"generation": generation, "worker": worker, "line": line})
        else:
            print(f"[{generation}.{worker}] {line}")
    if lines:
        sys.stdout.flush()
