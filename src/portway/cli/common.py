"""What the commands share: exit codes, errors, times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from ..supervise.exits import exit_code, report

__all__ = ["JSON", "NAME", "exit_code", "print_json", "remark", "report", "timeout"]


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def remark(text: str) -> None:
    print(f"portway: {text}", file=sys.stderr, flush=True)


def age(seconds: float) -> str:
    """Two units at most: 3d 4h, 5m 6s."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    shown = [f"{count}{unit}" for count, unit in parts if count]
    return " ".join(shown[:2]) or "0s"


class Seconds(click.ParamType[float | None]):
    name = "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        from ..supervise.config import seconds

        try:
            return seconds(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


NAME = click.argument("name")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def timeout(default: float | None = None) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """``--timeout``: how long the command waits; what it asked for goes on after that. Exit code 5."""
    shown = "no limit" if default is None else f"{default:g}"
    return click.option("--timeout", type=Seconds(), default=default, help=f"Seconds to wait [{shown}].")
